"""Sensitivities of all layers and candidates from one backward pass: a second-order estimate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Choice, Choices
from lightning_ptq.calibration.outputs import OutputReader
from lightning_ptq.errors import SensitivityError
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.runtime.progress import Progress


def fisher_rises(
    calibration: Calibration,
    choices: Choices,
    base: Choice,
    reader: OutputReader,
    seed: int = 0,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, dict[str, list[float]]]:
    """The rise of the KL divergence to second order, by layer, candidate and batch.

    A layer's output moves by ``δ`` when it goes to a candidate. Then ``KL ≈ ½ Σ_c p_c (δ · ∇ log p_c)²``, the quadratic
    form of the Fisher information (as in BRECQ, Li et al., 2021, eq. 10, but with the correlations within a sample).
    With random signs ``v``, the gradient ``g`` of ``Σ_c v_c √p_c log p_c``, the root held fixed, has
    ``E[(δ · g)²] = Σ_c p_c (δ · ∇ log p_c)²``; unlike for labels drawn from ``p``, rare classes bring no rare, large
    values. So a forward and a backward pass of the network, and for each candidate a forward of each layer alone, do
    for the whole table.

    Args:
        calibration: The calibrated module, all layers at their base, in eval mode.
        choices: The candidates.
        base: Each layer's base.
        reader: Where the logits are read; classes are the last dimension but for images (n, c, h, w), the second.
        seed: Of the signs.
        progress: Called with batches done, batches in all, and a text.

    Several ranks (``calibration.ranks``) share the batches.
    """
    ranks = calibration.ranks
    rises: dict[str, dict[str, list[float]]] = {n: {c: [] for c in own} for n, own in choices.of.items()}
    total = len(calibration.batches)
    for batch in filter(ranks.mine, range(total)):
        progress(batch, total, "backward pass")
        generator = torch.Generator(calibration.device).manual_seed(seed + batch)
        calls = _calls(calibration, reader, batch, generator)
        for name, layer in calibration.layers.items():
            for candidate in choices.of[name]:
                choices.put(name, candidate)
                rises[name][candidate].append(_rise(layer, calls[name]))
            choices.put(name, base[name])
    progress(total, total, "backward pass")
    everything = [_in_turn(of_rank) for of_rank in ranks.gather(rises)]
    for name, row in rises.items():
        for candidate in row:
            turns = [of_rank[name, candidate] for of_rank in everything]
            row[candidate] = [next(turns[batch % ranks.world]) for batch in range(total)]
    return rises


def _in_turn(rises: dict[str, dict[str, list[float]]]) -> dict[tuple[str, str], Iterator[float]]:
    return {(name, candidate): iter(values) for name, row in rises.items() for candidate, values in row.items()}


class _Call:
    """One call of a layer at its base: what went in, what came out, and the gradient at its output."""

    def __init__(self, args: Any, kwargs: Any, output: Tensor) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output
        self.gradient: Tensor | None = None


def _calls(
    calibration: Calibration, reader: OutputReader, batch: int, generator: torch.Generator
) -> dict[str, list[_Call]]:
    calls: dict[str, list[_Call]] = {name: [] for name in calibration.layers}
    tails: list[tuple[_Call, Tensor]] = []

    def watch(name: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            calls[name].append(_Call(args, kwargs, output.detach()))
            output = output if output.requires_grad else output.requires_grad_()
            tails.append((calls[name][-1], output))
            return output.clone()  # what follows may work in place

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in calibration.layers.items()]
    try:
        logits, _ = reader.read(lambda: calibration.run(batch, gradients=True))
    finally:
        for handle in handles:
            handle.remove()
    if logits.dim() < 2 or not logits.requires_grad:
        why = f"have shape {tuple(logits.shape)}, no classes among them" if logits.dim() < 2 else "carry no gradients"
        raise SensitivityError(f"measure='fisher' needs logits with gradients, the outputs {why}. Use 'kl' or 'mse'.")
    logs = logits.float().movedim(1, -1).log_softmax(-1) if logits.dim() > 3 else logits.float().log_softmax(-1)
    flat = logs.reshape(-1, logs.shape[-1])
    signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device) * 2 - 1
    projection = (flat * signs * (flat.detach() / 2).exp()).sum()
    gradients = torch.autograd.grad(projection, [t for _, t in tails], allow_unused=True)
    for (call, _), gradient in zip(tails, gradients, strict=True):
        call.gradient = gradient
    return calls


@torch.no_grad()
def _rise(layer: QuantLayer, calls: list[_Call]) -> float:
    """``½ mean (δ · g)²`` over the samples, calls of one forward summed."""
    total: Tensor | float = 0.0
    for call in calls:
        if call.gradient is not None:
            moved = layer(*call.args, **call.kwargs) - call.output
            total = total + (moved * call.gradient).flatten(1).sum(1)
    return 0.5 * float(torch.as_tensor(total).double().square().mean())
