"""Accuracy and fidelity, for each class, on ticked images, and with another preprocessing."""
