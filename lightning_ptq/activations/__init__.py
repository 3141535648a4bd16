"""Activations of units: stored under a memory limit, replayed, and dealt into shards."""
