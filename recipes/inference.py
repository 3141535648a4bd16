"""Inference time of a fake-quantized ResNet-18 against the float one: python recipes/inference.py"""

from __future__ import annotations

import copy
import json as json_
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from jsonargparse import auto_cli
from measuring import console, quiet
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_ptq import calibrate


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of several runs, after one to warm up."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def failures(module: nn.Module, image: Tensor, threads: int, forwards: int) -> int:
    """How many of several concurrent forwards fail or differ from a forward alone."""
    expected = module(image)

    def run(_: int) -> bool:
        try:
            with torch.no_grad():
                return torch.equal(module(image), expected)
        except Exception:  # whatever it is, this forward has failed
            return False

    with ThreadPoolExecutor(threads) as pool:
        return sum(not good for good in pool.map(run, range(forwards)))


@torch.no_grad()
def main(
    qconfig: str = "w8a8", image_size: int = 224, repeats: int = 15, threads: int = 8, json: Path | None = None
) -> None:
    """Time single images and batches of 16, float and quantized in turn, and serve from several threads.

    Args:
        qconfig: Bit widths.
        image_size: Height and width of the images.
        repeats: Forwards of each kind; the median is shown.
        threads: For the concurrent forwards.
        json: A file for the figures.
    """
    quiet()
    torch.manual_seed(0)
    network = resnet18().eval()
    quantized = copy.deepcopy(network)
    calibrate(quantized, [torch.randn(8, 3, image_size, image_size)], qconfig).release()
    table = Table("images", "float, ms", "quantized, ms", "ratio", title=f"ResNet-18, {qconfig}, eval mode, no_grad")
    found: dict[str, object] = {}
    for size in (1, 16):
        images = torch.randn(size, 3, image_size, image_size)
        pairs = [(seconds(lambda: network(images), 1), seconds(lambda: quantized(images), 1)) for _ in range(repeats)]
        plain, fake = (median(pair[i][0] for pair in pairs) for i in (0, 1))
        ratio = median(pair[1][0] / pair[0][0] for pair in pairs)
        table.add_row(str(size), f"{plain * 1e3:.1f}", f"{fake * 1e3:.1f}", f"{ratio:.2f}")
        found[str(size)] = {"float": plain, "quantized": fake, "ratio": ratio}
    console.print(table)
    image = torch.randn(1, 3, 64, 64)
    found["failures"] = failures(quantized, image, threads, 240)
    console.print(f"{found['failures']} of 240 concurrent forwards in {threads} threads failed or differed")
    if json:
        json.write_text(json_.dumps(found, indent=1))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
