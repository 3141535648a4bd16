"""Small nets and small questions that several test files share."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ptq.modules import FoldableBatchNorm, QuantLayer


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

    def __init__(self, width: int = 8, by_keyword: bool = False) -> None:
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
        """Training flags, requires_grad, and the attributes that each module has of its own."""
        found: dict[str, Any] = {}
        for name, child in self.module.named_modules():
            hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks)
            found[name] = (child.training, sorted(vars(child)), [list(hook) for hook in hooks])
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
