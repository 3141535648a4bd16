"""Bit allocation: sensitivities, costs and the integer program."""
