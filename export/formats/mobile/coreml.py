"""Core ML: an ML program that names what is in an image; written anywhere, run on Apple's systems alone."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import BackendError, ExportError, one_line
from prgkit.export.bundle.manifest import Artifact, Manifest, TensorSpec
from prgkit.export.formats.base import Format, Made, require_vectors_inside
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import section

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

COREML = "coreml"  # the format of an artifact
IMAGE, LABEL, PROBABILITIES, LOGITS = "image", "classLabel", "probabilities", "logits"
NEVER_EXECUTED = "never executed here: Core ML runs on Apple's systems"


def make_coreml(export: StudentExport) -> Made:
    """Convert the fused student, in FP32 and where FP16 is wanted in FP16, too."""
    return Made([make_one(export, "fp32"), *([make_one(export, "fp16")] if export.options.fp16 else [])])


def make_one(export: StudentExport, precision: str) -> Artifact:
    """Convert the student to compute in one precision."""
    half = precision == "fp16"
    return export.finish(
        f"coreml-{precision}",
        "model.fp16.mlpackage" if half else "model.mlpackage",
        write=partial(write_package, export, precision),
        writers=("coremltools",),
        runner=None,
        format=COREML,
        precision=precision,
        backend="coreml",
        note=NEVER_EXECUTED,
        input=image_of(export.preprocessing),
        export_options=("--coreml", "--fp16") if half else ("--coreml",),
    )


def write_package(export: StudentExport, precision: str, path: Path) -> None:
    """Write an ML program for iOS 15 or macOS 12 and newer: an RGB image in; class name, probabilities and logits out.

    Raises:
        ExportError: coremltools cannot convert the student.
    """
    from prgkit.export.formats.mobile.planar import PlanarStudent, trace_planar

    tools, size = quiet_coremltools(), export.preprocessing.image_size
    traced = trace_planar(PlanarStudent(export.module, probabilities=True), size)
    kinds = {"fp32": tools.precision.FLOAT32, "fp16": tools.precision.FLOAT16}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of progress
            model = tools.convert(
                traced,
                inputs=[tools.ImageType(IMAGE, shape=(1, 3, *sides(size)), color_layout=tools.colorlayout.RGB)],
                outputs=[tools.TensorType(PROBABILITIES), tools.TensorType(LOGITS)],
                classifier_config=tools.ClassifierConfig(
                    list(export.classes), LABEL, predicted_probabilities_output=PROBABILITIES
                ),
                convert_to="mlprogram",
                minimum_deployment_target=tools.target.iOS15,
                compute_precision=kinds[precision],
                skip_model_load=True,
            )
    except Exception as error:  # a converter of 600 operators raises what it likes
        raise ExportError(
            f"coremltools cannot convert this student: {one_line(error)}",
            fix="export without --coreml, or choose another student",
        ) from error
    model.user_defined_metadata["preprocessing"] = json.dumps(export.preprocessing.to_dict())
    shutil.rmtree(path, ignore_errors=True)
    model.save(str(path))


def image_of(preprocessing: Preprocessing) -> TensorSpec:
    """Return what the files take: an RGB image, which Vision or Core ML makes of any pixel buffer."""
    return TensorSpec(name=IMAGE, dtype="uint8", layout="HWC", shape=(*sides(preprocessing.image_size), 3))


def require_coreml(options: ExportOptions) -> None:
    """Refuse where coremltools is not installed, or does not start beside what is."""
    require_vectors_inside(options, "Core ML's files")
    try:
        quiet_coremltools()
    except ImportError as error:
        raise BackendError("--coreml needs coremltools, which is not installed", fix=INSTALL) from error
    except Exception as error:  # what a clash of versions raises
        raise BackendError(f"coremltools does not start here: {one_line(error)}", fix=f"{INSTALL} --upgrade") from error


INSTALL = "pip install 'prgkit[coreml]'"


def quiet_coremltools() -> Any:
    """Import coremltools without its notes on versions that it was not tested with, and on what needs macOS."""
    with contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module("coremltools")


def how_to_run(manifest: Manifest) -> str:
    """Return how the files are run in Swift, where there are any."""
    files = [artifact for artifact in manifest.artifacts if artifact.format == COREML]
    return section("coreml.md", manifest, files=files) if files else ""


CORE_ML = Format(
    "coreml",
    "coreml",
    wanted=lambda options: "coreml" in options.formats,
    make=make_coreml,
    require=require_coreml,
    how_to_run=how_to_run,
)
