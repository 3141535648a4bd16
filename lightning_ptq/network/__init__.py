"""The user's network: quantized operations, swapping, batch norms, tracing, units.

Importing this package registers the kinds of layers that can be swapped.
"""

from lightning_ptq.network import attention, batch_norm, layers, linears, recurrent, tables

__all__ = ["attention", "batch_norm", "layers", "linears", "recurrent", "tables"]
