"""The embedded default: real handwritten digits and a tiny CLIP that never saw their labels."""
