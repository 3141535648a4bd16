from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import ResNet, Snapshot, build, relative_error, rng_state, same_state, seeded, state
from torch import nn

from lightning_ptq import LayerQConfig, QConfig, calibrate, prepare
from lightning_ptq.errors import (
    CalibrationError,
    FewSamplesWarning,
    FunctionalOpWarning,
    QConfigError,
    UnreachedLayerWarning,
)
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.numerics.quantize import choose_qparams
from lightning_ptq.runtime.patching import hooked


class OutOfOrder(nn.Module):
    """Registers b, d, a, c and runs a, b, c, d."""

    def __init__(self):
        super().__init__()
        self.b, self.d, self.a, self.c = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        return self.d(self.c(F.relu(self.b(F.relu(self.a(x))))))


def qparams(calibration):
    """All scales and zero points."""
    return {k: v for k, v in state(calibration.module).items() if k.endswith((".scale", ".zero_point"))}


def widths(calibration):
    return {name: str(layer.qconfig) for name, layer in calibration.layers.items()}


X = [seeded(i, 4, 4) for i in range(3)]


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, torch.zeros(4)), lambda x: [x], lambda x: {"x": x}],
    ids=["tuple", "list", "dict"],
)
def test_tuples_lists_and_dicts_calibrate_as_bare_tensors_do(wrap):
    bare = calibrate(build(OutOfOrder), X, "w4a4")
    wrapped = calibrate(build(OutOfOrder), [wrap(x) for x in X], "w4a4")
    assert same_state(state(wrapped.module), state(bare.module))
    assert wrapped.samples == bare.samples == 12


def test_a_forward_of_ones_own_gets_module_and_batch():
    own = calibrate(
        build(OutOfOrder), [{"a": x, "b": 1} for x in X], "w4a4", forward=lambda m, batch: m(2 * batch["a"])
    )
    doubled = calibrate(build(OutOfOrder), [2 * x for x in X], "w4a4")
    assert same_state(state(own.module), state(doubled.module))


@pytest.mark.parametrize(("num_samples", "seen"), [(1, 4), (4, 4), (5, 8), (12, 12), (None, 12)])
def test_the_pass_stops_behind_the_batch_that_completes_num_samples(num_samples, seen):
    calibration = calibrate(build(OutOfOrder), X, "w4a4", num_samples=num_samples)
    reference = calibrate(build(OutOfOrder), X[: seen // 4], "w4a4")
    assert calibration.samples == seen
    assert len(calibration.batches) == seen // 4
    assert same_state(qparams(calibration), qparams(reference))


def test_a_loader_that_ends_early_warns_and_calibrates():
    with pytest.warns(FewSamplesWarning, match="after 12 samples, 13 were asked for"):
        calibration = calibrate(build(OutOfOrder), X, "w4a4", num_samples=13)
    assert same_state(qparams(calibration), qparams(calibrate(build(OutOfOrder), X, "w4a4")))


def spoiled(value):
    """The batches, one of them with an odd value in the input of layer b only."""
    batches = [x.clone() for x in X]
    batches[1][2, 3] = value
    return batches


def feed_b(module, x):
    return module.b(x) + module.a(torch.zeros(1, 4))


FAILURES = {
    "empty loader": ({"batches": []}, "no batch was seen"),
    "NaN": ({"batches": spoiled(float("nan")), "forward": feed_b}, "input of layer 'b', calibration batch 1"),
    "infinity": ({"batches": spoiled(float("-inf")), "forward": feed_b}, "input of layer 'b', calibration batch 1"),
    "all excluded": ({"batches": X, "qconfig": QConfig.parse("w4a4", exclude=["*"])}, "reached no layer"),
    "module not run": ({"batches": X, "forward": lambda module, x: x}, "reached no layer"),
    "no samples wanted": ({"batches": X, "num_samples": 0}, "num_samples must be 1 or more, got 0"),
    "no tensor": ({"batches": ["text"], "forward": lambda module, x: module(X[0])}, "type str holds no tensor"),
    "no qconfig": ({"batches": X, "qconfig": None}, "qconfig is missing"),
}


@pytest.mark.parametrize(("arguments", "message"), FAILURES.values(), ids=FAILURES)
def test_an_error_leaves_the_module_as_it_was(arguments, message):
    module = build(OutOfOrder)
    before = Snapshot(module)
    with pytest.raises(CalibrationError, match=message):
        calibrate(module, **{"qconfig": "w4a4", **arguments})
    before.assert_unchanged()


def test_an_interrupt_half_way_leaves_a_folded_net_as_it_was():
    module = build(ResNet)
    before = Snapshot(module)
    calls = iter(range(100))

    def forward(module, x):
        if next(calls) == 3:  # two batches were observed, the second forward after that is one of the folded net
            raise KeyboardInterrupt
        return module(x)

    with pytest.raises(KeyboardInterrupt):
        calibrate(module, [seeded(0, 2, 2, 6, 6)] * 2, "w4a4", forward=forward)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"a": "w8a8", "b": "w4a4", "c": "w4a4", "d": "w8a8"}),
        ({"first_last_bits": 6}, {"a": "w6a6", "b": "w4a4", "c": "w4a4", "d": "w6a6"}),
        ({"first_last_bits": 2}, dict.fromkeys("abcd", "w4a4")),
        ({"first_last_bits": None}, dict.fromkeys("abcd", "w4a4")),
        ({"overrides": {"[ab]": "w3a2", "b": "w5"}}, {"a": "w3a2", "b": "w5", "c": "w4a4", "d": "w8a8"}),
        ({"exclude": ["b", "d"]}, {"a": "w8a8", "c": "w4a4"}),
    ],
)
def test_widths_follow_execution_order_overrides_and_exclusions(options, expected):
    calibration = calibrate(build(OutOfOrder), X, QConfig.parse("w4a4", **options))
    assert widths(calibration) == expected
    assert list(calibration.layers) == sorted(expected)  # a runs first
    for name, layer in calibration.prepared.layers.items():
        assert (layer.qconfig is None) == (name not in expected)


def test_a_pattern_without_a_match_is_an_error_that_shows_the_names():
    module = build(OutOfOrder)
    before = Snapshot(module)
    with pytest.raises(QConfigError, match=r"no layer matches 'head\.\*'.*b, d, a, c"):
        calibrate(module, X, QConfig.parse("w4a4", overrides={"head.*": "w8a8"}))
    before.assert_unchanged()


def test_a_layer_that_never_runs_is_named_and_stays_float():
    def forward(module, x):
        return module.d(module.a(x))

    with pytest.warns(UnreachedLayerWarning, match="stay float: b, c"):
        calibration = calibrate(build(OutOfOrder), X, "w4a4", forward=forward)
    assert widths(calibration) == {"a": "w8a8", "d": "w8a8"}
    assert torch.equal(calibration.module.b(X[0]), build(OutOfOrder).b(X[0]))


class Functional(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.eye(4))
        self.inner.forward = lambda x: product(x, self.inner.weight)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.inner(x))


@pytest.mark.parametrize(
    ("product", "op"),
    [
        (lambda x, w: x @ w, "mm in inner"),
        (lambda x, w: F.linear(x, w, w[0]), "addmm in inner"),
        (lambda x, w: torch.einsum("ni,nij->nj", x, w.expand(len(x), 4, 4)), "bmm in inner"),
        (lambda x, w: F.conv1d(x[:, None], w[:1, None, :1]).squeeze(1), "convolution in inner"),
        (
            lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
            "(attention.*|bmm) in inner",
        ),
    ],
    ids=["matmul", "linear", "einsum", "conv", "attention"],
)
def test_a_product_outside_any_layer_is_named(product, op):
    with pytest.warns(FunctionalOpWarning, match=op):
        calibrate(Functional(product), X, QConfig.parse("w4a4", operations="layers"))


@pytest.mark.parametrize(
    ("product", "names"),
    [
        (lambda x, w: x @ w, ["weight_weight_1", "linear_1"]),
        (lambda x, w: F.linear(x, w, w[0]), ["weight_weight_0", "linear_1"]),
        (lambda x, w: torch.einsum("ni,nij->nj", x, w.expand(len(x), 4, 4)), ["einsum_1"]),
        (
            lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
            ["attention_1_scores", "attention_1_values"],
        ),
    ],
    ids=["matmul", "linear", "einsum", "attention"],
)
def test_a_product_in_a_forward_that_the_module_has_of_its_own_is_quantized(product, names):
    net = Functional(product)
    expected, own = net(X[0]), net.inner.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration = calibrate(net, X, QConfig.parse("w4a4", first_last_bits=None))
    assert sorted(calibration.layers) == sorted([*(f"inner.{name}" for name in names), "last"])
    calls = []
    inside = {name: net.get_submodule(f"inner.{name}") for name in names}
    with hooked(inside, before=lambda name, *_: calls.append(name)):
        net(X[0])
    assert sorted(calls) == sorted(names)
    calibration.prepared.undo()
    assert net.inner.forward is own
    assert torch.equal(net(X[0]), expected)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_ranges_of_unequal_batches_are_those_of_all_inputs_together(observer):
    class Fan(nn.Module):  # layers fed element by element, so that inputs do not depend on the batch size
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(7, 2), nn.Linear(7, 2)

        def forward(self, x):
            return self.a(x) + self.b(x.relu() ** 2)

    x = torch.cat([seeded(0, 20, 7), 30 * seeded(1, 3, 7)])
    config = QConfig.parse("w4a4", activation_observer=observer, percentile=97.0)
    parts = calibrate(build(Fan), x.split([9, 1, 10, 3]), config)
    whole = calibrate(build(Fan), [x], config)
    assert same_state(qparams(parts), qparams(whole))
    without_outliers = calibrate(build(Fan), [x[:20]], config)
    for name, layer in parts.layers.items():
        assert layer.input_fake_quant.scale > 1.05 * without_outliers.layers[name].input_fake_quant.scale


def test_minmax_scales_are_those_of_the_extremes():
    calibration = calibrate(
        build(OutOfOrder), X, QConfig.parse("w8a8", activation_observer="minmax", weight_observer="minmax")
    )
    x = torch.cat(X)
    quantizer = calibration.layers["a"].input_fake_quant
    assert quantizer.scale == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-6)
    assert quantizer.zero_point == round(-x.min().item() / quantizer.scale.item())
    weight = calibration.layers["b"].weight_fake_quant.scale.flatten()
    rows = build(OutOfOrder).b.weight.detach()
    expected = torch.maximum(rows.amax(1) / 127, -rows.amin(1) / 128)
    torch.testing.assert_close(weight, expected)


def test_a_layer_called_twice_has_one_scale_that_covers_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x) * 10)

    module = build(Twice)
    with torch.no_grad():
        seen = torch.cat([torch.cat([x, module.layer(x) * 10]) for x in X])
    calibration = calibrate(module, X, QConfig.parse("w8a8", activation_observer="minmax"))
    quantizer = calibration.layers["layer"].input_fake_quant
    scale, zero_point = choose_qparams(seen.min(), seen.max(), quantizer.spec)
    torch.testing.assert_close(quantizer.scale, scale)
    assert quantizer.zero_point == zero_point


def test_a_layer_called_by_keyword_is_calibrated_as_by_position():
    def by_keyword(module, x):
        return module.d(input=module.c(module.b(input=module.a(input=x))))

    def by_position(module, x):
        return module.d(module.c(module.b(module.a(x))))

    keyword = calibrate(build(OutOfOrder), X, "w4a4", forward=by_keyword)
    position = calibrate(build(OutOfOrder), X, "w4a4", forward=by_position)
    assert same_state(state(keyword.module), state(position.module))


def mixed_net():
    """Training flags, frozen parameters and a user's hook in disorder."""
    net = build(ResNet).train()
    net.blocks[0].eval()
    net.blocks[1].bn2.eval()
    net.head.weight.requires_grad_(False)
    net.blocks[1].conv1.weight.requires_grad_(False)
    net.blocks.register_forward_hook(lambda module, args, output: None)
    return net


def test_flags_gradients_hooks_and_random_states_stay():
    net = mixed_net()
    before, random_before = Snapshot(net), rng_state()
    calibration = calibrate(net, [seeded(i, 3, 2, 6, 6) for i in range(2)], "w4a4")
    assert {n: net.get_submodule(n).training for n in before.training} == before.training
    for name, parameter in net.named_parameters():  # a conv without bias gets a trainable one from its batch norm
        assert parameter.requires_grad == before.flags.get(f"{name} grad", True)
        assert parameter.grad is None
    for name in ("blocks", "blocks.0"):  # modules that were not swapped
        assert before._flags()[name] == before.flags[name]
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert rng_state() == random_before
    calibration.prepared.undo()
    before.assert_unchanged()


class Noisy(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Dropout(0.5),
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(8, 8),
            nn.Linear(8, 2),
        )


def test_a_net_in_train_mode_is_calibrated_in_eval_mode():
    trained, evaluated = build(Noisy).train(), build(Noisy).eval()
    before = state(trained)
    calibrations = [calibrate(net, X, "w4a4") for net in (trained, evaluated)]
    assert calibrations[0].folded == {"2": "1"}
    assert same_state(state(trained), state(evaluated))
    for key in ("2.running_mean", "2.running_var", "2.num_batches_tracked"):
        assert torch.equal(state(trained)[key], before[key])
    assert all(child.training for child in trained)


def test_prepared_modules_can_be_given_and_are_undone_too():
    module = build(OutOfOrder)
    before = Snapshot(module)
    prepared = prepare(module, "w3a3")
    assert widths(calibrate(prepared, X)) == {"a": "w8a8", "b": "w3a3", "c": "w3a3", "d": "w8a8"}
    prepared.undo()
    before.assert_unchanged()
    with pytest.raises(CalibrationError, match="no batch"):
        calibrate(prepare(module, "w3a3"), [])
    before.assert_unchanged()


def test_rounding_to_nearest_errs_less_with_more_bits():
    x = [seeded(i, 16, 2, 6, 6) for i in range(2)]
    expected = build(ResNet).eval()(x[0])
    nets = [
        calibrate(build(ResNet).eval(), x, QConfig.parse(b, first_last_bits=None)).module
        for b in ("w8a8", "w4a4", "w2a2")
    ]
    errors = [relative_error(net(x[0]), expected) for net in nets]
    assert errors[0] < 1e-3
    assert 10 * errors[0] < errors[1] < errors[2] / 2


def test_float_mode_is_the_float_net_until_release():
    x = seeded(0, 4, 2, 6, 6)
    calibration = calibrate(build(ResNet).eval(), [x], "w2a2")
    assert calibration.folded == {
        "bn": "stem",
        **{f"blocks.{i}.bn{j}": f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)},
    }
    expected = build(ResNet).eval()(x)
    with ops_in_mode(calibration.module, "float"):
        torch.testing.assert_close(calibration.module(x), expected)
    assert relative_error(calibration.run(0), expected) > 1e-6
    calibration.release()
    assert len(calibration.batches) == 0
    assert [layer.reference for layer in calibration.layers.values()] == [None] * 6


def test_only_large_first_and_last_layers_are_freed():
    net = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 16))  # 192, 2304, 768
    calibration = calibrate(net, [seeded(0, 8, 4)], "w4a4")
    assert calibration.edges == ("0", "4")
    calibration.free_large_edges()
    assert calibration.edges == calibration.part([0]).edges == ("0",)
    narrow = LayerQConfig.parse("w2a8")
    assert [str(calibration.qconfig_at(name, narrow)) for name in "024"] == ["w8a8", "w2a8", "w2a8"]
