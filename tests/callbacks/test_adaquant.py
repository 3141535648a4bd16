from __future__ import annotations

import dataclasses
import functools

import jsonargparse
import pytest
from helpers import IMAGES, Snapshot, classifier, loader, same_state, state, trainer

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, ReconstructionConfig, adaquant, calibrate
from lightning_ptq.errors import CallbackError, QConfigError, RolledBackWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
]

SHORT = {"steps": 4, "batch_size": 16}


def summary(result):
    """The rows of a result without the times."""
    return [(row.name, row.bits, row.error_before, row.error_after, row.accepted, row.curve) for row in result.units]


def reference(pl, **options):
    """What the functions do with the classifier: result and state."""
    net = classifier(pl)
    calibration = calibrate(net, IMAGES.split(8), "w3a4")
    return adaquant(calibration, config=ReconstructionConfig(**SHORT), **options), state(net)


@functools.cache
def expected_state(pl):
    """The state that they leave the classifier in."""
    return reference(pl)[1]


OPTIONS = {
    "default": {},
    "layers": {"granularity": "layer", "blocks": ["net"], "seed": 3},  # to which blocks do not matter
    "parallel": {"mode": "parallel", "candidates": ["w8a8", "w3a4"]},
    "blocks": {"blocks": ["net"]},
    "little memory": {"memory_limit": "1KB"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_callback_does_what_the_function_does(pl, tmp_path, options):
    module = classifier(pl)
    tuner = AdaQuantLayerwise(**SHORT, **options)
    trainer(pl, tmp_path, CalibrationCapture("w3a4"), tuner).fit(module, loader())
    result, expected = reference(pl, **options)
    assert summary(tuner.result) == summary(result)
    assert same_state(state(module), expected)
    assert tuner.result.states.keys() == result.states.keys()
    for candidate, states in result.states.items():
        for name, tuned in states.items():
            assert same_state(tuner.result.states[candidate][name], tuned)


CONFIGS = {
    "rates": {"weight_lr": 0.1, "bias_lr": 0.02, "scale_lr": 0.03, "held_out": 0.25, "drop": 0.3},
    "zero point": {"learn": ["bias", "activation_zero_point"], "zero_point_lr": 0.7},
    "adaround": {"rounding": "adaround", "weight_lr": 0.2},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_every_entry_of_the_configuration_arrives(tmp_path, options):
    callback = AdaQuantLayerwise(**SHORT, **options)
    assert callback.config == ReconstructionConfig(**SHORT, **options)
    assert callback.config != AdaQuantLayerwise(**SHORT).config


def parser():
    built = jsonargparse.ArgumentParser(exit_on_error=False)
    built.add_class_arguments(AdaQuantLayerwise, "callback", fail_untyped=True)
    return built


def test_the_command_line_offers_every_entry_of_the_configuration_with_its_default():
    offered = parser().parse_args([]).callback
    for field in dataclasses.fields(ReconstructionConfig):
        assert offered[field.name] == field.default
    given = parser().parse_object({"callback": {"learn": ["bias"], "steps": 7, "tolerance": None}}).callback
    assert AdaQuantLayerwise(**given.as_dict()).config == ReconstructionConfig(learn=("bias",), steps=7)


@pytest.mark.parametrize("given", [{"steps": "many"}, {"learn": 3}, {"rounding": "up"}, {"step": 3}], ids=str)
def test_the_command_line_checks_the_types_of_the_configuration(given):
    with pytest.raises(jsonargparse.ArgumentError, match=next(iter(given))):
        parser().parse_object({"callback": given})


def test_what_is_learned_is_given_as_a_list_a_tuple_or_not_at_all():
    for learn in (["weight", "bias"], ("weight", "bias")):
        assert AdaQuantLayerwise(learn=learn).config.learn == ("weight", "bias")
    assert AdaQuantLayerwise(learn=None).config == AdaQuantLayerwise().config == ReconstructionConfig()


@pytest.mark.parametrize(
    ("option", "closest"), [("step", "steps"), ("granularty", "granularity"), ("learning_rate", "learn")]
)
def test_an_unknown_option_is_refused_with_the_closest_one(option, closest):
    message = f"no option '{option}'; the closest one is '{closest}'. Choose from mode, .*seed, steps, .*tolerance"
    with pytest.raises(TypeError, match=message):
        AdaQuantLayerwise(steps=3, **{option: 3})


@pytest.mark.parametrize(
    ("bar", "options"),
    [
        ("none", {"log": True, "precision": "bf16-mixed"}),
        ("none", {"max_epochs": 3, "min_epochs": 2}),
        ("TQDMProgressBar", {}),
        ("TQDMProgressBar", {"log": True}),
        ("RichProgressBar", {"log": True}),
        ("RichProgressBar", {"precision": "bf16-mixed", "max_epochs": 3}),
    ],
    ids=str,
)
def test_precision_loggers_and_progress_bars_do_not_matter(pl, tmp_path, bar, options):
    options = dict(options)
    logger = pl.loggers.CSVLogger(tmp_path) if options.pop("log", False) else False
    extra = [] if bar == "none" else [getattr(pl.callbacks, bar)()]
    run = trainer(
        pl, tmp_path, CalibrationCapture("w3a4"), AdaQuantLayerwise(**SHORT), *extra,
        logger=logger, enable_progress_bar=bar != "none", **options,
    )  # fmt: skip
    module = classifier(pl)
    run.fit(module, loader())
    assert same_state(state(module), expected_state(pl))


def test_units_that_are_rolled_back_are_named(pl, tmp_path):
    tuner = AdaQuantLayerwise(steps=2, weight_lr=1e4, bias_lr=1e4, tolerance=0.0, closed_form=False)
    run = trainer(pl, tmp_path, CalibrationCapture("w3a4"), tuner)
    with pytest.warns(RolledBackWarning, match=r"net\.0-6 \(w3a4/w8a8\), net\.7-9 \(w3a4/w8a8\)"):
        run.fit(classifier(pl), loader())


def test_parallel_and_sequential_tuning_follow_one_another(pl, tmp_path):
    module = classifier(pl)
    tuners = [AdaQuantLayerwise(mode="parallel", **SHORT), AdaQuantLayerwise(**SHORT, seed=1)]
    assert tuners[0].state_key != tuners[1].state_key
    trainer(pl, tmp_path, CalibrationCapture("w3a4"), *tuners).fit(module, loader())
    net = classifier(pl)
    calibration = calibrate(net, IMAGES.split(8), "w3a4")
    config = ReconstructionConfig(**SHORT)
    results = [adaquant(calibration, mode="parallel", config=config), adaquant(calibration, config=config, seed=1)]
    assert [summary(tuner.result) for tuner in tuners] == [summary(result) for result in results]
    assert same_state(state(module), state(net))


@pytest.mark.parametrize(
    "make",
    [
        lambda: [AdaQuantLayerwise()],
        lambda: [AdaQuantLayerwise(), CalibrationCapture()],
        lambda: [CalibrationCapture(), CalibrationCapture()],
        lambda: [CalibrationCapture(), AdaQuantLayerwise(), CalibrationCapture()],
        lambda: [CalibrationCapture(), AdaQuantLayerwise(), BitAllocator(size=0.2)],
        lambda: [CalibrationCapture(), BitAllocator(size=0.2), BitAllocator(size=0.2)],
        lambda: [CalibrationCapture(), AdaQuantLayerwise(), AdaQuantLayerwise("parallel")],
    ],
    ids=["alone", "behind", "two", "again", "allocator behind sequential", "two allocators", "parallel last"],
)
def test_a_wrong_order_is_refused_with_the_right_one(pl, tmp_path, make):
    module = classifier(pl)
    before = Snapshot(module)
    with pytest.raises(
        CallbackError, match=r"Put one CalibrationCapture before all others.*'CalibrationCapture', \"AdaQ.*BitAllocator"
    ):
        trainer(pl, tmp_path, *make()).fit(module, loader())
    before.assert_unchanged()


BAD = [
    ({"steps": 0}, "steps must be.*got 0"),
    ({"batch_size": 0}, "batch_size must be.*got 0"),
    ({"mode": "sequentiel"}, "mode must be 'sequential' or 'parallel', got 'sequentiel'"),
    ({"granularity": "stage"}, "granularity must be 'layer' or 'block', got 'stage'"),
    ({"candidates": ["w4a4"]}, "candidates need mode='parallel'"),
    ({"mode": "parallel", "candidates": ["w4a16"]}, "bits must be a whole number from 2 to 8, got 16"),
    ({"learn": ["weights"]}, r"learn holds \['weights'\]"),
    ({"rounding": "nearest"}, "rounding must be"),
    ({"drop": 1.5}, r"drop must lie in \[0, 1\), got 1.5"),
    ({"held_out": -1}, "held_out must lie"),
    ({"memory_limit": "lots"}, "cannot read 'lots' as a size"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_refused_at_construction(options, message):
    with pytest.raises(QConfigError, match=message):
        AdaQuantLayerwise(**options)
