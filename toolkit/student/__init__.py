"""The student: a timm model, its heads, and its projector."""
