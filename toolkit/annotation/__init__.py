"""Accuracy where there are no labels: answers of the teacher for somebody to tick."""
