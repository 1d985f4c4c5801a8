"""INT8: calibration, what each block costs, and the accuracy that must be held."""
