"""prgkit: distil CLIP into a small classifier without labels, export it, and measure it on the device.

From Python: `distill`, `label`, `compare`, `load`, `pull`, and the classes that they return; see `prgkit.api`.
"""

from importlib import import_module

__version__ = "0.1.0"
_HOMES = {  # of each public name: importing prgkit imports none of them, so that it costs a device nothing
    **dict.fromkeys(("Bundle", "Run", "Update", "compare", "distill", "label", "load", "pull"), "prgkit.api"),
    **dict.fromkeys(("Model", "Prediction"), "prgkit.evaluate.predict"),
    "PrgkitError": "prgkit.errors",
    "Report": "prgkit.evaluate.report.schema",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
