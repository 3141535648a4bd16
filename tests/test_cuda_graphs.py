"""Steps that are repeated as graphs, with a stand-in for CUDA's: recorded operators run again on the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ResNet, Transformer, build, same_state, seeded, state, token_batches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate
from lightning_ptq.tuning import optimize

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")


class Replay(TorchDispatchMode):
    """Records operators; what they return is kept, and written to again when they run again, as in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::equal"):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def __call__(self) -> None:
        for func, args, kwargs, kept in self.calls:
            if func._schema.name.startswith("aten::") and any(r.alias_info for r in func._schema.returns):
                if func._schema.is_mutable:
                    func(*args, **kwargs)
                continue  # a view shows what its base holds
            for old, new in zip(kept, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class Recorder:
    """The stand-in for :class:`~lightning_ptq.runtime.cuda_graphs.CudaRecorder`."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def record(self, work: Any, generators: Any = ()) -> Any:
        replay = Replay()
        with replay:
            work()
        self.recorded += 1

        def repeat() -> None:
            self.repeated += 1
            with torch.no_grad():
                replay()

        return repeat


class Noisy(nn.Module):
    """Draws random numbers in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 0.01 * torch.rand_like(x)


class Waiting(nn.Module):
    """Reads a value from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if y.abs().max().item() > 1e6 else y


NETS: dict[str, Any] = {
    "resnet": lambda: (build(ResNet), list(seeded(1, 90, 2, 6, 6).split(15))),
    "transformer": lambda: (build(lambda: Transformer(16)), token_batches(5)),
}


def tuned(name: str, monkeypatch: pytest.MonkeyPatch, recorder: Recorder | None, **options: Any) -> Any:
    monkeypatch.setattr(optimize, "recorder_for", lambda device: recorder)
    net, batches = NETS[name]() if name in NETS else (build(options.pop("net")), options.pop("batches"))
    calibration = calibrate(net, batches, QConfig.parse("w3a3", first_last_bits=None))
    result = adaquant(calibration, config=ReconstructionConfig(steps=25, batch_size=8, **options))
    return state(calibration.module), result


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "learn", [None, ("weight", "bias", "weight_scale", "activation_scale", "activation_zero_point")]
)
def test_repeated_steps_give_the_same_bytes(name: str, learn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {} if learn is None else {"learn": learn}
    expected, _ = tuned(name, monkeypatch, None, **options)
    recorder = Recorder()
    found, result = tuned(name, monkeypatch, recorder, **options)
    assert same_state(found, expected)
    assert recorder.repeated > 10 * recorder.recorded > 0
    assert [unit.eager for unit in result.units] == [""] * len(result.units)


@pytest.mark.parametrize(("net", "options", "reason"), [
    (Noisy, {}, "draws random numbers"),
    (Waiting, {}, "not permitted when stream is capturing"),
    (lambda: nn.Linear(8, 8), {"rounding": "adaround"}, "AdaRound"),
])  # fmt: skip
def test_what_cannot_be_repeated_runs_eagerly_and_says_why(
    net: Any, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list(seeded(2, 64, 8).split(16))
    make = lambda: nn.Sequential(net())  # noqa: E731
    expected, _ = tuned("", monkeypatch, None, net=make, batches=batches, **options)
    found, result = tuned("", monkeypatch, Recorder(), net=make, batches=batches, **options)
    assert same_state(found, expected)
    assert all(reason in unit.eager for unit in result.units)


def test_a_repetition_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = tuned("resnet", monkeypatch, None)

    class Wrong(Recorder):
        def record(self, work: Any, generators: Any = ()) -> Any:
            super().record(work, generators)
            return lambda: None

    found, result = tuned("resnet", monkeypatch, Wrong())
    assert same_state(found, expected)
    assert all("differs" in unit.eager for unit in result.units)


def test_the_option_leaves_graphs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    tuned("resnet", monkeypatch, recorder, cuda_graphs=False)
    assert not recorder.recorded
