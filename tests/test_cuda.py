"""What a GPU does otherwise. Several processes on one: PTQ_TEST_ACCELERATOR=gpu pytest tests/ranks"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    IMAGES,
    ResNet,
    Transformer,
    build,
    classifier,
    loader,
    same_state,
    seeded,
    state,
    token_batches,
    trainer,
)
from torch import Tensor, nn

from lightning_ptq import (
    AdaQuantLayerwise,
    BitAllocator,
    CalibrationCapture,
    ReconstructionConfig,
    StatsTuning,
    adaquant,
    calibrate,
    export_onnx,
    load_packed,
    measure_sensitivity,
    reestimate_batch_norm,
    save_packed,
)
from lightning_ptq.calibration.batch import Batch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
]

CONFIG = ReconstructionConfig(steps=10, batch_size=16)
NETS = {"resnet": (ResNet, [*seeded(7, 64, 2, 6, 6).split(16)]), "transformer": (Transformer, token_batches(3, 32))}


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def calibrated(name: str, device: str, qconfig: str = "w4a4") -> Any:
    make, batches = NETS[name]
    return calibrate(build(make).eval().to(device), Batch(batches).to(torch.device(device)), qconfig)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("mode", "granularity"), [("sequential", "block"), ("sequential", "layer"), ("parallel", "block")]
)
def test_activations_in_files_change_nothing(tmp_path, monkeypatch, name, mode, granularity):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = []
    for limit in ("1GiB", 0):
        calibration = calibrated(name, "cuda")
        result = adaquant(calibration, mode=mode, granularity=granularity, config=CONFIG, memory_limit=limit)
        found.append(([(row.error_before, row.error_after) for row in result.units], state(calibration.module)))
        assert (result.peak_activation_bytes > 0) == (limit != 0)
    assert found[0][0] == found[1][0]
    assert same_state(found[0][1], found[1][1])
    assert list(tmp_path.iterdir()) == []


def test_sensitivities_and_statistics_with_activations_in_files():
    found = []
    for limit in ("1GiB", 0):
        calibration = calibrated("resnet", "cuda", "w4a8")
        table = measure_sensitivity(calibration, ["w8a8", "w4a8"], base="w8a8", memory_limit=limit)
        result = reestimate_batch_norm(calibration, memory_limit=limit)
        found.append((table.rises, result, state(calibration.module)))
    assert found[0][:2] == found[1][:2]
    assert same_state(found[0][2], found[1][2])


@pytest.mark.parametrize("name", NETS)
def test_a_gpu_ends_near_the_cpu(name):
    on_cpu, on_gpu = (calibrated(name, device) for device in ("cpu", "cuda"))
    for layer, quantized in on_cpu.layers.items():
        torch.testing.assert_close(
            on_gpu.layers[layer].input_fake_quant.scale.cpu(), quantized.input_fake_quant.scale, rtol=1e-3, atol=0
        )
    # Random numbers differ between devices. With nothing held out, all samples decide on both, so the errors of a
    # unit's initial quantization agree; in parallel mode they do not depend on the tuned units before it either.
    config = replace(CONFIG, held_out=0.0)
    left, right = (adaquant(calibration, mode="parallel", config=config).units for calibration in (on_cpu, on_gpu))
    assert [row.name for row in right] == [row.name for row in left]
    assert [row.error_before for row in right] == pytest.approx([row.error_before for row in left], rel=0.02)
    for row in (*left, *right):
        assert row.accepted == (row.error_after < row.error_before)


class Sorted(nn.Module):
    """A net whose block takes an order that stays on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), Ordered()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.arange(5, -1, -1), self.first(x))


class Ordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, order: Tensor, x: Tensor) -> Tensor:
        assert order.device.type == "cpu"
        return self.b(self.a(x)[:, order.to(x.device)])


@pytest.mark.parametrize("limit", ["1GiB", 0])
def test_an_input_on_the_cpu_stays_there(limit):
    calibration = calibrate(build(Sorted).eval().to("cuda"), seeded(1, 64, 6).to("cuda").split(16), "w4a4")
    result = adaquant(calibration, blocks=["block"], config=CONFIG, memory_limit=limit)
    assert [row.accepted for row in result.units] == [row.error_after < row.error_before for row in result.units]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_whole_pipeline(tmp_path, pl, precision):
    found = []
    for run in range(2):
        callbacks = [
            CalibrationCapture("w8a8"),
            AdaQuantLayerwise("parallel", candidates=["w8a8", "w4a4", "w2a4"], steps=10, batch_size=8),
            BitAllocator(0.3),
            AdaQuantLayerwise(steps=10, batch_size=8),
            StatsTuning(steps=5),
        ]
        module = classifier(pl)
        fitting = trainer(pl, tmp_path, *callbacks, accelerator="gpu", deterministic=True, precision=precision)
        fitting.fit(module, loader())
        assert callbacks[0].report.stages[-1].peak_gpu_memory > 0
        found.append(state(module))
        fitting.save_checkpoint(tmp_path / f"{run}.ckpt")
    assert same_state(*found)
    assert {tensor.device.type for tensor in found[0].values()} == {"cpu"}
    save_packed(module, tmp_path / "packed.safetensors")
    restored = load_packed(classifier(pl).cuda(), tmp_path / "packed.safetensors").eval()
    assert torch.equal(restored(IMAGES.cuda()), module.eval().cuda()(IMAGES.cuda()))


def test_a_module_on_the_gpu_is_exported_with_inputs_on_the_cpu(tmp_path: Any) -> None:
    make, batches = NETS["resnet"]
    net = build(make).eval().cuda()
    calibrate(net, batches, "w8a8").release()
    assert export_onnx(net, tmp_path / "net.onnx", batches[0]).parity.outputs[0].snr > 40
    assert all(parameter.is_cuda for parameter in net.parameters())
