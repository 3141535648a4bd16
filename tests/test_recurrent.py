"""Recurrent layers and cells: weights per row of a gate, quantized inputs and hidden states."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_ptq import (
    QConfig,
    ReconstructionConfig,
    adaquant,
    calibrate,
    load_packed,
    measure_sensitivity,
    para_normalize,
    prepare,
    save_packed,
    tune_bias,
)
from lightning_ptq.network.op import QuantizedOp, ops_in_mode
from lightning_ptq.report.inspect_module import inspect_module
from lightning_ptq.runtime.structure import float_tensors_in

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def made(cls: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(*args, **kwargs).eval()


LAYERS: dict[str, Any] = {
    "lstm": lambda: made(nn.LSTM, 4, 6),
    "lstm, all options": lambda: made(nn.LSTM, 4, 6, 2, batch_first=True, bidirectional=True, proj_size=3, dropout=0.5),
    "lstm, no bias": lambda: made(nn.LSTM, 4, 6, 2, bias=False),
    "gru": lambda: made(nn.GRU, 4, 6, 2, batch_first=True),
    "gru, both directions": lambda: made(nn.GRU, 4, 6, bidirectional=True),
    "rnn": lambda: made(nn.RNN, 4, 6, 2, bidirectional=True),
    "rnn, relu": lambda: made(nn.RNN, 4, 6, nonlinearity="relu", batch_first=True),
}
CELLS = {"lstm cell": nn.LSTMCell, "gru cell": nn.GRUCell, "rnn cell": nn.RNNCell}


def states(layer: Any, *samples: int) -> Any:
    """Return states before the first step."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    hidden = seeded(3, count, *samples, getattr(layer, "proj_size", 0) or layer.hidden_size).tanh()
    if not isinstance(layer, nn.LSTM):
        return hidden
    return hidden, seeded(4, count, *samples, layer.hidden_size)


def calls(layer: Any) -> dict[str, tuple[Any, ...]]:
    """Return arguments of all kinds."""
    x = seeded(0, 3, 5, 4) if layer.batch_first else seeded(0, 5, 3, 4)
    packed = pack_padded_sequence(x, torch.tensor([3, 5, 2]), layer.batch_first, enforce_sorted=False)
    return {
        "batch": (x,),
        "states": (x, states(layer, 3)),
        "single": (seeded(1, 5, 4),),
        "single, states": (seeded(1, 5, 4), states(layer)),
        "packed": (packed,),
        "packed, states": (packed, states(layer, 3)),
    }


def close(found: Any, expected: Any, **tolerance: float) -> None:
    pairs = zip(float_tensors_in(found), float_tensors_in(expected), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **tolerance)


def without_quantizers(layer: Any) -> Any:
    """Return a context in which the layer runs step by step with its float weights."""
    layer.mode = "quantized"
    return ops_in_mode(Wrapped(layer), "quantized")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["batch", "states", "single", "single, states", "packed", "packed, states"])
def test_steps_compute_what_torch_computes(name: str, kind: str) -> None:
    layer = LAYERS[name]()
    args = calls(layer)[kind]
    expected = layer(*args)
    prepared = prepare(Wrapped(layer), "w8a8")
    with without_quantizers(layer):
        found = layer(*args)
    assert type(found[0]) is type(expected[0])
    if isinstance(found[0], PackedSequence):
        assert torch.equal(found[0].batch_sizes, expected[0].batch_sizes)
    close(found, expected, rtol=1e-5, atol=1e-6)
    with ops_in_mode(Wrapped(layer), "float"):
        close(layer(*args), expected, rtol=0, atol=0)
    prepared.undo()
    close(layer(*args), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_cells_compute_what_torch_computes(name: str, batch: tuple[int, ...]) -> None:
    cell, x, hidden = made(CELLS[name], 4, 6), seeded(0, *batch, 4), seeded(1, *batch, 6).tanh()
    state = (hidden, seeded(2, *batch, 6)) if isinstance(cell, nn.LSTMCell) else hidden
    expected = [cell(x), cell(x, state)]
    prepare(Wrapped(cell), "w8a8")
    close([cell(x), cell(x, state)], expected, rtol=1e-5, atol=1e-6)


class Classifier(nn.Module):
    """A recurrent layer, and a head on its last output."""

    def __init__(self, layer: nn.Module, width: int, pack: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.pack = layer, nn.Linear(width, 3), pack

    def forward(self, x: Tensor) -> Tensor:
        if self.pack:
            lengths = torch.arange(len(x)) % x.shape[1] + 1
            packed, _ = self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            return self.head(pad_packed_sequence(packed, batch_first=True)[0].sum(1))
        return self.head(self.layer(x)[0][:, -1])


class Loop(nn.Module):
    """A cell that runs step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


NETS: dict[str, Any] = {
    "lstm": lambda seed: made(lambda: Classifier(nn.LSTM(8, 16, batch_first=True), 16), seed=seed),
    "lstm, all options": lambda seed: made(
        lambda: Classifier(nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True, proj_size=5, dropout=0.1), 10),
        seed=seed,
    ),
    "packed": lambda seed: made(lambda: Classifier(nn.GRU(8, 12, batch_first=True), 12, pack=True), seed=seed),
    "gru": lambda seed: made(lambda: Classifier(nn.GRU(8, 16, 2, batch_first=True), 16), seed=seed),
    "rnn": lambda seed: made(lambda: Classifier(nn.RNN(8, 16, batch_first=True), 16), seed=seed),
    "lstm cell": lambda seed: made(lambda: Loop(nn.LSTMCell(8, 16)), seed=seed),
    "gru cell": lambda seed: made(lambda: Loop(nn.GRUCell(8, 16)), seed=seed),
}
SAMPLES = [seeded(i, 32, 6, 3) @ seeded(99, 3, 8) for i in range(4)]  # white inputs leave nothing to tune


def test_each_input_and_each_weight_is_rounded_by_its_own_quantizer() -> None:
    net = NETS["gru"](0)
    calibration = calibrate(net, SAMPLES, QConfig.parse("w4a5", first_last_bits=None))
    layer = net.layer
    names = {"input_l0", "input_l1", "hidden_l0", "hidden_l1"}
    assert {which for name, which in calibration.observers if name == "layer"} == names
    assert set(layer.input_quantizers) == names
    q = {name: getattr(layer, f"{name}_fake_quant") for name in (*layer.input_names, *layer.weight_names)}
    tensors = {name: q[name](weight) for name, weight in layer.weights.items()}
    assert all(q[name].scale.shape == (48, 1) for name in layer.weight_names)
    x = seeded(9, 2, 6, 8)
    for at in (0, 1):
        hidden, outputs = torch.zeros(2, 16), []
        biases = [getattr(layer, f"bias_{which}_l{at}") for which in ("ih", "hh")]
        of_input = nn.functional.linear(q[f"input_l{at}"](x), tensors[f"weight_ih_l{at}"], biases[0])
        for step in of_input.unbind(1):
            of_hidden = nn.functional.linear(q[f"hidden_l{at}"](hidden), tensors[f"weight_hh_l{at}"], biases[1])
            reset, update = (step + of_hidden)[:, :32].sigmoid().chunk(2, -1)
            new = (step[:, 32:] + reset * of_hidden[:, 32:]).tanh()
            hidden = (1 - update) * new + update * hidden
            outputs.append(hidden)
        x = torch.stack(outputs, 1)
    close(layer(seeded(9, 2, 6, 8))[0], x, rtol=1e-5, atol=1e-5)


def test_observed_values_are_the_inputs_of_all_steps_in_the_layout_of_the_input() -> None:
    net = NETS["lstm, all options"](0)
    prepare(net, "w8a8")
    x = SAMPLES[0]
    seen = net.layer.input_tensors((x,), {})
    assert set(seen) == set(net.layer.input_names)
    assert all(found.shape[:2] == (32, 6) for found in seen.values())
    assert torch.equal(seen["input_l0"], x)
    output = net.layer(x)[0]
    close(seen["hidden_l1"][:, 1:], output[:, :-1, :5], rtol=1e-5, atol=1e-6)
    close(seen["hidden_l1_reverse"][:, :-1], output[:, 1:, 5:], rtol=1e-5, atol=1e-6)
    assert not seen["hidden_l0"][:, 0].any()


@pytest.mark.parametrize("name", NETS)
def test_networks_are_covered_and_close(name: str) -> None:
    net = NETS[name](0)
    expected = net(SAMPLES[0])
    found = inspect_module(net, SAMPLES[0], "w8a8")
    assert found.covered >= 0.99, found.products
    assert {row.name for row in found.layers if row.status == "quantized"} > {"head"}
    before = copy.deepcopy(net.state_dict())
    calibration = calibrate(net, SAMPLES, "w8a8")
    assert 0 < float((net(SAMPLES[0]) - expected).detach().norm() / expected.detach().norm()) < 0.05
    calibration.prepared.undo()
    assert torch.equal(net(SAMPLES[0]), expected)
    assert net.state_dict().keys() == before.keys()
    assert not any(isinstance(child, QuantizedOp) for child in net.modules())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_operation_counts_its_own_products(kind: Any) -> None:
    net = made(lambda: Classifier(kind(8, 16, 2, batch_first=True, bidirectional=True), 32))
    counted = {row.name: row.macs for row in inspect_module(net, SAMPLES[0], "w8a8").layers}
    prepare(net, "w8a8")
    macs = net.layer.macs((SAMPLES[0],), {}, net.layer(SAMPLES[0]))
    assert macs / 32 == counted["layer"] == 6 * net.layer.weight_count


@pytest.mark.parametrize("name", ["lstm, all options", "packed", "rnn", "lstm cell"])
def test_all_stages(name: str, tmp_path: Any) -> None:
    net = NETS[name](0)
    layer = "cell" if "cell" in name else "layer"
    calibration = calibrate(net, SAMPLES, QConfig.parse("w3a8", first_last_bits=None))
    rises = measure_sensitivity(calibration, ["w8a8", "w3a3"], measure="mse").rises
    assert all(rises[which]["w3a3"] > 0 for which in calibration.layers)
    before = {which: weight.detach().clone() for which, weight in getattr(net, layer).weights.items()}
    options: dict[str, Any] = {"lstm, all options": {"steps": 40, "rounding": "adaround"}, "packed": {"steps": 200}}
    config = ReconstructionConfig(**{"steps": 80, **options.get(name, {})}, batch_size=32)
    result = adaquant(calibration, granularity="layer", config=config, seed=1)
    unit = result.units[0]
    assert unit.name == layer
    assert unit.accepted
    assert unit.error_after < unit.error_before
    assert not any(torch.equal(before[which], weight) for which, weight in getattr(net, layer).weights.items())
    assert para_normalize(calibration, measure="mse", every_layer=True).skipped[layer]
    tune_bias(calibration, steps=2, measure="mse")
    expected = net(SAMPLES[0])
    save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(NETS[name](1), tmp_path / "net.safetensors")(SAMPLES[0]), expected)
    other = NETS[name](2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(SAMPLES[0]), expected)
    assert torch.equal(copy.deepcopy(net)(SAMPLES[0]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(SAMPLES[0]), expected)


class Returning(nn.LSTM):
    """A forward of its own, which returns the output alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * 2)[0]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Returning(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def test_a_derived_class_with_a_forward_of_its_own() -> None:
    net = made(Stack)
    expected = net(SAMPLES[0])
    calibration = calibrate(net, SAMPLES, "w8a8")
    assert torch.equal(net.layer.input_tensors((SAMPLES[0],), {})["input_l0"], SAMPLES[0] * 2)
    assert 0 < float((net(SAMPLES[0]) - expected).detach().norm() / expected.detach().norm()) < 0.05
    calibration.prepared.undo()
    assert torch.equal(net(SAMPLES[0]), expected)


def test_it_can_be_compiled_and_exported() -> None:
    net = NETS["lstm"](0)
    calibrate(net, SAMPLES, "w8a8")
    with torch.no_grad():
        expected = net(SAMPLES[0])
        assert torch.equal(torch.compile(net, backend="eager")(SAMPLES[0]), expected)
        assert torch.equal(torch.export.export(net, (SAMPLES[0],), strict=False).module()(SAMPLES[0]), expected)
