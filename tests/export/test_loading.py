"""What was quantized and saved is loaded bit for bit: from a packed file and from a state dict, into a float module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm

from lightning_ptq import LayerQConfig, QConfig, QuantSpec, calibrate, load_packed, para_normalize, prepare, save_packed
from lightning_ptq.errors import CheckpointError, PackedFileError, SurgeryError
from lightning_ptq.network.prepare import is_prepared

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def output(net: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return net(x)


def by_file(net: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    save_packed(net, folder / "net")
    return load_packed(target, folder / "net")


def by_state(net: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    torch.save(net.state_dict(), folder / "state")
    keys = target.load_state_dict(torch.load(folder / "state", weights_only=True))
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    return target


def by_state_after_prepare(net: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    prepare(target, "w8a8")
    return by_state(net, target, folder)


def by_assignment(net: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    target.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return target


WAYS = [by_file, by_state, by_state_after_prepare, by_assignment]


class Net(nn.Module):
    """A folded batch norm, layers without a bias, an unfolded norm, and buffers of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12)
        self.body, self.layer_norm, self.head = nn.Linear(12, 12, bias=False), nn.LayerNorm(12), nn.Linear(12, 4)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("mask", torch.tensor([True, True, False, True]))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("nothing", None)
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x - self.mean)).relu()
        return self.head(self.layer_norm(self.body(x)))[:, self.index] * self.mask + self.shift


WEIGHTS = [
    QuantSpec(8, per_channel=True), QuantSpec(8, symmetric=False, per_channel=True), QuantSpec(8, symmetric=False),
    QuantSpec(3, group_size=4),
]  # fmt: skip


@functools.cache
def calibrated(weight: QuantSpec, exclude: tuple[str, ...]) -> nn.Module:
    net = made(Net)
    calibrate(net, [X], QConfig(LayerQConfig(weight, QuantSpec(8, symmetric=False)), exclude=exclude)).release()
    return net


def quantized(weight: QuantSpec = WEIGHTS[0], exclude: tuple[str, ...] = ()) -> nn.Module:
    return copy.deepcopy(calibrated(weight, exclude))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weight", WEIGHTS, ids=["symmetric", "affine", "affine_tensor", "groups"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_module_is_loaded_in_its_own_dtype(way: Any, weight: QuantSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    net = quantized(weight).to(dtype)
    loaded = way(net, made(Net, seed=1).to(dtype), tmp_path)
    assert torch.equal(output(loaded, X.to(dtype)), output(net, X.to(dtype)))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for key, value in loaded.state_dict().items():
        assert value.dtype == net.state_dict()[key].dtype, key


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_a_module_of_another_dtype_keeps_it(way: Any, source: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    net = quantized(QuantSpec(4, per_channel=True)).to(source)
    loaded = way(net, made(Net, seed=1).to(target), tmp_path)
    found, expected = output(loaded, X.to(target)), output(net, X.to(source))
    assert found.dtype == target
    torch.testing.assert_close(found.double(), expected.double(), atol=0.15, rtol=0.05)
    for name in ("stem", "body", "head") if way is by_file else ():
        mine, its = loaded.get_submodule(name), net.get_submodule(name)
        assert mine.weight.dtype == target
        integers = [op.weight_fake_quant.integers(op.weight.detach().float()) for op in (mine, its)]
        assert torch.equal(*integers)
        assert torch.equal(mine.weight_fake_quant.scale, its.weight_fake_quant.scale)


def test_a_conversion_keeps_scales_in_single_precision() -> None:
    net = quantized()
    scales = {key: value.clone() for key, value in net.state_dict().items() if key.endswith("scale")}
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        state = net.to(dtype).state_dict()
        assert all(
            torch.equal(state[key], value) and state[key].dtype == torch.float32 for key, value in scales.items()
        )
    assert net.to("meta").state_dict()["head.weight_fake_quant.scale"].is_meta


@pytest.mark.parametrize("way", WAYS)
def test_layers_without_a_bias_get_one_from_statistics_tuning(way: Any, tmp_path: Path) -> None:
    def make() -> nn.Module:
        layers = [nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.LayerNorm(32)]
        return nn.Sequential(*layers, nn.Linear(32, 4, bias=False))

    net, x = made(make), torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    calibration = calibrate(net, list(x.split(32)), "w2a2")
    assert para_normalize(calibration, measure="mse").accepted
    calibration.release()
    assert all(net[index].bias is not None for index in (0, 2, 4))
    for dtype in DTYPES:
        net.to(dtype)
        loaded = way(net, made(make, seed=1).to(dtype), tmp_path)
        assert torch.equal(output(loaded, x.to(dtype)), output(net, x.to(dtype)))
        assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_norm_in_a_layer_that_stays_float_gives_it_a_bias(way: Any, tmp_path: Path) -> None:
    net = quantized(exclude=("stem",))
    assert net.stem.qconfig is None
    assert net.stem.bias is not None
    assert torch.equal(output(way(net, made(Net, seed=1), tmp_path)), output(net))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(10, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding((x.abs() * 2).long().clamp(0, 9))))


class Twice(nn.Module):
    """A layer and a batch norm under several names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.b, self.same_norm = self.a, self.norm
        self.parts = nn.ModuleDict({"x": nn.Sequential(self.a, nn.Linear(8, 4))})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["x"](self.same_norm(self.b(x)))


class Extra(nn.Module):
    """Has an extra state, which its output depends on."""

    def __init__(self, plain: bool = True) -> None:
        super().__init__()
        self.net, factor = mlp(), torch.rand(int(torch.randint(1, 6, ())))
        self.factor: Any = {"factor": factor.sum().item(), "of": ["x", None]} if plain else factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (self.factor["factor"] if isinstance(self.factor, dict) else self.factor.sum())

    def get_extra_state(self) -> Any:
        return self.factor

    def set_extra_state(self, state: Any) -> None:
        self.factor = state


class Renamed(nn.Module):
    """State dict hooks of its own give its tensors other names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self._register_state_dict_hook(lambda module, state, *_: self.rename(state, "net.", "core."))
        self._register_load_state_dict_pre_hook(lambda state, *_: self.rename(state, "core.", "net."))

    def rename(self, state: Any, old: str, new: str) -> None:
        for key in list(state):
            state[key.replace(old, new)] = state.pop(key)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x[None], x[None], x[None], need_weights=False)[0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


def checkpointed() -> nn.Module:
    net = mlp()
    net[2] = checkpoint_wrapper(net[2])
    return nn.Sequential(checkpoint_wrapper(net))


def normed() -> nn.Module:
    net = mlp()
    weight_norm(net[2])
    return net


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4)).requires_grad_(False)


ODD: dict[str, Callable[[], nn.Module]] = {
    "wrapped": lambda: Wrapper(Wrapper(mlp())),
    "data_parallel": lambda: nn.DataParallel(mlp()),
    "activation_checkpointing": checkpointed,
    "tied": Tied,
    "twice": Twice,
    "plain_extra_state": Extra,
    "tensor_extra_state": lambda: Extra(plain=False),
    "renamed": Renamed,
    "attention": Attention,
    "weight_norm": normed,
    "frozen": frozen,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")
def test_odd_modules_are_loaded(odd: str, way: Any, tmp_path: Path) -> None:
    net, fresh = made(ODD[odd]), made(ODD[odd], seed=1)
    calibrate(net, [X], "w4a8").release()
    assert not torch.equal(output(fresh), output(net))
    assert torch.equal(output(way(net, fresh, tmp_path)), output(net))


@pytest.mark.parametrize("way", WAYS)
def test_a_module_made_in_inference_mode_is_loaded(way: Any, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4))

    net = made(make)
    calibrate(net, [X], "w4a8").release()
    with torch.inference_mode():
        fresh = made(make, seed=1)
    assert torch.equal(output(way(net, fresh, tmp_path)), output(net))


def test_an_extra_state_that_is_no_json_is_refused(tmp_path: Path) -> None:
    net = made(Extra)
    calibrate(net, [X], "w4a8").release()
    net.factor = {**net.factor, "seen": {1, 2}}
    with pytest.raises(PackedFileError, match=r"'_extra_state', a dict, cannot be packed.*torch\.save"):
        save_packed(net, tmp_path / "net")


def state_of(make: Callable[[], nn.Module] = mlp) -> tuple[nn.Module, dict[str, Tensor]]:
    net = made(make)
    calibrate(net, [X], "w4a8").release()
    return net, dict(net.state_dict())


def test_a_state_dict_without_quantized_layers_leaves_a_module_float() -> None:
    net = made(mlp, seed=1)
    net.load_state_dict(made(mlp).state_dict())
    assert not is_prepared(net)
    with pytest.raises(TypeError):
        net.load_state_dict([])


@pytest.mark.parametrize("other", [
    lambda: nn.Sequential(nn.ReLU()),
    lambda: nn.Sequential(mlp(), nn.Linear(4, 4)),
    lambda: nn.Sequential(*[nn.LazyLinear(12), nn.ReLU()] * 2, nn.LazyLinear(4)),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnsupportedLayerWarning")
def test_a_state_dict_of_another_module_is_refused_with_the_line_to_write(other: Callable[[], nn.Module]) -> None:
    net, (_, state) = other(), state_of()
    kinds = [type(child) for child in net.modules()]
    with pytest.raises(CheckpointError, match=r"'0' .*, '2' .*, '4' .*write: .*lightning_ptq\.load_quantized\("):
        net.load_state_dict(state)
    assert [type(child) for child in net.modules()] == kinds


def test_nothing_is_prepared_if_nothing_quantized_fits() -> None:
    net, (_, state) = nn.Sequential(mlp(), nn.Linear(4, 4)), state_of()
    keys = net.load_state_dict(state, strict=False)
    assert set(keys.unexpected_keys) == set(state)
    assert not is_prepared(net)


def test_a_part_of_a_state_dict_is_loaded_into_a_part_of_a_module() -> None:
    net, state = state_of(lambda: Wrapper(mlp()))
    fresh = made(lambda: Wrapper(mlp()), seed=1)
    fresh.inner.load_state_dict({key.removeprefix("inner."): value for key, value in state.items()})
    assert torch.equal(output(fresh), output(net))
    one = made(mlp, seed=1)
    one.load_state_dict({key[6:]: value for key, value in state.items() if key.startswith("inner.0")}, strict=False)
    assert [layer.qconfig is None for layer in (one[0], one[2], one[4])] == [False, True, True]


def test_a_damaged_record_is_named() -> None:
    _, state = state_of()
    for record in (b"{", b"[]", b"\xff", b"[" * 100_000, b'{"weight": {"bits": 99}, "activation": null}'):
        net = made(mlp, seed=1)
        state["0.qconfig_json"] = torch.tensor(list(record), dtype=torch.uint8)
        with pytest.raises(SurgeryError, match=r"entry '0\.qconfig_json' is damaged"):
            net.load_state_dict(state)
        assert not is_prepared(net)


def test_a_meta_module_is_loaded_by_assignment_or_refused(tmp_path: Path) -> None:
    net, state = state_of()
    with torch.device("meta"):
        assigned, other = mlp().eval(), mlp()
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(output(assigned), output(net))
    save_packed(net, tmp_path / "net")
    with pytest.raises(PackedFileError, match=r"on the meta device here.*to_empty"):
        load_packed(other, tmp_path / "net")


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnsupportedLayerWarning")
def test_a_lazy_module_is_refused_until_it_has_run(tmp_path: Path) -> None:
    net, _ = state_of()
    save_packed(net, tmp_path / "net")
    lazy = nn.Sequential(nn.LazyLinear(12), *list(made(mlp, seed=1))[1:])
    with pytest.raises(PackedFileError, match="a LazyLinear that stays float; run one forward first"):
        load_packed(lazy, tmp_path / "net")
    output(lazy)
    assert torch.equal(output(load_packed(lazy, tmp_path / "net")), output(net))
