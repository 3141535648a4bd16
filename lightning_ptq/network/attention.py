"""Multi-head attention of torch: its packed projection, its two products, and no fused path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq.network.call_sites import CallSite
from lightning_ptq.network.functional import attention
from lightning_ptq.network.fused import FusedLayer, See
from lightning_ptq.network.layers import register_layer
from lightning_ptq.network.own_forward import has_own_forward
from lightning_ptq.network.swapping import float_class_of

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@register_layer(nn.MultiheadAttention)
class QuantMultiheadAttention(FusedLayer, nn.MultiheadAttention):
    """Fake-quantized :class:`torch.nn.MultiheadAttention`.

    Its weights are those of the projections of queries, keys and values. The two products of attention are operations
    of their own inside it, and so is the projection of the output.
    """

    input_names = ("query", "key", "value")
    weight_names = ("in_proj_weight", *_SEPARATE)
    bias_names = ("in_proj_bias",)
    functions = (F.multi_head_attention_forward,)
    own_children = ("out_proj",)

    def _init_swapped(self) -> None:
        super()._init_swapped()
        place = self.weights[self.weight_names[0]]
        for part in ("scores", "values"):
            self._modules[f"attention_1_{part}"] = CallSite("attention").to(place.device).train(self.training)

    @classmethod
    def weight_names_of(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the weights of a float layer: one for all projections, or one for each."""
        return ("in_proj_weight",) if module._parameters.get("in_proj_weight") is not None else _SEPARATE

    def input_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return queries, keys and values of a call with these arguments, by name."""
        if float_class_of(self).forward is nn.MultiheadAttention.forward and not has_own_forward(self):
            return super().input_tensors(args, kwargs)
        return {name: found[0] for name, found in self.inputs_seen(args, kwargs).items()}

    def after_seeing(self, name: str) -> None:
        """End the look at the inputs before the operations inside run."""
        if name == self.input_names[-1]:
            self.seen_all()

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return the multiply-accumulates of the projections of queries, keys and values."""
        return float(self.embed_dim * sum(x.numel() for x in self.input_tensors(args, kwargs).values()))

    def compute(self, func: Any, tensors: Mapping[str, Any], see: See | None, *args: Any, **kwargs: Any) -> Any:
        """Compute :func:`torch.nn.functional.multi_head_attention_forward`."""
        return self._attend(see or (lambda name, x: x), *args, **kwargs)

    def _attend(
        self,
        see: See,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        static_v: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch does
        batched = query.dim() == 3
        inputs = [see(name, x) for name, x in zip(self.input_names, (query, key, value), strict=True)]
        inputs = inputs if batched else [x.unsqueeze(1) for x in inputs]
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = _projected(inputs, separate if in_proj_weight is None else in_proj_weight.chunk(3), in_proj_bias)
        source = k.size(0)
        for row_k, row_v in _further_rows(bias_k, bias_v, add_zero_attn, k):
            k, v = torch.cat([k, row_k]), torch.cat([v, row_v])
        only_causal = is_causal and key_padding_mask is None and not need_weights  # torch then ignores the mask
        mask = _merged(None if only_causal else attn_mask, key_padding_mask, q, num_heads, k.size(0) - source)
        dropout = dropout_p if training else 0.0
        result, shown = self._products(q, k, v, num_heads, mask=mask, dropout=dropout, is_causal=only_causal)
        shown = shown.mean(1) if average_attn_weights else shown
        if not batched:
            result, shown = result.squeeze(1), shown.squeeze(0)
        return result, shown if need_weights else None

    def _products(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, *, mask: Tensor | None, dropout: float, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the projected output (length, samples, width), and the weights (samples, heads, length, source)."""
        scores, values = (self._modules[f"attention_1_{part}"] for part in ("scores", "values"))
        shown: list[Tensor] = []

        def keep(weights: Tensor, of: Tensor) -> Any:
            shown.append(weights)
            return cast(CallSite, values)(weights, of)

        q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
        result = attention(cast(CallSite, scores), keep, q, k, v, mask, dropout, is_causal)
        # Samples come first, as where this projection would be a layer of its own.
        return self.out_proj(result.transpose(1, 2).flatten(2)).transpose(0, 1), shown[0]


def _projected(inputs: list[Tensor], weights: tuple[Any, ...], bias: Tensor | None) -> list[Tensor]:
    """Return queries, keys and values, (length, samples, width) each, from inputs and weights."""
    biases: tuple[Tensor | None, ...] = (None,) * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True)]


def _further_rows(
    bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, like: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values (1, samples, width) that every query sees besides the given ones."""
    rows = []
    if bias_k is not None and bias_v is not None:
        rows.append((bias_k.expand(1, like.size(1), -1), bias_v.expand(1, like.size(1), -1)))
    if add_zero_attn:
        zeros = torch.zeros_like(like[:1])
        rows.append((zeros, zeros))
    return rows


def _merged(attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, heads: int, further: int) -> Tensor | None:
    """Return what is added to the scores (samples, heads, length, source length), in a shape that broadcasts to it.

    Args:
        attn_mask: Mask (length, source length) or (samples * heads, length, source length).
        padding: Mask (samples, source length), or (source length) of a single sample.
        query: Queries (length, samples, width).
        heads: Number of heads.
        further: Number of further keys, which all queries see.
    """
    merged = None
    if attn_mask is not None:
        merged = F.pad(_summand(attn_mask, query), (0, further))
        merged = merged if merged.dim() == 2 else merged.view(query.size(1), heads, *merged.shape[1:])
    if padding is not None:
        rows = F.pad(_summand(padding, query), (0, further)).view(query.size(1), 1, 1, -1)
        merged = rows if merged is None else merged + rows
    return merged


def _summand(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as what is added to the scores; a boolean mask is True where a key is not seen."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
