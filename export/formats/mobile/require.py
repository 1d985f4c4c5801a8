"""What a converter needs, said before any work is done."""

from __future__ import annotations

import importlib.util

from prgkit.errors import BackendError, ExportError
from prgkit.export.formats.options import ExportOptions


def require_converter(options: ExportOptions, what: str, *, modules: tuple[str, ...], extra: str) -> None:
    """Refuse a format ``what`` whose converter is not installed, and class vectors that it cannot take as an input.

    Raises:
        BackendError: one of ``modules`` is missing.
        ExportError: class vectors are to be an input.
    """
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise BackendError(f"{what} files are written by {missing[0]}, which is not installed", fix=install(extra))
    if options.class_vectors == "input":
        raise ExportError(
            f"{what} files hold their class vectors; they cannot take them as an input",
            fix=f"export --open-vocabulary without the word, or without --{extra.removesuffix('-export')}",
        )


def install(extra: str) -> str:
    """Return how to install an extra."""
    return f"pip install 'prgkit[{extra}]'"
