"""Plots as inline SVG: a device has no matplotlib."""
