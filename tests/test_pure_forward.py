"""Forwards that are no pure function of their batch: noise, state, work in place, caches."""

from __future__ import annotations

import copy
import gc
import random
import time
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import build, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture, QConfig, StatsTuning, adaquant, calibrate, inspect
from lightning_ptq.errors import CalibrationError, UnrepeatableForwardWarning
from lightning_ptq.runtime.isolation import Isolation

DATA = seeded(7, 512, 8) @ seeded(8, 8, 16)


def net16():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


class Step(pl.LightningModule):
    """A module whose ``training_step`` is the given function of module and batch."""

    def __init__(self, step):
        super().__init__()
        self.net = net16()
        self.step = step

    def training_step(self, batch, i):
        return self.step(self, batch[0])

    def configure_optimizers(self):
        return None


def torch_noise(m, x):
    return F.mse_loss(m.net(x + torch.randn_like(x)), x)


def numpy_noise(m, x):
    return F.mse_loss(m.net(x + torch.from_numpy(np.random.randn(*x.shape)).float()), x)


def python_noise(m, x):
    return F.mse_loss(m.net(x + torch.tensor([[random.gauss(0, 1) for _ in range(16)] for _ in x])), x)


def dropout(m, x):
    return F.mse_loss(m.net(F.dropout(x, 0.5, training=True)), x)


def own_generator(m, x):
    return F.mse_loss(m.net(x + torch.randn(x.shape, generator=m.generator)), x)


def in_place(m, x):
    return F.mse_loss(m.net(x.div_(3)), x)


def counter(m, x):
    m.count += 1
    return F.mse_loss(m.net(x * (1 + m.count)), x)


def running_mean(m, x):
    m.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
    return F.mse_loss(m.net(x - m.mean), x)


def last_batch(m, x):
    previous = m.seen[-1] if m.seen else torch.zeros_like(x)
    m.seen.append(x)
    return F.mse_loss(m.net(x + 0.5 * previous), x)


STEPS = [
    torch_noise, numpy_noise, python_noise, dropout, own_generator, in_place, counter, running_mean, last_batch,
]  # fmt: skip


def module(step):
    m = build(lambda: Step(step))
    m.generator = torch.Generator().manual_seed(1)
    m.count, m.seen = 0, []
    m.register_buffer("mean", torch.zeros(16))
    return m


def fitted(m, *callbacks, first_last_bits=None):
    capture = CalibrationCapture("w3a8", first_last_bits=first_last_bits, resume=False, save_checkpoint=False)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[capture, *callbacks], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(m, DataLoader(TensorDataset(DATA.clone()), 64))
    return capture


def noise_to_signal(m, reference, x):
    with torch.no_grad():
        expected = reference(x)
        return float(F.mse_loss(m.net.eval()(x), expected) / expected.square().mean())


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.parametrize("step", STEPS)
def test_adaquant_beats_rounding_to_nearest_on_a_fixed_noise(step):
    errors = []
    x = DATA + seeded(99, 512, 16)
    for callbacks in ([], [AdaQuantLayerwise()]):
        m = module(step)
        reference = copy.deepcopy(m.net).eval()
        fitted(m, *callbacks)
        scaled = {"in_place": x / 3, "running_mean": DATA, "counter": 2 * DATA, "last_batch": DATA}
        errors.append(noise_to_signal(m, reference, scaled.get(step.__name__, x)))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("step", STEPS)
def test_a_forward_gives_the_same_each_time_and_leaves_nothing_behind(step):
    m = module(step)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), m.generator.get_state()
    batches = [[x.clone()] for x in DATA.split(128)]
    untouched = [x.clone() for x in DATA.split(128)]
    calibration = calibrate(m, batches, "w8a8", forward=lambda m, batch: m.training_step(batch, 0))
    again = [calibration.run(2) for _ in range(3)]
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], again[2])
    assert all(torch.equal(batch[0], x) for batch, x in zip(batches, untouched, strict=True))
    assert (m.count, m.seen, m.mean.abs().sum()) == (0, [], 0)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), m.generator.get_state()
    assert states[:2] == after[:2]
    assert all(map(torch.equal, states[2:], after[2:]))


def test_random_numbers_differ_between_batches():
    m = module(torch_noise)
    drawn = []
    forward = lambda m, batch: drawn.append(torch.randn(3)) or m.net(batch)  # noqa: E731
    calibrate(m, list(DATA.split(256)), "w8a8", forward=forward)
    # The first batch runs three times: once to find the functions that are called, and twice to be compared.
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[2], drawn[3])


class RandomBlock(nn.Module):
    """A residual block that drops activations in eval mode too, as Monte Carlo dropout does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.b(F.dropout(self.a(x).relu(), 0.3, training=True))


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_blocks_that_draw_random_numbers_are_tuned_on_the_numbers_of_each_call():
    net = build(lambda: nn.Sequential(nn.Linear(16, 16), RandomBlock(), RandomBlock(), nn.Linear(16, 4)))
    calibration = calibrate(net, list(DATA.split(64)), QConfig.parse("w3a8", first_last_bits=None))
    assert calibration.isolation.draws
    result = adaquant(calibration)
    assert [unit.accepted for unit in result.units if unit.name in ("1", "2")] == [True, True]
    assert all(unit.error_after < 0.95 * unit.error_before for unit in result.units if unit.name in ("1", "2"))


def test_what_a_step_keeps_on_the_module_does_not_leak():
    graphs = []

    def step(m, x):
        loss = F.mse_loss(m.net(x), x)
        m.outputs.append(loss)
        graphs.append(weakref.ref(loss))
        return loss

    m = module(step)
    m.outputs = []
    fitted(m, StatsTuning(measure="mse", steps=3))
    gc.collect()
    assert m.outputs == []
    assert not [ref for ref in graphs if ref() is not None]


def test_a_step_that_updates_parameters_in_place_leaves_them_alone():
    def step(m, x):
        with torch.no_grad():
            for slow, fast in zip(m.teacher.parameters(), m.net.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
        return F.mse_loss(m.net(x), m.teacher(x))

    m = module(step)
    m.teacher = build(net16, 1)
    before = [parameter.detach().clone() for parameter in m.teacher.parameters()]
    calibrate(m, [[DATA]], QConfig.parse("w8a8", exclude=["teacher*"]), forward=lambda m, b: m.training_step(b, 0))
    assert all(torch.equal(*pair) for pair in zip(before, m.teacher.parameters(), strict=True))


def test_a_late_change_in_place_is_an_error_that_names_the_tensor():
    def forward(m, x):
        m.mean.add_(1)
        return m.net(x)

    m = module(torch_noise)
    calibration = calibrate(m, [DATA], "w8a8", forward=lambda m, x: m.net(x + 0 * m.mean))
    calibration.forward = forward
    calibration.isolation.leaves_traces = True
    with pytest.raises(CalibrationError, match=r"changed .*mean.* in place"):
        calibration.run(0)


def test_what_still_differs_is_named_by_a_warning_and_by_inspect():
    def forward(m, x):
        return m.net(x * (time.perf_counter_ns() % 1000 + 1))

    with pytest.warns(UnrepeatableForwardWarning, match=r"the input of layer 'net.0' had other values"):
        calibrate(module(torch_noise), [DATA], "w8a8", forward=forward)
    findings = inspect(module(torch_noise), DATA, "w8a8", step=forward).warnings
    assert [finding.category for finding in findings] == ["UnrepeatableForwardWarning"]


@dataclass
class Cache:
    """A key-value cache as decoders pass it on; it grows with every call."""

    keys: dict[int, torch.Tensor]

    def update(self, index, x):
        old = self.keys.get(index)
        self.keys[index] = x if old is None else torch.cat([old, x], 1)
        return self.keys[index]


class DecoderLayer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index, self.qkv, self.out = index, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, cache=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        k = cache.update(self.index, k)
        return x + self.out((q @ k.mT).softmax(-1)[..., : v.shape[1]] @ v)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(i) for i in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        cache = Cache({})
        for layer in self.layers:
            x = layer(x, cache=cache)
        return self.head(x)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning")
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_a_cache_among_the_arguments_starts_anew_in_every_call(granularity):
    net = build(Decoder).eval()
    x = [seeded(i, 16, 5, 8) for i in range(4)]
    expected = net(x[0])
    calibration = calibrate(net, x, QConfig.parse("w3a8", first_last_bits=None))
    before = float(F.mse_loss(calibration.run(0), expected))
    result = adaquant(calibration, granularity=granularity)
    assert len(result.units) == (4 if granularity == "block" else 13)
    assert float(F.mse_loss(calibration.run(0), expected)) < before


def test_an_isolated_forward_that_leaves_nothing_costs_nothing():
    isolation, net = Isolation(), nn.Linear(2, 2)
    with isolation.forward(net, seed=0, learn=True):
        net(torch.ones(1, 2))
    assert (isolation.draws, isolation.leaves_traces) == (False, False)
