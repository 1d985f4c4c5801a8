"""ncnn: a folder with the graph as text and the weights, converted by pnnx from TorchScript."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import BackendError, ExportError
from prgkit.export.bundle.manifest import Artifact, Manifest, TensorSpec
from prgkit.export.formats.base import Format, Made, require_vectors_inside
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import section
from prgkit.export.runtimes.ncnn import BIN, INPUT, NCNN, PARAM, NcnnRunner

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

WRITERS = ("ncnn", "pnnx")


def make_ncnn(export: StudentExport) -> Made:
    """Convert the fused student, in FP32 and where FP16 is wanted with its weights halved, too."""
    return Made([make_one(export, "fp32"), *([make_one(export, "fp16")] if export.options.fp16 else [])])


def make_one(export: StudentExport, precision: str) -> Artifact:
    """Convert the student in one precision; it must give PyTorch's logits."""
    half = precision == "fp16"
    return export.finish(
        f"ncnn-{precision}",
        "model.fp16.ncnn" if half else "model.ncnn",
        write=lambda folder: write_ncnn(export, folder, half=half),
        writers=WRITERS,
        runner=partial(NcnnRunner, half=half),
        format=NCNN,
        precision=precision,
        input=planes(export.preprocessing),
        export_options=("--ncnn", "--fp16") if half else ("--ncnn",),
    )


def write_ncnn(export: StudentExport, folder: Path, *, half: bool) -> None:
    """Write ncnn's two files into a new folder.

    Raises:
        ExportError: pnnx cannot convert the student.
    """
    from prgkit.export.formats.mobile.planar import PlanarStudent, trace_planar

    source = export.work / "student.pt"
    if not source.exists():
        trace_planar(PlanarStudent(export.module), export.preprocessing.image_size).save(str(source))
    folder.mkdir()
    height, width = sides(export.preprocessing.image_size)
    command = [importlib.import_module("pnnx").EXEC_PATH, source.name, f"inputshape=[1,3,{height},{width}]"]
    command += [f"fp16={int(half)}", f"ncnnparam={folder.resolve() / PARAM}", f"ncnnbin={folder.resolve() / BIN}"]
    done = subprocess.run(command, cwd=export.work, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not (folder / BIN).exists():
        said = (done.stderr + done.stdout).strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ExportError(
            f"pnnx cannot convert this student: {said[-1]}", fix="export without --ncnn, or choose another student"
        )


def planes(preprocessing: Preprocessing) -> TensorSpec:
    """Return what the files take: what ncnn's Mat::from_pixels makes of RGB pixels."""
    shape = (3, *sides(preprocessing.image_size))
    return TensorSpec(name=INPUT, dtype="float32", layout="CHW", shape=shape, values="RGB, 0 to 255")


def require_ncnn(options: ExportOptions) -> None:
    """Refuse where the converter or ncnn itself is missing."""
    require_vectors_inside(options, "ncnn's files")
    if missing := [name for name in WRITERS if importlib.util.find_spec(name) is None]:
        raise BackendError(
            f"--ncnn needs {' and '.join(missing)}, which the install leaves out", fix="pip install 'prgkit[pnnx]'"
        )


def how_to_run(manifest: Manifest) -> str:
    """Return how the files are run in Python and C++, where there are any."""
    files = [artifact for artifact in manifest.artifacts if artifact.format == NCNN]
    return section("ncnn.md", manifest, files=files) if files else ""


NCNN_FILES = Format(
    "ncnn",
    "pnnx",
    wanted=lambda options: "ncnn" in options.formats,
    make=make_ncnn,
    require=require_ncnn,
    how_to_run=how_to_run,
)
