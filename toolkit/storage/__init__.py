"""How things are kept: files that appear whole or not at all, journals, locks, and the run folder."""
