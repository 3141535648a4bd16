"""Sensitivities of all layers and candidates from one backward pass: a second-order estimate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_ptq.activations.calls import unit_errors
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Candidates, Choice
from lightning_ptq.calibration.outputs import OutputReader
from lightning_ptq.errors import SensitivityError, UnitError
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.runtime.gradient import gradient_errors
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.progress import Progress, no_progress


def fisher_rises(
    calibration: Calibration,
    choices: Candidates,
    base: Choice,
    reader: OutputReader,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, dict[str, list[float]]]:
    """Estimate the rise of the KL divergence to second order, by layer, candidate and batch.

    Let ``δ`` be the change of a layer's output when the layer goes from its base to a candidate. Then
    ``KL ≈ ½ Σ_c p_c (δ · ∇ log p_c)²``, the quadratic form of the Fisher information (as in BRECQ, Li et al., 2021,
    eq. 10, but including the correlations within a sample). With random signs ``v``, the gradient ``g`` of
    ``Σ_c v_c √p_c log p_c``, with ``√p_c`` held constant, has ``E[(δ · g)²] = Σ_c p_c (δ · ∇ log p_c)²``. Labels drawn
    from ``p`` would give the same expectation, but rare classes would then contribute rare, large values. Where a
    sample has several positions (tokens, pixels), the estimate is the mean over them, as the divergence is.

    The whole table takes one forward and one backward pass of the network, and a forward of each layer alone for each
    of its candidates. Several ranks (``calibration.ranks``) share the batches.

    Args:
        calibration: The calibrated module in eval mode, all layers at their base.
        choices: The candidates.
        base: The base candidate of each layer.
        reader: Reads the logits; classes are the second dimension of (n, c, height, width), else the last one.
        seed: Seed of the signs.
        progress: Called with the batches done, the batches in total, and a text.

    Raises:
        SensitivityError: If the outputs have no dimension of classes, or cannot be differentiated.
    """
    ranks = calibration.ranks
    total = len(calibration.batches)
    measured: dict[int, dict[str, dict[str, float]]] = {}  # by batch, layer and candidate
    for batch in filter(ranks.owns, range(total)):
        progress(batch, total, "backward pass")
        # A seed for each batch, so that the signs do not depend on which rank draws them.
        generator = torch.Generator(calibration.device).manual_seed(seed + batch)
        calls, samples = layer_calls(calibration, reader, batch, generator)
        measured[batch] = {}
        for name, layer in calibration.layers.items():
            row = measured[batch][name] = {base[name]: 0.0}
            for candidate in (each for each in choices.by_layer[name] if each != base[name]):
                choices.put(name, candidate)
                try:
                    with unit_errors():
                        row[candidate] = _rise(layer, calls[name], samples)
                except UnitError as error:
                    raise SensitivityError(
                        f"layer {name!r} cannot run outside the network's forward: {error}. Write measure='kl' or"
                        " 'mse', which run the whole network."
                    ) from error
            choices.put(name, base[name])
    progress(total, total, "backward pass")
    measured = ranks.merge(measured)
    return {
        name: {candidate: [measured[batch][name][candidate] for batch in range(total)] for candidate in candidates}
        for name, candidates in choices.by_layer.items()
    }


class LayerCall:
    """One call of a layer at its base: its arguments, its output, and the gradient of the projection at its output."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output
        self.gradient: Tensor | None = None


@gradient_errors("Write measure='kl' or 'mse', which need no gradients.")
def layer_calls(
    calibration: Calibration, reader: OutputReader, batch: int, generator: torch.Generator
) -> tuple[dict[str, list[LayerCall]], int]:
    """Return all calls of each layer in a forward and a backward pass on one batch, and the number of samples.

    Raises:
        SensitivityError: If the outputs have no dimension of classes, or cannot be differentiated.
    """
    calls: dict[str, list[LayerCall]] = {name: [] for name in calibration.layers}
    outputs: list[tuple[LayerCall, Tensor]] = []

    def record(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tensor = layer.output_tensor(output)
        call = LayerCall(args, kwargs, tensor.detach())
        calls[name].append(call)
        outputs.append((call, tensor if tensor.requires_grad else tensor.requires_grad_()))
        passed_on = tensor.clone()  # because later modules may change their input in place
        return tree_map(lambda leaf: passed_on if leaf is tensor else leaf, output)

    with hooked(calibration.layers, after=record):
        logits, _ = reader.read(lambda: calibration.run(batch, gradients=True))
    if logits.dim() < 2 or not logits.requires_grad:
        why = f"have shape {tuple(logits.shape)}, without classes" if logits.dim() < 2 else "carry no gradients"
        raise SensitivityError(f"measure='fisher' needs logits with gradients, the outputs {why}. Use 'kl' or 'mse'.")
    with torch.enable_grad():  # the caller may have gradients switched off
        projection = _projection(logits, generator)
    # A layer whose output does not reach the logits has no gradient, and no rise.
    gradients = torch.autograd.grad(projection, [output for _, output in outputs], allow_unused=True)
    for (call, _), gradient in zip(outputs, gradients, strict=True):
        call.gradient = gradient
    return calls, len(logits)


def _projection(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``Σ v_c √p_c log p_c / √t`` over all positions, with random signs ``v`` and constant ``√p_c``.

    A sample has ``t`` positions, so that squares of the gradient are means over them.
    """
    classes_last = logits.movedim(1, -1) if logits.dim() > 3 else logits
    logs = classes_last.float().log_softmax(-1)
    flat = logs.reshape(-1, logs.shape[-1])  # (positions, classes)
    signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device) * 2 - 1
    return (flat * signs * (flat.detach() / 2).exp()).sum() / math.sqrt(len(flat) / len(logits))


@torch.no_grad()
def _rise(layer: QuantizedOp, calls: list[LayerCall], samples: int) -> float:
    """Return ``½ mean (δ · g)²`` over the samples, where ``δ · g`` is summed over the calls of one forward."""
    total: Tensor | float = 0.0
    apart = 0.0  # of calls on rows that cannot be told apart by sample, such as those routed to an expert
    for call in calls:
        if call.gradient is not None:
            change = layer.output_tensor(layer(*call.args, **call.kwargs)) - call.output
            products = _by_sample(change * call.gradient, samples)
            if len(products) == samples:
                total = total + products
            else:
                apart += float(products.double().square().sum()) / samples
    return 0.5 * (float(torch.as_tensor(total).double().square().mean()) + apart)


def _by_sample(products: Tensor, samples: int) -> Tensor:
    """Return the sum of each sample: of the first dimension, or where that is the sequence, of the second one.

    Where samples were joined with their positions, (samples * positions, ...), all rows of one are added. Any other
    rows are added up on their own.
    """
    rows = len(products)
    if rows != samples and products.dim() > 2 and products.shape[1] == samples:
        products = products.movedim(1, 0)
    elif rows > samples and rows % samples == 0:
        products = products.unflatten(0, (samples, -1))
    return products.flatten(1).sum(1) if products.dim() > 1 else products
