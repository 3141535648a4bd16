from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import pytorch_lightning
import torch
import yaml
from helpers import classifier_class, loader

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, StatsTuning, load_packed
from lightning_ptq.cli import main as command_line
from lightning_ptq.network.layers import QuantLayer

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
SHARED = ("advanced", "light", "w2a4", "w4a4", "w4a8", "w8a8")
FILES = {"cifar10": ["--data=d.npz", "--weights=w.th"], "imagenet": ["--data=d", "--classes=c.tsv"], "quickstart": []}


def parser(recipe: str) -> Any:
    main = importlib.import_module(recipe).main
    return jsonargparse.capture_parser(lambda: jsonargparse.auto_cli(main, as_positional=False))


def test_every_config_is_tested():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {*SHARED, "digits", "lightning_cli"}


@pytest.mark.parametrize("recipe", FILES)
@pytest.mark.parametrize("name", SHARED)
def test_every_recipe_reads_a_config_and_flags_override_it(recipe, name):
    settings = parser(recipe).parse_args([f"--config={CONFIGS / name}.yaml", "--calibration=7", *FILES[recipe]])
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert {key: settings[key] for key in given} == given
    assert given["pipeline"] == ("adaquant" if name.startswith("w") else name)
    assert settings.calibration == 7


def test_an_unknown_key_is_an_error(tmp_path):
    (tmp_path / "wrong.yaml").write_text("qconfg: w4a4\n")
    with pytest.raises(SystemExit):
        parser("quickstart").parse_args([f"--config={tmp_path / 'wrong.yaml'}"])


def first_row(module: Any, batch: Any) -> Any:
    return module(batch[0][:1])


def first_of(output: Any) -> Any:
    return output[0]


ARGUMENTS: list[tuple[Any, dict[str, Any]]] = [
    (CalibrationCapture, {"qconfig": "w4a8", "overrides": {"head.*": "w8a8"}, "exclude": ["stem"]}),
    (CalibrationCapture, {"step": "predict", "first_last_bits": None, "weight_observer": "minmax"}),
    (AdaQuantLayerwise, {"mode": "parallel", "candidates": ["w8a8", "w4"], "memory_limit": 1024, "blocks": ["a.*"]}),
    (AdaQuantLayerwise, {"learn": ["weight"], "rounding": "adaround", "tolerance": 0.0, "memory_limit": "2GiB"}),
    (BitAllocator, {"table": {"stem": {"w8a8": 1.0}}, "limit": 3.0, "pins": {"head": "w8a8"}, "output": "logits"}),
    (BitAllocator, {"max_degradation": 0.1, "minimise": "bops", "ties": ["a.*"], "output": 1}),
    (StatsTuning, {"target": None, "measure": "mse", "output": "logits", "norm_affine": True}),
]


@pytest.mark.parametrize(("cls", "arguments"), ARGUMENTS)
def test_every_callback_is_built_from_plain_types(cls, arguments):
    built = jsonargparse.ArgumentParser(exit_on_error=False)
    built.add_class_arguments(cls, "callback", fail_untyped=True)
    parsed = built.parse_object({"callback": arguments}).callback
    assert {key: list(v) if isinstance(v := parsed[key], tuple) else v for key in arguments} == arguments
    assert cls(**parsed.as_dict()).role == cls.__name__


@pytest.mark.parametrize(
    ("cls", "given", "read"),
    [
        (CalibrationCapture, {"step": first_row}, lambda callback: callback.step),
        (AdaQuantLayerwise, {"blocks": first_row}, lambda callback: callback.blocks),
        (StatsTuning, {"output": first_of}, lambda callback: callback.common["output"]),
    ],
)
def test_a_function_is_given_by_its_import_path(cls, given, read):
    built = jsonargparse.ArgumentParser(exit_on_error=False)
    built.add_class_arguments(cls, "callback")
    ((key, function),) = given.items()
    parsed = built.parse_args([f"--callback.{key}={__name__}.{function.__name__}"]).callback
    assert read(cls(**parsed.as_dict())) is function


class Small(classifier_class(pytorch_lightning)):
    """A module of the user, given by its import path."""


class Images(pytorch_lightning.LightningDataModule):
    """Data module of the user."""

    def train_dataloader(self) -> Any:
        return loader()


def small_run(folder: Path) -> dict[str, Any]:
    """Return the settings of the example's YAML file, with another module and fewer steps."""
    given = yaml.safe_load((CONFIGS / "lightning_cli.yaml").read_text())
    given |= {"weights": str(folder / "trained.ckpt"), "packed": str(folder / "new" / "packed.safetensors")}
    given["output"] = str(folder / "quantized.ckpt")
    given |= {"model": {"class_path": f"{__name__}.Small"}, "data": {"class_path": f"{__name__}.Images"}}
    given["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(folder)}
    capture, parallel, allocator, sequential, _ = (each["init_args"] for each in given["trainer"]["callbacks"])
    capture["num_samples"] = 40
    parallel["steps"] = sequential["steps"] = 2
    allocator["size"] = 0.3
    return given


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_the_command_line_loads_weights_runs_the_callbacks_of_the_example_and_packs(tmp_path, capsys):
    trained = Small()
    trained.net[9].bias.data.fill_(7)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.ckpt")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_run(tmp_path)))
    assert command_line(["quantize", f"--config={tmp_path / 'run.yaml'}"]) == 0
    loaded, from_checkpoint = load_packed(Small(), tmp_path / "new" / "packed.safetensors"), Small()
    from_checkpoint.load_state_dict(torch.load(tmp_path / "quantized.ckpt", weights_only=True)["state_dict"])
    assert [layer.qconfig is not None for layer in loaded.modules() if isinstance(layer, QuantLayer)] == [True] * 4
    assert loaded.net[9].bias.mean().item() == pytest.approx(7, abs=1)
    images, _ = next(iter(loader()))
    assert torch.equal(loaded.eval()(images), from_checkpoint.eval()(images))
