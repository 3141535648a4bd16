from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ResidualBlock, Zoo, randomize_norms
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from lightning_ptq import QConfig, calibrate, prepare
from lightning_ptq.errors import (
    BakedWeightWarning,
    PTQError,
    PTQWarning,
    QConfigError,
    SurgeryError,
    TiedWeightWarning,
    UnfoldedBatchNormWarning,
    UnreachedLayerWarning,
    UnsupportedLayerWarning,
)
from lightning_ptq.network.batch_norm import FoldableBatchNorm, fold_batch_norms
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.trace import trace


def objects(module: nn.Module) -> list[tuple[str, int]]:
    """Every place of the module tree and who sits there, shared modules in each of their places."""
    named = list(module.named_modules(remove_duplicate=False))
    return [(name, id(child)) for name, child in named] + [(name, id(p)) for name, p in module.named_parameters()]


@pytest.mark.parametrize("build", [Zoo, lambda: nn.TransformerEncoderLayer(8, 2)])
def test_undo_puts_the_very_same_objects_back(build: Callable[[], nn.Module]) -> None:
    net = build()
    before, state = objects(net), copy.deepcopy(net.state_dict())
    prepared = prepare(net, "w4a4")
    for child in net.modules():
        assert isinstance(child, (QuantLayer, FoldableBatchNorm)) or "Quant" not in type(child).__name__
    assert not [name for name, c in net.named_modules() if type(c) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)]
    assert list(net.state_dict()) == list(state)
    for layer in prepared.layers.values():  # what tuning does to the swapped layers stays with them
        biases = {name: getattr(layer, name) for name in layer.bias_names}
        layer.set_parameters({**{name: weight + 1 for name, weight in layer.weights.items()}, **biases})
    prepared.undo()
    prepared.undo()
    assert objects(net) == before
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_layers_are_found_by_name_in_registration_order() -> None:
    layers = prepare(Zoo(), "w4").layers
    block = ["block.conv1", "block.conv2"]
    assert list(layers) == ["stem", *block, "up", "depthwise", "hidden", "embedding", "gate", "head"]


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.ModuleDict({"inner": shared}))
    prepared = prepare(net, "w4")
    assert net[0] is net[2] is net[3]["inner"]
    assert isinstance(net[0], QuantLayer)
    assert not net[0].tied
    prepared.undo()
    assert net[0] is net[2] is net[3]["inner"] is shared


@pytest.mark.parametrize("other", [nn.Linear(6, 4, bias=False), nn.Embedding(4, 6)], ids=["linear", "embedding"])
def test_a_tied_weight_is_named_and_marked(other: nn.Module) -> None:
    net = nn.ModuleDict({"first": nn.Linear(6, 4), "other": other, "free": nn.Linear(6, 4)})
    other.weight = net["first"].weight
    with pytest.warns(TiedWeightWarning, match="first") as caught:
        layers = prepare(net, "w4").layers
    assert "free" not in str(caught[0].message)
    assert {name: layer.tied for name, layer in layers.items()} == {"first": True, "other": True, "free": False}


def test_a_layer_without_a_weight_of_its_own_is_skipped() -> None:
    odd = nn.Conv2d(3, 3, 1)
    del odd.weight
    odd.weight = torch.ones(3, 3, 1, 1)
    net = nn.Sequential(odd, nn.LazyLinear(4), nn.Linear(4, 4)).eval()
    skipped = list(net[:2])
    with pytest.warns(UnsupportedLayerWarning, match=r"^0, 1: the weight is lazy or no parameter"):
        prepared = prepare(net, "w4")
    assert list(prepared.layers) == ["2"]
    assert list(net[:2]) == skipped


@pytest.mark.parametrize(
    ("build", "qconfig", "error", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "w4", SurgeryError, "nothing to quantize"),
        (lambda: nn.Linear(3, 3), QConfig.parse("w4", operations="layers"), SurgeryError, "nothing to quantize"),
        (Zoo, QConfig.parse("w4", overrides={"haed": "w8"}), QConfigError, "no layer matches 'haed'"),
        (Zoo, QConfig.parse("w4", exclude=["stem", "blocks.*"]), QConfigError, r"no layer matches 'blocks\.\*'"),
        (Zoo, "4 bits", QConfigError, "cannot read '4 bits'"),
    ],
    ids=["nothing", "a_bare_layer", "override", "exclude", "text"],
)
def test_what_cannot_be_prepared_stays_as_it_was(
    build: Callable[[], nn.Module], qconfig: Any, error: type[PTQError], message: str
) -> None:
    net = build()
    before = objects(net)
    with pytest.raises(error, match=message):
        prepare(net, qconfig)
    assert objects(net) == before


def test_a_warning_turned_into_an_error_leaves_the_module_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)))
    before = objects(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PTQWarning)
        with pytest.raises(BakedWeightWarning):
            prepare(net, "w4")
    assert objects(net) == before


def test_a_module_is_prepared_once() -> None:
    net = Zoo()
    prepared = prepare(net, "w4")
    before = objects(net)
    with pytest.raises(SurgeryError, match="has quantized layers already"):
        prepare(net, "w8")
    assert objects(net) == before
    prepared.undo()
    assert len(prepare(net, "w8").layers) == 9


def fold(net: nn.Module, x: Tensor) -> tuple[dict[str, str], Tensor]:
    """What was folded, and the output afterwards."""
    with torch.no_grad():
        folded = fold_batch_norms(net, trace(net, lambda: net(x)), lambda: net(x))
        return folded, net(x)


def folded_norms(net: nn.Module) -> list[str]:
    return [name for name, child in net.named_modules() if isinstance(child, FoldableBatchNorm) and child.is_folded]


PAIRS: dict[str, tuple[Callable[[bool], nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d, (3, 4, 7)),
    "conv2d": (lambda bias: nn.Conv2d(4, 6, 3, bias=bias, groups=2), nn.BatchNorm2d, (3, 4, 5, 6)),
    "conv3d": (lambda bias: nn.Conv3d(4, 6, 2, bias=bias), nn.BatchNorm3d, (3, 4, 3, 4, 3)),
    "transpose1d": (lambda bias: nn.ConvTranspose1d(4, 6, 3, bias=bias), nn.BatchNorm1d, (3, 4, 5)),
    "transpose1d_grouped": (lambda bias: nn.ConvTranspose1d(4, 6, 3, bias=bias, groups=2), nn.BatchNorm1d, (3, 4, 5)),
    "transpose2d": (lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=bias), nn.BatchNorm2d, (3, 4, 3, 3)),
    "transpose2d_grouped": (
        lambda bias: nn.ConvTranspose2d(4, 6, 2, bias=bias, groups=2),
        nn.BatchNorm2d,
        (3, 4, 3, 3),
    ),
    "linear": (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, (5, 4)),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", PAIRS)
def test_folding_keeps_the_output_and_the_float_originals(name: str, bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    layer, norm_class, shape = PAIRS[name]
    net = randomize_norms(nn.Sequential(layer(bias), norm_class(6, affine=affine, eps=0.1), nn.ReLU()))
    originals, state, x = list(net), copy.deepcopy(net.state_dict()), torch.randn(shape)
    with torch.no_grad():
        expected = net(x)
    prepared = prepare(net, "w4")
    folded, found = fold(net, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert folded == {"1": "0"}
    assert folded_norms(net) == ["1"]
    assert torch.equal(net[1](x), x)
    assert net[0].bias is not None

    prepared.undo()
    assert list(net) == originals
    assert {key: value.tolist() for key, value in net.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    assert torch.equal(net(x), expected)


def test_every_pair_of_a_network_is_folded() -> None:
    torch.manual_seed(0)
    net, x = randomize_norms(Zoo()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
    prepare(net, "w4")
    with pytest.warns(UnfoldedBatchNormWarning, match="free_norm: it does not directly follow") as caught:
        folded, found = fold(net, x)
    assert "stem_norm" not in str(caught[0].message)
    assert folded == {"stem_norm": "stem", "block.bn1": "block.conv1", "block.bn2": "block.conv2", "up_norm": "up"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Pieces(nn.Module):
    """Convolutions and batch norms, put together by a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **norm: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, **norm)
        self.other_bn = nn.BatchNorm2d(4)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def skip_from_before_the_norm(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(y) + y


def two_norms_of_one_output(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(y) * net.other_bn(y)


def layer_called_twice(net: Any, x: Tensor) -> Tensor:
    return net.bn(net.conv(net.conv(x)))


def changed_in_place_between(net: Any, x: Tensor) -> Tensor:
    return net.bn(net.conv(x).mul_(2))


def read_through_a_view(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(y) + net.first(y.view_as(y))


NO_NEIGHBOUR, OUTPUT_CHANGES = "does not directly follow", "changes the model's output"


@pytest.mark.parametrize(
    ("forward", "norm", "reason"),
    [
        (skip_from_before_the_norm, {}, f"bn: folding it into conv {OUTPUT_CHANGES}"),
        (read_through_a_view, {}, f"bn: folding it into conv {OUTPUT_CHANGES}"),
        (two_norms_of_one_output, {}, f"other_bn: folding it into conv {OUTPUT_CHANGES}"),
        (changed_in_place_between, {}, f"bn: folding it into conv {OUTPUT_CHANGES}"),
        (layer_called_twice, {}, f"bn: it {NO_NEIGHBOUR}"),
        (lambda net, x: net.bn(net.bn(net.conv(x))), {}, f"bn: it {NO_NEIGHBOUR}"),
        (lambda net, x: net.conv(net.bn(x)), {}, f"bn: it {NO_NEIGHBOUR}"),
        (lambda net, x: net.bn(F.relu(net.conv(x))), {}, f"bn: it {NO_NEIGHBOUR}"),
        (lambda net, x: net.bn(net.conv(x)), {"track_running_stats": False}, "bn: it has no running statistics"),
    ],
)
def test_what_is_no_clean_pair_stays_a_batch_norm(forward: Callable, norm: dict, reason: str) -> None:
    torch.manual_seed(0)
    net, x = randomize_norms(Pieces(forward, **norm)), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = net(x)
    prepared = prepare(net, "w4")
    with pytest.warns(UnfoldedBatchNormWarning, match=reason):
        folded, found = fold(net, x)
    assert folded == {}
    assert folded_norms(net) == []
    assert torch.equal(found, expected)
    assert all(
        layer.weight is p
        for layer, p in zip(prepared.layers.values(), (net.first.weight, net.conv.weight), strict=True)
    )


def test_a_bad_pair_does_not_keep_a_good_one_from_folding() -> None:
    torch.manual_seed(0)
    net = randomize_norms(Pieces(lambda net, x: skip_from_before_the_norm(net, net.other_bn(net.first(x)))))
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = net(x)
    prepare(net, "w4")
    with pytest.warns(UnfoldedBatchNormWarning, match=r"float layers: bn: folding it into conv changes"):
        folded, found = fold(net, x)
    assert folded == {"other_bn": "first"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_called_by_keyword_are_folded_too() -> None:
    torch.manual_seed(0)
    net, x = randomize_norms(Pieces(lambda net, x: net.bn(input=net.conv(input=x)))), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = net(x)
    prepare(net, "w4")
    folded, found = fold(net, x)
    assert folded == {"bn": "conv"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_norm_is_folded_into_a_tied_weight() -> None:
    net = randomize_norms(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    net[2].weight = net[0].weight
    with pytest.warns(TiedWeightWarning, match="0, 2"):
        prepare(net, "w4")
    with pytest.warns(UnfoldedBatchNormWarning, match="1: the layer before it shares its weight"):
        assert fold(net, torch.randn(3, 4))[0] == {}


class Branching(nn.Module):
    """Its way depends on the values, and its number of steps too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stem_bn = nn.BatchNorm2d(4)
        self.positive, self.negative = ResidualBlock(4), ResidualBlock(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem_bn(self.stem(x))
        block = self.positive if x.sum().item() > 0 else self.negative
        for _ in range(min(int(x.abs().max()), 1)):
            y = block(y)
        return y


@pytest.mark.parametrize(("sign", "taken"), [(1, "positive"), (-1, "negative")])
def test_folding_needs_no_symbolic_trace(sign: int, taken: str) -> None:
    torch.manual_seed(0)
    net = randomize_norms(Branching())
    x = sign * torch.rand(2, 3, 6, 6) + sign
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(net)
    with torch.no_grad():
        expected = net(x)
    prepare(net, "w4")
    folded, found = fold(net, x)
    assert folded == {"stem_bn": "stem", f"{taken}.bn1": f"{taken}.conv1", f"{taken}.bn2": f"{taken}.conv2"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Listed(nn.Module):
    """Holds its layers in more places than the tree of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps = [self.first, self.second]
        self.call = self.second.__call__
        self.reference = weakref.ref(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.reference()(self.steps[0](x)))


def test_other_references_to_a_layer_see_the_quantized_one() -> None:
    net, x = Listed().eval(), torch.randn(16, 4)
    expected = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreachedLayerWarning)
        calibration = calibrate(net, [x], QConfig.parse("w2a8", first_last_bits=None))
    assert net.steps[0] is net.first is net.reference()
    assert calibration.trace.calls == {"": 1, "first": 2, "second": 1}
    assert list(calibration.layers) == ["first", "second"]
    assert not torch.allclose(net(x), expected)
    calibration.prepared.undo()
    assert torch.equal(net(x), expected)


def test_hooks_keep_their_handles() -> None:
    net, seen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), []
    before, during, kept = [net[0].register_forward_hook(lambda *_, i=i: seen.append(i)) for i in range(3)]
    attributes = {name: (list(vars(child)), type(child)) for name, child in net.named_modules()}
    dictionaries = [id(child._forward_hooks) for child in net]
    prepared = prepare(net, "w4")
    during.remove()
    added = net[0].register_forward_pre_hook(lambda *_: seen.append("added"))
    prepared.undo()
    before.remove()
    net(torch.randn(2, 4))
    assert seen == ["added", 2]
    added.remove()
    kept.remove()
    net(torch.randn(2, 4))
    assert seen == ["added", 2]
    assert {name: (list(vars(child)), type(child)) for name, child in net.named_modules()} == attributes
    assert [id(child._forward_hooks) for child in net] == dictionaries


class Slotted(nn.Linear):
    __slots__ = ("gain",)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


def test_slots_are_kept_through_swaps_copies_and_pickles() -> None:
    net, x = nn.Sequential(Slotted(4, 4)), torch.randn(16, 4)
    net[0].gain = 3.0
    expected = net(x)
    prepared = prepare(net, "w8")
    for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(twin[0], QuantLayer)
        assert torch.equal(twin(x), expected)
    prepared.undo()
    assert type(net[0]) is Slotted
    assert torch.equal(net(x), expected)


class Guarded(nn.Linear):
    """Takes no attributes but its own, and says how it is copied."""

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "closed", False) and not hasattr(self, name):
            raise AttributeError(f"no {name} here")
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        return type(self), (self.in_features, self.out_features), self.__dict__


def test_a_class_with_its_own_setattr_and_reduce_is_quantized() -> None:
    net, x = nn.Sequential(Guarded(4, 4)).eval(), torch.randn(16, 4)
    net[0].closed = True
    calibrate(net, [x], QConfig.parse("w3a8", first_last_bits=None)).release()
    assert net[0].qconfig is not None
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))


class Sealed(type):
    def __new__(cls, name: str, bases: tuple[type, ...], namespace: Any) -> Any:
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError("sealed")
        return super().__new__(cls, name, bases, namespace)


class SealedLinear(nn.Linear, metaclass=Sealed):
    pass


class ModeLinear(nn.Linear):
    mode = "fan_in"


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class ChannelConv(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 3, 1)
        self.channels = 3


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (SealedLinear(4, 4), "its class cannot be changed"),
        (ModeLinear(4, 4), "its class defines 'mode', the name of"),
        (ChannelConv(), "its attribute 'channels' has the name of"),
        (parametrize.register_parametrization(nn.Linear(4, 4), "bias", Noise()), "computed anew with other values"),
        (nn.Embedding(4, 4, max_norm=1.0), "its max_norm changes the weight.*set max_norm to None"),
    ],
    ids=["metaclass", "class_attribute", "attribute", "random", "max_norm"],
)
def test_a_layer_that_cannot_be_swapped_stays_float_and_is_named(layer: nn.Module, reason: str) -> None:
    net = nn.ModuleDict({"odd": layer, "plain": nn.Linear(4, 4)})
    kind = type(layer)
    with pytest.warns(UnsupportedLayerWarning, match=f"^odd: .*{reason}"):
        prepared = prepare(net, "w4")
    assert list(prepared.layers) == ["plain"]
    assert type(layer) is kind


def test_if_no_layer_can_be_quantized_the_error_says_what_to_do() -> None:
    with pytest.raises(SurgeryError, match=r"nothing to quantize.*0: the weight is lazy or no parameter.*Run one"):
        prepare(nn.Sequential(nn.LazyLinear(4)), "w4")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::lightning_ptq.errors.FunctionalOpWarning")
def test_a_scripted_part_is_named_and_stays_float() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))))
    net = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 2)).eval()
    x = torch.randn(16, 4)
    expected = net(x)
    with pytest.warns(UnsupportedLayerWarning, match=r"^1: it is scripted.*Script it after quantization"):
        calibration = calibrate(net, [x], "w8a8")
    assert list(calibration.layers) == ["0", "2"]
    torch.testing.assert_close(net(x), expected, rtol=0.05, atol=0.05)
    calibration.prepared.undo()
    assert torch.equal(net(x), expected)


def test_undo_follows_a_module_to_another_dtype_and_keeps_its_order() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x = torch.randn(16, 4)
    expected = net(x)
    calibration = calibrate(net, [x], "w4a8")
    net.double()
    calibration.prepared.undo()
    assert {tensor.dtype for tensor in (*net.parameters(), net[1].running_mean)} == {torch.float64}
    torch.testing.assert_close(net(x.double()), expected.double())
    assert list(net.state_dict())[:3] == ["0.weight", "1.weight", "1.bias"]
