from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ResidualBlock, Zoo, randomize_norms
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_ptq import LayerQConfig, QConfig, QuantSpec, calibrate, load_packed, prepare, save_packed
from lightning_ptq.errors import PackedFileError, SurgeryError, TiedWeightWarning, UnfoldedBatchNormWarning
from lightning_ptq.export.bits import pack_bits, unpack_bits
from lightning_ptq.export.packed import FORMAT_VERSION

quick = settings(max_examples=60, deadline=None, derandomize=True)
INPUT = (4, 3, 8, 8)


@quick
@given(st.integers(2, 8), st.data())
def test_bits_round_trip(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    stream = pack_bits(torch.tensor(values), bits)
    assert stream.dtype == torch.uint8
    assert stream.numel() == -(-len(values) * bits // 8)
    assert unpack_bits(stream, bits, len(values)).tolist() == values


def test_bits_lie_lowest_first() -> None:
    assert pack_bits(torch.tensor([[0b101, 0b011], [0b110, 0b001]]), 3).tolist() == [0b10011101, 0b0011]


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def zoo(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize_norms(Zoo())


def images(seed: int = 1, shape: tuple[int, ...] = INPUT) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized_zoo(bits: str = "w4a8", **options: Any) -> nn.Module:
    """The zoo with random numbers, calibrated; the gate stays float and one batch norm cannot be folded."""
    net = zoo()
    with pytest.warns(UnfoldedBatchNormWarning, match="free_norm"):
        calibration = calibrate(net, [images()], QConfig.parse(bits, exclude=["gate"], **options))
    assert len(calibration.folded) == 4
    calibration.release()
    return net


def output(net: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return net(images(2) if x is None else x)


def layers_of(net: nn.Module) -> dict[str, Any]:
    return {name: child for name, child in net.named_modules() if hasattr(child, "qconfig")}


def short(pair: LayerQConfig | None) -> LayerQConfig | None:
    """Without the choice of observer, which a file does not keep."""
    if pair is None:
        return None
    weight, activation = pair.weight, pair.activation
    return LayerQConfig(
        QuantSpec(weight.bits, weight.symmetric, weight.per_channel),
        activation and QuantSpec(activation.bits, activation.symmetric, activation.per_channel),
    )


@pytest.mark.parametrize("bits", ["w2a4", "w3", "w4a8", "w8a8"])
def test_a_loaded_module_gives_the_same_outputs_bit_for_bit(bits: str, tmp_path: Path) -> None:
    net = quantized_zoo(bits)
    path = tmp_path / "net.safetensors"
    assert save_packed(net, path) == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]

    fresh = zoo(seed=5)
    assert not torch.equal(output(fresh), output(net))
    loaded = load_packed(fresh, str(path))
    assert loaded is fresh
    assert torch.equal(output(loaded), output(net))
    for name, layer in layers_of(net).items():
        assert layers_of(loaded)[name].qconfig == short(layer.qconfig)
    kept = ["gate.weight", "embedding.weight", "mean", "free_norm.running_var", "layer_scale.scale", "depthwise.gain"]
    for key in kept:
        assert torch.equal(loaded.state_dict()[key], zoo().state_dict()[key])


WEIGHTS = [QuantSpec(4, symmetric, per_channel) for symmetric in (True, False) for per_channel in (True, False)]


@pytest.mark.parametrize("weight", WEIGHTS, ids=["channel", "tensor", "affine_channel", "affine_tensor"])
@pytest.mark.parametrize(
    "activation", [None, QuantSpec(6), QuantSpec(6, symmetric=False)], ids=["none", "symmetric", "affine"]
)
def test_every_kind_of_grid_is_kept(weight: QuantSpec, activation: QuantSpec | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Flatten())
    with torch.no_grad():
        net[2].weight.add_(0.3)  # lopsided, so that an affine grid has a zero point of its own
    fresh = copy.deepcopy(net)
    calibrate(net, [images()], QConfig(LayerQConfig(weight, activation)))
    save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(output(load_packed(fresh, tmp_path / "net.safetensors")), output(net))


def test_a_packed_file_can_be_packed_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_packed(quantized_zoo("w3a5"), first)
    save_packed(load_packed(zoo(5), first), second)
    (metadata, tensors), (metadata_again, tensors_again) = read(first), read(second)
    assert metadata == metadata_again
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(tensor, tensors_again[key]) for key, tensor in tensors.items())


def test_tied_weights_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4))
    net[2].weight = net[0].weight
    fresh, x = copy.deepcopy(net), images(shape=(8, 6))
    with pytest.warns(TiedWeightWarning):
        calibrate(net, [x], "w4a8")
    save_packed(net, tmp_path / "net")
    with pytest.warns(TiedWeightWarning):
        load_packed(fresh, tmp_path / "net")
    assert torch.equal(output(fresh, x), output(net, x))


def test_a_shared_layer_is_packed_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(32, 32, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), shared, nn.ReLU(), shared)
    fresh = copy.deepcopy(net)
    calibrate(net, [images()], QConfig.parse("w4a8", first_last_bits=None))
    assert save_packed(net, tmp_path / "net") < 32 * 32 * 9
    assert torch.equal(output(load_packed(fresh, tmp_path / "net")), output(net))
    assert fresh[1] is fresh[3]


def test_a_w4_file_is_under_a_seventh_of_the_float_weights(tmp_path: Path) -> None:
    widths = [3, 48, 48, 64, 64]
    layers = [
        layer
        for inputs, outputs in pairwise(widths)
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
    ]
    net = randomize_norms(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))
    state = net.state_dict().values()
    assert 80_000 < sum(tensor.numel() for tensor in state) < 120_000
    float_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state)
    calibrate(net, [images()], QConfig.parse("w4a8", first_last_bits=None))
    assert save_packed(net, tmp_path / "net.safetensors") < float_bytes / 7


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "net.safetensors"
    save_packed(quantized_zoo(), path)
    return path


class Unpickled(Exception):
    """Raised by a pickle as soon as somebody reads it as one."""


class Bomb:
    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise Unpickled


def rewritten(change: Callable[[dict[str, Any], dict[str, str], dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Makes a file again after a change of its header, its metadata or its tensors."""

    def rewrite(path: Path) -> None:
        metadata, tensors = read(path)
        header = json.loads(metadata.pop("ptq"))
        change(header, metadata, tensors)
        save_file(tensors, path, {"ptq": json.dumps(header), **metadata})

    return rewrite


def write(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def cut(share: float) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


FAULTS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing": (lambda path: path.unlink(), FileNotFoundError, r"there is no file .*net\.safetensors.*save_packed"),
    "cut_header": (cut(0.01), PackedFileError, "damaged"),
    "cut_tensors": (cut(0.9), PackedFileError, "damaged"),
    "empty": (write(b""), PackedFileError, "damaged"),
    "garbage": (write(bytes(range(256)) * 40), PackedFileError, "damaged"),
    "pickle": (write(pickle.dumps(Bomb())), PackedFileError, "damaged"),
    "plain_safetensors": (lambda path: save_file({"a": torch.ones(2)}, path), PackedFileError, "not a packed file"),
    "newer": (
        rewritten(lambda header, metadata, tensors: metadata.update(version=str(FORMAT_VERSION + 1))),
        PackedFileError,
        rf"format version {FORMAT_VERSION + 1}.*pip install -U lightning-ptq",
    ),
    "odd_version": (
        rewritten(lambda header, metadata, tensors: metadata.update(version="one")),
        PackedFileError,
        "damaged",
    ),
    "no_header": (
        rewritten(lambda header, metadata, tensors: metadata.update(ptq="{")),
        PackedFileError,
        "damaged",
    ),
    "no_layers": (rewritten(lambda header, metadata, tensors: header.clear()), PackedFileError, "damaged"),
    "odd_bits": (
        rewritten(lambda header, metadata, tensors: header["layers"]["up"]["weight"].update(bits=9)),
        PackedFileError,
        "damaged",
    ),
    "no_weight": (
        rewritten(lambda header, metadata, tensors: tensors.pop("up.weight.packed")),
        PackedFileError,
        "damaged: the weight of layer 'up' is missing",
    ),
    "no_scale": (
        rewritten(lambda header, metadata, tensors: tensors.pop("up.weight.scale")),
        PackedFileError,
        "damaged.*'up",
    ),
    "short_weight": (
        rewritten(lambda header, metadata, tensors: tensors.update({"up.weight.packed": torch.zeros(1).byte()})),
        PackedFileError,
        "damaged",
    ),
}


def assert_untouched(net: nn.Module, load: Callable[[], Any], error: type[Exception], message: str) -> None:
    modules, state = list(net.modules()), copy.deepcopy(net.state_dict())
    types = [type(module) for module in modules]
    with pytest.raises(error, match=message):
        load()
    assert list(net.modules()) == modules
    assert [type(module) for module in modules] == types
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_and_the_module_stays_as_it_was(fault: str, packed: Path, tmp_path: Path) -> None:
    spoil, error, message = FAULTS[fault]
    path = tmp_path / "net.safetensors"
    path.write_bytes(packed.read_bytes())
    spoil(path)
    net = zoo(5)
    assert_untouched(net, lambda: load_packed(net, path), error, message)


def changed_zoo(**children: nn.Module) -> nn.Module:
    net = zoo(5)
    for name, child in children.items():
        setattr(net, name, child)
    return net


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "another_net": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
    "nothing_to_quantize": lambda: nn.Sequential(nn.ReLU()),
    "wider_layer": lambda: changed_zoo(head=nn.Linear(17, 6)),
    "a_layer_less": lambda: changed_zoo(head=nn.Identity()),
    "another_type_of_layer": lambda: changed_zoo(stem=nn.ConvTranspose2d(8, 3, 3)),
    "wider_float_part": lambda: changed_zoo(embedding=nn.Embedding(5, 17)),
    "a_float_part_less": lambda: changed_zoo(layer_norm=nn.Identity()),
    "no_folded_norm": lambda: changed_zoo(stem_norm=nn.Identity()),
    "another_norm": lambda: changed_zoo(stem_norm=nn.GroupNorm(2, 8)),
    "a_layer_more": lambda: changed_zoo(pool=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(12, 12, 1))),
    "a_float_part_more": lambda: changed_zoo(pool=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.GroupNorm(3, 12))),
    "a_bias_more": lambda: changed_zoo(hidden=nn.Linear(48, 17)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_model_is_refused(other: str, packed: Path) -> None:
    net = OTHERS[other]()
    assert_untouched(net, lambda: load_packed(net, packed), PackedFileError, "belongs to another model")


def test_what_is_not_quantized_is_not_packed(tmp_path: Path) -> None:
    net, prepared = zoo(), zoo()
    prepare(prepared, "w4")
    for module in (net, prepared):
        with pytest.raises(SurgeryError, match="Zoo is not quantized"):
            save_packed(module, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_module_is_not_loaded_into(packed: Path) -> None:
    net = quantized_zoo("w8")
    assert_untouched(net, lambda: load_packed(net, packed), SurgeryError, "has quantized layers already")


@pytest.mark.parametrize("bits", ["w3a5", "w2"])
@pytest.mark.parametrize("target", ["w3a5", "w8a8", "w6"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["prepared", "calibrated"])
def test_a_state_dict_brings_its_widths_along(bits: str, target: str, calibrated: bool) -> None:
    net = nn.Sequential(ResidualBlock(3), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten())
    other = randomize_norms(copy.deepcopy(net))
    calibrate(randomize_norms(net), [images()], QConfig.parse(bits, exclude=[] if calibrated else ["1"]))
    if calibrated:
        calibrate(other, [images(3)], target)
    else:
        prepare(other, target)
    assert not torch.equal(output(other), output(net))
    state = copy.deepcopy(net.state_dict())
    keys = other.load_state_dict(state)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert torch.equal(output(other), output(net))
    assert {key: value.tolist() for key, value in other.state_dict().items()} == {
        k: v.tolist() for k, v in state.items()
    }
    assert {n: str(m.qconfig) for n, m in layers_of(other).items()} == {
        n: str(m.qconfig) for n, m in layers_of(net).items()
    }


def test_a_prepared_module_takes_a_float_state_dict() -> None:
    float_net, other = zoo(), zoo(5)
    prepare(other, "w4a4")
    other.load_state_dict(float_net.state_dict())
    assert torch.equal(output(other), output(float_net))


def test_a_file_of_format_version_1_is_read(tmp_path: Path) -> None:
    net = quantized_zoo("w3a5")
    path, old = tmp_path / "net.safetensors", tmp_path / "old.safetensors"
    save_packed(net, path)
    metadata, tensors = read(path)
    header = json.loads(metadata["ptq"])

    def grid(spec: dict[str, Any]) -> dict[str, Any]:
        return {key: spec[key] for key in ("bits", "symmetric", "per_channel")}

    for name, entry in header["layers"].items():
        scale, zero_point = entry["inputs"]["input"]
        header["layers"][name] = {
            "kind": entry["kind"], "shape": entry["shapes"]["weight"], "weight": grid(entry["weight"]),
            "activation": grid(entry["activation"]), "scale": scale, "zero_point": zero_point,
        }  # fmt: skip
    save_file(tensors, old, {**metadata, "version": "1", "ptq": json.dumps(header)})
    assert torch.equal(output(load_packed(zoo(seed=3), old)), output(net))


def test_a_state_dict_with_records_of_grids_alone_is_read() -> None:
    net = quantized_zoo("w3a5")
    state = dict(net.state_dict())
    for key in [key for key in state if key.endswith("qconfig_json")]:
        record = json.loads(bytes(state[key].tolist()))
        grids = {
            which: {name: spec[name] for name in ("bits", "symmetric", "per_channel")} for which, spec in record.items()
        }
        state[key] = torch.tensor(list(json.dumps(grids).encode()), dtype=torch.uint8)
    known = {key: value.clone() for key, value in state.items()}
    loaded = zoo(seed=3)
    prepare(loaded, "w8a8")
    loaded.load_state_dict(state)
    assert torch.equal(output(loaded), output(net))
    assert all(torch.equal(state[key], value) for key, value in known.items())  # the user's dictionary is untouched
