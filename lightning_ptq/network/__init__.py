"""The user's network: quantized operations, swapping, batch norms, tracing, units.

Importing this package registers the kinds of layers that can be swapped.
"""

from lightning_ptq.network import batch_norm, layers

__all__ = ["batch_norm", "layers"]
