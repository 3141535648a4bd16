from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import ResNet, Transformer, build, seeded, token_batches
from torch import nn

from lightning_ptq import QConfig, calibrate
from lightning_ptq.activations.calls import Call
from lightning_ptq.activations.replay import Replay
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.network.units import find_units

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning")


class Letters(nn.Module):
    """The linear layers a, b, c, ... that the given forward speaks of; layer a has no bias."""

    def __init__(self, forward):
        super().__init__()
        for name in sorted({"a", "b", "c", "d", "e"}.intersection(forward.__code__.co_names)):
            setattr(self, name, nn.Linear(5, 5, bias=name != "a"))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def letters(forward):
    return build(lambda: Letters(forward)).eval()


def chain(m, x):
    return m.d(F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))))


def long_skip(m, x):
    a = F.relu(m.a(x))
    return m.d(torch.cat([m.c(F.relu(m.b(a))), a], 1)[:, ::2])


def in_place(m, x):
    a = m.a(x)
    b = m.b(F.relu_(a).add_(1))  # a is changed in place, read, and read again as a skip
    return m.d(m.c(b.mul_(2)) + a)


def branch_on_finished(m, x):
    a = m.a(x)
    b = m.b(a)
    return m.c(b * 2) if a.mean() > 0 else m.c(b)


def branch_with_skip(m, x):
    a = m.a(x)
    b = F.relu(m.b(a))
    return m.d(m.c(b + 3 * a if x.mean() > 0 else b))


def through_numpy(m, x):
    return m.c(m.b(torch.from_numpy(m.a(x).detach().numpy() ** 2)))


def twice(m, x):
    return m.d(m.c(m.b(F.relu(m.b(F.relu(m.a(x)))))))


def twice_around(m, x):
    return m.c(m.a(F.relu(m.b(F.relu(m.a(x))))))


PLAIN = [seeded(i, rows, 5) for i, rows in enumerate((4, 4, 3))]
SHIFTED = [x + shift for x, shift in zip(PLAIN, (-3, 3, 3), strict=True)]
IMAGES = [seeded(i, rows, 2, 6, 6) for i, rows in enumerate((3, 2))]


def signed(net):
    """Batches with a negative mean behind layer a in the first, and a positive one in the others."""
    return [x * net.a(x).mean().sign() * sign for x, sign in zip(PLAIN, (-1, 1, 1), strict=True)]


LETTERS = {
    "chain": chain,
    "long skip": long_skip,
    "in place": in_place,
    "through numpy": through_numpy,
    "layer called twice": twice,
    "layer called before and after another": twice_around,
}
NETS = {
    **{name: (lambda forward=forward: letters(forward), PLAIN) for name, forward in LETTERS.items()},
    "branch on a finished unit": (lambda: letters(branch_on_finished), signed(letters(branch_on_finished))),
    "skip on some batches only": (lambda: letters(branch_with_skip), SHIFTED),
    "residual": (lambda: build(ResNet).eval(), IMAGES),
    "transformer with masks": (lambda: build(Transformer).eval(), token_batches(3, 4, lengths=(5, 3))),
    "transformer, all by keyword": (lambda: build(lambda: Transformer(by_keyword=True)).eval(), token_batches(3, 4)),
}


def calibrated(net, batches):
    return calibrate(net, batches, QConfig.parse("w3a3", first_last_bits=None))


def recorded(calibration, unit, stream):
    """The calls of a unit in a plain full run, by batch, as forward pre-hooks see them."""
    calls = [[] for _ in calibration.batches]
    with ops_in_mode(calibration.module, stream):
        for batch, seen in enumerate(calls):
            handle = unit.module.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(Call.of((args, kwargs), torch.clone)),
                with_kwargs=True,
            )
            calibration.run(batch)
            handle.remove()
    return calls


def assert_same_calls(found, expected):
    assert [len(calls) for calls in found] == [len(calls) for calls in expected]
    for calls, wanted in zip(found, expected, strict=True):
        for call, want in zip(calls, wanted, strict=True):
            assert call.spec == want.spec
            for leaf, other in zip(call.leaves, want.leaves, strict=True):
                torch.testing.assert_close(leaf, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", NETS)
def test_inputs_of_every_unit_are_those_of_a_full_run(name, granularity):
    make, batches = NETS[name]
    calibration = calibrated(make(), batches)
    units = find_units(calibration.module, calibration.trace, granularity)
    with ActivationStore("1MB") as store:
        replays = {stream: Replay(calibration, units, store, stream) for stream in ("float", "quantized")}
        for index, unit in enumerate(units):
            for stream, replay in replays.items():
                calls = replay.inputs(index)
                assert_same_calls(calls, recorded(calibration, unit, stream))
                data = UnitData(calls, store)
                if stream == "quantized":  # tuning changes the unit between the two
                    for layer in unit.layers.values():
                        for quantizer in layer.weight_quantizers.values():
                            quantizer.scale *= 1.5
                replay.finish(index, data.outputs(unit.module, len(calibration.batches), stream))
    assert not [module for module in calibration.module.modules() if "forward" in vars(module)]


TRACED = ["chain", "long skip", "in place", "layer called twice", "residual", "transformer with masks"]


@pytest.mark.parametrize("name", [*TRACED, "transformer, all by keyword"])
def test_finished_units_run_again_for_one_batch_only(monkeypatch, name):
    make, batches = NETS[name]
    calibration = calibrated(make(), batches)
    units = find_units(calibration.module, calibration.trace, "layer")
    runs, own = Counter(), QuantLayer.forward
    monkeypatch.setattr(QuantLayer, "forward", lambda layer, *args: (runs.update([id(layer)]), own(layer, *args))[1])
    with ActivationStore("1MB") as store:
        list(walk(calibration, store, ["float"]))
    for index, unit in enumerate(units):
        # Its outputs on every batch, and the first batch in a full forward for each unit behind it.
        expected = len(batches) + len(units) - 1 - index
        assert runs[id(unit.module)] <= expected * unit.calls + (unit.calls - 1) * (len(batches) + (index > 0))


def walk(calibration, store, streams=("float", "quantized")):
    """Capture and finish all units; yields what the store holds behind each."""
    units = find_units(calibration.module, calibration.trace, "layer")
    replays = {stream: Replay(calibration, units, store, stream) for stream in streams}
    for index, unit in enumerate(units):
        for stream, replay in replays.items():
            data = UnitData(replay.inputs(index), store)
            replay.finish(index, data.outputs(unit.module, len(calibration.batches), stream))
            del data
        yield unit.name, store.in_memory


def test_the_store_of_a_deep_net_holds_one_boundary_at_a_time():
    depth, batches = 12, [seeded(i, 8, 16) for i in range(2)]
    calibration = calibrate(
        build(lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(depth)))).eval(), batches, "w4a4"
    )
    activation = sum(x.nbytes for x in batches)
    with ActivationStore("1GB") as store:
        held = dict(walk(calibration, store))
        assert list(held.values()) == [2 * activation] * (depth - 1) + [0]  # an output a stream; none at the end
        assert store.peak <= 4 * activation  # besides: inputs and outputs of one unit; all together are 12 a stream


def test_a_long_skip_is_held_as_long_as_it_is_needed_and_no_longer():
    def forward(m, x):
        a = m.a(x)
        return m.e(m.d(m.c(m.b(a)) + a))

    calibration = calibrated(letters(forward), PLAIN)
    activation = sum(x.nbytes for x in PLAIN)
    with ActivationStore("1GB") as store:
        held = dict(walk(calibration, store, ["float"]))
    assert {name: size // activation for name, size in held.items()} == {"a": 1, "b": 2, "c": 2, "d": 1, "e": 0}


def test_a_unit_that_some_batch_does_not_reach_has_no_calls_there():
    def forward(m, x):
        return m.b(m.a(x)) if x.mean() < 0 else m.a(x)

    calibration = calibrated(letters(forward), SHIFTED)
    units = find_units(calibration.module, calibration.trace, "layer")
    with ActivationStore("1MB") as store:
        list(walk(calibration, store))
        calls = Replay(calibration, units, store, "float").inputs(1)
    assert [len(of_batch) for of_batch in calls] == [1, 0, 0]
    assert not [module for module in calibration.module.modules() if "forward" in vars(module)]


def unit_data(unit, batches, store, *args, **kwargs):
    """The data of a unit that was called once a batch, with the float unit's outputs as targets."""
    calls = [[Call.of(((x, *args), kwargs), store.put)] for x in batches]
    data = UnitData(calls, store)
    data.set_targets(data.outputs(unit, len(batches), "float"), unit)
    return data


class Text(nn.Module):
    """Mean of the tokens that the mask shows, projected."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x, mask=None):
        x = x.reshape(x.shape[0], -1, 5)
        return self.layer(x if mask is None else x * mask[..., None]).mean(1)


def test_batches_of_several_sizes_and_lengths_keep_their_order_and_their_targets():
    unit = build(Text)
    shapes = [(4, 2, 5), (3, 6, 5), (2, 2, 5), (1, 6, 5), (4, 2, 5)]
    batches = [seeded(i, *shape) for i, shape in enumerate(shapes)]
    with ActivationStore("1MB") as store:
        data = unit_data(unit, batches, store)
        assert [(group.rows, group.bounds) for group in data.groups] == [(10, [0, 4, 6, 10]), (4, [0, 3, 4])]
        assert data.separable
        for outputs, x in zip(data.outputs(unit, 5, "float"), batches, strict=True):
            assert torch.equal(outputs[0].leaves[0], unit(x))
        for group, rows in data.batches(data.split(0.3, torch.Generator())[0], 3):
            (x,), _ = group.arguments(rows)
            torch.testing.assert_close(group.wanted(rows)[0], unit(x))


class Mixing(nn.Module):
    """Attention over the dimension given, with outputs of about the size given."""

    def __init__(self, batch_first, size=1.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.size = size

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0] * self.size


@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_are_separable_only_where_no_output_depends_on_several(batch_first, size):
    unit = build(lambda: Mixing(batch_first, size)).eval()
    with ActivationStore("1MB") as store:
        data = unit_data(unit, [seeded(i, 4, 4, 6) for i in range(3)], store)
        assert data.separable is batch_first
        taken = data.batches(data.split(0, torch.Generator())[0], 2)
        assert len(taken) == (6 if batch_first else 3)  # mini-batches of two rows, or whole calls
        for group, rows in taken:
            (x,), _ = group.arguments(rows)
            torch.testing.assert_close(group.wanted(rows)[0], unit(x))


GROUPS = {
    "one group": [(6, 2, 5), (6, 2, 5)],
    "two groups": [(5, 2, 5), (4, 3, 5), (3, 2, 5)],
    "a group of one row": [(5, 2, 5), (1, 3, 5)],
    "groups of one row only": [(1, 2, 5), (1, 3, 5), (1, 4, 5), (1, 5, 5)],
}


@pytest.mark.parametrize("held_out", [0.125, 0.5, 0.9])
@pytest.mark.parametrize("shapes", GROUPS.values(), ids=GROUPS)
def test_held_out_samples_are_disjoint_from_the_others_and_the_same_for_a_seed(shapes, held_out):
    with ActivationStore("1MB") as store:
        data = unit_data(build(Text), [seeded(i, *shape) for i, shape in enumerate(shapes)], store)
        splits = [data.split(held_out, torch.Generator().manual_seed(seed)) for seed in (0, 0, *range(1, 9))]
        assert splits[0] == splits[1]
        assert any(split != splits[0] for split in splits)
        every = {(index, row) for index, group in enumerate(data.groups) for row in range(group.rows)}
        for tune, held in splits:
            assert tune
            assert held
            assert sorted([*tune, *held]) == sorted(every)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("shapes", GROUPS.values(), ids=GROUPS)
def test_mini_batches_hold_every_sample_once_and_are_never_empty(shapes, shuffled):
    with ActivationStore("1MB") as store:
        data = unit_data(build(Text), [seeded(i, *shape) for i, shape in enumerate(shapes)], store)
        generator = torch.Generator().manual_seed(0) if shuffled else None
        for samples in data.split(0.3, torch.Generator()):
            batches = data.batches(samples, 2, generator)
            assert all(1 <= len(rows) <= 2 for _, rows in batches)
            number = {id(group): index for index, group in enumerate(data.groups)}
            found = [(number[id(group)], row) for group, rows in batches for row in rows.tolist()]
            assert sorted(found) == sorted(samples)


def test_masks_go_with_their_samples_and_shared_tensors_with_their_calls():
    unit = build(Text)
    masks = [torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
    batches = [seeded(0, 3, 2, 5), seeded(1, 2, 2, 5)]
    with ActivationStore("1MB") as store:
        calls = [[Call.of(((x,), {"mask": mask}), store.put)] for x, mask in zip(batches, masks, strict=True)]
        data = UnitData(calls, store)
        outputs = data.outputs(unit, 2, "float")
        assert len(data.groups) == 1
    for (call,), x, mask in zip(outputs, batches, masks, strict=True):
        torch.testing.assert_close(call.leaves[0], unit(x, mask))


class Ordered(nn.Module):
    def forward(self, x, order):
        return x[:, order]


class OrderFirst(nn.Module):
    def forward(self, order, x):
        return x[:, order]


def test_a_shared_tensor_may_come_before_the_samples():
    batches, order = [seeded(i, 5, 3) for i in range(2)], torch.tensor([2, 0, 1])
    with ActivationStore("1MB") as store:
        data = UnitData([[Call.of(((order, x), {}), store.put)] for x in batches], store)
        data.set_targets(data.outputs(OrderFirst(), 2, "float"), OrderFirst())
        assert data.separable
        assert data.groups[0].rows == 10
        assert torch.equal(data.groups[0].wanted(torch.tensor([6]))[0], batches[1][1:2][:, order])


class Turned(nn.Module):
    """Puts out rows of another number than it takes, and one number for all of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x).transpose(0, 1), x.mean()


def test_outputs_of_other_rows_than_the_inputs_are_taken_call_by_call():
    unit = build(Turned)
    with ActivationStore("1MB") as store:
        data = unit_data(unit, [seeded(i, size, 5, 6) for i, size in enumerate((4, 3, 4))], store)
        assert not data.separable
        taken = data.batches(data.split(0, torch.Generator())[0], 2)
        assert len(taken) == 3
        for group, rows in taken:
            (x,), _ = group.arguments(rows)
            assert all(torch.equal(*pair) for pair in zip(group.wanted(rows), unit(x), strict=True))


def test_calls_with_different_shared_tensors_are_not_taken_for_one_another():
    orders = [torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])]  # as many, and the same sum
    batches = [seeded(i, 4, 3) for i in range(2)]
    with ActivationStore("1MB") as store:
        calls = [[Call.of(((x, order), {}), store.put)] for x, order in zip(batches, orders, strict=True)]
        outputs = UnitData(calls, store).outputs(Ordered(), 2, "float")
    for (call,), x, order in zip(outputs, batches, orders, strict=True):
        assert torch.equal(call.leaves[0], x[:, order])


def test_a_unit_that_works_in_place_leaves_its_stored_inputs_alone():
    unit = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = seeded(0, 4, 5)
    with ActivationStore("1MB") as store:
        data = unit_data(unit, [x], store)
        assert torch.equal(data.groups[0].inputs[0], x)
