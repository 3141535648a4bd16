from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ResNet, Snapshot, build, same_state, seeded, state
from torch import Tensor, nn

from lightning_ptq import QConfig, calibrate, measure_sensitivity, para_normalize, reestimate_batch_norm, tune_bias
from lightning_ptq.errors import (
    CalibrationError,
    QConfigError,
    SensitivityError,
    StatisticsError,
    UnfoldedBatchNormWarning,
)
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.statistics.acceptance import split_samples
from lightning_ptq.statistics.channel_statistics import ChannelStatistics, watch_outputs


class Folded(nn.Module):
    """Grouped, transposed and plain convolutions and a linear layer, each with a batch norm."""

    def __init__(self):
        super().__init__()
        self.grouped, self.n1 = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.up, self.n2 = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)
        self.line, self.n3 = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.n2(self.up(F.relu(self.n1(self.grouped(x))))))
        return self.head(F.relu(self.n3(self.line(x.mean((2, 3))))))


class PreActivation(nn.Module):
    """A batch norm cannot be folded between an activation and another operator, here a product."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(1.0 * self.norm(F.relu(self.first(x))))


class Encoder(nn.Module):
    """No batch norm anywhere."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(F.gelu(self.norm(self.first(x))))


def trained(make, shape):
    """A net whose batch norms have the statistics of its data, as after training."""
    net = build(make)
    for norm in net.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norm.momentum = None
            norm.reset_running_stats()
            with torch.no_grad():
                norm.weight.copy_(1 + 0.5 * seeded(8, len(norm.weight)))
                norm.bias.copy_(0.3 * seeded(9, len(norm.bias)))
    net.train()(seeded(7, 400, *shape))
    return net.eval()


CONV, FLAT = (4, 6, 6), (6,)
SIZES = (16, 16, 16, 7)


def batches(shape, seed=1):
    return list(seeded(seed, sum(SIZES), *shape).split(SIZES[0]))


def calibration_of(make=Folded, shape=CONV, bits="w3a4", **options):
    options = {"signed_scales": False, **options}  # which leaves more to correct
    return calibrate(trained(make, shape), batches(shape), QConfig.parse(bits, first_last_bits=None, **options))


def concatenated(calibration, name, mode):
    """A layer's output on all samples, channels first, float64."""
    outputs = []
    layer = calibration.layers[name]
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    with ops_in_mode(calibration.module, mode):
        for batch in range(len(calibration.batches)):
            calibration.run(batch)
    handle.remove()
    whole = torch.cat(outputs).double()
    return whole.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)


@pytest.mark.parametrize("mode", ["float", "quantized"])
def test_statistics_are_those_of_all_samples_concatenated(mode):
    calibration = calibration_of()
    found = watch_outputs(calibration, list(calibration.layers), mode)
    for name, statistics in found.items():
        whole = concatenated(calibration, name, mode)
        torch.testing.assert_close(statistics.mean, whole.mean(1))
        torch.testing.assert_close(statistics.deviation, whole.std(1, correction=0))


def test_far_means_do_not_drown_the_variance():
    x = seeded(3, 500, 2).double() + 1e7
    found = ChannelStatistics(1)
    for part in x.split(96):
        found.update(part)
    torch.testing.assert_close(found.deviation, x.std(0, correction=0), rtol=1e-6, atol=0)


def test_outputs_have_the_norms_statistics_again_and_the_integers_stay():
    calibration = calibration_of()
    before = {n: layer.weight_fake_quant.integers(layer.weight) for n, layer in calibration.layers.items()}
    result = reestimate_batch_norm(calibration, held_out=0)
    assert result.accepted
    assert result.after < result.before
    assert result.layers == ("grouped", "up", "line")
    for name, norm in (("grouped", "n1"), ("up", "n2"), ("line", "n3")):
        layer, norm = calibration.layers[name], getattr(calibration.module, norm)
        whole = concatenated(calibration, name, "quantized")
        torch.testing.assert_close(whole.mean(1), norm.bias.double(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(whole.std(1, correction=0), norm.weight.double().abs(), rtol=1e-3, atol=1e-4)
        assert torch.equal(layer.weight_fake_quant.integers(layer.weight), before[name])


@pytest.mark.parametrize(("make", "shape", "every", "layers"), [
    (Encoder, FLAT, False, ("first", "second")),
    (Folded, CONV, False, ("head",)),
    (Folded, CONV, True, ("grouped", "up", "line", "head")),
])  # fmt: skip
def test_outputs_have_the_float_statistics_where_there_was_no_norm(make, shape, every, layers):
    calibration = calibration_of(make, shape)
    result = para_normalize(calibration, every_layer=every, held_out=0)
    assert (result.accepted, result.layers) == (True, layers)
    for name in layers:
        found, wanted = (concatenated(calibration, name, mode) for mode in ("quantized", "float"))
        torch.testing.assert_close(found.mean(1), wanted.mean(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.std(1, correction=0), wanted.std(1, correction=0), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnfoldedBatchNormWarning")
def test_an_unfolded_norm_gets_the_running_statistics_of_the_quantized_network():
    net = trained(PreActivation, FLAT)
    before = Snapshot(net)
    samples = list(seeded(7, 400, 6).split(150))  # those that the float norm's own statistics are of
    with pytest.warns(UnfoldedBatchNormWarning):
        calibration = calibrate(net, samples, QConfig.parse("w2a2", first_last_bits=None))
    result = reestimate_batch_norm(calibration, held_out=0)
    assert (result.accepted, result.layers) == (True, ("norm",))
    inputs = []
    handle = net.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for batch in range(len(samples)):
        calibration.run(batch)
    handle.remove()
    torch.testing.assert_close(net.norm.running_mean, torch.cat(inputs).mean(0))
    torch.testing.assert_close(net.norm.running_var, torch.cat(inputs).var(0))
    assert not net.norm.training
    calibration.prepared.undo()
    before.assert_unchanged()


def test_biases_come_closer_to_the_float_outputs_and_nothing_else_moves():
    calibration = calibration_of(bits="w2a3")
    before = state(calibration.module)
    flags = [p.requires_grad for p in calibration.module.parameters()]
    result = tune_bias(calibration, steps=60, held_out=0)
    assert result.accepted
    assert result.after < 0.95 * result.before
    moved = {key for key, value in state(calibration.module).items() if not torch.equal(value, before[key])}
    assert moved == {f"{name}.bias" for name in calibration.layers} == set(result.layers)
    assert [p.requires_grad for p in calibration.module.parameters()] == flags
    assert all(p.grad is None for p in calibration.module.parameters())


def test_norms_are_tuned_with_the_biases_if_asked_and_given_back_by_undo():
    net = build(Encoder).eval()
    before = Snapshot(net)
    calibration = calibrate(net, batches(FLAT), QConfig.parse("w2a3", first_last_bits=None))
    result = tune_bias(calibration, steps=40, norm_affine=True, measure="mse", held_out=0)
    assert set(result.layers) == {"first.bias", "second.bias", "norm.weight", "norm.bias"}
    assert result.accepted
    calibration.prepared.undo()
    before.assert_unchanged()


STEPS = {
    "batch norm": lambda calibration, **options: reestimate_batch_norm(calibration, **options),
    "para": lambda calibration, **options: para_normalize(calibration, every_layer=True, **options),
    "bias": lambda calibration, **options: tune_bias(calibration, steps=5, lr=0.9, **options),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(("gains", "accepted"), [
    ([0.0, 0.0, 0.0, 0.0], False),
    ([0.1, 0.1, 0.2, 0.1], True),  # all a little better
    ([4.0, 0.0, -0.1, 0.0], False),  # one sample much better: better in the mean, but not beyond doubt
    ([-0.1, -0.1, -0.2, -0.1], False),
])  # fmt: skip
def test_what_does_not_help_beyond_doubt_on_held_out_samples_is_taken_back(step, gains, accepted, monkeypatch):
    calibration = calibrate(build(lambda: nn.Sequential(nn.Linear(6, 4, bias=False))).eval(), batches(FLAT), "w2a8")
    after = 1 - torch.tensor(gains, dtype=torch.float64)
    values = iter([[torch.ones_like(after)], [after]])
    monkeypatch.setattr("lightning_ptq.calibration.outputs.Meter.each", lambda meter: next(values))
    before = state(calibration.module)
    result = step(calibration)
    assert (result.accepted, result.before, result.after) == (accepted, 1.0, pytest.approx(float(after.mean())))
    assert accepted or same_state(state(calibration.module), before)


@pytest.mark.parametrize("step", ["batch norm", "para"])
def test_a_small_disk_means_computing_again_with_the_same_result(step, monkeypatch):
    calibrations = [calibration_of() for _ in range(3)]
    expected = STEPS[step](calibrations[0], held_out=0.25)
    for room in ("lightning_ptq.activations.memory_plan.disk_room", "lightning_ptq.activations.store.disk_room"):
        monkeypatch.setattr(room, lambda *_: 0)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_ptq.statistics.normalization.keep_outputs", lambda *_: True)
        with pytest.raises(CalibrationError, match="fit neither into memory_limit"):
            STEPS[step](calibrations[1], memory_limit="100KB")
    assert STEPS[step](calibrations[2], memory_limit="100KB") == expected  # the inputs of any layer fit
    assert expected.accepted
    assert same_state(state(calibrations[2].module), state(calibrations[0].module))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_an_exception_leaves_the_module_as_it_was(step):
    calibration = calibration_of()
    before = state(calibration.module)

    def stop(done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step(calibration, progress=stop)
    assert same_state(state(calibration.module), before)


def test_held_out_samples_are_not_used():
    calibration = calibration_of()
    tune, rest = split_samples(calibration, 0.25, seed=3)
    assert (len(tune.batches), len(rest.batches), tune.samples + rest.samples) == (3, 1, sum(SIZES))
    one = calibrate(trained(Folded, CONV), [seeded(1, 20, *CONV)], "w3a4")
    tune, rest = split_samples(one, 0.1, seed=0)
    assert (tune.samples, rest.samples) == (18, 2)
    assert torch.equal(torch.cat([tune.batches[0], rest.batches[0]]), one.batches[0])


def test_constant_channels_and_shared_scales_get_their_mean_only():
    net = trained(Folded, CONV)
    with torch.no_grad():
        net.grouped.weight[3] = 0
    calibration = calibrate(net, batches(CONV), QConfig.parse("w3a4", first_last_bits=None))
    result = para_normalize(calibration, every_layer=True, held_out=0)
    assert result.skipped == {"grouped": "1 of its channels are constant: mean only"}
    assert all(bool(torch.isfinite(value).all()) for value in state(calibration.module).values())


def test_bad_input_is_told():
    single = calibrate(trained(Encoder, FLAT), [seeded(1, 1, 6)], "w3a4")
    with pytest.raises(StatisticsError, match="two samples or more, the calibration set has 1"):
        reestimate_batch_norm(single)
    odd = calibrate(
        trained(Encoder, FLAT), [{"x": seeded(1, 8, 6), "scale": torch.tensor(1.0)}], "w3a4",
        forward=lambda module, batch: module(batch["x"] * batch["scale"]),
    )  # fmt: skip
    with pytest.raises(StatisticsError, match=r"one batch that cannot be divided.*held_out=0"):
        tune_bias(odd)
    calibration = calibration_of()
    for options, message in [
        ({"steps": 0}, "steps must be 1 or more.*steps=0"),
        ({"lr": math.inf}, "lr positive.*lr=inf"),
        ({"measure": "loss"}, "measures 'kl' or 'mse'.*got 'loss'"),
        ({"held_out": 1.0}, r"held_out must lie in \[0, 1\), got 1.0"),
    ]:
        with pytest.raises(QConfigError, match=message):
            tune_bias(calibration, **options)


def test_of_several_outputs_one_is_chosen():
    calibration = calibrate(
        build(ResNet).eval(), [seeded(1, 16, 2, 6, 6)], "w2a4", forward=lambda module, batch: (module(batch), batch)
    )
    assert tune_bias(calibration, steps=3, output=lambda found: found).step == "bias"


class Cast(nn.Module):
    """Computes in another type than that of its parameters, by an autocast of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.last(self.first(x).relu())


def test_a_layer_that_cannot_run_alone_is_skipped_and_named():
    qconfig = QConfig.parse("w4a4", first_last_bits=None)
    calibration = calibrate(build(Cast).eval(), [seeded(i, 32, 8) for i in range(4)], qconfig)
    result = para_normalize(calibration, measure="mse")
    assert "cannot run outside the network's forward" in result.skipped["last"]
    with pytest.raises(SensitivityError, match=r"layer 'last' cannot run outside the network's forward.*'kl' or 'mse'"):
        measure_sensitivity(calibration, ["w8a8", "w4a4"], measure="fisher")
    measure_sensitivity(calibration, ["w8a8", "w4a4"], measure="mse")
