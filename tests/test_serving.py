"""A quantized module in use: several threads, and weights that are quantized once."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import ResNet, Transformer, build, seeded, token_batches
from torch import nn
from torch.nn.utils import prune

from lightning_ptq import QConfig, calibrate
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.numerics.fake_quantize import FakeQuantize

X = seeded(9, 4, 2, 6, 6)


def quantized(qconfig: str = "w4a8") -> nn.Module:
    net = build(ResNet).eval()
    calibrate(net, [seeded(0, 16, 2, 6, 6)], QConfig.parse(qconfig)).release()
    return net


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[FakeQuantize]:
    """The quantizers of weights that computed something."""
    found: list[FakeQuantize] = []
    forward = FakeQuantize.forward

    def counted(self: FakeQuantize, x: Any) -> Any:
        if isinstance(x, nn.Parameter):
            found.append(self)
        return forward(self, x)

    monkeypatch.setattr(FakeQuantize, "forward", counted)
    return found


@pytest.mark.parametrize("training", [False, True])
def test_a_quantized_module_serves_from_several_threads(training: bool) -> None:
    net = quantized()
    for child in net.modules():
        if "Quant" in type(child).__name__:
            child.training = training  # in train mode nothing is kept, so every forward quantizes the weights
    inputs = [seeded(i, 2, 2, 6, 6) for i in range(8)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    start = threading.Barrier(8)

    def serve(index: int) -> bool:
        start.wait()
        with torch.no_grad():
            return all(torch.equal(net(inputs[index]), expected[index]) for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(serve, range(8)))


def test_one_thread_may_run_the_float_reference_while_others_serve() -> None:
    net = build(ResNet).eval()
    expected_float = net(X)
    calibrate(net, [seeded(0, 16, 2, 6, 6)], "w4a8")
    twin = copy.deepcopy(net)
    with torch.no_grad(), ops_in_mode(twin, "float"):
        expected = net(X)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: (twin if i % 2 else net)(X), range(40)))
    for index, output in enumerate(found):
        torch.testing.assert_close(output, expected_float if index % 2 else expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_constant_weights_are_quantized_once(mode: Any, roundings: list[FakeQuantize]) -> None:
    net = quantized()
    with mode():
        first = net(X)
        once = len(roundings)
        assert torch.equal(net(X), first)
    assert once == 6
    assert len(roundings) == once
    with torch.no_grad():
        assert torch.equal(net(X), first)
    assert len(roundings) == once
    net.requires_grad_(False)
    x = X.clone().requires_grad_()
    net(x).sum().backward()  # what inference mode left behind can be differentiated through
    assert x.grad.abs().sum() > 0


def halve(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(0.5)


CHANGES = {
    "weight": lambda layer: halve(layer.weight),
    "weight under no_grad by copy_": lambda layer: layer.weight.detach().copy_(layer.weight.detach() * 0.5),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 0.5)),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.detach() * 0.5),
    "scale": lambda layer: halve(layer.weight_fake_quant.scale),
    "another scale": lambda layer: setattr(layer.weight_fake_quant, "scale", layer.weight_fake_quant.scale * 0.5),
    "state dict": lambda layer: layer.load_state_dict(
        {key: value * 0.5 if key == "weight" else value for key, value in copy.deepcopy(layer.state_dict()).items()}
    ),
    "data in place, then eval": lambda layer: (layer.weight.data.mul_(0.5), layer.eval()),
    "dtype and back": lambda layer: (layer.double(), halve(layer.weight), layer.float()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_kept_is_forgotten_when_the_weight_or_its_grid_changes(change: Any) -> None:
    net = quantized()
    with torch.no_grad():
        before = net(X)
    change(net.stem)
    with torch.no_grad():
        after = net(X)
        fresh = copy.deepcopy(net)(X)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh)


def test_gradients_reach_the_weights_in_eval_mode_after_inference() -> None:
    net = quantized()
    with torch.no_grad():
        expected = net(X)
    output = net(X)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert net.stem.weight.grad.abs().sum() > 0


def test_copies_and_pickles_leave_out_what_was_kept() -> None:
    net = quantized()
    size = len(pickle.dumps(net))
    with torch.no_grad():
        expected = net(X)
    assert len(pickle.dumps(net)) == size
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.stem.weight_fake_quant._cached is None
        with torch.no_grad():
            assert torch.equal(twin(X), expected)


def test_a_quantized_module_is_exported_by_torch() -> None:
    net = quantized()
    with torch.no_grad():
        expected = net(X)
        program = torch.export.export(net, (X,), strict=False)
        assert torch.equal(program.module()(X), expected)
        assert torch.equal(net(X), expected)


def test_a_module_that_calls_itself_sees_its_own_weight() -> None:
    class Recursive(nn.Linear):
        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            y = super().forward(x)
            return self(y, depth - 1) if depth else y

    net = nn.Sequential(Recursive(4, 4)).eval()
    calibrate(net, [seeded(0, 16, 4)], QConfig.parse("w3", first_last_bits=None))
    layer, x = net[0], seeded(1, 2, 4)
    weight = layer.weight_fake_quant(layer.weight)
    expected = x
    for _ in range(3):
        expected = nn.functional.linear(expected, weight, layer.bias)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning")
def test_a_transformer_serves_from_several_threads() -> None:
    net = build(Transformer).eval()
    batches = token_batches()
    calibrate(net, batches, "w4a8").release()
    with torch.no_grad():
        expected = [net(**batch) for batch in batches]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda i: net(**batches[i % 3]), range(60)))
    assert all(torch.equal(output, expected[index % 3]) for index, output in enumerate(found))


def test_views_of_one_storage_are_told_apart() -> None:
    layers = [quantized() for _ in range(3)]
    for index, net in enumerate(layers):
        net.stem.weight.data /= 1 + index
    base = copy.deepcopy(layers[0])
    params, buffers = torch.func.stack_module_state(layers)
    with torch.no_grad():
        for index, net in enumerate(layers):
            state = {k: v[index] for k, v in (params | buffers).items()}
            assert torch.equal(torch.func.functional_call(base, state, (X,)), net(X))


def test_training_steps_between_evaluations_are_noticed() -> None:
    net = quantized()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=True)  # fused kernels leave the version counter alone
    for _ in range(2):
        net.train()
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
        net.eval()
        with torch.no_grad():
            assert torch.equal(net(X), copy.deepcopy(net)(X))


def test_a_forward_that_changes_its_weight_in_place_sees_the_same_weight_every_time() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                weight = self.weight.mul_(2)
            return nn.functional.linear(x, weight, self.bias)

    net = nn.Sequential(Doubling(4, 4)).eval()
    calibrate(net, [seeded(0, 16, 4)], QConfig.parse("w4", first_last_bits=None)).release()
    x = seeded(1, 2, 4)
    with torch.no_grad():
        expected = net(x)
        assert all(torch.equal(net(x), expected) for _ in range(3))


def test_hooks_of_a_quantizer_run_every_time_and_tracing_keeps_nothing() -> None:
    net, calls = quantized(), []
    handle = net.stem.weight_fake_quant.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(3):
            net(X)
        handle.remove()
        assert len(calls) == 3
        traced = torch.jit.trace(quantized(), (X,))
        torch.testing.assert_close(traced(X), net(X))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trace_by_torch_passes_its_check_and_can_be_saved() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    calibrate(net, [seeded(0, 16, 4)], "w4a8").release()
    x, file = seeded(1, 2, 4), io.BytesIO()
    torch.jit.save(torch.jit.trace(net, (x,)), file)  # with gradients enabled, as it is by default
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), net(x))


def test_pruned_and_replicated_layers_compute() -> None:
    net = quantized()
    with torch.no_grad():
        expected = net(X)
        replica = net.stem._replicate_for_data_parallel()
        for name, tensor in net.stem.named_parameters(recurse=False):
            setattr(replica, name, tensor.detach().clone())
        assert torch.equal(replica(X), net.stem(X))
        prune.l1_unstructured(net.stem, "weight", 5)
        assert not torch.equal(net(X), expected)
