"""No argument ends in an error of Python or torch: each is accepted, or refused by an error of the library."""

from __future__ import annotations

import functools
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from helpers import build, same_state, seeded, state
from torch import nn
from torch.nn import functional as F

import lightning_ptq as ptq
from lightning_ptq import QConfig, QuantSpec, ReconstructionConfig
from lightning_ptq.allocation.costs import size_cost
from lightning_ptq.allocation.search import search_allocation
from lightning_ptq.calibration.candidates import Candidates
from lightning_ptq.callbacks import AdaQuantLayerwise, BitAllocator, CalibrationCapture, StatsTuning
from lightning_ptq.callbacks.pipelines import advanced, light
from lightning_ptq.errors import CalibrationError, PTQError, SensitivityError, SurgeryError
from lightning_ptq.runtime.memory import parse_bytes

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")

STRANGE = [
    "",
    "a",
    "w04a04",
    "w4a8 ",
    "w\uff14a\uff14",
    0,
    -1,
    1.5,
    2.5,
    True,
    math.nan,
    math.inf,
    [],
    ["a"],
    [1],
    {},
    {"a": 1},
    object(),
    b"x",
]


def mlp() -> nn.Sequential:
    return build(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))


BATCHES = [seeded(seed, 8, 6) for seed in range(3)]


@functools.cache
def calibrated() -> ptq.Calibration:
    qconfig = QConfig.parse("w8a8", weight_observer="minmax", activation_observer="minmax")
    return ptq.calibrate(mlp(), BATCHES, qconfig)


CONSTRUCTORS = {
    "CalibrationCapture": (CalibrationCapture, {}, (
        "qconfig", "num_samples", "overrides", "exclude", "first_last_bits", "symmetric_activations",
        "weight_observer", "activation_observer", "percentile", "signed_scales", "save_checkpoint", "resume",
        "resume_dir", "report_dir", "timeout",
    )),
    "AdaQuantLayerwise": (AdaQuantLayerwise, {}, (
        "mode", "granularity", "blocks", "candidates", "memory_limit", "seed", "steps", "batch_size", "learn",
        "weight_lr", "bias_lr", "scale_lr", "zero_point_lr", "rounding", "drop", "held_out", "parts", "tolerance",
        "loss",
    )),
    "BitAllocator": (BitAllocator, {"size": 0.2}, (
        "size", "bops", "table", "limit", "max_degradation", "minimise", "candidates", "measure", "rounds", "ties",
        "pins", "time_limit",
    )),
    "StatsTuning": (StatsTuning, {}, (
        "target", "bias", "steps", "lr", "norm_affine", "measure", "held_out", "memory_limit", "seed", "parts",
    )),
    "light": (light, {"size": 0.2}, ("size", "candidates", "num_samples", "seed")),
    "advanced": (advanced, {"size": 0.2}, ("size", "candidates", "num_samples", "seed")),
    "QuantSpec": (QuantSpec, {}, (
        "bits", "symmetric", "per_channel", "group_size", "observer", "percentile", "signed_scale",
    )),
    "LayerQConfig": (ptq.LayerQConfig, {"weight": QuantSpec(4), "activation": None}, ("weight", "activation")),
    "QConfig": (QConfig, {"default": ptq.LayerQConfig.parse("w4")}, (
        "default", "overrides", "exclude", "first_last_bits",
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_accept_an_argument_or_refuse_it(name):
    make, needed, arguments = CONSTRUCTORS[name]
    for argument in arguments:
        for value in STRANGE:
            with suppress(PTQError):
                make(**{**needed, argument: value})


ONE_STEP = ReconstructionConfig(steps=1)
FUNCTIONS = {
    "calibrate": (lambda **k: ptq.calibrate(**{"module": mlp(), "batches": BATCHES, "qconfig": "w8a8", **k}), (
        "module", "qconfig", "num_samples",
    )),
    "prepare": (lambda **k: ptq.prepare(**{"module": mlp(), "qconfig": "w8a8", **k}), ("module", "qconfig")),
    "adaquant": (lambda **k: ptq.adaquant(**{"calibration": calibrated(), "config": ONE_STEP, **k}), (
        "calibration", "mode", "granularity", "blocks", "candidates", "config", "memory_limit", "seed",
    )),
    "measure_sensitivity": (
        lambda **k: ptq.measure_sensitivity(**{"calibration": calibrated(), "candidates": ["w8a8"], **k}),
        ("calibration", "candidates", "base", "measure", "memory_limit", "seed", "output"),
    ),
    "tune_bias": (lambda **k: ptq.tune_bias(**{"calibration": calibrated(), "steps": 1, **k}), (
        "calibration", "steps", "lr", "norm_affine", "measure", "held_out", "parts", "seed", "output",
    )),
    "para_normalize": (lambda **k: ptq.para_normalize(**{"calibration": calibrated(), **k}), (
        "calibration", "held_out", "measure", "memory_limit", "seed",
    )),
    "apply_allocation": (
        lambda **k: ptq.apply_allocation(**{"calibration": calibrated(), "allocation": {"0": "w8a8"}, **k}),
        ("calibration", "allocation"),
    ),
    "inspect": (lambda **k: ptq.inspect(**{"module": mlp(), "batch": BATCHES[0], **k}), (
        "module", "qconfig", "samples", "granularity", "blocks", "config", "memory_limit", "step",
    )),
    "save_packed": (lambda **k: ptq.save_packed(**{"module": calibrated().module, "path": "/nowhere/x", **k}), (
        "module",
    )),
    "load_quantized": (lambda **k: ptq.load_quantized(**{"module": mlp(), "path": __file__, **k}), (
        "module", "weights_only",
    )),
    "load_packed": (lambda **k: ptq.load_packed(**{"module": mlp(), "path": __file__, **k}), ("module",)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_accept_an_argument_or_refuse_it(name):
    call, arguments = FUNCTIONS[name]
    for argument in arguments:
        for value in STRANGE:
            try:
                call(**{argument: value})
            except PTQError:
                continue
            except Exception as error:
                raise AssertionError(f"{argument}={value!r} ends in a raw {error!r}") from error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CalibrationCapture(num_samples="1024"), "a whole number, got '1024'. Write for example 1024."),
        (lambda: CalibrationCapture(resume="yes"), "True or False, got 'yes'. Write for example resume=True."),
        (lambda: CalibrationCapture(step="train"), "step must be 'training', 'predict' or a function"),
        (lambda: CalibrationCapture(timeout="60"), "timeout must be a positive number .*, got '60'.*example 60"),
        (lambda: AdaQuantLayerwise(seed="7"), "seed must be a whole number, got '7'. Write for example 7."),
        (lambda: AdaQuantLayerwise(seed=None), "seed must be a whole number, got None. Write for example 1."),
        (lambda: AdaQuantLayerwise(weight_lr="0.5"), "weight_lr must be 0 or more, got '0.5'. Write for example 0.5."),
        (lambda: BitAllocator("20%"), "size must be a finite number, got '20%'. Write for example 0.2."),
        (lambda: BitAllocator("small"), "size must be a finite number, got 'small'. Write for example 0.15."),
        (lambda: BitAllocator(0.2, output=True), "output must be a key, an index or a function.*got True"),
        (lambda: StatsTuning(output=1.5), "output must be a key, an index or a function.*got 1.5"),
        (lambda: StatsTuning(steps="9"), "steps must be a whole number, got '9'. Write for example 9."),
        (lambda: StatsTuning(lr="0.1"), "lr must be positive, got '0.1'. Write for example 0.1."),
        (lambda: StatsTuning(parts="2"), "parts must be a whole number or None, got '2'. Write for example 2."),
        (lambda: CalibrationCapture(num_samples=2.5), "num_samples must be 1 or more, got 2.5"),
        (lambda: CalibrationCapture(num_samples=True), "num_samples must be 1 or more, got True"),
        (lambda: CalibrationCapture("w04a04"), "cannot read 'w04a04' as bit widths"),
        (lambda: CalibrationCapture("w\uff14a\uff14"), "cannot read .* as bit widths"),
        (lambda: CalibrationCapture(percentile=None), r"percentile must lie in \(50, 100\], got None"),
        (lambda: CalibrationCapture(overrides=["w8a8"]), r"overrides must be a dictionary of texts, got \['w8a8'\]"),
        (lambda: CalibrationCapture(exclude=[5]), "exclude must hold texts only, got 5 in it"),
        (lambda: AdaQuantLayerwise(seed="a"), "seed must be a whole number, got 'a'"),
        (lambda: AdaQuantLayerwise(seed=-1), "seed must be .* from 0 to .*, got -1"),
        (lambda: AdaQuantLayerwise(memory_limit=1.5), "cannot read 1.5 as a size"),
        (lambda: AdaQuantLayerwise(memory_limit="1.5"), "cannot read '1.5' as a size"),
        (lambda: AdaQuantLayerwise("parallel", candidates=[]), r"candidates must be a list of bit widths, got \[\]"),
        (lambda: BitAllocator(0.2, candidates=[]), r"candidates must be a list of bit widths, got \[\]"),
        (lambda: BitAllocator(0.2, rounds=1.5), "rounds must be 1 or more, got 1.5"),
        (lambda: BitAllocator(0.2, time_limit=math.nan), "time_limit must be a number of seconds, got nan"),
        (lambda: BitAllocator(math.nan), "size must be a finite number, got nan"),
        (lambda: BitAllocator(0), "budget for size must be a positive number, got 0"),
        (lambda: BitAllocator(0.2, minimise="watts"), "minimise must be one of .*, got 'watts'"),
        (lambda: BitAllocator(table=[1], limit=3), r"a table must be a CSV file or a dictionary .*, got \[1\]"),
        (lambda: StatsTuning(steps=1.5), "steps must be 1 or more, got 1.5"),
        (lambda: StatsTuning(lr=0), "lr positive, got steps=100, lr=0"),
        (lambda: StatsTuning(held_out=None), r"held_out must lie in \[0, 1\), got None"),
        (lambda: light(0.2, candidates="w8a8"), "candidates must be a list of bit widths, got 'w8a8'"),
        (lambda: ReconstructionConfig(steps=True), "steps must be 1 or more, got True"),
        (lambda: parse_bytes(True), "cannot read True as a size"),
        (lambda: parse_bytes("\u0663GB"), "cannot read '\u0663GB' as a size"),
        (lambda: ptq.adaquant(mlp()), "calibration must be what calibrate.. returned, got a Sequential"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_with_its_value(call, message):
    with pytest.raises(PTQError, match=message):
        call()


def test_numpy_numbers_are_numbers():
    capture = CalibrationCapture("w4a8", np.int64(7), first_last_bits=np.int32(6), percentile=np.float32(99.5))
    assert (type(capture.num_samples), capture.num_samples) == (int, 7)
    assert QConfig.from_dict(capture.qconfig.to_dict()) == capture.qconfig
    assert type(capture.qconfig.first_last_bits) is int
    tuner = AdaQuantLayerwise(
        seed=np.int64(3), steps=np.int64(5), weight_lr=np.float64(0.5), memory_limit=np.int64(100)
    )
    assert tuner.config == ReconstructionConfig(steps=5, weight_lr=0.5)
    assert {type(tuner.seed), type(tuner.config.steps)} == {int}
    assert BitAllocator(np.float32(0.5), rounds=np.int64(2)).rounds == 2
    assert parse_bytes(np.int64(12)) == 12


def loss_of(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


TYPES = {
    "integers": lambda x: (10 * x).long(),
    "double": lambda x: x.double(),
    "bytes": lambda x: (10 * x).abs().byte(),
    "half": lambda x: x.half(),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("first", [nn.Linear(6, 3), nn.LayerNorm(6)], ids=["layer", "norm"])
def test_inputs_of_a_wrong_type_are_named(kind, first):
    net = nn.Sequential(first, nn.Linear(first(torch.zeros(1, 6)).shape[1], 3)).eval()
    before = state(net)
    with pytest.raises(CalibrationError, match=rf"batch with tensors of {TYPES[kind](torch.zeros(1)).dtype}.*x.to"):
        ptq.calibrate(net, [TYPES[kind](BATCHES[0])], "w8a8")
    assert same_state(state(net), before)


def test_a_double_module_takes_double_inputs():
    calibration = ptq.calibrate(mlp().double(), [batch.double() for batch in BATCHES], "w8a8")
    assert calibration.module(BATCHES[0].double()).dtype == torch.float64


def test_batches_without_samples_are_passed_over():
    empty = torch.zeros(0, 6)
    calibration = ptq.calibrate(mlp(), [empty, *BATCHES, empty], "w4a8")
    assert (calibration.samples, len(calibration.batches)) == (24, 3)
    assert same_state(state(calibration.module), state(ptq.calibrate(mlp(), BATCHES, "w4a8").module))
    with pytest.raises(CalibrationError, match="no batch was seen"):
        ptq.calibrate(mlp(), [empty], "w4a8")
    with pytest.raises(CalibrationError, match="no batch was seen"):
        ptq.inspect(mlp(), empty)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_weight_that_is_not_finite_is_an_error_before_calibration(value, tensor):
    net = mlp()
    with torch.no_grad():
        getattr(net[2], tensor)[1] = value
    with pytest.raises(CalibrationError, match=f"{tensor} of layer '2' holds NaN or an infinity"):
        ptq.calibrate(net, [None], "w8a8")  # no batch is looked at
    assert type(net[2]) is nn.Linear
    ptq.calibrate(net, BATCHES, QConfig.parse("w8a8", exclude=["2"]))  # what stays float is the user's affair


def test_a_norm_that_is_not_finite_is_an_error_before_calibration():
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    net[1].running_var[0] = math.inf
    with pytest.raises(CalibrationError, match="running_var of layer '1' holds NaN or an infinity"):
        ptq.calibrate(net, BATCHES, "w8a8")


def test_a_module_of_inference_mode_is_refused():
    with torch.inference_mode():
        net = mlp()
    with pytest.raises(CalibrationError, match=r"0.weight is a tensor of torch.inference_mode"):
        ptq.calibrate(net, BATCHES, "w8a8")
    assert type(net[0]) is nn.Linear
    with pytest.raises(CalibrationError, match=r"torch.inference_mode"):
        ptq.inspect(net, BATCHES[0])


def test_the_loss_as_a_measure_needs_labels():
    with pytest.raises(SensitivityError, match="measure='loss' needs a calibration forward that returns its loss"):
        ptq.measure_sensitivity(calibrated(), ["w8a8", "w4a8"], measure="loss")
    batches = [(batch, torch.arange(8) % 3) for batch in BATCHES]
    calibration = ptq.calibrate(mlp(), batches, QConfig.parse("w8a8", first_last_bits=None), forward=loss_of)
    assert ptq.measure_sensitivity(calibration, ["w8a8", "w2a8"], measure="loss").rises["2"]["w2a8"] != 0


def test_a_calibration_whose_batches_are_freed_is_named():
    calibration = ptq.calibrate(mlp(), BATCHES, "w8a8")
    calibration.release()
    for call in (ptq.adaquant, ptq.tune_bias, ptq.para_normalize, ptq.reestimate_batch_norm):
        with pytest.raises(CalibrationError, match="holds no batches any more"):
            call(calibration)
    with pytest.raises(SurgeryError, match="has quantized layers already"):
        ptq.calibrate(calibration.module, BATCHES, "w8a8")


def test_the_description_of_a_calibration_is_short():
    assert repr(calibrated()) == "Calibration(Sequential, w8a8, 2 layers, 24 samples in 3 batches, on cpu)"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: light(0.3, capture={"sepp": 1}), r"capture has 'sepp', which CalibrationCapture.*'step'"),
        (lambda: light(0.3, capture=["step"]), r"capture must be a dictionary of arguments, got \['step'\]"),
        (lambda: light(0.3, allocator={"candidates": ["w8a8"]}), r"allocator has 'candidates'"),
        (lambda: advanced(0.3, allocator={"size": 1.0}), r"allocator has 'size'"),
        (lambda: advanced(0.3, parallel={"mode": "sequential"}), r"parallel has 'mode'"),
        (lambda: advanced(0.3, statistics={3: 3}), r"statistics has 3, which StatsTuning"),
        (lambda: searched(measuring={"seeds": 3}), r"measuring has 'seeds'.*'measure'.*'seed'"),
        (lambda: searched(measuring={"candidates": ["w8a8"]}), r"measuring has 'candidates'"),
        (lambda: searched(solving={"timeout": 3}), r"solving has 'timeout'.*'time_limit'"),
        (lambda: searched(solving=3), r"solving must be a dictionary of arguments, got 3"),
    ],
)
def test_dictionaries_of_further_arguments_are_checked(make, told):
    with pytest.raises(PTQError, match=told):
        make()


def searched(**options):
    calibration = ptq.calibrate(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [torch.ones(4, 4)], "w8a8")
    costs = size_cost(calibration, Candidates(calibration, ["w8a8", "w4a4"]))
    return search_allocation(calibration, ["w8a8", "w4a4"], costs, {"size": 1.0}, **options)
