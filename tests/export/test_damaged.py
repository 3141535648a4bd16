from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_ptq import LayerQConfig, QConfig, QuantSpec, calibrate, load_packed, save_packed
from lightning_ptq.errors import PackedFileError

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def tiny(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.LayerNorm(6)).eval()


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(X)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with an affine and a signed grid, a folded batch norm, and floats."""
    net, path = tiny(), tmp_path_factory.mktemp("packed") / "net"
    affine = LayerQConfig(QuantSpec(4, symmetric=False, per_channel=True), QuantSpec(8, symmetric=False))
    signed = LayerQConfig(QuantSpec(4, per_channel=True), QuantSpec(8))
    calibrate(net, [X], QConfig(affine, overrides=(("2", signed),), first_last_bits=None)).release()
    save_packed(net, path)
    return path


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def load(path: Path, net: nn.Module | None = None) -> Tensor:
    return output(load_packed(tiny(seed=2) if net is None else net, path))


def signature(net: nn.Module) -> list[tuple[str, Any]]:
    kinds = [(name, (type(child), sorted(vars(child)))) for name, child in net.named_modules()]
    return kinds + [(key, value.tolist()) for key, value in net.state_dict().items()]


def mutate(data: bytes, chance: random.Random, start: int, end: int) -> bytes:
    """Flip a bit, overwrite, insert, delete or swap bytes between ``start`` and ``end``, or cut the file there."""
    at, other = (chance.randrange(start, end) for _ in range(2))
    kind = chance.choice(["flip", "flip", "flip", "flips", "byte", "zeros", "insert", "delete", "swap", "cut"])
    changed = bytearray(data)
    if kind == "flip":
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == "flips":
        for place in (at, other):
            changed[place] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        changed[at] = chance.randrange(256)
    elif kind == "zeros":
        length = chance.randrange(1, 16)
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == "insert":
        changed[at:at] = chance.randbytes(chance.randrange(1, 5))
    elif kind == "delete":
        del changed[at : at + chance.randrange(1, 5)]
    elif kind == "swap":
        changed[at], changed[other] = changed[other], changed[at]
    else:
        del changed[at:]
    return bytes(changed)


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield mutations of a file: two in its header for one in its tensors, whose bytes are all alike to a reader."""
    chance, header = random.Random(seed), 8 + int.from_bytes(data[:8], "little")
    while count:
        mutated = mutate(data, chance, *[(0, header), (0, header), (header, len(data))][count % 3])
        if mutated != data:
            count -= 1
            yield mutated


def test_no_mutation_of_a_file_gives_another_model(packed: Path, tmp_path: Path) -> None:
    path, expected, net = tmp_path / "net", load(packed), tiny(seed=2)
    before, same = signature(net), 0
    for mutated in mutations(packed.read_bytes(), 2400, seed=0):
        path.write_bytes(mutated)
        try:
            found = load(path, net)
        except PackedFileError:
            continue
        assert torch.equal(found, expected)
        net, same = tiny(seed=2), same + 1
    assert signature(net) == before  # of the last refusals; a module that was left swapped is refused as quantized
    assert same < 100


def test_no_flipped_bit_of_the_tensors_is_overlooked(packed: Path, tmp_path: Path) -> None:
    data, path = packed.read_bytes(), tmp_path / "net"
    header = 8 + int.from_bytes(data[:8], "little")
    net = tiny(seed=2)
    for at in range(header, len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(PackedFileError, match="damaged"):
            load_packed(net, path)


def test_a_file_without_a_checksum_loads_or_is_refused(packed: Path, tmp_path: Path) -> None:
    metadata, tensors = read(packed)
    del metadata["checksum"]
    path = tmp_path / "net"
    save_file(tensors, path, metadata)
    assert torch.equal(load(path), load(packed))
    net, loaded = tiny(seed=2), 0
    for mutated in mutations(path.read_bytes(), 400, seed=1):
        path.write_bytes(mutated)
        try:
            load(path, net)
        except PackedFileError:
            continue
        net, loaded = tiny(seed=2), loaded + 1
    assert 20 < loaded < 380


Change = Callable[[dict[str, Any], dict[str, str], dict[str, Tensor]], Any]


def layer(name: str, **values: Any) -> Change:
    return lambda header, metadata, tensors: header["layers"][name].update(values)


def spec(name: str, which: str, **values: Any) -> Change:
    return lambda header, metadata, tensors: header["layers"][name][which].update(values)


def fill(key: str, value: Any) -> Change:
    return lambda header, metadata, tensors: tensors[key].fill_(value)


def cast(key: str, dtype: torch.dtype) -> Change:
    return lambda header, metadata, tensors: tensors.update({key: tensors[key].to(dtype)})


def swap(first: str, second: str) -> Change:
    return lambda header, metadata, tensors: tensors.update({first: tensors[second], second: tensors[first]})


def nested(header: dict[str, Any], metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    metadata["ptq"] = '{"layers":' + "[" * 100_000 + "]" * 100_000 + "}"


def both(header: dict[str, Any], metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    header["folded"] *= 2


VALUES: dict[str, Change] = {
    **{f"scale_{value}": fill("0.weight.scale", value) for value in (0.0, float("nan"), float("inf"), 1e-39, -1.0)},
    **{f"input_scale_{s}": layer("0", inputs={"input": [s, 0]}) for s in (0, -0.1, "1", True, None, 1e300, 10**400)},
    "input_scale_nan": layer("2", inputs={"input": [float("nan"), 0]}),
    "input_scale_inf": layer("2", inputs={"input": [float("inf"), 0]}),
    **{f"input_zero_point_{z}": layer("0", inputs={"input": [0.1, z]}) for z in (-1, 256, 1.5, True, None, 10**30)},
    "input_zero_point_of_a_signed_grid": layer("2", inputs={"input": [0.1, 3]}),
    "no_inputs": layer("0", inputs={}),
    "another_input": layer("0", inputs={"input": [0.1, 0], "other": [0.1, 0]}),
    "short_input": layer("0", inputs={"input": [0.1]}),
    "inputs_without_a_grid": layer("0", activation=None),
    "zero_point": fill("0.weight.zero_point", 16),
    "negative_zero_point": fill("0.weight.zero_point", -1),
    "packed_type": cast("0.weight.packed", torch.int8),
    "scale_type": cast("0.weight.scale", torch.int32),
    "zero_point_type": cast("0.weight.zero_point", torch.float32),
    "bias_type": cast("2.bias", torch.int64),
    "scale_shape": lambda h, m, tensors: tensors.update({"0.weight.scale": tensors["0.weight.scale"][None].clone()}),
    "bias_shape": lambda header, metadata, tensors: tensors.update({"0.bias": torch.zeros(7)}),
    "key_more": lambda header, metadata, tensors: tensors.update({"3.gain": torch.zeros(7)}),
    "huge_shape": layer("0", shapes={"weight": [10**30, 10**30]}),
    "negative_shape": layer("0", shapes={"weight": [-6, -4]}),
    "shape_of_truth": layer("0", shapes={"weight": [True, 4]}),
    "two_weights": layer("0", shapes={"weight": [6, 4], "other": [6, 4]}),
    "no_shapes": layer("0", shapes=None),
    "kind": layer("0", kind=3),
    "field_more": layer("0", more=1),
    "bits_of_truth": spec("0", "weight", bits=True),
    "other_bits": spec("0", "weight", bits=8),
    "symmetric_as_a_number": spec("0", "weight", symmetric=0),
    "per_channel": spec("0", "weight", per_channel=False),
    "group_size": spec("0", "weight", group_size=2),
    "group_size_0": spec("0", "weight", group_size=0),
    "observer": spec("0", "weight", observer="none"),
    "percentile": spec("0", "weight", percentile=float("nan")),
    "spec_more": spec("0", "weight", more=1),
    "activation_as_a_list": layer("0", activation=[8]),
    "layers_as_a_list": lambda header, metadata, tensors: header.update(layers=list(header["layers"].items())),
    "layer_as_a_list": lambda header, metadata, tensors: header["layers"].update({"0": []}),
    "no_folded": lambda header, metadata, tensors: header.pop("folded"),
    "folded_number": lambda header, metadata, tensors: header.update(folded=[1]),
    "folded_twice": both,
    "folded_layer": lambda header, metadata, tensors: header.update(folded=["3"]),
    "header_as_a_list": lambda header, metadata, tensors: metadata.update(ptq="[]"),
    "long_number": lambda header, metadata, tensors: metadata.update(ptq='{"layers":' + "9" * 5000 + "}"),
    "nested": nested,
    "no_header": lambda header, metadata, tensors: metadata.update(ptq=None),
    "version_0": lambda header, metadata, tensors: metadata.update(version="0"),
    "version_-1": lambda header, metadata, tensors: metadata.update(version="-1"),
    "version_of_other_digits": lambda header, metadata, tensors: metadata.update(version="\u0662"),
    "long_version": lambda header, metadata, tensors: metadata.update(version="1" * 5000),
    "version_1": lambda header, metadata, tensors: metadata.update(version="1"),
    "metadata_more": lambda header, metadata, tensors: metadata.update(checksun="0"),
}


def rewrite(source: Path, path: Path, change: Change, checksum: bool = False) -> Path:
    metadata, tensors = read(source)
    header = json.loads(metadata.pop("ptq"))
    if not checksum:
        del metadata["checksum"]
    change(header, metadata, tensors)
    text = metadata.pop("ptq", json.dumps(header))
    save_file(tensors, path, {**metadata, **({} if text is None else {"ptq": text})})
    return path


@pytest.mark.parametrize("value", VALUES)
def test_a_bad_value_is_refused_without_a_checksum_too(value: str, packed: Path, tmp_path: Path) -> None:
    path = rewrite(packed, tmp_path / "net", VALUES[value])
    net = tiny(seed=2)
    before = signature(net)
    with pytest.raises(PackedFileError, match=r"damaged|belongs to another model"):
        load_packed(net, path)
    assert signature(net) == before
    assert torch.equal(load(packed, net), load(packed))


def test_two_tensors_of_one_shape_in_each_others_place_are_refused(packed: Path, tmp_path: Path) -> None:
    path = rewrite(packed, tmp_path / "net", swap("0.weight.scale", "2.weight.scale"), checksum=True)
    with pytest.raises(PackedFileError, match="its checksum is that of another content"):
        load(path)


def test_a_checksum_covers_names_and_header(packed: Path, tmp_path: Path) -> None:
    for change in (spec("0", "activation", observer="minmax"), swap("3.weight", "3.bias"), fill("3.bias", 0.5)):
        assert torch.isfinite(load(rewrite(packed, tmp_path / "old", change))).all()  # nothing else is wrong with it
        with pytest.raises(PackedFileError, match="checksum"):
            load(rewrite(packed, tmp_path / "new", change, checksum=True))


class Refusing(nn.Module):
    """Raises while its tensors are loaded."""

    def __init__(self, refuse: bool) -> None:
        super().__init__()
        self.a, self.refuse, self.b = nn.LayerNorm(4), refuse, nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def get_extra_state(self) -> Any:
        return {"version": [1, None, "x"]}

    def set_extra_state(self, state: Any) -> None:
        if self.refuse:
            raise ZeroDivisionError("no state")


def test_a_module_that_raises_while_it_is_loaded_stays_as_it_was(tmp_path: Path) -> None:
    net = Refusing(refuse=False)
    nn.init.normal_(net.a.weight)
    calibrate(net, [X], "w4a8").release()
    save_packed(net, tmp_path / "net")
    target = Refusing(refuse=True)
    types, before = [type(child) for child in target.modules()], copy.deepcopy(target.state_dict())
    with pytest.raises(PackedFileError, match=r"Refusing does not take it \(no state\)"):
        load_packed(target, tmp_path / "net")
    assert [type(child) for child in target.modules()] == types
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items() if key != "_extra_state")
    target.refuse = False
    assert torch.equal(output(load_packed(target, tmp_path / "net")), output(net))


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    calibrate(net, [X], "w4a8").release()
    scale = net[0].input_fake_quant.scale.clone()
    net[0].input_fake_quant.scale.fill_(0)
    with pytest.raises(PackedFileError, match=r"cannot be written .*the input scale 0"):
        save_packed(net, tmp_path / "net")
    net[0].input_fake_quant.scale.copy_(scale)
    with pytest.raises(PackedFileError, match="cannot be written"):
        save_packed(net, tmp_path / "missing" / "net")
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(PackedFileError, match=r"'0\.weight'.*cannot be packed: it is not a number"):
        save_packed(net, tmp_path / "net")
    with pytest.raises(PackedFileError, match="on the meta device"):
        save_packed(net.to("meta"), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
