from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_ptq import ReconstructionConfig, adaquant, calibrate
from lightning_ptq.activations.calls import Call
from lightning_ptq.network.slices import Slice
from lightning_ptq.network.trace import RESULT
from lightning_ptq.tuning.tunable import units_for

IMAGES = [seeded(i, 8, 2, 8, 8) for i in range(3)]


def conv(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class ConvModule(nn.Module):
    """A convolution, its norm and its activation in a class of their own, as many networks have them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


class Net(nn.Module):
    """A chain inside a network, and another after it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Conv2d(2, 2, 1), nn.ReLU())))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(128, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


CHAINS = {
    "flat": (lambda: nn.Sequential(*conv(2, 4), *conv(4, 4), nn.MaxPool2d(2), *conv(4, 8), *head(8)), ["0-6", "7-12"]),
    "depthwise": (
        lambda: nn.Sequential(conv(2, 4), *(nn.Sequential(conv(4, 4, groups=4), conv(4, 4)) for _ in "abc"), *head(4)),
        ["0", "1", "2", "3", "6"],
    ),
    "modules": (lambda: nn.Sequential(*(ConvModule(2, 2) for _ in range(4)), *head(2)), ["0-1", "2-6"]),
    "stages": (
        lambda: nn.Sequential(nn.Sequential(conv(2, 2), conv(2, 2)), nn.Sequential(conv(2, 4), conv(4, 4)), *head(4)),
        ["0", "1", "4"],
    ),
    "network": (Net, ["features.0-3", "features.4-9", "classifier"]),
    "one layer": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), ["1"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHAINS)
def test_chains_are_cut_into_units(kind: str) -> None:
    make, expected = CHAINS[kind]
    torch.manual_seed(0)
    calibration = calibrate(make().eval(), IMAGES, "w4a4")
    with units_for(calibration, "block", None) as (_, units):
        assert [unit.name for unit in units] == expected
        assert sorted(name for unit in units for name in unit.layers) == sorted(calibration.layers)
        for unit in units:
            paths = dict(unit.module.named_modules())
            assert all(paths[unit.inside(name)] is layer for name, layer in unit.layers.items())


def test_slices_run_in_place_of_their_layers_and_the_trace_shows_it() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    calibration = calibrate(net, IMAGES, "w8a8")
    expected = calibration.run(0)
    names = dict(net.named_modules()).keys()
    called: list[str] = []
    with units_for(calibration, "block", None) as (sliced, units):
        for unit in units:
            unit.module.register_forward_hook(lambda *_, name=unit.name: called.append(name))
        assert torch.equal(sliced.run(0), expected)
        assert called == ["features.0-3", "features.4-9", "classifier"]
        flow = sliced.trace.flow(called)
        assert flow.needed == {
            "features.0-3": set(),
            "features.4-9": {"features.0-3"},
            "classifier": {"features.4-9"},
            RESULT: {"classifier"},
        }
        entered = [event.scope for event in sliced.trace.events if event.kind == "enter" and event.name == "features.2"]
        assert entered == [("", "features", "features.0-3", "features.2")]
        events = [event for event in sliced.trace.events if event.name == "features.0-3"]
        assert [(event.kind, event.scope) for event in events] == [
            ("enter", ("", "features", "features.0-3")),
            ("exit", ("", "features")),
        ]
    called.clear()
    assert torch.equal(calibration.run(0), expected)
    assert called == ["classifier"]  # which is no slice
    assert dict(net.named_modules()).keys() == names
    assert "forward" not in vars(net.features)


def test_chains_that_are_not_called_as_a_whole_are_not_cut() -> None:
    class Loop(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.features:
                x = layer(x)
            return self.classifier(x)

    calibration = calibrate(Loop().eval(), IMAGES, "w8a8")
    with units_for(calibration, "block", None) as (_, units):
        assert [unit.name for unit in units] == [*(f"features.{i}" for i in range(0, 10, 2)), "classifier"]


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_slices_are_tuned(mode: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*conv(2, 8), *conv(8, 8), *conv(8, 8), *conv(8, 8), *head(8)).eval()
    images = [seeded(i, 32, 2, 8, 8) for i in range(4)]
    calibration = calibrate(net, images, "w2a8")
    start = {name: layer.weight.clone() for name, layer in calibration.layers.items()}
    config = ReconstructionConfig(steps=40, held_out=0.25)
    result = adaquant(calibration, mode=mode, config=config)
    assert [unit.name for unit in result.units] == ["0-5", "6-14"]
    assert [unit.accepted for unit in result.units] == [True, True]
    assert all(unit.error_after < 0.8 * unit.error_before for unit in result.units)
    if mode == "sequential":
        assert not any(torch.equal(layer.weight, start[name]) for name, layer in calibration.layers.items())


def test_a_slice_is_no_child_of_its_chain() -> None:
    chain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    part = Slice("net.chain", chain, ["0", "1"])
    assert part.name == "net.chain.0-1"
    assert list(part.state_dict()) == ["0.weight", "0.bias"]
    assert Slice("", chain, ["2"]).name == "2"
    assert Call.of(part(torch.ones(1, 2))).leaves
