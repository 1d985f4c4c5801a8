"""The versions of what is installed, read without importing any of it: `prgkit --version`."""

from __future__ import annotations

import platform
from importlib import metadata

from prgkit import __version__

WORKED_WITH = (
    *("torch", "timm", "open_clip_torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx"),
    *("openvino", "ai-edge-litert", "ncnn"),
)


def version_lines() -> list[str]:
    """Return prgkit's version, Python's, and that of each package that it trains, exports or runs with."""
    found = {"prgkit": __version__, "Python": platform.python_version()}
    found |= {name: version_of(name) or "not installed" for name in WORKED_WITH}
    return [f"{name:<16} {version}" for name, version in found.items()]


def version_of(package: str) -> str | None:
    """Return an installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
