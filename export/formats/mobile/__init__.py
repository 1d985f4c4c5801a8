"""Formats of runtimes for phones and boards: what a converter makes of the fused student."""
