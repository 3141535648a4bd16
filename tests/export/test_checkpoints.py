"""``quantized.ckpt`` in the ways that Lightning loads a checkpoint, into a module that knows nothing of the library."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IMAGES, LABELS, build, loader, state, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_ptq import CalibrationCapture, calibrate, prepare
from lightning_ptq.errors import SurgeryError
from lightning_ptq.network.prepare import is_prepared

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]


@functools.cache
def module_class(pl: Any) -> Any:
    class Plain(pl.LightningModule):
        """Overrides hooks of its own, and calls none of Lightning's."""

        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(
                nn.Conv2d(IMAGES.shape[1], width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 4, bias=False),
            )  # fmt: skip
            self.loaded = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

        test_step = validation_step

        def predict_step(self, batch: Any, index: int) -> Any:
            return self(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.loaded += 1

    return Plain


@pytest.fixture
def quantized(pl: Any, tmp_path: Path) -> tuple[Any, Path]:
    """A quantized module of another width than the default, and its checkpoint."""
    module = build(lambda: module_class(pl)(width=6))
    capture, keep = CalibrationCapture("w4a4", first_last_bits=None), pl.callbacks.ModelCheckpoint(tmp_path / "kept")
    trainer(pl, tmp_path, capture, keep, enable_checkpointing=True).fit(module, loader())
    assert is_prepared(module)
    return module.eval(), tmp_path / "kept" / "quantized.ckpt"


def same(module: Any, other: Any) -> bool:
    states = state(module), state(other)
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def test_load_from_checkpoint_gives_the_quantized_module(pl: Any, quantized: Any) -> None:
    module, path = quantized
    for options in ({}, {"strict": False}, {"map_location": "cpu"}):
        loaded = module_class(pl).load_from_checkpoint(path, **options).eval()
        assert torch.equal(loaded(IMAGES), module(IMAGES))
        assert same(loaded, module)
        assert (loaded.loaded, loaded.hparams.width) == (1, 6)
    with pytest.raises(RuntimeError, match="size mismatch"):  # torch's, as for any other checkpoint
        module_class(pl).load_from_checkpoint(path, width=5)


@pytest.mark.parametrize("task", ["validate", "test", "predict", "fit"])
@pytest.mark.parametrize("with_callbacks", [False, True])
def test_a_trainer_takes_the_checkpoint(
    task: str, with_callbacks: bool, pl: Any, quantized: Any, tmp_path: Path
) -> None:
    module, path = quantized
    fresh = build(lambda: module_class(pl)(width=6), seed=1)
    callbacks = [CalibrationCapture("w8a8")] if with_callbacks else []
    data = DataLoader(IMAGES, len(IMAGES)) if task == "predict" else loader(len(LABELS))
    result = getattr(trainer(pl, tmp_path, *callbacks), task)(fresh, data, ckpt_path=path)
    assert torch.equal(fresh.eval()(IMAGES), module(IMAGES))
    assert same(fresh, module)
    if task == "predict":
        assert torch.equal(result[0], module(IMAGES))
    elif task != "fit":
        assert result[0]["loss"] == pytest.approx(F.cross_entropy(module(IMAGES), LABELS).item(), rel=1e-5)


def test_training_starts_from_the_checkpoint(pl: Any, quantized: Any, tmp_path: Path) -> None:
    module, path = quantized
    assert torch.load(path, weights_only=True)["optimizer_states"] == []
    fresh = build(lambda: module_class(pl)(width=6), seed=1)
    trainer(pl, tmp_path, max_epochs=2).fit(fresh, loader(), ckpt_path=path)
    assert is_prepared(fresh)
    assert not same(fresh, module)


def test_another_precision_is_kept(pl: Any, quantized: Any, tmp_path: Path) -> None:
    module, path = quantized
    fresh = build(lambda: module_class(pl)(width=6), seed=1)
    data = DataLoader(IMAGES, len(IMAGES))
    (found,) = trainer(pl, tmp_path, precision="bf16-true").predict(fresh, data, ckpt_path=path)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), module(IMAGES), atol=0.1, rtol=0.1)


def test_a_checkpoint_of_another_module_is_refused_with_the_line_to_write(pl: Any, quantized: Any) -> None:
    _, path = quantized

    class Other(module_class(pl)):  # type: ignore[misc]
        def __init__(self, width: int = 4) -> None:
            super().__init__(width)
            self.net = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))

    line = (
        r"Other has no quantizable layers called 'net\.0', 'net\.5'.*module = Other\(\.\.\.\); lightning_ptq\.prepare"
    )
    with pytest.raises(SurgeryError, match=line):
        Other.load_from_checkpoint(path)


def test_the_line_of_the_error_works(pl: Any, quantized: Any) -> None:
    module, path = quantized
    fresh = module_class(pl)(width=6)
    prepare(fresh, "w8a8")
    fresh.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(fresh.eval()(IMAGES), module(IMAGES))


SCRIPT = """
import sys
import torch
from torch import nn
from lightning_ptq.numerics.spec import QuantSpec
net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
net.load_state_dict(torch.load(sys.argv[1], weights_only=True))
torch.save(net.eval()(torch.ones(1, 4)), sys.argv[2])
print("pytorch_lightning" in sys.modules)
"""


def test_an_import_of_any_part_is_enough(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    calibrate(net, [torch.randn(8, 4)], "w4a8").release()
    torch.save(net.state_dict(), tmp_path / "state")
    script = [sys.executable, "-c", SCRIPT, tmp_path / "state", tmp_path / "output"]
    assert subprocess.run(script, check=True, capture_output=True, text=True).stdout.strip() == "False"
    assert torch.equal(torch.load(tmp_path / "output"), net.eval()(torch.ones(1, 4)))
