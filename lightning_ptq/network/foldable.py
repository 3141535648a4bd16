"""Batch norms that can be folded: afterwards they normalize with a mean of 0 and a variance of 1."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_ptq.network.own_forward import has_own_forward
from lightning_ptq.network.swapping import (
    ReplaceableTensor,
    Swapped,
    float_class_of,
    register_swap,
    register_swap_by_name,
    tensors_replaced,
)

_NEUTRAL = {"running_mean": 0.0, "running_var": 1.0, "weight": 1.0, "bias": 0.0}

NORM_TENSORS = (*_NEUTRAL, "num_batches_tracked", "folded")
"""Names of the tensors that a folded batch norm does not compute with."""

_DEFAULT_EPS = 1e-5  # of frozen batch norms, some of which have it as a constant in their forward


class FoldableBatchNorm(Swapped):
    """A batch norm that no longer normalizes once it is folded into the layer before it or the layers after it.

    What a derived class does beside the normalization, such as an activation, it still does: its own forward runs with
    statistics that change nothing. Affine parameters stay: after folding into the layer before, they are the mean and
    the standard deviation that each channel of the layer's output should have. The state dict records ``folded``.

    Attributes:
        is_folded: True if it is folded.
        is_folded_ahead: True if it is folded into the layers after it.
    """

    prefix = "Foldable"
    added_names = ("folded",)
    is_folded: bool = False
    is_folded_ahead: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        float_class: Any = next(base for base in cls.__mro__ if not issubclass(base, Swapped))
        if float_class.forward is not _BatchNorm.forward:
            for name in (*_NEUTRAL, "eps", "training"):
                setattr(cls, name, ReplaceableTensor(name))

    @classmethod
    def reason_against(cls, module: nn.Module) -> str:
        """Return why ``module`` cannot be swapped, or an empty text."""
        statistics = [getattr(module, name, None) for name in ("running_mean", "running_var")]
        frozen = not isinstance(module, _BatchNorm)
        if isinstance(module, LazyModuleMixin) or (frozen and not all(isinstance(s, Tensor) for s in statistics)):
            return "it has no statistics yet"
        if has_own_forward(module):
            return "a forward was set on it, which may do anything"
        return super().reason_against(module)

    @property
    def is_plain(self) -> bool:
        """True if it does nothing but normalize, as torch's own classes."""
        return float_class_of(self).forward is _BatchNorm.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batch norm's output, without the normalization if it is folded."""
        if not self.is_folded:
            return super().forward(*args, **kwargs)
        if self.is_plain:
            return next(iter((*args, *kwargs.values())))
        with tensors_replaced(self, self._neutral()):
            return super().forward(*args, **kwargs)

    def _neutral(self) -> dict[str, Any]:
        """Return attributes with which the normalization is ``x · 1 + 0``; in train mode too."""
        values: dict[str, Any] = {"training": False}
        for name, value in _NEUTRAL.items():
            tensor = getattr(self, name, None)
            values[name] = None if tensor is None else torch.full_like(tensor, value)
        if hasattr(self, "eps"):
            values["eps"] = 0.0
        else:
            values["running_var"] -= _DEFAULT_EPS  # the sum is 1 in single and in double precision
        return values

    @torch.no_grad()
    def gain_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the factor and the shift of each channel in eval mode, (channels,)."""
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        deviation = (variance + getattr(self, "eps", _DEFAULT_EPS)).sqrt()
        weight, bias = (cast("Tensor | None", getattr(self, name, None)) for name in ("weight", "bias"))
        gain = (torch.ones_like(deviation) if weight is None else weight) / deviation
        return gain, (torch.zeros_like(deviation) if bias is None else bias) - mean * gain

    def set_folded(self, folded: bool, ahead: bool = False) -> None:
        """Switch the normalization off or on.

        Args:
            folded: True to switch it off.
            ahead: True if it went into the layers after it.
        """
        self.__dict__.update(is_folded=folded, is_folded_ahead=folded and ahead)
        self._buffers.pop("folded", None)
        if folded:
            self.register_buffer("folded", torch.tensor(True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "running_mean" in state_dict:  # a partial state dict without this norm says nothing about it
            self.set_folded(prefix + "folded" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


register_swap(_BatchNorm, FoldableBatchNorm)
# Torchvision, detectron2, timm and transformers each have classes of this name, with statistics as buffers.
register_swap_by_name("*FrozenBatchNorm*", FoldableBatchNorm)


def is_folded(module: nn.Module) -> bool:
    """Return True if ``module`` is a batch norm that was folded."""
    return isinstance(module, FoldableBatchNorm) and module.is_folded


def folded_norms(module: nn.Module) -> list[str]:
    """Return the qualified names of the folded batch norms below ``module``."""
    return [name for name, child in module.named_modules() if is_folded(child)]
