"""The network's output: where it is read in a calibration forward, and how two outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.padding import where_real
from lightning_ptq.errors import QConfigError, SensitivityError
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.structure import float_tensors_in, is_float

Divergence = Literal["kl", "mse"]
ChooseOutput = Callable[[Any], Any] | int | str  # jsonargparse tries to parse a value as these types in this order


def check_choice(output: Any) -> ChooseOutput | None:
    """Return how the output is selected; raise :class:`QConfigError` unless it is a key, an index, a function or None.

    Args:
        output: The value of an argument ``output``.
    """
    if output is None or callable(output) or (isinstance(output, (str, int)) and not isinstance(output, bool)):
        return cast("ChooseOutput | None", output)
    raise QConfigError(
        f"output must be a key, an index or a function of the network's output, got {output!r}. Write for example"
        " 'logits', or leave it out."
    )


class OutputReader:
    """Reads the output of the network in a calibration forward, independently of what that forward returns.

    The network is the outermost module that runs last and has quantized layers: the ``LightningModule`` if its step
    calls ``self(...)``, otherwise the child that it calls.

    Args:
        calibration: A calibrated module.
        choose: How to select the tensor: a key, an index, or a function of the output. By default it is the only
            floating-point tensor that is no scalar, or else the ``logits``.
    """

    def __init__(self, calibration: Calibration, choose: ChooseOutput | None = None) -> None:
        self.choose = choose
        layers = tuple(calibration.layers)
        self.networks: dict[str, nn.Module] = {}
        for trace in calibration.traces:  # a step may call another network on other batches
            outermost = [event.name for event in trace.events if event.kind == "exit" and not event.scope]
            holders = [n for n in outermost if any(n in ("", layer) or layer.startswith(n + ".") for layer in layers)]
            if holders:
                self.networks[holders[-1]] = calibration.module.get_submodule(holders[-1])

    def read(self, run: Callable[[], Any]) -> tuple[Tensor, Any]:
        """Run a forward.

        Returns:
            The network's output, (samples, ...), and what the forward returned.

        Raises:
            SensitivityError: If ``choose`` selects no tensor, or without it, there is more than one candidate.
        """
        outputs: list[Any] = []

        def record(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
            outputs.append(output)

        with hooked(self.networks, after=record):
            result = run()
        if not outputs:
            raise SensitivityError("the calibration forward called no module with quantized layers on some batch.")
        return self._tensor(outputs[-1]), result

    def _tensor(self, output: Any) -> Tensor:
        tensor = output
        if callable(self.choose):
            tensor = self.choose(output)
        elif self.choose is not None:
            try:
                # A tensor could be indexed too, but that would select a sample.
                tensor = output[self.choose] if not isinstance(output, Tensor) else None
            except (KeyError, IndexError, TypeError):
                tensor = None
            if tensor is None:
                raise SensitivityError(f"the network's output has no {self.choose!r}. {_described(output)}")
        elif not isinstance(output, Tensor):
            leaves = [leaf for leaf in float_tensors_in(output) if leaf.dim()]  # a scalar is the loss
            tensor = leaves[0] if len(leaves) == 1 else _logits(output)
        if not (isinstance(tensor, Tensor) and tensor.dim()):
            raise SensitivityError(
                f"cannot tell which tensor is the network's output. {_described(output)} Set output= to its key, its"
                " index, or a function that selects it."
            )
        return tensor


def _logits(output: Any) -> Tensor | None:
    """Return the entry or attribute ``logits`` of a mapping, a dataclass or a named tuple; None if there is none."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if is_float(logits) else None


def _described(output: Any) -> str:
    kind = type(output).__name__
    return f"It is a {kind} with the keys {list(output)}." if isinstance(output, Mapping) else f"It is a {kind}."


def divergence(output: Tensor, target: Tensor, measure: Divergence, padding: Tensor | None = None) -> Tensor:
    """Return how far outputs are from targets, for each sample.

    Args:
        output: Output of the quantized network, (samples, ...).
        target: Output of the float network, same shape.
        measure: ``"kl"``: the Kullback-Leibler divergence of the softmax distributions in nats, mean over positions;
            classes are the second dimension of (n, c) and (n, c, height, width, ...), the last one of (n, t, c).
            ``"mse"``: the mean squared difference.
        padding: Positions of the samples that hold data, (samples, positions); only these are compared. None for all.

    Returns:
        The divergences, (samples,), float64, on the CPU.

    Raises:
        QConfigError: If the measure is unknown.
        SensitivityError: If the outputs have different shapes, or the measure is ``"kl"`` and there are fewer than two
            classes.

    Example:
        >>> from torch import zeros, ones
        >>> divergence(zeros(3, 2), ones(3, 2), "mse").tolist()
        [1.0, 1.0, 1.0]
    """
    if measure not in ("kl", "mse"):
        raise QConfigError(f"the measure between outputs must be 'kl' or 'mse', got {measure!r}.")
    if output.shape != target.shape:
        raise SensitivityError(
            f"the network's output has shape {tuple(output.shape)} when quantized, but {tuple(target.shape)} in float,"
            " so the two cannot be compared: its shape depends on its values. Set output= to a function of the output"
            " that returns a tensor of the same shape each time."
        )
    output, target = output.cpu().double(), target.cpu().double()  # divergences may be as small as float32 rounding
    if measure == "mse":
        values = (output - target).square()
        real = where_real(output, padding)
    else:
        classes = 2 if output.dim() == 3 else 1
        if output.dim() < 2 or output.shape[classes] < 2:  # with a single class, every divergence would be 0
            raise SensitivityError(
                f"the outputs have shape {tuple(output.shape)}, so there are no logits of several classes to compare."
                " Write measure='mse'."
            )
        logs = F.log_softmax(output, classes), F.log_softmax(target, classes)
        values = F.kl_div(*logs, log_target=True, reduction="none").sum(classes)
        real = where_real(output, padding)
        real = None if real is None else real.squeeze(classes)
    if real is not None:
        counted = real.expand_as(values).reshape(len(values), -1)
        return (values.reshape(len(values), -1) * counted).sum(1) / counted.sum(1).clamp(min=1)
    return values.reshape(len(values), -1).mean(1)


def float_outputs(calibration: Calibration, reader: OutputReader) -> list[Tensor]:
    """Return the float network's output on each calibration batch, on the CPU."""
    with ops_in_mode(calibration.module, "float"):
        batches = range(len(calibration.batches))
        return [reader.read(partial(calibration.run, batch))[0].detach().cpu() for batch in batches]


class Meter:
    """Measures how far a calibrated module is from the float one, or its loss, in one forward per batch.

    Args:
        calibration: The calibrated module; the outputs of its float layers are computed immediately.
        measure: ``"kl"`` or ``"mse"`` between the outputs, or ``"loss"``.
        output: The tensor of the network's output; see :class:`OutputReader`.
        finite: Whether a measure that is NaN or an infinity is an error.

    Attributes:
        samples: Number of samples in each calibration batch.
    """

    def __init__(
        self, calibration: Calibration, measure: str, output: ChooseOutput | None, finite: bool = True
    ) -> None:
        self.calibration = calibration
        self.finite = finite
        self.measure = measure
        self.reader = OutputReader(calibration, output)
        self.targets = float_outputs(calibration, self.reader)
        self.samples = [len(target) for target in self.targets]

    def measure_all(self) -> list[float]:
        """Return the measure of the module in its present state, by batch; several ranks share the batches."""
        return [float(values.mean()) for values in self.each()]

    def each(self) -> list[Tensor]:
        """Return the measure of the module in its present state for each sample, by batch.

        The loss has a single value per batch. Several ranks share the batches.

        Raises:
            SensitivityError: On all ranks, if one of them cannot measure.
        """
        ranks, batches = self.calibration.ranks, range(len(self.calibration.batches))
        by_batch = ranks.merge({batch: self._outcome(batch) for batch in filter(ranks.owns, batches)})
        found: list[Tensor] = []
        for batch in batches:
            outcome = by_batch[batch]
            if isinstance(outcome, SensitivityError):
                raise outcome
            found.append(outcome)
        return found

    def _outcome(self, batch: int) -> Tensor | SensitivityError:
        try:
            return self._values(batch, partial(self.calibration.run, batch), "the base")
        except SensitivityError as error:
            if self.calibration.ranks.world == 1:
                raise
            return error  # the other ranks learn of it, and do not wait for this one

    def mean(self, values: list[Tensor] | None = None) -> float:
        """Return the mean over all samples of what :meth:`each` returned, or returns now."""
        means = [float(of_batch.mean()) for of_batch in (self.each() if values is None else values)]
        return sum(m * n for m, n in zip(means, self.samples, strict=True)) / sum(self.samples)

    def __call__(self, batch: int, run: Callable[[], Any], what: str = "the base") -> float:
        """Return the measure of a forward.

        Args:
            batch: Index of the batch on which ``run`` runs the forward.
            run: The forward.
            what: Description of the module's state for error messages.

        Raises:
            SensitivityError: If the measure is not finite, or the forward returns no loss.
        """
        return float(self._values(batch, run, what).mean())

    def _values(self, batch: int, run: Callable[[], Any], what: str) -> Tensor:
        output, result = self.reader.read(run)
        if self.measure == "loss":
            values = torch.tensor([_loss(result)], dtype=torch.float64)
        else:
            measure, padding = cast(Divergence, self.measure), self.calibration.padding(batch)
            values = divergence(output, self.targets[batch], measure, padding).detach()
        if self.finite and not torch.isfinite(values).all():
            raise SensitivityError(
                f"the {self.measure} with {what} is {float(values.mean())} on calibration batch {batch}."
                " Check the module's output on that batch."
            )
        return values


def check_output(calibration: Calibration, measure: Divergence, output: ChooseOutput | None) -> None:
    """Check that the float network's output can be read and measured, on one batch of each course of the forward.

    Raises:
        SensitivityError: If it cannot.
    """
    some = calibration.part(calibration.one_batch_per_course())
    for found in float_outputs(some, OutputReader(some, output)):
        divergence(found, found, measure)


def _loss(result: Any) -> float:
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss)
    raise SensitivityError(
        f"measure='loss' needs a calibration forward that returns its loss, got one that returns a"
        f" {type(result).__name__}. Calibrate with step='training' and labelled batches, or use measure='kl' or 'mse',"
        " which need no labels."
    )
