from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import SmallNet, Snapshot, build, loader, same_state, seeded, state, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_ptq
from lightning_ptq import AdaQuantLayerwise, CalibrationCapture, QConfig, ReconstructionConfig, adaquant, calibrate
from lightning_ptq.errors import UnsupportedLayerWarning
from lightning_ptq.network.prepare import prepare
from lightning_ptq.runtime.eager import is_compiled, not_compiled

pytestmark = [
    pytest.mark.both_packages,
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]
X = seeded(1, 8, 1, 5, 5)
BATCHES = [x for x, _ in loader()]
FAST = {"weight_observer": "minmax", "activation_observer": "minmax"}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch._dynamo.reset()


class Tiny(pl.LightningModule):
    """Two linear layers; small, because compiling takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> None:
        return None


def compiled_inside() -> tuple[Any, Any]:
    module = build(Tiny)
    module.net = torch.compile(module.net, backend="eager")
    return module, module


def compiled_in_place() -> tuple[Any, Any]:
    module = build(Tiny)
    module.net.compile(backend="eager")
    return module, module


def compiled_whole() -> tuple[Any, Any]:
    module = build(Tiny)
    return module, torch.compile(module, backend="eager")


def values(module: nn.Module) -> list[Tensor]:
    return list(state(module).values())


def fitted(given: Any, tmp_path: Any) -> None:
    callbacks = CalibrationCapture("w4a4", **FAST), AdaQuantLayerwise(steps=3)
    trainer(pl, tmp_path, *callbacks).fit(given, loader())


@pytest.mark.parametrize("make", [compiled_inside, compiled_in_place, compiled_whole])
def test_a_compiled_module_is_quantized_as_the_eager_one(tmp_path, make):
    eager = build(Tiny)
    fitted(eager, tmp_path)
    module, given = make()
    module.eval(), eager.eval()
    assert is_compiled(given)
    with torch.no_grad():
        before = given(X)  # is compiled with the float weights
        fitted(given, tmp_path)
        assert all(map(torch.equal, values(module), values(eager)))
        module.eval(), eager.eval()
        assert torch.equal(given(X), eager(X))
        assert not torch.equal(given(X), before)
        assert torch.equal(module(X), eager(X))


def test_functions_take_compiled_modules_and_undo_brings_the_float_function_back():
    eager, net = build(Tiny).eval(), build(Tiny).eval()
    given = torch.compile(net, backend="eager")
    with torch.no_grad():
        before = given(X)
        calibrations = [calibrate(each, BATCHES, QConfig.parse("w4a4", **FAST)) for each in (eager, given)]
        for calibration in calibrations:
            adaquant(calibration, config=ReconstructionConfig(steps=3))
        assert torch.equal(given(X), eager(X))
        assert not torch.equal(given(X), before)
        calibrations[1].prepared.undo()
        assert torch.equal(given(X), before)


@pytest.mark.parametrize("place", ["call", "method", "child", "nowhere"])
def test_what_is_compiled_is_found(place):
    net = build(SmallNet)
    if place == "call":
        net.compile(backend="eager")
    elif place == "method":
        net.forward = torch.compile(net.forward, backend="eager")
    elif place == "child":
        net[3] = torch.compile(net[3], backend="eager")
    assert is_compiled(net) == (place != "nowhere")


def test_nothing_compiled_runs_meanwhile():
    used = []

    def backend(graph: Any, inputs: Any) -> Any:
        used.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    with not_compiled():
        assert compiled(torch.zeros(1)) == 1
    assert used == []
    assert compiled(torch.zeros(1)) == 1
    assert used == [1]


@pytest.mark.parametrize("step", ["training", "predict"])
def test_inspect_takes_a_compiled_module(step):
    module, given = compiled_whole()
    before = Snapshot(module)
    found = lightning_ptq.inspect(given, next(iter(loader())), step=step)
    assert [layer.name for layer in found.layers] == ["net.1", "net.3"]
    before.assert_unchanged()


@pytest.mark.parametrize("name", ["net.1", "net._orig_mod.1"])
def test_patterns_match_names_with_and_without_the_prefix(name):
    module, _ = compiled_inside()
    prepared = prepare(module, QConfig.parse("w4a4", exclude=[name], overrides={name.replace("1", "3"): "w3a3"}))
    assert prepared.qconfig.for_layer("net._orig_mod.1") is None
    assert str(prepared.qconfig.for_layer("net._orig_mod.3")) == "w3a3"
    prepared.undo()


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.inner = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning")
def test_a_scripted_submodule_is_named_and_stays_float():
    net = build(Scripted)
    inner = state(net.inner)
    with pytest.warns(UnsupportedLayerWarning, match="inner"):
        calibration = calibrate(net, [seeded(0, 16, 4)], "w4a4")
    assert list(calibration.layers) == ["first", "last"]
    adaquant(calibration, config=ReconstructionConfig(steps=2))
    assert same_state(state(net.inner), inner)
    calibration.prepared.undo()
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in (net, net.first, net.last))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_submodule_can_be_inspected():
    net = build(Scripted)
    classes = [type(child) for child in net.modules()]
    found = lightning_ptq.inspect(net, seeded(0, 16, 4))
    assert [layer.name for layer in found.layers] == ["first", "last"]
    assert found.macs == 32 + 64 + 16
    assert found.covered == pytest.approx(48 / 112)
    assert "inner" in " ".join(warning.message for warning in found.warnings)
    assert [type(child) for child in net.modules()] == classes


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.use_reentrant is None:
            return self.last(x + self.inner(x))
        return self.last(x + checkpoint(self.inner, x, use_reentrant=self.use_reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("blocks", [None, ["inner"], [""]])
def test_checkpoints_inside_a_forward_change_nothing(use_reentrant, blocks):
    states = []
    for each in (None, use_reentrant):
        net = build(lambda each=each: Checkpointed(each))
        calibration = calibrate(net, [seeded(0, 16, 4)], QConfig.parse("w3a3", **FAST))
        adaquant(calibration, blocks=blocks, config=ReconstructionConfig(steps=5))
        states.append(state(net))
    assert same_state(*states)
