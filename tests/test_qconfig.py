from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from lightning_ptq.errors import QConfigError
from lightning_ptq.numerics.qconfig import LayerQConfig, QConfig
from lightning_ptq.numerics.spec import QuantSpec


@pytest.mark.parametrize(
    ("text", "weight", "activation"), [("w4a8", 4, 8), ("w4", 4, None), ("w8a8", 8, 8), ("w2a3", 2, 3)]
)
def test_a_candidate_parses_and_prints(text: str, weight: int, activation: int | None) -> None:
    pair = LayerQConfig.parse(text)
    assert pair.weight == QuantSpec(weight, symmetric=True, per_channel=True)
    assert pair.activation == (QuantSpec(activation, symmetric=False, per_channel=False) if activation else None)
    assert str(pair) == text


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_has_two_to_the_bits_integers(bits: int) -> None:
    signed, unsigned = QuantSpec(bits), QuantSpec(bits, symmetric=False)
    assert (signed.quant_min, signed.quant_max) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert (unsigned.quant_min, unsigned.quant_max) == (0, 2**bits - 1)


@pytest.mark.parametrize("bits", [0, 1, 9, -4, 4.0, "4", True, None])
def test_widths_outside_2_to_8_are_refused(bits: object) -> None:
    with pytest.raises(QConfigError, match=r"from 2 to 8, got"):
        QuantSpec(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["w1", "w9a8", "w4a1", "w0a0", "w4a16"])
def test_a_candidate_of_a_bad_width_names_it(text: str) -> None:
    with pytest.raises(QConfigError, match=r"from 2 to 8, got (0|1|9|16)\."):
        QConfig.parse(text)


@pytest.mark.parametrize(
    "text", ["", "4", "w", "a8", "w4a", "w4a8 ", "W4A8", "w4b8", "w-4a8", "w4.5", "w4a8w4", 4, None]
)
def test_what_is_no_candidate_is_shown_in_the_error(text: object) -> None:
    with pytest.raises(QConfigError) as caught:
        QConfig.parse(text)  # type: ignore[arg-type]
    assert f"cannot read {text!r} as bit widths" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observer": "max"}, "observer must be one of"),
        ({"percentile": 50}, "percentile must lie"),
        ({"percentile": 100.1}, "percentile must lie"),
        ({"percentile": float("nan")}, "percentile must lie"),
    ],
)
def test_bad_spec_values_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(QConfigError, match=message):
        QuantSpec(8, **arguments)


def test_exclude_as_a_text_is_refused() -> None:
    with pytest.raises(QConfigError, match=r"Write \['head'\]"):
        QConfig.parse("w4", exclude="head")


@pytest.mark.parametrize("bits", [1, 9])
def test_first_last_bits_are_checked(bits: int) -> None:
    with pytest.raises(QConfigError, match="from 2 to 8"):
        QConfig.parse("w4", first_last_bits=bits)


@pytest.mark.parametrize(
    ("name", "edge", "found"),
    [
        ("body.0", False, "w4a6"),
        ("body.0", True, "w8a8"),  # first_last_bits
        ("head", True, "w2"),  # an override wins over first_last_bits
        ("head.0.fc", False, "w5a5"),  # the last match wins, and * crosses dots
        ("head.0", False, "w3a3"),
        ("head.gate", False, None),  # exclude wins over overrides
        ("Head", False, "w4a6"),  # case counts
    ],
)
def test_what_holds_for_a_layer(name: str, edge: bool, found: str | None) -> None:
    overrides = {"head": "w2", "head.*": "w3a3", "*.fc": "w5a5"}
    config = QConfig.parse("w4a6", overrides=overrides, exclude=["*.gate"])
    pair = config.for_layer(name, edge)
    assert (None if pair is None else str(pair)) == found


@pytest.mark.parametrize(
    ("text", "bits", "found"),
    [("w4a6", 6, "w6a6"), ("w4a8", 6, "w6a8"), ("w8a4", 6, "w8a6"), ("w3", 8, "w8"), ("w4a6", None, "w4a6")],
)
def test_first_last_bits_only_raise(text: str, bits: int | None, found: str) -> None:
    assert str(QConfig.parse(text, first_last_bits=bits).for_layer("stem", edge=True)) == found


@pytest.mark.parametrize(("other", "found"), [("w3a2", "w3a2"), ("w3", "w3")])
def test_with_bits_of_keeps_all_but_the_widths(other: str, found: str) -> None:
    config = QConfig.parse(
        "w8a8", symmetric_activations=True, weight_observer="minmax", activation_observer="percentile"
    )
    pair = config.default.with_bits_of(LayerQConfig.parse(other))
    assert str(pair) == found
    assert pair.weight.observer == "minmax"
    if pair.activation is not None:
        assert (pair.activation.symmetric, pair.activation.observer) == (True, "percentile")


@pytest.mark.parametrize("role", ["overrides", "exclude"])
def test_a_pattern_without_a_match_is_named_with_what_there_is(role: str) -> None:
    config = QConfig.parse("w4", **{role: {"body.*": "w8", "haed*": "w8"}})
    with pytest.raises(QConfigError) as caught:
        config.check_patterns(["body.0", "body.1", "head"])
    message = str(caught.value)
    assert "no layer matches 'haed*'" in message
    assert "body.0, body.1, head" in message
    assert "'body.*'" not in message


def test_configs_are_frozen() -> None:
    config = QConfig.parse("w4a8")
    for frozen, field in ((config, "exclude"), (config.default, "weight"), (config.default.weight, "bits")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, field, 4)


CONFIGS = [
    QConfig.parse("w4"),
    QConfig.parse("w8a8", first_last_bits=None),
    QConfig.parse(
        "w2a3",
        overrides={"a.*": "w8a8", "b": "w4"},
        exclude=["*.gate", "c"],
        first_last_bits=6,
        symmetric_activations=True,
        weight_observer="percentile",
        activation_observer="minmax",
        percentile=99.5,
        signed_scales=False,
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.default))
def test_json_round_trip(config: QConfig) -> None:
    data = json.loads(json.dumps(config.to_dict()))
    assert QConfig.from_dict(data) == config
    assert QConfig.parse(data) == config
    assert QConfig.parse(config) is config


@pytest.mark.parametrize(
    "change",
    [
        {"default": "w4a8"},
        {"default": {"weight": {"bits": 4}}},
        {"default": {"weight": {"bits": 4, "width": 4}, "activation": None}},
        {"exclud": ["head"]},
        {"overrides": {"head": "w8"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_dictionary_that_is_no_config_is_refused(change: dict) -> None:
    data = QConfig.parse("w4a8").to_dict()
    with pytest.raises(QConfigError, match=r"cannot read .* as a QConfig"):
        QConfig.from_dict({**data, **change})
