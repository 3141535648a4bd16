"""Numbers on integer grids: configurations, rounding, observers, scales."""
