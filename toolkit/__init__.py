"""prgkit: distil CLIP into a small classifier without labels, export it, and measure it on the device."""

__version__ = "0.1.0"
