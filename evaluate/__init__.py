"""Measure every artifact on this machine: latency, accuracy, fidelity; and report it."""
