"""`prgkit compare`: several objectives, students, seeds or devices side by side."""
