"""``quantized.ckpt`` in the ways that Lightning loads a checkpoint, into a module that knows nothing of the library."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IMAGES, LABELS, Snapshot, build, loader, state, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_ptq import CalibrationCapture, calibrate, load_quantized, save_packed
from lightning_ptq.errors import CheckpointError, PTQError, SurgeryError
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
    with pytest.raises(
        CheckpointError, match=r"'net\.0\.weight' of shape \(6, 1, 3, 3\) is of shape \(5.*load_quantized"
    ):
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
        r"stay float here: 'net\.0' of shape \(6, 1, 3, 3\), 'net\.5'.*module = lightning_ptq\.load_quantized\(Other\("
    )
    with pytest.raises(CheckpointError, match=line):
        Other.load_from_checkpoint(path)


def test_load_quantized_gives_the_quantized_module(pl: Any, quantized: Any, tmp_path: Path) -> None:
    module, path = quantized
    fresh = build(lambda: module_class(pl)(width=6), seed=1).eval()
    assert load_quantized(fresh, path) is fresh
    assert same(fresh, module)
    assert torch.equal(fresh(IMAGES), module(IMAGES))
    assert fresh.loaded == 1  # its on_load_checkpoint ran
    torch.save(module.state_dict(), tmp_path / "state")
    net = build(lambda: module_class(pl)(width=6), seed=1).eval().net
    torch.save(module.net.state_dict(), tmp_path / "net")
    for target, file in ((build(lambda: module_class(pl)(width=6)).eval(), "state"), (net, "net")):
        assert torch.equal(load_quantized(target, str(tmp_path / file))(IMAGES), module(IMAGES))
    half = build(lambda: module_class(pl)(width=6)).half()
    assert load_quantized(half, path).net[0].weight.dtype == torch.float16


def test_load_quantized_builds_what_configure_model_builds(pl: Any, quantized: Any) -> None:
    module, path = quantized

    class Late(module_class(pl)):  # type: ignore[misc]
        def __init__(self, width: int = 4) -> None:
            super().__init__(width)
            self.net = None

        def configure_model(self) -> None:
            self.net = self.net or module_class(pl)(6).net

    assert torch.equal(load_quantized(Late(), path).eval()(IMAGES), module(IMAGES))


class Reduced:
    """Modules of other architectures, by name, with what the error says of them."""

    @staticmethod
    def narrow(cls: Any) -> Any:
        return cls(width=5)

    @staticmethod
    def without_a_layer(cls: Any) -> Any:
        module = cls(width=6)
        module.net[5], module.extra = nn.Identity(), nn.Linear(3, 3)
        return module

    @staticmethod
    def without_any_layer(cls: Any) -> Any:
        module = cls(width=6)
        module.net = nn.Identity()
        return module


ELSE = {
    Reduced.narrow: r"other shapes: 'net\.0\.weight' of shape \(6, 1, 3, 3\) is of shape \(5, 1, 3, 3\) here",
    Reduced.without_a_layer: r"float here: 'net\.5' of shape \(4, 24\); not in the checkpoint: 'extra\.weight'",
    Reduced.without_any_layer: r"float here: 'net\.0' of shape \(6, 1, 3, 3\), 'net\.5' of shape \(4, 24\)",
}


@pytest.mark.parametrize("make", ELSE, ids=lambda make: make.__name__)
def test_another_architecture_is_named_and_stays_as_it_was(pl: Any, quantized: Any, make: Any) -> None:
    module = build(lambda: make(module_class(pl)), seed=1)
    module.on_load_checkpoint = lambda checkpoint: None
    before = Snapshot(module)
    with pytest.raises(CheckpointError, match=rf"quantized\.ckpt: the state dict is .*{ELSE[make]}") as raised:
        load_quantized(module, quantized[1])
    assert "fake_quant" not in str(raised.value)
    before.assert_unchanged()


def float_checkpoint(pl: Any, folder: Path) -> None:
    run = trainer(pl, folder)
    run.fit(module_class(pl)(), loader())
    run.save_checkpoint(folder / "file")


def with_objects(module: Any, path: Path) -> None:
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": {"path": pathlib.PurePosixPath("a")}}, path)


FILES = {
    "a float checkpoint": (
        lambda pl, m, d: float_checkpoint(pl, d),
        "it is that of a float module. Load it by MyModule",
    ),
    "a float state": (lambda pl, m, d: torch.save({"a": torch.ones(1)}, d / "file"), "it is the state dict of a float"),
    "a list": (lambda pl, m, d: torch.save([1], d / "file"), "it is a list. Name the quantized.ckpt"),
    "a packed file": (lambda pl, m, d: save_packed(m, d / "file"), "is a safetensors file.*load_packed"),
    "a module": (
        lambda pl, m, d: torch.save(nn.ReLU(), d / "file"),
        "holds an object of torch.nn.modules.*weights_only",
    ),
    "objects": (lambda pl, m, d: with_objects(m, d / "file"), "holds an object of pathlib.*weights_only=False"),
    "text": (lambda pl, m, d: (d / "file").write_text("text"), "is damaged or no checkpoint"),
    "nothing": (lambda pl, m, d: (d / "file").touch(), "is damaged or no checkpoint"),
    "half": (
        lambda pl, m, d: (d / "file").write_bytes(next(d.rglob("*.ckpt")).read_bytes()[:5000]),
        "is damaged or no",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_said_to_be_one(pl: Any, quantized: Any, tmp_path: Path, name: str) -> None:
    write, message = FILES[name]
    write(pl, quantized[0], tmp_path)
    module = module_class(pl)(width=6)
    before = Snapshot(module)
    with pytest.raises(CheckpointError, match=rf"file .*{message}"):
        load_quantized(module, tmp_path / "file")
    before.assert_unchanged()


def test_objects_are_read_where_the_file_is_trusted(pl: Any, quantized: Any, tmp_path: Path) -> None:
    with_objects(quantized[0], tmp_path / "file")
    loaded = load_quantized(module_class(pl)(width=6), tmp_path / "file", weights_only=False)
    assert same(loaded, quantized[0])
    torch.save(nn.ReLU(), tmp_path / "module")
    with pytest.raises(CheckpointError, match="it is a pickled ReLU"):
        load_quantized(module_class(pl)(), tmp_path / "module", weights_only=False)


def test_no_file_and_a_quantized_module_are_refused(pl: Any, quantized: Any, tmp_path: Path) -> None:
    module, path = quantized
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.*best_model_path"):
        load_quantized(module_class(pl)(), tmp_path / "none")
    with pytest.raises(SurgeryError, match="has quantized layers already"):
        load_quantized(module, path)
    with pytest.raises(PTQError, match="path must be the path of a file, got None"):
        load_quantized(module_class(pl)(), None)


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
