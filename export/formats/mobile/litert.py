"""LiteRT (formerly TensorFlow Lite): a .tflite file in FP32, FP16 and INT8, pixels in and logits out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prgkit.export.bundle.manifest import LITERT
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.mobile import litert_convert
from prgkit.export.formats.mobile.apart import run_apart
from prgkit.export.formats.mobile.require import require_converter
from prgkit.export.formats.snippets import section
from prgkit.export.int8.files import Int8File, int8_judge
from prgkit.export.runtimes.litert import LiteRtRunner

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

EXTRA = "litert-export"  # `litert` alone is the runtime, which a device installs
CONVERTER, QUANTISER = ("litert-torch", "litert-converter"), ("ai-edge-quantizer",)
ON_CPU_FP16 = "weights in float16; on a CPU LiteRT computes with them in float32 unless it is told otherwise"


def make_litert(export: StudentExport) -> Made:
    """Convert the fused student; the FP16 and INT8 files are made of the FP32 one, where these are asked for."""
    fp32 = export.folder / "model.tflite"
    finish = partial(export.finish, format=LITERT, runner=LiteRtRunner)

    def convert(path: Path) -> None:
        export.note("LiteRT: converting takes a minute")
        run_apart(litert_convert.convert, export.program, path)

    options = ("--litert",)
    artifacts = [
        finish("litert", fp32.name, write=convert, precision="fp32", converters=CONVERTER, export_options=options)
    ]
    if export.options.fp16:
        fp16 = finish(
            "litert-fp16",
            "model.fp16.tflite",
            write=partial(run_apart, litert_convert.halve, fp32),
            precision="fp16",
            note=ON_CPU_FP16,
            converters=(*CONVERTER, *QUANTISER),
            export_options=(*options, "--fp16"),
        )
        artifacts.append(fp16)
    int8 = make_int8(export, fp32) if export.options.int8 else Made()
    return Made([*artifacts, *int8.artifacts], int8.not_kept, int8.decided)


def make_int8(export: StudentExport, fp32: Path) -> Made:
    """Make the INT8 file of the FP32 one, by LiteRT's own quantiser."""
    judge = int8_judge(export)
    if judge is None:
        return Made()

    def write(path: Path) -> None:
        np.save(saved := export.work / "calibration.npy", judge.calibration)
        run_apart(litert_convert.quantise, fp32, saved, path)

    file = Int8File(
        "litert-int8",
        "model.int8.tflite",
        layout="litert",
        format=LITERT,
        write=write,
        runner=LiteRtRunner,
        options=("--litert", "--int8"),
        converters=(*CONVERTER, *QUANTISER),
    )
    return judge.make_all([file])


LITERT_FORMAT = Format(
    "litert",
    wanted=lambda options: "litert" in options.formats,
    make=make_litert,
    require=partial(
        require_converter, what="LiteRT", modules=("litert_torch", "ai_edge_quantizer", "ai_edge_litert"), extra=EXTRA
    ),
    how_to_run=partial(section, "litert.md"),
)
