from __future__ import annotations

import torch
from helpers import Transformer, seeded, token_batches
from torch import Tensor, nn

from lightning_ptq import calibrate


def widths(net: nn.Module, batches: list) -> set[str]:
    calibration = calibrate(net.eval(), batches, "w4a4")
    return {name for name, layer in calibration.layers.items() if str(layer.qconfig) == "w8a8"}


def test_layers_that_share_the_first_input_are_first() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
            self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.query(x), self.key(x), self.value(x)
            return self.head(self.out((q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1))

    assert widths(Attention(), [seeded(0, 4, 5, 8)]) == {"query", "key", "value", "head"}


def test_a_layer_whose_output_the_result_does_not_hold_is_not_last() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.block = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
            self.last, self.pooler = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.stem(x))
            h = h + self.block(h)
            h = self.norm(h + self.last(h.relu()))
            self.pooler(h)
            return h

    assert widths(Pooled(), [seeded(0, 4, 4)]) == {"stem", "last"}


def test_every_head_is_last() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Linear(4, 4), nn.Linear(4, 4)
            self.classes, self.boxes = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(self.stem(x).relu()).relu()
            return {"classes": self.classes(h), "boxes": self.boxes(h), "features": h}

    assert widths(Heads(), [seeded(0, 4, 4)]) == {"stem", "classes", "boxes"}


def test_a_transformer_has_first_and_last_layers() -> None:
    torch.manual_seed(0)
    assert widths(Transformer(), token_batches()) == {"layers.0.attention.qkv", "head"}
