"""INT8: calibration, a file for each runtime, and which are kept."""
