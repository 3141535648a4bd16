"""The network's output: where it is read in a calibration forward, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import QConfigError, SensitivityError
from lightning_ptq.network.layers import layers_in_mode

Divergence = Literal["kl", "mse"]
ChooseOutput = Callable[[Any], Any] | int | str  # in the order in which jsonargparse tries to read a word


class OutputReader:
    """Reads the output of the network off a calibration forward, whatever that forward returns.

    The network is the outermost module that runs last and holds quantized layers: the ``LightningModule`` where its
    step calls ``self(...)``, or the child that it calls.

    Args:
        calibration: A calibrated module.
        choose: The tensor in an output of several: a key, an index, or a function of the output.
    """

    def __init__(self, calibration: Calibration, choose: ChooseOutput | None = None) -> None:
        self.choose = choose
        outermost = [event.name for event in calibration.trace.events if event.kind == "exit" and not event.scope]
        layers = tuple(calibration.layers)
        holders = [n for n in outermost if any(n in ("", layer) or layer.startswith(n + ".") for layer in layers)]
        self.network = calibration.module.get_submodule(holders[-1])

    def read(self, run: Callable[[], Any]) -> tuple[Tensor, Any]:
        """Run a forward.

        Returns:
            The network's output, (samples, ...), and what the forward returned.

        Raises:
            SensitivityError: If the output is no tensor and nothing says which part of it to take.
        """
        found: list[Any] = []
        handle = self.network.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            result = run()
        finally:
            handle.remove()
        return self._tensor(found[-1]), result

    def _tensor(self, output: Any) -> Tensor:
        tensor = output
        if callable(self.choose):
            tensor = self.choose(output)
        elif self.choose is not None:
            try:
                tensor = output[self.choose] if not isinstance(output, Tensor) else None
            except (KeyError, IndexError, TypeError):
                tensor = None
            if tensor is None:
                raise SensitivityError(f"the network's output has no {self.choose!r}. {_shown(output)}")
        elif not isinstance(output, Tensor):
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            tensor = leaves[0] if len(leaves) == 1 else None
        if not (isinstance(tensor, Tensor) and tensor.dim()):
            raise SensitivityError(
                f"cannot tell which tensor is the network's output. {_shown(output)} Write output= with its key, its"
                " index, or a function that picks it."
            )
        return tensor


def _shown(output: Any) -> str:
    kind = type(output).__name__
    return f"It is a {kind} with the keys {list(output)}." if isinstance(output, Mapping) else f"It is a {kind}."


def divergence(output: Tensor, target: Tensor, measure: Divergence) -> Tensor:
    """How far the outputs are from the targets, sample by sample.

    Args:
        output: (samples, ...), of the quantized network.
        target: The float network's, same shape.
        measure: ``"kl"``: the Kullback-Leibler divergence of the softmax distributions in nats, mean over positions;
            classes are the second dimension of (n, c) and (n, c, height, width, ...), the last one of (n, t, c).
            ``"mse"``: the mean squared difference.

    Returns:
        (samples,), float64, on the CPU.

    Example:
        >>> from torch import zeros, ones
        >>> divergence(zeros(3, 2), ones(3, 2), "mse").tolist()
        [1.0, 1.0, 1.0]
    """
    if measure not in ("kl", "mse"):
        raise QConfigError(f"the measure between outputs must be 'kl' or 'mse', got {measure!r}.")
    output, target = output.cpu().double(), target.cpu().double()  # divergences may be as small as float32 rounding
    if measure == "mse":
        apart = (output - target).square()
    else:
        classes = 2 if output.dim() == 3 else 1
        if output.dim() < 2 or output.shape[classes] < 2:  # of a single class, every divergence would be 0
            raise SensitivityError(
                f"the outputs have shape {tuple(output.shape)}, so there are no logits of several classes to compare."
                " Write measure='mse'."
            )
        logs = F.log_softmax(output, classes), F.log_softmax(target, classes)
        apart = F.kl_div(*logs, log_target=True, reduction="none").sum(classes)
    return apart.reshape(len(apart), -1).mean(1)


def float_outputs(calibration: Calibration, reader: OutputReader) -> list[Tensor]:
    """The float network's output on each calibration batch, on the CPU."""
    with layers_in_mode(calibration.module, "float"):
        batches = range(len(calibration.batches))
        return [reader.read(partial(calibration.run, batch))[0].detach().cpu() for batch in batches]


class Meter:
    """How far a calibrated module is from the float one, or its loss: the measure of one forward.

    Args:
        calibration: The calibrated module; its float outputs are taken at once.
        measure: ``"kl"`` or ``"mse"`` between the outputs, ``"loss"``; ``"fisher"`` is an estimate of ``"kl"``.
        output: See :class:`OutputReader`.

    Attributes:
        samples: In each calibration batch.
    """

    def __init__(self, calibration: Calibration, measure: str, output: ChooseOutput | None) -> None:
        self.calibration = calibration
        self.measure = "kl" if measure == "fisher" else measure
        self.reader = OutputReader(calibration, output)
        self.targets = float_outputs(calibration, self.reader)
        self.samples = [len(target) for target in self.targets]

    def measure_all(self) -> list[float]:
        """The measure of the module as it is, by batch; several ranks share the batches."""
        return [float(values.mean()) for values in self.each()]

    def each(self) -> list[Tensor]:
        """The measure of the module as it is for each sample, by batch; for ``"loss"``, one value a batch."""
        ranks, runs = self.calibration.ranks, range(len(self.calibration.batches))
        own = {b: self._values(b, partial(self.calibration.run, b), "the base") for b in filter(ranks.mine, runs)}
        found = {batch: values for of_rank in ranks.gather(own) for batch, values in of_rank.items()}
        return [found[batch] for batch in runs]

    def mean(self, values: list[Tensor] | None = None) -> float:
        """The measure of the module as it is, or of what :meth:`each` returned, over all samples."""
        found = [float(of_batch.mean()) for of_batch in (self.each() if values is None else values)]
        return sum(v * n for v, n in zip(found, self.samples, strict=True)) / sum(self.samples)

    def __call__(self, batch: int, run: Callable[[], Any], what: str = "the base") -> float:
        """The measure of the forward that ``run`` does on a batch.

        Raises:
            SensitivityError: If it is NaN, or the forward returns no loss.
        """
        return float(self._values(batch, run, what).mean())

    def _values(self, batch: int, run: Callable[[], Any], what: str) -> Tensor:
        output, result = self.reader.read(run)
        if self.measure == "loss":
            values = torch.tensor([_loss(result)], dtype=torch.float64)
        else:
            values = divergence(output, self.targets[batch], cast(Any, self.measure)).detach()
        if not torch.isfinite(values).all():
            raise SensitivityError(
                f"the {self.measure} with {what} is {float(values.mean())} on calibration batch {batch}."
                " Check the module's output on that batch."
            )
        return values


def _loss(result: Any) -> float:
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss)
    raise SensitivityError(
        f"measure='loss' needs a calibration forward that returns its loss, not a {type(result).__name__}. Calibrate"
        " with step='training' and labelled batches, or use measure='kl' or 'mse', which need no labels."
    )
