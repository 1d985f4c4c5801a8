"""One file for each runtime that an artifact is run with."""
