"""Networks of libraries as ONNX files and as programs for a backend of torch: ``nox -s integrations``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Kinds, ResNet, build, exportable, seeded
from zoo import PLAIN, VISION, Case

from lightning_ptq import calibrate, export_onnx, export_program, verify_export
from lightning_ptq.export.targets import configured

if not os.environ.get("PTQ_TEST_INTEGRATIONS"):
    pytest.skip("these libraries take long to import", allow_module_level=True)

from test_sweep_libraries import CASES

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")
IMAGES = [seeded(i, 6, 2, 6, 6) for i in range(3)]
NETWORKS: dict[str, Case] = {
    **{name: PLAIN[name] for name in ("u-net", "lstm", "one dimension", "squeeze and excite")},
    **{name: VISION[name] for name in ("efficientnet", "densenet", "vision transformer", "swin transformer")},
    **{name: CASES[name] for name in ("bert", "gpt2", "distilbert", "vit")},
}


def inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_of_a_network_computes_what_the_module_computes(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    net = build(case.make).eval()
    calibrate(net, case.batches, configured("w8a8", "onnxruntime"), forward=case.forward).release()
    batches = [inputs(batch) for batch in case.batches]
    result = export_onnx(net, tmp_path / "net.onnx", batches[0], target="onnxruntime", batches=batches)
    assert result.parity.outputs[0].snr > 40
    assert result.float_products == []
    assert any("batch" in axes.values() for axes in result.dynamic_axes.values())


def test_a_text_model_takes_sequences_of_any_length_with_masks(tmp_path: Path) -> None:
    case = CASES["bert"]
    net = build(case.make).eval()

    def batch(length: int, samples: int) -> dict[str, Any]:
        ids = torch.arange(samples * length).view(samples, length) % 20
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    calibrate(net, [batch(6, 4), batch(8, 4)], configured("w8a8", "onnxruntime")).release()
    result = export_onnx(net, tmp_path / "net.onnx", batch(6, 4), batches=[batch(9, 3), batch(4, 1)])
    assert result.dynamic_axes["input_ids"] == {0: "batch", 1: "sequence"}
    assert result.parity.outputs[0].snr > 40


def test_a_backend_of_torch_finds_its_patterns_in_a_program() -> None:
    pytest.importorskip("torchao")
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  registers the patterns
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    net, images = exportable(ResNet, IMAGES), seeded(9, 6, 2, 6, 6)  # the backend knows no transposed convolutions
    program = export_program(net, images, {})
    with torch.no_grad():
        lowered = lower_pt2e_quantized_to_x86(program.module(), (images,))
        expected, found = net(images), lowered(images)
    assert sum("qconv" in str(node.target) for node in lowered.graph.nodes) == 5
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_openvino_computes_what_the_module_computes(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    net = exportable(Kinds, IMAGES, "w8a8", "openvino")
    path = export_onnx(net, tmp_path / "net.onnx", IMAGES[0], target="openvino").path
    compiled = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU")
    with torch.no_grad():
        expected = net(IMAGES[1])
    found = torch.from_numpy(compiled(IMAGES[1].numpy())[0])
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert verify_export(path, net, IMAGES).passed
