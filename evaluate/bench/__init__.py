"""`prgkit bench`: what is measured on this machine, and how."""
