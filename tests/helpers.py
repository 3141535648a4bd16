"""Small nets and small questions that several test files share."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_ptq import calibrate
from lightning_ptq.export.targets import configured
from lightning_ptq.network.batch_norm import FoldableBatchNorm
from lightning_ptq.network.layers import QuantLayer

# With "gpu" the Trainers of the tests use one, in all ranks.
ACCELERATOR = os.environ.get("PTQ_TEST_ACCELERATOR", "cpu")


def seeded(seed: int, *shape: int) -> Tensor:
    """Normal random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(make: Any, seed: int = 0) -> nn.Module:
    """``make()`` with reproducible parameters, and batch norms with statistics of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
        for child in net.modules():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                child.running_mean.normal_(0, 0.3)
                child.running_var.uniform_(0.5, 2)
        return net


def sharp(make: Any) -> nn.Module:
    """A net whose logits are so far apart that divergences are well above rounding."""
    net = build(make).eval()
    with torch.no_grad():
        list(net.parameters())[-2].mul_(20)
    return net


class Residual(nn.Module):
    """conv-bn-relu-conv-bn plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """A stem, two residual blocks and a head; images of 6 x 6 pixels."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Residual(width), Residual(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    """One head, batch first; ``mask`` is true where a token is to be seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, :]))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward part, each with a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        hidden = hidden + self.attention(self.norm1(hidden), mask=mask)
        return (hidden + self.down(F.gelu(self.up(self.norm2(hidden)))),)


class Transformer(nn.Module):
    """Token embeddings, two encoder layers that take their mask by keyword, a head on the mean of what is seen."""

    def __init__(self, width: int = 16, by_keyword: bool = False) -> None:
        super().__init__()
        self.by_keyword = by_keyword
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(EncoderLayer(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            (hidden,) = layer(hidden=hidden, mask=mask) if self.by_keyword else layer(hidden, mask=mask)
        seen = torch.ones_like(ids) if mask is None else mask
        return self.head((hidden * seen[..., None]).sum(1) / seen.sum(1, keepdim=True))


class Kinds(nn.Module):
    """A residual block, transposed convolutions with and without groups, a concatenation and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(2, 4, 3, padding=1), Residual(4)
        self.up, self.grouped = nn.ConvTranspose2d(4, 6, 2, 2), nn.ConvTranspose2d(4, 4, 2, 2, groups=2)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x).relu())
        return self.head(torch.cat([self.up(x), self.grouped(x)], 1).mean((2, 3)))


def exportable(make: Any, batches: list[Any], qconfig: str = "w8a8", target: str | None = None, **options: Any) -> Any:
    """A net that is quantized for a target, without exceptions for the first and the last layer."""
    net = build(make).eval()
    calibrate(net, batches, configured(qconfig, target, first_last_bits=None, **options)).release()
    return net


def token_batches(count: int = 3, size: int = 8, lengths: tuple[int, ...] = (5,)) -> list[dict[str, Tensor]]:
    """Dictionaries of ids and masks; the sequence length cycles through ``lengths``."""
    batches = []
    for i in range(count):
        generator, length = torch.Generator().manual_seed(i), lengths[i % len(lengths)]
        mask = torch.rand(size, length, generator=generator) > 0.3
        mask[:, 0] = True
        batches.append({"ids": torch.randint(11, (size, length), generator=generator), "mask": mask})
    return batches


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Squared error over squared norm."""
    return ((found - expected).square().sum() / expected.square().sum()).item()


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return copy.deepcopy(dict(module.state_dict()))


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """True if both have the same keys, and bit for bit the same tensors."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


_LIGHTNING = ("_hparams", "_trainer", "_device", "_current_fx_name")  # which every Trainer sets on a LightningModule


class Snapshot:
    """All of a float module that an undo has to bring back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.objects = self._objects()
        self.state = state(module)
        self.flags = self._flags()
        self.training = {name: child.training for name, child in module.named_modules()}

    def _objects(self) -> dict[str, int]:
        modules = {f"module {name}": id(child) for name, child in self.module.named_modules()}
        return modules | {f"parameter {name}": id(p) for name, p in self.module.named_parameters()}

    def _flags(self) -> dict[str, Any]:
        """The attributes that each module has of its own, with the values of the plain ones; hooks; requires_grad."""
        found: dict[str, Any] = {}
        for name, child in self.module.named_modules():
            attributes = {key: value for key, value in vars(child).items() if key not in _LIGHTNING}
            plain = {k: v for k, v in attributes.items() if v is None or isinstance(v, (bool, int, float, str))}
            hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks)
            found[name] = (sorted(attributes), plain, [list(hook) for hook in hooks])
        return found | {f"{n} grad": p.requires_grad for n, p in self.module.named_parameters()}

    def assert_unchanged(self) -> None:
        """The same module and parameter objects with the same values and flags, and no library class left."""
        assert self._objects() == self.objects
        assert same_state(state(self.module), self.state)
        assert self._flags() == self.flags
        assert not [child for child in self.module.modules() if isinstance(child, (QuantLayer, FoldableBatchNorm))]


def rng_state() -> tuple[Any, ...]:
    """The global random states of torch, numpy and Python, comparable."""
    name, keys, *rest = np.random.get_state()
    return bytes(torch.get_rng_state().tolist()), name, keys.tobytes(), *rest, random.getstate()


class SmallNet(nn.Sequential):
    """conv-bn-relu-conv-relu-linear-linear with dropout; images of 5 x 5 pixels, three classes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip


IMAGES, LABELS = seeded(50, 40, 1, 5, 5), torch.arange(40) % 3


def classifier_class(pl: Any) -> Any:
    """An ordinary LightningModule class of the given package."""

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallNet()
            self.seen = MeanMetric()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x), y)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.seen.update(loss.detach())
            self.log("train_loss", loss)
            self.log("seen", self.seen)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    return Classifier


def classifier(pl: Any, change: Any = lambda base: base) -> Any:
    """A classifier with reproducible weights; ``change`` derives another class from the ordinary one."""
    return build(change(classifier_class(pl)))


def loader(batch_size: int = 8, **kwargs: Any) -> DataLoader[Any]:
    """Five batches of (image, label)."""
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size, **kwargs)


def trainer(pl: Any, root: Any, *callbacks: Any, **kwargs: Any) -> Any:
    """A quiet Trainer; on a GPU each process is a node, for NCCL wants those of one node on different GPUs."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    options = {
        "max_epochs": 1, "accelerator": ACCELERATOR, "devices": 1, "default_root_dir": str(root), **quiet, **kwargs
    }  # fmt: skip
    if ACCELERATOR == "gpu":
        several = {"num_nodes": options.get("num_nodes", 1) * options["devices"], "devices": 1}
        options |= {"deterministic": True, **several}
    return pl.Trainer(callbacks=list(callbacks), **options)


@torch.no_grad()
def idle_quantizers(calibration: Any, x: Any) -> list[str]:
    """Names of the quantizers whose scale makes no difference to the output: nothing is computed with them."""
    module, idle = calibration.module, []
    expected = module.eval()(x)
    for name, op in calibration.layers.items():
        for key, quantizer in {**op.weight_quantizers, **op.input_quantizers}.items():
            scale = quantizer.scale.clone()
            quantizer.scale.mul_(3.7)
            idle += [f"{name}.{key}"] if torch.equal(module.eval()(x), expected) else []
            quantizer.scale.copy_(scale)
    return idle
