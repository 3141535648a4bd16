from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import ResidualBlock, attach_all, randomize_norms
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq import Calibrator, prepare
from lightning_ptq.network.trace import RESULT, Trace, trace


class Pieces(nn.Module):
    """Layers a to e of one width, registered from the last to the first, and put together by a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], width: int = 4) -> None:
        super().__init__()
        for name in "edcba":
            self.add_module(name, nn.Linear(width, width))
        self.weight = nn.Parameter(torch.randn(width, width))
        self.lstm, self.gru = nn.LSTM(width, width), nn.GRU(width, width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def traced(forward: Callable[[Any, Tensor], Any]) -> Trace:
    net = Pieces(forward).eval()
    prepare(net, "w4")
    with torch.no_grad():
        return trace(net, lambda: net(torch.randn(3, 4)))


def branch(net: Any, x: Tensor) -> Tensor:
    return net.c(net.a(x)) if x.isnan().any() else net.b(net.c(net.a(net.c(x))))


def test_layers_come_in_the_order_they_ran() -> None:
    watched = traced(branch)
    assert watched.layer_order == ["c", "a", "b"]
    assert watched.calls == {"": 1, "a": 1, "b": 1, "c": 2}


def test_a_module_that_calls_others_leaves_its_own_events_around_theirs() -> None:
    net = randomize_norms(nn.Sequential(ResidualBlock(3)))
    prepare(net, "w4")
    with torch.no_grad():
        events = trace(net, lambda: net(torch.randn(1, 3, 4, 4))).events
    entered = [(event.kind, event.name) for event in events if event.kind != "op"]
    inside = [(kind, f"0.{name}") for name in ("conv1", "bn1", "conv2", "bn2") for kind in ("enter", "exit")]
    assert entered == [("enter", ""), ("enter", "0"), *inside, ("exit", "0"), ("exit", "")]
    assert {event.scope for event in events if event.name == "aten::convolution"} == {
        ("", "0", "0.conv1"),
        ("", "0", "0.conv2"),
    }


def unet(net: Any, x: Tensor) -> Tensor:
    high = net.a(x)
    low = net.b(F.relu(high)[:, :, None].amax(-1))
    low = net.c(low)
    return net.d(torch.cat([low, high], 1)[:, 2:6]) + net.e(x)


def in_place(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y.relu_()
    z = net.b(y)
    z[:, :2] += net.c(x)[:, 2:]
    return net.d(z) * net.e(y)


def views(net: Any, x: Tensor) -> Tensor:
    left, right = torch.cat([net.a(x), net.b(x)], 1).chunk(2, 1)
    return (
        net.d(left.t().reshape(4, 3).t()) + net.c(net.a.weight.new_ones(3, 4)) + net.e(right.view(3, 2, 2).flatten(1))
    )


def written_over(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y = y + net.b(x)
    buffer = torch.zeros(3, 4)
    buffer.copy_(net.c(y))
    return net.d(buffer) + net.e(torch.zeros(3, 4))


def keyword(net: Any, x: Tensor) -> Tensor:
    return net.c(input=net.b(input=F.relu(net.a(x))))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda net, x: net.d(F.gelu(net.c(net.b(net.a(x))))), {"a": "", "b": "a", "c": "b", "d": "c"}),
        (unet, {"a": "", "b": "a", "c": "b", "d": "ac", "e": ""}),
        (in_place, {"a": "", "b": "a", "c": "", "d": "bc", "e": "a"}),
        (views, {"a": "", "b": "", "c": "", "d": "ab", "e": "ab"}),
        (written_over, {"a": "", "b": "", "c": "ab", "d": "c", "e": ""}),
        (lambda net, x: net.b(net.a(net.b(x))), {"a": "b", "b": "a"}),
        (keyword, {"a": "", "b": "a", "c": "b"}),
    ],
    ids=["chain", "unet", "in_place", "views", "written_over", "twice", "keyword"],
)
def test_needed_outputs(forward: Callable, expected: dict[str, str]) -> None:
    found = traced(forward).needed_outputs(expected)
    found.pop(RESULT)
    assert found == {unit: set(needed) for unit, needed in expected.items()}


def test_outputs_that_reach_the_result_past_all_units() -> None:
    net = attach_all(Pair(), torch.randn(3, 4))
    assert net.needed_outputs(["left", "right"])[RESULT] == {"left", "right"}
    watched = attach_all(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(3, 4))
    assert watched.needed_outputs(["0", "2"])[RESULT] == {"2"}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> dict[str, Tensor]:
        y = self.left(x)
        return {"out": self.right(y if skip is None else y + skip), "skip": y}


class Blocks(nn.Module):
    """Blocks that exchange dictionaries, and hand a tensor over the one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Pair(), Pair(), Pair()

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first["out"])
        return self.third(F.relu(second["out"]), skip=first["skip"])["out"]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (["first", "second", "third"], {"first": set(), "second": {"first"}, "third": {"first", "second"}}),
        (["first", "third"], {"first": set(), "third": {"first"}}),
        (
            ["first.left", "first.right", "second", "third.right"],
            {
                "first.left": set(),
                "first.right": {"first.left"},
                "second": {"first.right"},
                "third.right": {"first.left", "second"},
            },
        ),
    ],
    ids=["blocks", "a_block_left_out", "layers_and_blocks"],
)
def test_needed_outputs_of_blocks(units: list[str], expected: dict[str, set[str]]) -> None:
    net = Blocks()
    watched = attach_all(net, torch.randn(3, 4))
    found = watched.needed_outputs(units)
    found.pop(RESULT)
    assert found == expected


@pytest.mark.parametrize(
    ("forward", "residual"),
    [
        (lambda net, x: x + net.a(x), True),
        (lambda net, x: net.a(x).add_(x), True),
        (lambda net, x: torch.add(x, net.a(x), alpha=0.5), True),
        (lambda net, x: net.a(x) + net.weight[0], False),
        (lambda net, x: net.a(x) + 1, False),
        (lambda net, x: torch.cat([x, net.a(x)]), False),
        (lambda net, x: x * net.a(x), False),
    ],
)
def test_a_residual_connection_is_seen(forward: Callable, residual: bool) -> None:
    assert traced(forward).residual == ({""} if residual else set())


def test_a_residual_connection_belongs_to_the_module_that_adds() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), ResidualBlock(4), nn.Sequential(ResidualBlock(4)), nn.Flatten())
    assert attach_all(net, torch.randn(1, 3, 4, 4)).residual == {"1", "2.0"}


@pytest.mark.parametrize(
    ("forward", "scope"),
    [
        (lambda net, x: F.linear(net.a(x), net.weight), ""),
        (lambda net, x: F.linear(net.a(x), net.weight, net.weight[0]), ""),
        (lambda net, x: net.a(x) @ net.weight, ""),
        (lambda net, x: net.a(x) @ net.weight[0], ""),
        (lambda net, x: net.a(x)[None] @ net.weight[None], ""),
        (lambda net, x: torch.einsum("bi,ij->bj", net.a(x), net.weight), ""),
        (lambda net, x: F.conv1d(net.a(x)[None], torch.ones(1, 3, 1)), ""),
        (lambda net, x: F.scaled_dot_product_attention(*[net.a(x)[None, None]] * 3), ""),
    ],
    ids=["linear", "biased", "mm", "mv", "bmm", "einsum", "conv", "sdpa"],
)
def test_products_outside_any_layer_are_found(forward: Callable, scope: str) -> None:
    found = traced(forward).float_products
    assert {where for _, where in found} == {scope}


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.lstm(net.a(x)),
        lambda net, x: net.gru(net.a(x)),
        lambda net, x: net.attention(*[net.a(x)[:, None]] * 3),
    ],
)
def test_products_inside_recurrent_and_attention_layers_are_theirs(forward: Callable) -> None:
    assert not traced(forward).float_products


def test_products_of_layers_are_not_float_products() -> None:
    net = randomize_norms(nn.Sequential(ResidualBlock(3), nn.Flatten(), nn.Linear(48, 4), nn.Softmax(1)))
    x = torch.randn(1, 3, 4, 4)
    attach_all(net, x)
    with torch.no_grad():
        assert trace(net, lambda: net(x)).float_products == set()


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_behind(fails: bool) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        if fails:
            raise KeyError("forward")
        return net.a(x)

    net = Pieces(forward)
    prepare(net, "w4")
    everywhere = nn.modules.module
    registries = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    registries += [hooks for child in net.modules() for hooks in (child._forward_hooks, child._forward_pre_hooks)]
    before = [list(hooks) for hooks in registries]
    with pytest.raises(KeyError, match="forward") if fails else nullcontext():
        trace(net, lambda: net(torch.randn(3, 4)))
    assert [list(hooks) for hooks in registries] == before


def test_batch_norms_know_the_layer_they_follow() -> None:
    net = randomize_norms(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), ResidualBlock(4))
    )
    watched = attach_all(net, torch.randn(2, 3, 4, 4))
    assert watched.batch_norm_after == {"1": "0", "4.bn1": "4.conv1", "4.bn2": "4.conv2"}


def test_what_observers_look_at_decides_nothing() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    calibrator = Calibrator(prepare(net, "w4a4"))
    calibrator.observe(torch.randn(3, 4))  # the observer of each layer looks for NaN
    needed = calibrator.finish().trace.needed_outputs(["0", "2", "4"])
    assert (needed["2"], needed["4"]) == ({"0"}, {"2"})
