from __future__ import annotations

import pytest
import torch
from helpers import IMAGES, Snapshot, classifier, loader, same_state, state, trainer

from lightning_ptq import (
    AdaQuantLayerwise,
    BitAllocator,
    CalibrationCapture,
    ReconstructionConfig,
    StatsTuning,
    adaquant,
    calibrate,
    load_packed,
    para_normalize,
    reestimate_batch_norm,
    save_packed,
    tune_bias,
)
from lightning_ptq.callbacks import pipelines
from lightning_ptq.errors import CallbackError, QConfigError, StatisticsError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")

SHORT = {"steps": 6, "batch_size": 8}


def steps(calibration, target):
    """What the callback does, by the functions."""
    found = [reestimate_batch_norm(calibration)] if target in ("auto", "batch_norm") else []
    found += [para_normalize(calibration, every_layer=True)] if target in ("auto", "float") else []
    return [*found, tune_bias(calibration, steps=8)]


@pytest.mark.parametrize("target", ["auto", "batch_norm", "float", None])
def test_the_callback_does_what_the_functions_do(pl, tmp_path, target):
    module = classifier(pl)
    tuning = StatsTuning(target=target, steps=8)
    trainer(pl, tmp_path, CalibrationCapture("w2a4"), AdaQuantLayerwise(**SHORT), tuning).fit(module, loader())
    net = classifier(pl)
    calibration = calibrate(net, IMAGES.split(8), "w2a4")
    adaquant(calibration, config=ReconstructionConfig(**SHORT))
    expected = steps(calibration, target)
    assert [(row.step, row.accepted) for row in tuning.result] == [(row.step, row.accepted) for row in expected]
    assert [row.after for row in tuning.result] == pytest.approx([row.after for row in expected])
    assert same_state(state(module), state(net))


@pytest.mark.parametrize("make", [
    lambda: pipelines.light(0.3, candidates=["w8a8", "w4a4", "w2a4"], statistics={"steps": 4}),
    lambda: pipelines.advanced(
        0.3, candidates=["w8a8", "w4a4", "w2a4"], parallel=SHORT, sequential=SHORT, statistics={"steps": 4}
    ),
], ids=["light", "advanced"])  # fmt: skip
def test_a_whole_pipeline_ends_in_a_packed_file(pl, tmp_path, make):
    module = classifier(pl)
    callbacks = make()
    trainer(pl, tmp_path, *callbacks).fit(module, loader())
    allocator = next(callback for callback in callbacks if isinstance(callback, BitAllocator))
    assert allocator.result.allocation.costs["size"] <= allocator.result.allocation.limits["size"]
    assert len(callbacks[-1].result) == 3
    save_packed(module, tmp_path / "packed.safetensors")
    again = load_packed(classifier(pl), tmp_path / "packed.safetensors").eval()
    torch.testing.assert_close(again(IMAGES), module.eval()(IMAGES), rtol=0, atol=0)


def test_one_sample_is_too_few_and_the_float_module_comes_back(pl, tmp_path):
    module = classifier(pl)
    before = Snapshot(module)
    with pytest.raises(StatisticsError, match="two samples or more"):
        trainer(pl, tmp_path, CalibrationCapture("w4a4", num_samples=1), StatsTuning()).fit(
            module, loader(batch_size=1)
        )
    before.assert_unchanged()


def test_it_comes_last(pl, tmp_path):
    with pytest.raises(CallbackError, match="StatsTuning"):
        trainer(pl, tmp_path, CalibrationCapture(), StatsTuning(), AdaQuantLayerwise()).fit(classifier(pl), loader())


@pytest.mark.parametrize(
    ("parts", "before", "expected"),
    [
        (None, [], 2),
        (None, [{"parts": 3}], 3),
        (None, [{"mode": "parallel", "parts": 3}, {"parts": 5}], 5),
        (4, [{"parts": 3}], 4),
        (1, [], 1),
    ],
)
def test_bias_tuning_has_the_parts_of_the_tuning_before_it(pl, tmp_path, monkeypatch, parts, before, expected):
    given = []

    def watched(*args, parts, **options):
        given.append(parts)
        return tune_bias(*args, parts=parts, **options)

    monkeypatch.setattr("lightning_ptq.callbacks.statistics.tune_bias", watched)
    tuning = [AdaQuantLayerwise(**{**SHORT, "steps": 1}, **options) for options in before]
    stages = [CalibrationCapture("w4a4"), *tuning, StatsTuning(target=None, steps=1, parts=parts)]
    trainer(pl, tmp_path, *stages).fit(classifier(pl), loader())
    assert given == [expected]


def test_the_parts_of_bias_tuning_arrive(pl, tmp_path):
    states = []
    for parts in (1, 3):
        module = classifier(pl)
        stages = [CalibrationCapture("w2a4"), StatsTuning(target=None, steps=8, parts=parts)]
        trainer(pl, tmp_path / str(parts), *stages).fit(module, loader())
        net = classifier(pl)
        tune_bias(calibrate(net, IMAGES.split(8), "w2a4"), steps=8, parts=parts)
        assert stages[1].result[0].accepted
        assert same_state(state(module), state(net))
        states.append(state(module))
    assert not same_state(*states)


@pytest.mark.parametrize(("options", "message"), [
    ({"parts": 0}, "parts must be 1 or more, or None, got 0"),
    ({"target": "mean"}, "target must be 'auto', 'batch_norm', 'float' or None, got 'mean'"),
    ({"measure": "top1"}, "measure must be 'kl' or 'mse', got 'top1'"),
])  # fmt: skip
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(QConfigError, match=message):
        StatsTuning(**options)
