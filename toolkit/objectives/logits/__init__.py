"""Objectives on the classes' logits, and on subclasses of them."""
