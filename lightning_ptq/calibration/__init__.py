"""The calibration pass and the calibrated module."""
