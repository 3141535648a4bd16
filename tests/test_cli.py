from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import yaml
from helpers import build, classifier_class, loader

from lightning_ptq import load_packed
from lightning_ptq.cli import main
from lightning_ptq.cli.forwards import first_batch
from lightning_ptq.cli.packages import package_of
from lightning_ptq.cli.weights import load_weights
from lightning_ptq.errors import PTQError
from lightning_ptq.network.layers import QuantLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FewSamplesWarning"),
]


class Small(classifier_class(pytorch_lightning)):
    """A module of the user, given by its import path."""


class Other(classifier_class(lightning.pytorch)):
    """One of the other package."""


class Images(pytorch_lightning.LightningDataModule):
    """Data module of the user."""

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


class OtherImages(lightning.pytorch.LightningDataModule):
    """One of the other package."""

    def train_dataloader(self) -> Any:
        return loader()


COMMON = ["--model", f"{__name__}.Small", "--data", f"{__name__}.Images", "--trainer.accelerator", "cpu"]
COMMON += ["--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a run that was started by one line."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.save(build(Small).state_dict(), "trained.pt")
        options = ["--weights", "trained.pt", "--qconfig", "w2a4", "--steps", "2", "--report_dir", "report"]
        assert main(["quantize", *COMMON, *options, "--packed", "new/q.safetensors"]) == 0
    return folder


@pytest.fixture
def quantized(folder, finished):
    """A copy of these files in the current folder."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


def failure(args: list[str], capsys: Any) -> str:
    """Return what a wrong command line prints to stderr."""
    with pytest.raises(SystemExit) as exited:
        main(args)
    assert exited.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_quantize_writes_all_files_and_reports_the_metrics(quantized, capsys):
    module, packed = Small(), Small()
    load_weights(module, Path("quantized.ckpt"))
    load_packed(packed, "new/q.safetensors")
    images, _ = next(iter(loader()))
    assert sum(isinstance(layer, QuantLayer) and layer.is_quantized for layer in module.modules()) == 4
    assert torch.equal(module.eval()(images), packed.eval()(images))
    record = json.loads(Path("report/report.json").read_text())
    (metric,) = record["metrics"]
    assert metric["name"] == "val_loss"
    assert metric["before"] != metric["after"]
    assert record["settings"]["AdaQuant sequential"]["config"]["steps"] == 2
    assert not Path("ptq_progress").exists()


@pytest.mark.parametrize("file", ["quantized.ckpt", "new/q.safetensors"])
def test_validate_runs_on_a_quantized_file(quantized, file, capsys):
    measured = json.loads(Path("report/report.json").read_text())["metrics"][0]
    capsys.readouterr()
    assert main(["validate", *COMMON, "--weights", file]) == 0
    assert printed_loss(capsys) == pytest.approx(measured["after"], rel=1e-6)
    assert main(["validate", *COMMON, "--weights", "trained.pt"]) == 0
    assert printed_loss(capsys) == pytest.approx(measured["before"], rel=1e-6)
    assert abs(measured["after"] - measured["before"]) > 1e-4


def printed_loss(capsys: Any) -> float:
    return float(re.search(r"val_loss\W+(\d\.\d+)", capsys.readouterr().out)[1])


def test_export_writes_onnx_from_a_quantized_file(quantized, capsys):
    assert main(["export", *COMMON, "--weights", "quantized.ckpt", "--onnx", "out/model.onnx"]) == 0
    assert Path("out/model.onnx").stat().st_size > 1000
    assert "verified" in capsys.readouterr().out
    assert main(["export", *COMMON, "--weights", "quantized.ckpt", "--network", "nothing"]) == 1
    assert "no module 'nothing'" in capsys.readouterr().err
    assert main(["export", *COMMON, "--weights", "trained.pt"]) == 1
    assert "is not quantized" in capsys.readouterr().err


def test_export_without_verification_says_nothing_of_it(quantized, capsys):
    export = ["export", *COMMON, "--weights", "quantized.ckpt", "--onnx", "a.onnx"]
    assert main([*export, "--verify", "false"]) == 0
    assert "verified" not in capsys.readouterr().out


def test_inspect_prints_what_would_be_quantized_and_changes_nothing(folder, capsys):
    assert main(["inspect", *COMMON, "--qconfig", "w4a4"]) == 0
    text = capsys.readouterr().out
    assert "4 of 4" in text
    assert "w4a4" in text
    assert list(folder.iterdir()) == []


def test_the_other_package_of_lightning_is_chosen_by_the_model(capsys, monkeypatch):
    args = ["--model", f"{__name__}.Other", "--data", f"{__name__}.OtherImages"]
    Path("run.yaml").write_text(yaml.safe_dump({"model": {"class_path": f"{__name__}.Other"}}))
    assert package_of(args) == package_of(["--config=run.yaml"]) == "lightning.pytorch"
    assert package_of(COMMON) == package_of(["--model", "nowhere.Net"]) == package_of([]) == "pytorch_lightning"
    assert main(["inspect", *args, "--trainer.accelerator", "cpu"]) == 0
    assert "4 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--qconfig", "w4x4"], "cannot read 'w4x4' as bit widths"),
        (["--num_samples", "none"], "num_samples"),
        (["--weights", "nowhere.ckpt"], "no weights in nowhere.ckpt"),
        (["--qconfg", "w4a4"], "--qconfg"),
        (["--target", "abacus"], "abacus"),
        (["--size", "-1"], "must be"),
    ],
)
def test_a_wrong_option_is_a_short_error(options, message, capsys):
    assert message in failure(["quantize", *COMMON, *options], capsys)


def test_a_wrong_argument_of_a_callback_in_yaml_is_a_short_error(capsys):
    capture = {"class_path": "lightning_ptq.CalibrationCapture", "init_args": {"qconfig": "w4x4"}}
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [capture]}}))
    assert "cannot read 'w4x4'" in failure(["quantize", "--config", "run.yaml", *COMMON], capsys)
    capture["init_args"] = {"qconfig": "w4a4"}
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [capture]}}))
    text = failure(["quantize", "--config", "run.yaml", *COMMON, "--size", "0.3", "--tune=false"], capsys)
    assert "no effect: --size, --tune" in " ".join(text.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--exclude", "[nothing*]"], "no layer matches 'nothing*'"), (["--size", "1e-6"], "the budget of")],
)
def test_an_error_of_the_library_is_one_message(options, message, capsys):
    assert main(["quantize", *COMMON, *options, "--tune", "false"]) == 1
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text


def test_an_output_that_cannot_be_written_is_an_error_that_keeps_the_progress(capsys, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    Path("file").write_text("")
    assert "file/q.ckpt" in failure(["quantize", *COMMON, "--output", "file/q.ckpt"], capsys)
    Path("folder").mkdir()
    assert "folder is a folder" in failure(["quantize", *COMMON, "--output", "folder"], capsys)
    monkeypatch.setattr(pytorch_lightning.Trainer, "save_checkpoint", full)
    assert main(["quantize", *COMMON, "--output", "q.ckpt", "--tune", "true", "--steps", "1"]) == 1
    assert "q.ckpt cannot be written (OSError: no space left)" in capsys.readouterr().err
    assert Path("ptq_progress").exists()


@pytest.mark.parametrize("content", [b"text", b"", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors"])
def test_a_file_that_holds_no_weights_is_an_error(content, name):
    Path(name).write_bytes(content)
    with pytest.raises(PTQError, match=name):
        load_weights(Small(), Path(name))


def test_weights_of_another_model_are_an_error():
    torch.save({"a": torch.zeros(1)}, "w.pt")
    with pytest.raises(PTQError, match="do not fit Small"):
        load_weights(Small(), Path("w.pt"))


def test_quantized_weights_are_not_quantized_again(quantized, capsys):
    assert main(["quantize", *COMMON, "--weights", "quantized.ckpt"]) == 1
    assert "quantized layers already" in capsys.readouterr().err


def test_without_jsonargparse_the_message_names_the_extra(monkeypatch, capsys):
    def find(name: str, *rest: Any) -> Any:
        return None if name == "jsonargparse" else own(name, *rest)

    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert main(["quantize", *COMMON]) == 1
    assert "pip install 'lightning-ptq[cli]'" in capsys.readouterr().err


def test_the_module_runs_and_its_help_needs_no_lightning():
    code = """
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_module("lightning_ptq", run_name="__main__")
finally:
    print("loaded:", *{"jsonargparse", "pytorch_lightning", "lightning"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("loaded:")[1].split() == []
    assert all(name in result.stdout for name in ("inspect", "quantize", "validate", "export", "report", "compare"))


def test_several_train_loaders_give_a_batch_as_in_fit():
    class Several(Images):
        def train_dataloader(self) -> Any:
            return {"a": loader(), "b": loader(4)}

    batch = first_batch(None, Small(), Several())
    assert (len(batch["a"][0]), len(batch["b"][0])) == (8, 4)


def test_the_help_of_a_subcommand_shows_its_own_options_only(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["quantize", "--help"])
    assert exited.value.code == 0
    text = capsys.readouterr().out
    assert "--report_dir" in text
    assert "--trainer.max_epochs" not in text.replace("--trainer.accelerator gpu", "")
