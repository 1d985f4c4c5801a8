"""What runs a student: a runtime, its variants, and one open file of it that turns pixels into logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BackendError, ExportError
from prgkit.export.bundle.manifest import VECTORS, Artifact
from prgkit.storage.reproducible import read_array

EXPORT_AGAIN = "export it again: prgkit export"


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


class Variant(NamedTuple):
    """One of the ways in which a runtime runs a file, such as an execution provider."""

    name: str
    backend: str  # what a report calls it
    device: str  # "cpu" or "cuda"
    install: str = ""  # how to get it
    suffix: str = ""  # of the artifact's name in a report
    always_listed: bool = False  # a report also says why it does not run here
    takes_threads: bool = True  # its number of threads can be swept
    least_seconds: float = 0.0  # a shorter bench leaves it out


class Runtime(Protocol):
    """A library that runs files of some formats: a frozen object, listed in `RUNTIMES`."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of artifacts that it opens."""
        ...

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The ways in which it runs a file, the one that is everywhere first."""
        ...

    def runs(self, variant: Variant, artifact: Artifact, beside: Sequence[Artifact]) -> bool:
        """Tell whether a variant computes in the artifact's precision; of layouts ``beside`` it, in its fastest."""
        ...

    def why_not_here(self, setup: Setup, *, gpu: bool) -> str | None:
        """Return why a file cannot run on this machine, which has a ``gpu`` of NVIDIA's or none; None where it can."""
        ...

    def load_libraries(self, setup: Setup) -> None:
        """Import all that `open` needs, so that the time it takes is that of the file alone."""
        ...

    def open(self, setup: Setup) -> Runner:
        """Open a file.

        Raises:
            BackendError: it cannot run on this machine; says what is missing.
            ExportError: it is damaged, or not ours.
        """
        ...

    def from_run(self, run_folder: Path) -> Sequence[Artifact]:
        """Return what it runs straight from a run, where that is at hand: files that no bundle holds."""
        ...

    def examine(self, versions: Mapping[str, str | None]) -> Sequence[tuple[str, str | None]]:
        """Return a line for each thing that it does: what that is, and what is missing here for it, or None.

        ``versions`` are those of the installed packages, None for one that is not.
        """
        ...


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

    def open(self) -> Runner:
        """Open the file; raises what `Runtime.open` does."""
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
