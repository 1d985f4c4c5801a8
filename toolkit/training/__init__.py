"""Distillation: the training set, the loop, and what happens to pseudo-labels before it."""
