"""Activations of units: stored under a memory limit, replayed, and split into shards."""
