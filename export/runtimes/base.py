"""What runs a student: a runtime, its variants, and one open file of it that turns pixels into logits."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BackendError, ExportError
from prgkit.export.bundle.manifest import EXPORT_AGAIN, VECTORS, Artifact
from prgkit.storage.reproducible import read_array


class Runner(Protocol):
    """An open file that turns pixels into logits."""

    name: str
    backend: str
    device: str
    max_batch: int | None  # the largest batch of one execution; None where there is no limit

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]; returns when the logits are on the host."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


Versions = Mapping[str, str | None]


class Variant(NamedTuple):
    """One of the ways in which a runtime runs a file, such as an execution provider."""

    name: str
    backend: str  # what a report calls it
    device: str  # "cpu" or "cuda"
    install: str = ""  # how to get it
    suffix: str = ""  # of the artifact's name in a report
    always_listed: bool = False  # a report also says why it does not run here
    takes_threads: bool = True  # its number of threads can be swept
    side_by_side: bool = False  # files opened with one thread each, in threads of one process, run at the same time
    least_seconds: float = 0.0  # a shorter bench leaves it out


def runs_all(variant: Variant, artifact: Artifact, beside: Sequence[Artifact]) -> bool:
    """Tell that every artifact is run whose format is opened."""
    return True


def nothing_missing(setup: Setup, gpu: bool) -> str | None:
    """Tell that nothing is missing."""
    return None


def install_missing(setup: Setup, gpu: bool, *, modules: Sequence[str], install: str) -> str | None:
    """Return how to install a runtime, where one of its modules is not here."""
    return None if all(map(importlib.util.find_spec, modules)) else install


def nothing_in_runs(run_folder: Path) -> Sequence[Artifact]:
    """Return that a run holds nothing for a runtime."""
    return []


@dataclass(frozen=True)
class Runtime:
    """A library that runs files of some formats, listed in `RUNTIMES`."""

    name: str
    formats: tuple[str, ...]  # of the artifacts that it opens
    variants: tuple[Variant, ...]  # the ways in which it runs a file, the one that is everywhere first
    libraries: tuple[str, ...]  # modules that opening a file needs: their import is no part of the time that it takes
    # Opens a file. Raises a BackendError where it cannot run on this machine, an ExportError where it is damaged.
    open: Callable[[Setup], Runner]
    # A line for each thing that it does: what that is, and what is missing here for it, or None. It is given the
    # versions of the installed packages, None for one that is not.
    examine: Callable[[Versions], Sequence[tuple[str, str | None]]]
    # Whether a variant computes in an artifact's precision; of several layouts beside it, in its fastest.
    runs: Callable[[Variant, Artifact, Sequence[Artifact]], bool] = runs_all
    # Why a file cannot run on this machine, which has a GPU of NVIDIA's or none; None where it can.
    why_not_here: Callable[[Setup, bool], str | None] = nothing_missing
    # What it runs straight from a run's folder: files that no bundle holds.
    from_run: Callable[[Path], Sequence[Artifact]] = nothing_in_runs


@dataclass(frozen=True)
class Setup:
    """A file and how it is to be run; it can be sent to another process."""

    runtime: Runtime
    variant: Variant
    artifact: Artifact
    folder: Path  # that the file lies in
    threads: int | None = None  # of one run on the CPU; None leaves the choice to the runtime
    class_vectors: Path | None = None  # that take the place of a class head, where the file holds none
    logit_scale: float = 1.0  # of their scores

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.artifact.file

    def why_not_here(self, *, gpu: bool) -> str | None:
        """Return why the file cannot run on this machine, with a ``gpu`` of NVIDIA's or without; None where it can."""
        return self.runtime.why_not_here(self, gpu)

    def load_libraries(self) -> None:
        """Import what opening the file needs."""
        for module in self.runtime.libraries:
            importlib.import_module(module)

    def open(self) -> Runner:
        """Open the file."""
        return self.runtime.open(self)


def read_class_vectors(path: Path) -> NDArray[np.float32]:
    """Return the class vectors [C, D] that lie beside an ONNX file which takes them as an input.

    Raises:
        BackendError: they do not.
    """
    try:
        return read_array(path.with_name(VECTORS)).astype(np.float32, copy=False)
    except ExportError as error:
        raise BackendError(
            f"{path.name} takes its class vectors as an input: {error.what}", where=path.parent, fix=EXPORT_AGAIN
        ) from error
