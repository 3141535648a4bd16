from __future__ import annotations

import pytest
import torch
from helpers import build, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_ptq import calibrate
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.granularity import ChannelLayout
from lightning_ptq.numerics.observers import MinMaxObserver, MSEObserver, PercentileObserver
from lightning_ptq.numerics.quantize import choose_qparams, dequantize, fake_quantize, quantize
from lightning_ptq.numerics.spec import QuantSpec
from lightning_ptq.numerics.weight_scales import weight_qparams

quick = settings(max_examples=80, deadline=None, derandomize=True)

specs = st.builds(QuantSpec, st.integers(2, 8), st.booleans())
scales = st.floats(2**-10, 2**6, width=32) | st.floats(-(2**6), -(2**-10), width=32)  # negative: turned round


plain = st.lists(st.floats(-1000, 1000, width=32), min_size=12, max_size=12).map(torch.tensor)
halves = st.lists(st.integers(-600, 600), min_size=12, max_size=12).map(lambda steps: torch.tensor(steps) / 2)


def zero_point(data: st.DataObject, spec: QuantSpec) -> int:
    return 0 if spec.symmetric else data.draw(st.integers(spec.quant_min, spec.quant_max))


def assert_same_as_torch(ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    assert torch.equal(ours, theirs)
    upstream = torch.linspace(-1, 1, x.numel()).view_as(x)
    (ours_x,), (theirs_x,) = (torch.autograd.grad(y, x, upstream) for y in (ours, theirs))
    assert torch.equal(ours_x, theirs_x)


@quick
@given(plain, halves, scales, specs, st.data())
def test_per_tensor_equals_torch_bit_for_bit(
    x: Tensor, ties: Tensor, step: float, spec: QuantSpec, data: st.DataObject
) -> None:
    scale, zero = torch.tensor(step), torch.tensor(zero_point(data, spec), dtype=torch.int32)
    x = torch.cat([x, ties * scale]).requires_grad_()  # also on grid points, and half-way between them
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero, spec.quant_min, spec.quant_max)
    ours = fake_quantize(x, scale, zero, spec.quant_min, spec.quant_max)
    with torch.no_grad():
        assert torch.equal(fake_quantize(x, scale, zero, spec.quant_min, spec.quant_max), ours)
    assert_same_as_torch(ours, theirs, x)


@quick
@given(plain, halves, st.lists(scales, min_size=3, max_size=3), specs, st.sampled_from([0, 1, 2]), st.data())
def test_per_channel_equals_torch_bit_for_bit(
    x: Tensor, ties: Tensor, steps: list[float], spec: QuantSpec, axis: int, data: st.DataObject
) -> None:
    scale = torch.tensor(steps)
    zero = torch.tensor([zero_point(data, spec) for _ in steps], dtype=torch.int32)
    x = torch.stack([x.view(3, 4), ties.view(3, 4) * scale[:, None]], -1)
    x = x.movedim(0, axis).contiguous().requires_grad_()
    shape = [3 if dim == axis else 1 for dim in range(3)]
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, axis, spec.quant_min, spec.quant_max)
    ours = fake_quantize(x, scale.view(shape), zero.view(shape), spec.quant_min, spec.quant_max)
    assert_same_as_torch(ours, theirs, x)


def straight_through(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    def round_through(value: Tensor) -> Tensor:
        return value.round().detach() + (value - value.detach())  # the second term is exactly 0

    q = round_through(x / scale) + round_through(zero)
    q = torch.where(q < low, low, torch.where(q > high, high, q))  # unlike clamp, passes the gradient on the bounds
    return (q - round_through(zero)) * scale


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1), (6, 1, 1, 1), (1, 4, 1, 1), (6, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(4, symmetric=False), QuantSpec(8)], ids=lambda s: str(s.bits))
def test_gradients_of_scale_and_zero_point_are_those_of_lsq_plus(
    spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(6, 4, 5, 3, generator=generator) for _ in range(2))
    scale = torch.rand(shape, generator=generator) + 1.5  # a good part of the values is clamped
    scale = scale * 2 / (spec.quant_max - spec.quant_min)
    zero = torch.rand(shape, generator=generator) * 2 + (spec.quant_min + spec.quant_max) / 2
    leaves = [t.to(dtype).requires_grad_() for t in (x, scale, zero)]
    copies = [t.detach().double().requires_grad_() for t in leaves]
    ours = torch.autograd.grad(fake_quantize(*leaves, spec.quant_min, spec.quant_max), leaves, upstream.to(dtype))
    theirs = torch.autograd.grad(straight_through(*copies, spec.quant_min, spec.quant_max), copies, upstream.double())
    for found, expected in zip(ours, theirs, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (4, 1)], ids=str)
def test_the_input_dtype_is_kept(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.linspace(-2, 2, 36).view(4, 9).to(dtype)
    scale, zero = torch.full(shape, 0.137), torch.full(shape, 7, dtype=torch.int32)
    with torch.no_grad():
        found = fake_quantize(x, scale, zero, 0, 15)
    expected = fake_quantize(x.float(), scale, zero, 0, 15)
    with_graph = fake_quantize(x.requires_grad_(), scale, zero, 0, 15)
    assert found.dtype == with_graph.dtype == dtype
    assert torch.equal(found, with_graph)
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6, atol=0)
    assert torch.autograd.grad(with_graph.sum(), x)[0].dtype == dtype


@quick
@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), specs)
def test_the_grid_covers_the_range_and_holds_zero(a: float, b: float, spec: QuantSpec) -> None:
    low, high = sorted((a, b))
    scale, zero = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
    step, offset = scale.item(), zero.item()
    assert zero.dtype == torch.int32
    assert spec.quant_min <= offset <= spec.quant_max
    assert fake_quantize(torch.tensor(0.0), scale, zero, spec.quant_min, spec.quant_max).item() == 0

    least, greatest = (spec.quant_min - offset) * step, (spec.quant_max - offset) * step
    slack = 1e-5 * step if spec.symmetric else 0.501 * step  # an affine grid is shifted by up to half a step to hold 0
    assert least <= low + slack
    assert greatest >= high - slack
    low, high = min(low, 0), max(high, 0)
    needed = max(low / spec.quant_min, high / spec.quant_max) if spec.symmetric else (high - low) / spec.quant_max
    assert step == pytest.approx(needed, rel=1e-5, abs=1e-30)


@quick
@given(specs, st.floats(2**-20, 2**20, width=32), st.data())
def test_dequantized_integers_quantize_to_themselves(spec: QuantSpec, step: float, data: st.DataObject) -> None:
    scale, zero = torch.tensor(step), torch.tensor(zero_point(data, spec))
    integers = torch.arange(spec.quant_min, spec.quant_max + 1).float()
    values = dequantize(integers, scale, zero)
    assert torch.equal(quantize(values, scale, zero, spec.quant_min, spec.quant_max), integers)
    assert torch.equal(fake_quantize(values, scale, zero, spec.quant_min, spec.quant_max), values)
    assert values.unique().numel() == 2**spec.bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_snapped_weights_requantize_to_themselves(bits: int) -> None:
    spec = QuantSpec(bits, per_channel=True)
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(bits))
    scale, zero = choose_qparams(*weight.aminmax(dim=1, keepdim=True), spec)
    integers = quantize(weight, scale, zero, spec.quant_min, spec.quant_max)
    snapped = dequantize(integers, scale, zero)
    assert torch.equal(quantize(snapped, scale, zero, spec.quant_min, spec.quant_max), integers)
    assert ((snapped - weight).abs() <= 0.501 * scale).all()


HALVES = [torch.float16, torch.bfloat16]
GRIDS = {"per_channel": {"per_channel": True}, "per_tensor": {}, "groups": {"group_size": 4}}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("observer", ["mse", "percentile"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_empty_and_tiny_weights_survive_half_precision(dtype, observer, grid, symmetric, size):
    weight = seeded(1, 4, 8) * size
    if grid != "per_tensor":
        weight[1:] = seeded(2, 3, 8)
    spec = QuantSpec(4, symmetric, observer=observer, **GRIDS[grid])
    quantizer = FakeQuantize(spec, spec.granularity.layout(weight.shape, ChannelLayout()))
    scale, zero_point = weight_qparams(quantizer.rows(weight), spec)
    quantizer.scale.copy_(scale.view_as(quantizer.scale))
    quantizer.zero_point.copy_(zero_point.view_as(quantizer.zero_point))
    assert quantizer.scale.to(dtype).all()
    expected = quantizer(weight)
    quantizer.to(dtype)
    found = quantizer(weight.to(dtype))
    assert found.isfinite().all()
    assert torch.equal(found[0], found[0] * 0) or size
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=1.01 * scale.abs().max().item())
    assert quantizer.values(quantizer.integers(weight.to(dtype))).isfinite().all()


@pytest.mark.parametrize("make", [MinMaxObserver, PercentileObserver, MSEObserver])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_are_all_zero_survive_half_precision(make, symmetric):
    spec = QuantSpec(8, symmetric)
    observer = make(spec)
    observer.update(torch.zeros(5))
    scale, zero_point = observer.qparams()
    for dtype in HALVES:
        x = torch.tensor([0.0, 1.0], dtype=dtype)
        found = fake_quantize(x, scale.to(dtype), zero_point, spec.quant_min, spec.quant_max)
        assert found[0] == 0
        assert found.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_pruned_channel_is_zero_in_half_precision(dtype):
    net = build(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2], net[2].weight[:] = 0, 0, 0
    calibrate(net, [seeded(1, 32, 8)], "w4a8")
    inputs = seeded(2, 5, 8).to(dtype)
    net.to(dtype)
    with torch.no_grad():
        hidden = net[0](inputs)
        assert hidden.isfinite().all()
        assert not hidden[:, 2].any()
        assert torch.equal(net(inputs), net[2].bias.expand(5, 3))
