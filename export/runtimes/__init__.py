"""What runs a student's files; the list of all runtimes is here, and no other module knows one by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from prgkit.errors import BackendError
from prgkit.export.bundle.manifest import Artifact
from prgkit.export.runtimes.base import Runner, Runtime, Setup
from prgkit.export.runtimes.executorch import EXECUTORCH_RUNTIME
from prgkit.export.runtimes.litert import LITERT_RUNTIME
from prgkit.export.runtimes.ncnn import NCNN_RUNTIME
from prgkit.export.runtimes.onnxruntime import ONNXRUNTIME
from prgkit.export.runtimes.openvino import OPENVINO
from prgkit.export.runtimes.pytorch import PYTORCH
from prgkit.export.runtimes.tensorrt import TENSORRT, TENSORRT_RTX

RUNTIMES: list[Runtime] = [
    ONNXRUNTIME,
    OPENVINO,
    NCNN_RUNTIME,
    LITERT_RUNTIME,
    EXECUTORCH_RUNTIME,
    PYTORCH,
    TENSORRT,
    TENSORRT_RTX,
]


def setups(artifact: Artifact, folder: Path, beside: Sequence[Artifact]) -> Iterator[Setup]:
    """Yield every way to run an artifact in ``folder`` that prgkit knows, with or without what it takes here."""
    for runtime in RUNTIMES:
        for variant in runtime.variants if artifact.format in runtime.formats else ():
            if runtime.runs(variant, artifact, beside):
                yield Setup(runtime, variant, artifact, folder)


def first_setup(folder: Path, artifacts: Sequence[Artifact], runtime: str | None = None) -> Setup:
    """Return how the first artifact in ``folder`` is run that a runtime runs: the one of that name, or any.

    Raises:
        BackendError: there is no such runtime, or none runs any of these.
    """
    names = [known.name for known in RUNTIMES]
    if runtime not in (None, *names):
        raise BackendError(f"there is no runtime {runtime!r}", fix=f"one of: {', '.join(names)}")
    for artifact in artifacts:
        for setup in setups(artifact, folder, artifacts):
            if runtime in (None, setup.runtime.name):
                return setup
    if runtime is None:
        raise BackendError(f"artifact {artifacts[0].name} has unknown format {artifacts[0].format!r}", where=folder)
    fix = "prgkit export --help says what can be exported where the student was trained"
    raise BackendError(f"the bundle holds no file that {runtime} runs", where=folder, fix=fix)


def open_runner(folder: Path, artifact: Artifact, *, threads: int | None = None) -> Runner:
    """Open an artifact in ``folder`` with the first runtime that runs it.

    Raises:
        BackendError: none does, or it cannot on this machine; says what is missing.
        ExportError: the file is damaged, or not ours.
    """
    return replace(first_setup(folder, [artifact]), threads=threads).open()
