"""ncnn: a folder with the graph as text and the weights, converted by pnnx."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ExportError
from prgkit.export.bundle.manifest import NCNN, Artifact, TensorSpec
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.mobile.require import require_converter
from prgkit.export.formats.snippets import section_on_files
from prgkit.export.runtimes.ncnn import BIN, INPUT, PARAM, NcnnRunner

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport


def make_ncnn(export: StudentExport) -> Made:
    """Convert the fused student, in FP32 and where FP16 is wanted with its weights halved, too."""
    return Made([make_one(export, "fp32"), *([make_one(export, "fp16")] if export.options.fp16 else [])])


def make_one(export: StudentExport, precision: str) -> Artifact:
    """Convert the student in one precision; it must give PyTorch's logits."""
    half = precision == "fp16"

    def write(folder: Path) -> None:
        from prgkit.export.formats.mobile.planar import torchscript

        convert(torchscript(export), folder, sides(export.preprocessing.image_size), half)

    return export.finish(
        f"ncnn-{precision}",
        "model.fp16.ncnn" if half else "model.ncnn",
        write=write,
        converters=("pnnx", "ncnn"),
        runner=partial(NcnnRunner, threads=1, half=half),  # more would spin where others work
        format=NCNN,
        precision=precision,
        input=planes(export.preprocessing),
        export_options=("--ncnn", "--fp16") if half else ("--ncnn",),
    )


def convert(torchscript: Path, folder: Path, size: tuple[int, int], half: bool) -> None:
    """Write ncnn's two files into a new folder.

    pnnx, a program, writes them beside the TorchScript file first: where this process is killed, pnnx goes on, and
    would write where the next export does.

    Raises:
        ExportError: pnnx cannot convert the student.
    """
    files = [f"ncnnparam={PARAM}", f"ncnnbin={BIN}"]
    shape = f"inputshape=[1,3,{size[0]},{size[1]}]"
    command = [program(), torchscript.name, shape, f"fp16={int(half)}", *files]
    done = subprocess.run(command, cwd=torchscript.parent, capture_output=True, check=False)
    if done.returncode or not torchscript.with_name(BIN).exists():
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ExportError(
            f"pnnx cannot convert this student: {said[-1]}", fix="export without --ncnn, or choose another student"
        )
    folder.mkdir()
    for file in (PARAM, BIN):
        shutil.move(torchscript.with_name(file), folder / file)


def program() -> str:
    """Return where pnnx lies in its package, whose import would import torch."""
    package = importlib.util.find_spec("pnnx")
    assert package is not None
    assert package.origin is not None
    return str(Path(package.origin).with_name("pnnx.exe" if sys.platform == "win32" else "pnnx"))


def planes(preprocessing: Preprocessing) -> TensorSpec:
    """Return what the files take: what ncnn's Mat::from_pixels makes of RGB pixels."""
    shape = (3, *sides(preprocessing.image_size))
    return TensorSpec(name=INPUT, dtype="float32", layout="CHW", shape=shape, values="RGB, 0 to 255")


NCNN_FORMAT = Format(
    "ncnn",
    wanted=lambda options: "ncnn" in options.formats,
    make=make_ncnn,
    require=partial(require_converter, what="ncnn", modules=("pnnx", "ncnn"), extra="ncnn-export"),
    how_to_run=partial(section_on_files, "ncnn.md", NCNN),
)
