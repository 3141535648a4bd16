"""The user's network: quantized layers, swapping, folding, tracing, units."""
