"""Time to solve the integer program to proven optimality: python recipes/solver.py"""

from __future__ import annotations

import time

import numpy as np
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from lightning_ptq import Cost, allocate_bits

WIDTHS = [(8, 8), (6, 8), (5, 8), (4, 8), (4, 4), (3, 8), (3, 4), (2, 8), (2, 4)]


def problem(layers: int, seed: int) -> tuple[dict[str, dict[str, float]], list[Cost]]:
    """Return sensitivities and costs similar to those of real networks.

    Sizes span four decades and every bit less makes the rise four times larger. Noise on every entry prevents that
    sorting the layers solves the problem.
    """
    random = np.random.default_rng(seed)
    rises, sizes, bops = {}, {}, {}
    for i in range(layers):
        weights, positions, scale = random.lognormal(9, 1.5), random.lognormal(4, 1), random.lognormal(-6, 1.5)
        names = [f"w{w}a{a}" for w, a in WIDTHS]
        noise = random.lognormal(0, 0.3, len(WIDTHS))
        values = [n * scale * (4.0 ** -(w - 2) + 4.0 ** -(a - 2)) for n, (w, a) in zip(noise, WIDTHS, strict=True)]
        rises[f"layer{i}"] = dict(zip(names, values, strict=True))
        sizes[f"layer{i}"] = {n: weights * w / 8 for n, (w, _) in zip(names, WIDTHS, strict=True)}
        bops[f"layer{i}"] = {n: weights * positions * w * a for n, (w, a) in zip(names, WIDTHS, strict=True)}
    return rises, [Cost(name, table) for name, table in (("size", sizes), ("bops", bops))]


def main(
    layers: list[int] = [500, 5000],  # noqa: B006  # jsonargparse copies it
    budget: float = 0.55,
    seeds: int = 3,
    time_limit: float = 120,
) -> None:
    """Solve random problems of nine candidates under a size and a bit-operations budget.

    Args:
        layers: Numbers of layers.
        budget: Both budgets, as a fraction of the cost of the widest choice.
        seeds: Number of problems for each number of layers.
        time_limit: Time limit for each problem, in seconds.
    """
    results = Table("layers", "seed", "seconds", "proven", "gap", "rise")
    for count in layers:
        for seed in range(seeds):
            rises, costs = problem(count, seed)
            limits = {c.name: budget * sum(max(row.values()) for row in c.values.values()) for c in costs}
            start = time.perf_counter()
            allocation = allocate_bits(rises, costs, limits, time_limit=time_limit)
            seconds = time.perf_counter() - start
            cells = (f"{seconds:.1f}", str(allocation.proven), f"{allocation.gap:.1e}", f"{allocation.rise:.6g}")
            results.add_row(str(count), str(seed), *cells)
    Console().print(results)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
