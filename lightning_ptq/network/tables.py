"""Embeddings: layers whose output is rows of a table, with a scale for each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_ptq.network.layers import QuantLayer, register_layer
from lightning_ptq.network.swapping import ReplaceableTensor

MAX_NORM = "its max_norm changes the weight in each forward"
"""Why a table that limits the norms of its rows stays float."""


class QuantTable(QuantLayer):
    """A layer that looks rows of its weight up. Its inputs are indices, so there is nothing else to quantize."""

    input_names = ()
    bias_names = ()
    is_linear = False
    is_lookup = True
    quantized_from = "products"
    sparse = ReplaceableTensor("sparse")

    @classmethod
    def reason_against(cls, module: nn.Module) -> str:
        """Return why ``module`` cannot be quantized, or an empty text."""
        if getattr(module, "max_norm", None) is not None:
            return MAX_NORM
        return super().reason_against(module)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Any]) -> Any:
        dense = {"sparse": False} if self.is_quantized else {}  # a quantizer takes no sparse gradients
        return super()._call(args, kwargs, {**tensors, **dense})

    def channel_dim(self, output: Tensor) -> int:
        """Return the last dimension."""
        return output.dim() - 1

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return 0: nothing is multiplied."""
        return 0.0


@register_layer(nn.Embedding)
class QuantEmbedding(QuantTable, nn.Embedding):
    """Fake-quantized :class:`torch.nn.Embedding`."""


@register_layer(nn.EmbeddingBag)
class QuantEmbeddingBag(QuantTable, nn.EmbeddingBag):
    """Fake-quantized :class:`torch.nn.EmbeddingBag`.

    Attributes:
        pooling: The ``mode`` of the float layer, which is another attribute here.
    """

    added_names = (*(name for name in QuantTable.added_names if name != "mode"), "pooling")
    mode = ReplaceableTensor("mode")
    pooling: str

    def _init_swapped(self) -> None:
        self.__dict__["pooling"] = self.__dict__["mode"]
        super()._init_swapped()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Any]) -> Any:
        return super()._call(args, kwargs, {**tensors, "mode": self.pooling})

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return super().extra_repr().replace(repr(self.mode), repr(self.pooling))
