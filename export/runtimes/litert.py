"""LiteRT (formerly TensorFlow Lite), on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BackendError, one_line
from prgkit.export.bundle.manifest import EXPORT_AGAIN, LITERT
from prgkit.export.runtimes.base import Runtime, Setup, Variant, Versions, install_missing
from prgkit.native_output import without_stderr

INSTALL = "pip install 'prgkit[litert]'"


def open_litert(setup: Setup) -> LiteRtRunner:
    """Open a .tflite file."""
    return LiteRtRunner(setup.path, setup.threads, name=setup.artifact.name)


def examine(versions: Versions) -> Sequence[tuple[str, str | None]]:
    """Return whether it runs here."""
    return [("litert CPU", INSTALL if versions["ai-edge-litert"] is None else None)]


LITERT_RUNTIME = Runtime(
    name="litert",
    formats=(LITERT,),
    variants=(Variant("CPU", "litert", "cpu", side_by_side=True),),
    libraries=("ai_edge_litert.interpreter",),
    open=open_litert,
    examine=examine,
    why_not_here=partial(install_missing, modules=("ai_edge_litert",), install=INSTALL),
)


class LiteRtRunner:
    """Runs a .tflite file, which is made for one picture at a time; several run one after another."""

    backend, device = "litert", "cpu"
    max_batch: int | None = 1

    def __init__(self, path: Path, threads: int | None = None, *, name: str | None = None) -> None:
        """Open ``path``.

        Args:
            path: the .tflite file, in any precision.
            threads: threads of one run; None leaves the choice to LiteRT.
            name: what reports call it; the file's name by default.

        Raises:
            BackendError: LiteRT is not installed, or the file is missing or damaged.
        """
        try:
            litert = importlib.import_module("ai_edge_litert.interpreter")
        except ImportError as error:
            raise BackendError("LiteRT is not installed", fix=INSTALL) from error
        if not path.exists():
            raise BackendError(f"there is no {path.name}", where=path.parent, fix=EXPORT_AGAIN)
        self.name = name or path.name
        try:
            with without_stderr():
                self._interpreter: Any = litert.Interpreter(str(path), num_threads=threads)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise BackendError(
                f"LiteRT cannot open {path.name}: {one_line(error)}", where=path, fix=EXPORT_AGAIN
            ) from error
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        return np.concatenate([self._one(pixels[place : place + 1]) for place in range(len(pixels))])

    def close(self) -> None:
        """Release the interpreter and its threads."""
        self._interpreter = None

    def _one(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            self._interpreter.set_tensor(self._input, pixels)
            self._interpreter.invoke()
            logits: NDArray[np.float32] = self._interpreter.get_tensor(self._output)
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"LiteRT cannot run {self.name}: {one_line(error)}") from error
        return logits
