"""ExecuTorch, on the CPU: what is in a file for XNNPACK runs there, the rest by its portable kernels."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BackendError, one_line
from prgkit.export.bundle.manifest import EXECUTORCH, EXPORT_AGAIN
from prgkit.export.runtimes.base import Runtime, Setup, Variant, Versions, install_missing
from prgkit.native_output import without_stderr

INSTALL = "pip install 'prgkit[executorch]'"
LIBRARY, THREADS = "executorch.runtime", "executorch.extension.pybindings.portable_lib"
IDENTIFIER = slice(4, 8)  # where a file says which version of the format it is of, as b"ET12"


def open_executorch(setup: Setup) -> ExecuTorchRunner:
    """Open a .pte file."""
    return ExecuTorchRunner(setup.path, setup.threads, name=setup.artifact.name)


def examine(versions: Versions) -> Sequence[tuple[str, str | None]]:
    """Return whether it runs here; its Python runtime takes and gives PyTorch's tensors."""
    missing = versions["executorch"] is None or versions["torch"] is None
    return [("executorch CPU", INSTALL if missing else None)]


EXECUTORCH_RUNTIME = Runtime(
    name="executorch",
    formats=(EXECUTORCH,),
    variants=(Variant("CPU", "executorch", "cpu"),),
    libraries=("torch", LIBRARY),
    open=open_executorch,
    examine=examine,
    why_not_here=partial(install_missing, modules=("executorch", "torch"), install=INSTALL),
)


class ExecuTorchRunner:
    """Runs a .pte file, which is made for one picture at a time; several run one after another."""

    backend, device = "executorch", "cpu"
    max_batch: int | None = 1

    def __init__(self, path: Path, threads: int | None = None, *, name: str | None = None) -> None:
        """Open ``path``.

        Args:
            path: the .pte file.
            threads: threads of one run, the same for all files that this process has open; None leaves the choice to
                ExecuTorch.
            name: what reports call it; the file's name by default.

        Raises:
            BackendError: ExecuTorch is not installed, or the file is missing, damaged, or of another version.
        """
        try:
            with warnings.catch_warnings(), without_stderr():
                warnings.simplefilter("ignore")
                library, threading, self._torch = map(importlib.import_module, (LIBRARY, THREADS, "torch"))
        except ImportError as error:
            raise BackendError("ExecuTorch is not installed", fix=INSTALL) from error
        if not path.exists():
            raise BackendError(f"there is no {path.name}", where=path.parent, fix=EXPORT_AGAIN)
        self.name = name or path.name
        try:
            with without_stderr():
                if threads is not None:
                    threading._unsafe_reset_threadpool(threads)  # safe as long as no file is open
                self._program: Any = library.Runtime.get().load_program(str(path))
                self._method: Any = self._program.load_method("forward")
        except RuntimeError as error:
            raise BackendError(why_not_opened(path, error), where=path, fix=EXPORT_AGAIN) from error

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        images = self._torch.from_numpy(np.ascontiguousarray(pixels))
        try:
            logits = [self._method.execute([image])[0] for image in images.split(1)]
        except RuntimeError as error:
            raise BackendError(f"ExecuTorch cannot run {self.name}: {one_line(error)}") from error
        return cast(NDArray[np.float32], self._torch.cat(logits).numpy())

    def close(self) -> None:
        """Release the program."""
        self._method = self._program = None


def why_not_opened(path: Path, error: RuntimeError) -> str:
    """Say what is wrong with a file; ExecuTorch's own error is a number."""
    with open(path, "rb") as file:
        found = file.read(IDENTIFIER.stop)[IDENTIFIER]
    if not (found[:2] == b"ET" and found[2:].isdigit()):
        return f"{path.name} is no ExecuTorch program: it begins with {found!r}"
    return f"ExecuTorch cannot open {path.name}, a program of format {found.decode()}: {one_line(error)}"
