"""Digests of fixed-seed runs, which show whether a change of the code changes any result: python recipes/digests.py

Run it before a change with --json BEFORE.json, and after the change with --against BEFORE.json on the same machine,
because results depend on the processor and the number of threads. The data are the quickstart's digits, so nothing is
downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import json as json_
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from measuring import Classifier, console, quiet, top1, trainer
from quickstart import SmallResNet, digits
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.callbacks import pipelines

CANDIDATES = ["w8a8", "w4a4", "w2a4"]


def runs(seed: int, steps: int) -> dict[str, list[Any]]:
    """Return the callbacks of each run: AdaQuant at two settings, and both pipelines of the paper."""
    quick: dict[str, Any] = {"steps": steps}
    return {
        "w4a4": [CalibrationCapture("w4a4"), AdaQuantLayerwise(steps=steps, seed=seed)],
        "w2a4": [CalibrationCapture("w2a4"), AdaQuantLayerwise(steps=steps, seed=seed)],
        "light": pipelines.light(0.2, candidates=CANDIDATES, statistics=quick, seed=seed),
        "advanced": pipelines.advanced(
            0.2, candidates=CANDIDATES, parallel=quick, sequential=quick, statistics=quick, seed=seed
        ),
    }


def digest(module: nn.Module) -> str:
    """Return a checksum of all tensors of the state dict."""
    checksum = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if not key.endswith("_json"):  # the settings of a layer as text, whose wording does not change a result
            checksum.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            checksum.update(value.cpu().contiguous().numpy().tobytes())
    return checksum.hexdigest()[:16]


def main(
    json: Path | None = None, against: Path | None = None, seed: int = 0, steps: int = 60, calibration: int = 512
) -> None:
    """Train the quickstart's network, quantize it in four ways, and print digest and accuracy of each result.

    Args:
        json: File to write the digests to.
        against: File that an earlier run wrote with --json. If a digest differs, the recipe exits with an error.
        seed: Seed of all random choices.
        steps: Optimization steps of every stage.
        calibration: Number of calibration images.
    """
    quiet()
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    train, test_set = digits(seed)
    test = DataLoader(test_set, batch_size=250)
    module = Classifier(SmallResNet(), classes=10, lr=0.05, epochs=4)
    trainer(max_epochs=4).fit(module, DataLoader(train, batch_size=64, shuffle=True))
    results = {"float": [digest(module.net), top1(module, test)]}
    images = DataLoader(TensorDataset(*train[:calibration]), batch_size=64)
    for name, callbacks in runs(seed, steps).items():
        quantized = copy.deepcopy(module)
        trainer(callbacks).fit(quantized, images)
        results[name] = [digest(quantized.net), top1(quantized, test)]
    known = json_.loads(against.read_text()) if against else {}
    table = Table("run", "digest", "top-1 %", "before", "top-1 % before", title="Digests of the state dicts")
    for name, (checksum, accuracy) in results.items():
        before, earlier = known.get(name, ["", None])
        table.add_row(name, checksum, f"{accuracy:.2f}", before, "" if earlier is None else f"{earlier:.2f}")
    console.print(table)
    if json:
        json.write_text(json_.dumps(results, indent=1))
    if changed := [name for name in known if known[name][0] != results.get(name, [""])[0]]:
        raise SystemExit(f"the digests of {', '.join(changed)} differ from those in {against}.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
