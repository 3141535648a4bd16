"""Adaptations of the Trainer to a PTQ run: data loading, progress, logging, signals, and training disabled."""
