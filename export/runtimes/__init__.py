"""What runs a student's files; the list of all runtimes is here, and no other module knows one by its name."""

from __future__ import annotations

from pathlib import Path

from prgkit.errors import BackendError
from prgkit.export.bundle.manifest import Artifact
from prgkit.export.runtimes.base import Runner, Runtime, Setup
from prgkit.export.runtimes.onnxruntime import ONNXRUNTIME
from prgkit.export.runtimes.openvino import OPENVINO
from prgkit.export.runtimes.pytorch import PYTORCH
from prgkit.export.runtimes.tensorrt import TENSORRT, TENSORRT_RTX

RUNTIMES: list[Runtime] = [ONNXRUNTIME, OPENVINO, PYTORCH, TENSORRT, TENSORRT_RTX]


def open_runner(folder: Path, artifact: Artifact, *, threads: int | None = None) -> Runner:
    """Open an artifact in ``folder`` with the first runtime that runs it.

    Raises:
        BackendError: none does, or it cannot on this machine; says what is missing.
        ExportError: the file is damaged, or not ours.
    """
    for runtime in RUNTIMES:
        for variant in runtime.variants:
            if artifact.format in runtime.formats and runtime.runs(variant, artifact, [artifact]):
                return runtime.open(Setup(runtime, variant, artifact, folder, threads))
    raise BackendError(f"artifact {artifact.name} has unknown format {artifact.format!r}", where=folder)
