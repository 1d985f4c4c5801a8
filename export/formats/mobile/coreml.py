"""Core ML: an ML program that names what is in an image; written anywhere, run on Apple's systems alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import BackendError, ExportError
from prgkit.export.bundle.manifest import COREML, Artifact, TensorSpec
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.mobile.apart import run_apart
from prgkit.export.formats.mobile.require import install, require_converter
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import section_on_files

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

IMAGE, LABEL = "image", "classLabel"
NEVER_EXECUTED = "never executed here: Core ML runs on Apple's systems"


def make_coreml(export: StudentExport) -> Made:
    """Convert the fused student, in FP32 and where FP16 is wanted in FP16, too."""
    return Made([make_one(export, "fp32"), *([make_one(export, "fp16")] if export.options.fp16 else [])])


def make_one(export: StudentExport, precision: str) -> Artifact:
    """Convert the student to compute in one precision."""
    half = precision == "fp16"

    def write(path: Path) -> None:
        from prgkit.export.formats.mobile.planar import torchscript

        metadata = {"preprocessing": json.dumps(export.preprocessing.to_dict())}
        size = sides(export.preprocessing.image_size)
        run_apart(convert, torchscript(export), path, size, list(export.classes), precision, metadata)

    return export.finish(
        f"coreml-{precision}",
        "model.fp16.mlpackage" if half else "model.mlpackage",
        write=write,
        converters=("coremltools",),
        runner=None,
        format=COREML,
        precision=precision,
        backend="coreml",
        note=NEVER_EXECUTED,
        input=image_of(export.preprocessing),
        export_options=("--coreml", "--fp16") if half else ("--coreml",),
    )


def convert(
    torchscript: Path, path: Path, size: tuple[int, int], classes: list[str], precision: str, metadata: dict[str, str]
) -> None:
    """Write an ML program for iOS 15, macOS 12 and newer: an RGB image in, class name and probabilities out."""
    import coremltools as tools

    from prgkit.export.formats.mobile.planar import classifier

    model = tools.convert(
        classifier(torchscript, size),
        inputs=[tools.ImageType(IMAGE, shape=(1, 3, *size), color_layout=tools.colorlayout.RGB)],
        classifier_config=tools.ClassifierConfig(classes, LABEL),
        convert_to="mlprogram",
        minimum_deployment_target=tools.target.iOS15,
        compute_precision=tools.precision.FLOAT16 if precision == "fp16" else tools.precision.FLOAT32,
        skip_model_load=True,
    )
    model.user_defined_metadata.update(metadata)
    model.save(str(path))
    program = path / "Data/com.apple.CoreML/model.mlmodel"
    program.write_bytes(model.get_spec().SerializeToString(deterministic=True))  # the same bytes every time


def image_of(preprocessing: Preprocessing) -> TensorSpec:
    """Return what the files take: an RGB image, which Vision or Core ML makes of any pixel buffer."""
    return TensorSpec(name=IMAGE, dtype="uint8", layout="HWC", shape=(*sides(preprocessing.image_size), 3))


def require_coreml(options: ExportOptions) -> None:
    """Refuse where coremltools is not installed, or does not start beside the versions that are."""
    require_converter(options, "Core ML", modules=("coremltools",), extra="coreml")
    try:
        run_apart(start)
    except ExportError as error:
        raise BackendError(f"coremltools does not start here: {error.what}", fix=install("coreml")) from error


def start() -> None:
    """Import coremltools."""
    import coremltools  # noqa: F401


COREML_FORMAT = Format(
    "coreml",
    wanted=lambda options: "coreml" in options.formats,
    make=make_coreml,
    require=require_coreml,
    how_to_run=partial(section_on_files, "coreml.md", COREML),
)
