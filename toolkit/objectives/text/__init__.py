"""Objectives by the vectors of words: of the classes, or of other words that the teacher is asked about."""
