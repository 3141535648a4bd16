from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IMAGES, build, classifier, classifier_class, loader, same_state, state, trainer

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture, ExportONNX, StatsTuning, verify_export
from lightning_ptq.callbacks import export as export_module
from lightning_ptq.errors import CallbackError, ExportError, ParityError
from lightning_ptq.export import onnx_weights, sessions
from lightning_ptq.network.op import quantized_ops

ir = pytest.importorskip("onnx_ir")
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def ptq(*last: Any, **options: Any) -> list[Any]:
    return [CalibrationCapture("w4a8", target="onnxruntime", **options), AdaQuantLayerwise(steps=2), *last]


def test_fit_writes_a_file_that_computes_what_the_module_computes(pl: Any, tmp_path: Path) -> None:
    module, export = classifier(pl), ExportONNX("sub/net.onnx", samples=20, output_names=["logits"])
    callbacks = ptq(StatsTuning(steps=2), export, report_dir=str(tmp_path / "report"))
    trainer(pl, tmp_path, *callbacks).fit(module, loader())
    result = export.result
    assert result.path == tmp_path / "sub" / "net.onnx"
    assert result.parity.samples == 24  # whole batches of 8
    assert result.parity.outputs[0].name == "logits"
    assert result.dynamic_axes == {"x": {0: "batch"}}
    # The run's result is the module after statistics tuning, and so is the file.
    assert verify_export(result.path, module, [IMAGES]).outputs[0].snr > 100
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "Exported file" in (tmp_path / "report" / "report.html").read_text()
    assert report["export"]["opset"] == 21
    assert report["export"]["parity"]["samples"] == 24
    assert callbacks[0].report.summary()["onnx_bytes"] == result.bytes


def test_the_network_that_a_step_calls_is_exported_with_the_inputs_it_gets(pl: Any, tmp_path: Path) -> None:
    class Steps(classifier_class(pl)):
        def forward(self, *_: Any) -> Any:
            raise NotImplementedError

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(input=2 * batch[0]).square().mean()

    module, export = build(Steps), ExportONNX("net.onnx")
    trainer(pl, tmp_path, *ptq(export)).fit(module, loader())
    assert verify_export(tmp_path / "net.onnx", module.net, [IMAGES]).passed
    assert list(export.result.dynamic_axes) == ["input"]
    other = ExportONNX("other.onnx", network="net")
    trainer(pl, tmp_path, *ptq(other)).fit(build(Steps), loader())
    assert other.result.bytes == export.result.bytes


def test_an_error_of_the_export_leaves_the_finished_run(
    pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = classifier(pl)
    monkeypatch.setattr(onnx_weights, "narrow", _spoil)
    with pytest.raises(ParityError, match=r"net.failed.onnx does not compute"):
        trainer(pl, tmp_path, *ptq(ExportONNX("net.onnx")), enable_checkpointing=True).fit(module, loader())
    assert sorted(path.suffix for path in tmp_path.glob("net*")) == [".onnx"]
    assert all(op.is_quantized for op in quantized_ops(module).values())
    saved = torch.load(next(tmp_path.rglob("quantized.ckpt")), weights_only=False)["state_dict"]
    assert same_state(saved, state(module))


def test_an_unforeseen_error_leaves_the_finished_run(pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("of the exporter")

    module = classifier(pl)
    monkeypatch.setattr(export_module, "export_onnx", fail)
    with pytest.raises(ExportError, match=r"net.onnx failed \(ZeroDivisionError: of the exporter\)"):
        trainer(pl, tmp_path, *ptq(ExportONNX(tmp_path / "net.onnx"))).fit(module, loader())
    assert all(op.is_quantized for op in quantized_ops(module).values())


def _spoil(graph: Any, *_: Any) -> None:
    for name, value in graph.initializers.items():
        if name.endswith("stored"):
            value.const_value = ir.tensor(-value.const_value.numpy(), name=name)


def test_bad_arguments_are_told_before_the_work(pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = classifier(pl)
    before = state(module)
    with pytest.raises(ExportError, match=r"network='nett'.*children are \['net', 'seen'\]"):
        trainer(pl, tmp_path, *ptq(ExportONNX(network="nett"))).fit(module, loader())
    assert same_state(before, state(module))
    with pytest.raises(CallbackError, match="ExportONNX"):
        trainer(pl, tmp_path, *ptq(ExportONNX(), StatsTuning())).fit(module, loader())
    with pytest.raises(ExportError, match="18"):
        ExportONNX(opset=9)
    for arguments in ({"path": None}, {"dynamic_axes": {"x": [0]}}, {"output_names": "logits"}):
        with pytest.raises(ExportError, match=next(iter(arguments))):
            ExportONNX(**arguments)
    monkeypatch.setattr(sessions, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'lightning-ptq\[onnx\]'"):
        ExportONNX()


def test_wandb_gets_the_file_as_an_artifact(pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = pl.loggers.WandbLogger(project="ptq", save_dir=tmp_path, offline=True)
    run, artifacts = logger.experiment, []
    log_artifact = run.log_artifact
    monkeypatch.setattr(run, "log_artifact", lambda artifact: (artifacts.append(artifact), log_artifact(artifact)))
    trainer(pl, tmp_path, *ptq(ExportONNX("net.onnx")), logger=logger).fit(classifier(pl), loader())
    wandb.finish()
    (artifact,) = [found for found in artifacts if found.type == "model"]  # tables are artifacts too
    assert (artifact.name.split(":")[0], artifact.type) == ("net", "model")
    assert list(artifact.manifest.entries) == ["net.onnx"]
    assert artifact.manifest.entries["net.onnx"].size == (tmp_path / "net.onnx").stat().st_size
