"""Inference time of a fake-quantized ResNet-18 and of the float network: python recipes/inference.py"""

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


def seconds(run: Callable[[Tensor], object], images: Tensor) -> float:
    """Return the seconds of one run, after another one to warm up."""
    run(images)
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


def failures(module: nn.Module, image: Tensor, threads: int, forwards: int) -> int:
    """Return how many of several concurrent forwards fail, or differ from a single forward."""
    expected = module(image)

    def run(_: int) -> bool:
        try:
            with torch.no_grad():
                return torch.equal(module(image), expected)
        except Exception:  # any exception counts as a failure
            return False

    with ThreadPoolExecutor(threads) as pool:
        return sum(not good for good in pool.map(run, range(forwards)))


@torch.no_grad()
def main(
    qconfig: str = "w8a8", image_size: int = 224, repeats: int = 15, threads: int = 8, json: Path | None = None
) -> None:
    """Time single images and batches of 16, float and quantized in turn, and call the network from several threads.

    Args:
        qconfig: Bit widths.
        image_size: Height and width of the images.
        repeats: Forwards of each kind; the median is shown.
        threads: Threads that call the network at the same time.
        json: File for the measurements.
    """
    quiet()
    torch.manual_seed(0)
    network = resnet18().eval()
    quantized = copy.deepcopy(network)
    calibrate(quantized, [torch.randn(8, 3, image_size, image_size)], qconfig).release()
    table = Table("images", "float, ms", "quantized, ms", "ratio", title=f"ResNet-18, {qconfig}, eval mode, no_grad")
    record: dict[str, object] = {}
    for size in (1, 16):
        images = torch.randn(size, 3, image_size, image_size)
        # In turn, so that other load on the machine affects both equally; the ratio is taken within each pair.
        pairs = [(seconds(network, images), seconds(quantized, images)) for _ in range(repeats)]
        plain, fake = (median(times) for times in zip(*pairs, strict=True))
        ratio = median(fake_time / plain_time for plain_time, fake_time in pairs)
        table.add_row(str(size), f"{plain * 1e3:.1f}", f"{fake * 1e3:.1f}", f"{ratio:.2f}")
        record[str(size)] = {"float": plain, "quantized": fake, "ratio": ratio}
    console.print(table)
    image = torch.randn(1, 3, 64, 64)
    record["failures"] = failures(quantized, image, threads, 240)
    console.print(f"{record['failures']} of 240 concurrent forwards in {threads} threads failed or differed")
    if json:
        json.write_text(json_.dumps(record, indent=1))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
