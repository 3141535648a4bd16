"""Linear layers of two inputs, or with a weight that is transposed."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_ptq.network.layers import QuantLayer, register_layer
from lightning_ptq.network.swapping import register_swap_by_name


@register_layer(nn.Bilinear)
class QuantBilinear(QuantLayer, nn.Bilinear):  # type: ignore[misc]  # torch's stub has no None for its bias
    """Fake-quantized :class:`torch.nn.Bilinear`: each weight is multiplied by two inputs."""

    input_names = ("input1", "input2")

    def channel_dim(self, output: Tensor) -> int:
        """Return the last dimension."""
        return output.dim() - 1


class QuantConv1D(QuantLayer):
    """A linear layer with a weight of (inputs, outputs), as the ``Conv1D`` of GPT-2 in transformers."""

    output_channel_dim = 1

    @classmethod
    def applies_to(cls, module: nn.Module) -> bool:
        """Return True for the layout of transformers; other packages have other classes of this name."""
        weight = module._parameters.get("weight")
        return weight is not None and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1]


register_swap_by_name("Conv1D", QuantConv1D)
