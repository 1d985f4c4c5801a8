"""The options of `export` and `push`: which files are made besides FP32 ONNX, what a bundle refuses, what travels."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from prgkit.cli import values
from prgkit.cli.options import json_option, run_option, with_options

if TYPE_CHECKING:
    from prgkit.cli.state import Session
    from prgkit.storage.run import Run

QUALCOMM_CHIPS = ("SM8450", "SM8475", "SM8550", "SM8650", "SM8750", "SM8850", "SC8380XP")
FORMATS = {  # options that each ask for a format, by its name
    "litert": "Also as LiteRT (.tflite); with --fp16 and --int8 in these, too.",
    "executorch": "Also as ExecuTorch (.pte), its network in XNNPACK.",
    "ncnn": "Also as ncnn (.param, .bin), as for a Raspberry Pi; with --fp16 in that, too.",
    "coreml": "Also as Core ML (.mlpackage), for iOS and macOS; with --fp16 in that, too.",
}


def export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what export takes: which files are made besides FP32 ONNX, and how."""
    options: list[Callable[..., Any]] = [
        click.option("--fp16", is_flag=True, help="Also in 16-bit floats."),
        click.option("--int8", is_flag=True, help="Also in 8-bit integers, where these are as good as FP32."),
        click.option("--trt", is_flag=True, help="Also as TensorRT engines."),
        *engine_options(),
        click.option(
            "--open-vocabulary",
            is_flag=False,
            flag_value="initializer",
            type=click.Choice(["initializer", "input"]),
            help="Score images by the teacher's class vectors in place of a class head, so that relabel can change the "
            "classes; in the ONNX file they are an initializer (without a word), or an input.",
        ),
        click.option(
            "--embedding",
            is_flag=True,
            help="Also the student's embedding as an ONNX file, for predict --gallery; implies --open-vocabulary.",
        ),
        click.option(
            "--float-input",
            is_flag=True,
            help="Also an ONNX file that takes normalised floats, NCHW, for runtimes that prepare images themselves.",
        ),
        click.option("--explain", is_flag=True, help="Also a file for heat maps: where each class was found."),
        click.option(
            "--qnn",
            type=click.Choice(QUALCOMM_CHIPS, case_sensitive=False),
            metavar="CHIP",
            help=f"Also compiled for the NPU of a Qualcomm chip: {', '.join(QUALCOMM_CHIPS)}.",
        ),
        click.option(
            "--evaluation-images",
            type=click.IntRange(min=1),
            metavar="N",
            help="How many held-out images travel.  [default: the recipe's, 2000]",
        ),
        *(click.option(f"--{name}", is_flag=True, help=text) for name, text in FORMATS.items()),
        click.option("--format", "formats", multiple=True, hidden=True, help="Also in this format, by its name."),
        click.option("--zip", "packs", is_flag=True, help="Also pack the bundle into one file beside it."),
        run_option,
        json_option,
    ]
    return with_options(command, options)


def push_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what push takes: where a bundle is published, and what of it."""
    options: list[Callable[..., Any]] = [
        click.argument("repo", metavar="OWNER/NAME"),
        click.option("--private", is_flag=True, help="Make the repository private; an existing one must be."),
        click.option(
            "--with-images", is_flag=True, help="Also the golden and the evaluation images, and their labels."
        ),
        click.option(
            "--license",
            default="unknown",
            show_default=True,
            metavar="ID",
            help="The model's licence, in the Hub's words, e.g. apache-2.0.",
        ),
        click.option("--revision", metavar="BRANCH", help="A branch, made where there is none.  [default: main]"),
        run_option,
        json_option,
    ]
    return with_options(command, options)


def engine_options() -> list[Callable[..., Any]]:
    """Return how TensorRT's engines are built."""
    return [
        click.option(
            "--backend",
            type=click.Choice(["tensorrt", "tensorrt_rtx"]),
            metavar="NAME",
            help="Build the engines with this one of tensorrt and tensorrt_rtx; implies --trt.  "
            "[default: tensorrt where it can run, else tensorrt_rtx]",
        ),
        click.option(
            "--batch",
            metavar="MIN,OPT,MAX",
            type=values.batch_profile,
            help="Batch sizes of the engines, e.g. 1,1,32; three equal ones make a static engine; implies --trt.  "
            "[default: the recipe's]",
        ),
        click.option(
            "--sm",
            metavar="LIST",
            type=values.gpu_generations,
            help="GPU generations that the engines are for, e.g. 86,89; 80+ is all from Ampere on that the backend "
            "builds for; implies --trt.  [default: 80+; of tensorrt: this GPU]",
        ),
    ]


def refuse_where_one_stands(session: Session, run: Run) -> None:
    """Refuse, before any work is done for it, to replace the bundle that the command was typed in."""
    from prgkit.export.bundle.artifact_cache import require_elsewhere

    fix = f"cd {shlex.quote(str(run.folder.resolve()))} first; there --run is not needed"
    require_elsewhere(run.bundle, "export", fix=fix, stands_in=session.typed_in)


def refuse_in_a_bundle(given: Mapping[str, object], *, builds: bool) -> None:
    """Refuse what can only be made where the student is; a bundle gets engines, and can be packed."""
    files = ("embedding", "explain", "float_input", "open_vocabulary", "qnn", *FORMATS, "formats")
    of_students = (*files, "evaluation_images")
    if asked := [key for key in of_students if given[key]]:
        option = "--" + asked[0].removesuffix("s" if asked[0] == "formats" else "").replace("_", "-")
        raise click.UsageError(f"{option} is for where the student was trained; this is a bundle.")
    if given["fp16"] and not builds:
        raise click.UsageError("--fp16 halves where the student was trained; in a bundle it is for --trt.")
    if given["int8"] and not builds:
        raise click.UsageError("--int8 quantises where the student was trained; in a bundle it is for --trt.")
    if not (builds or given["packs"]):
        raise click.UsageError("A bundle is exported already; export --trt builds its engines, export --zip packs it.")
