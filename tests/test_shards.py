from __future__ import annotations

import pytest
import torch
from helpers import build, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_ptq import QConfig, ReconstructionConfig, calibrate
from lightning_ptq.activations.replay import Replay
from lightning_ptq.activations.shards import ShardSamples, make_shards
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.network.units import find_units
from lightning_ptq.tuning.drop import ActivationDrop
from lightning_ptq.tuning.losses import SquaredError


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 64))
def test_each_batch_is_in_one_shard_and_each_sample_weighs_the_same(
    samples: list[int], parts: int, batch_size: int
) -> None:
    dealt = make_shards(samples, parts, batch_size)
    assert [part.index for part in dealt] == list(range(min(parts, len(samples))))
    assert sorted(batch for part in dealt for batch in part.batches) == list(range(len(samples)))
    for part in dealt:
        own = sum(samples[batch] for batch in part.batches)
        assert part.weight == pytest.approx(own / sum(samples))
        assert part.size == max(1, round(batch_size * part.weight))


BATCHES = [seeded(i, rows, 6) for i, rows in enumerate((8, 5, 8))]


def samples_of(parts: int, index: int, seed: int = 0, **options: float) -> ShardSamples:
    """Return the samples of the only layer of a net in one of the shards."""
    net = build(lambda: nn.Sequential(nn.Linear(6, 4))).eval()
    calibration = calibrate(net, BATCHES, QConfig.parse("w3a4", first_last_bits=None))
    (unit,) = find_units(net, calibration.trace, "layer")
    config = ReconstructionConfig(parts=parts, batch_size=8, **{"held_out": 0.25, **options})
    part, store = make_shards([len(x) for x in BATCHES], parts, config.batch_size)[index], ActivationStore("1MB")
    replay = Replay(calibration, [unit], store, "float", batches=part.batches)
    data = UnitData(replay.inputs(0), store)
    data.set_targets(data.outputs(unit.module, len(part.batches), "float"), unit.module)
    return ShardSamples(part, data, config.held_out, seed * parts + index)


@pytest.mark.parametrize(("parts", "index", "batches"), [(1, 0, (0, 1, 2)), (2, 0, (0, 2)), (2, 1, (1,)), (3, 1, (1,))])
def test_a_shard_has_the_samples_of_its_batches_and_draws_each_once_an_epoch(parts, index, batches):
    own = samples_of(parts, index)
    whole = torch.cat([BATCHES[batch] for batch in batches])
    (group,) = own.data.groups
    assert torch.equal(group.inputs[0], whole)
    tuned = len(whole) - round(len(whole) * 0.25)
    epochs = []
    for _ in range(2):
        drawn = []
        while len(drawn) < tuned:
            step = own.draw()
            assert sum(share for _, _, share in step) == pytest.approx(1)
            drawn += [row for _, rows, _ in step for row in rows.tolist()]
        assert len(set(drawn)) == tuned
        epochs.append(drawn)
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_what_is_drawn_differs_by_shard_and_seed_and_not_by_what_else_is_drawn():
    def draws(own: ShardSamples) -> list[int]:
        drop = ActivationDrop(own.generator)
        drop.probability = 0.5
        return [*own.draw()[0][1].tolist(), *drop(torch.zeros(40)).tolist()]

    known = draws(samples_of(3, 0))
    other = samples_of(3, 2)
    assert draws(samples_of(3, 0)) == known
    assert draws(other) != known  # of as many samples
    assert draws(samples_of(3, 0, seed=1)) != known


def test_the_spread_of_the_targets_is_that_over_all_samples():
    own = samples_of(2, 0)
    targets = torch.cat([target.whole for group in own.data.groups for target in group.targets]).double()
    ((squares, count),) = SquaredError.magnitudes(own.targets())
    assert count == targets.numel()
    assert squares == pytest.approx((targets - targets.mean(0)).square().sum().item(), rel=1e-5)


def test_without_a_spread_the_square_counts():
    constant = torch.full((4, 3), 2.0)
    assert SquaredError.spread([constant, constant]) == pytest.approx((96.0, 24))
    assert SquaredError.spread([torch.ones(1, 5)]) == pytest.approx((5.0, 5))  # one sample
    assert SquaredError.spread([torch.zeros(2, 2)]) == (0.0, 4)
    assert SquaredError.spread([torch.tensor(3.0), torch.tensor(5.0)])[0] == pytest.approx(2.0)  # whole calls
