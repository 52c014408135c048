"""Calibration: readers of samples, streaming collectors, the choice of ranges."""
