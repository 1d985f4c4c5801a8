"""One file for each format that a student is exported to."""
