"""INT8 recipes against each other: how each stands to FP32, and how fast each is in ONNX Runtime and in OpenVINO.

    python benchmarks/int8.py --runs runs/ > results/int8.json

``runs`` holds finished runs with a bundle. Fidelity is measured at the student's own size on its evaluation images,
latency with the same weights at ``--size``, where all files take turns in one process. A ratio is FP32's latency
divided by the file's, above 1 where INT8 is faster, with its 95 % interval over rounds. Two of the files are
made to fail: one with the scale of a layer doubled, one of ONNX Runtime's quantiser by minima and maxima of tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from onnx import numpy_helper

from prgkit.data.index import read_image_index
from prgkit.evaluate import system
from prgkit.evaluate.bench.timing import timed_runs
from prgkit.evaluate.selection import round_ratio
from prgkit.export.bundle.bundle import Evaluation, open_bundle, read_evaluation
from prgkit.export.bundle.fidelity import compare_with_fp32
from prgkit.export.formats.onnx_export import export_onnx, onnx_export_module, write_fp16
from prgkit.export.from_run import calibration_set
from prgkit.export.int8.calibration import measure_spreads
from prgkit.export.int8.qdq import Quantizable, find_convolutions, tensors_of
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.export.runtimes.openvino import OpenVinoRunner
from prgkit.export.runtimes.parity import run_and_close
from prgkit.metrics import kl
from prgkit.progress import NullProgress
from prgkit.storage.run import Run
from prgkit.student.model import load_student

CALIBRATION_IMAGES = 256
CLIP_QUANTILE = 0.02
DOUBLED = 8  # layers, spread over the network
RUNTIMES: dict[str, Callable[[Path, int], Any]] = {
    "onnxruntime": lambda path, threads: OnnxRunner(path, threads=threads),
    "openvino": OpenVinoRunner,
}


def ours(fp32: Path, pixels: np.ndarray, path: Path, *, layout: Any = "onnxruntime") -> None:
    """Quantise as an export does, in one of its layouts."""
    nodes, source = find_convolutions(fp32), fp32
    if layout == "tensorrt":
        write_fp16(fp32, source := path.with_suffix(".fp16.onnx"))
    spreads = measure_spreads(fp32, tensors_of(fp32, nodes), pixels)
    Quantizable(source, spreads, CLIP_QUANTILE, layout).write(path, nodes)


def nncf(fp32: Path, pixels: np.ndarray, path: Path, *, preset: str, fast: bool = True) -> None:
    """Quantise with NNCF."""
    library: Any = importlib.import_module("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    images = library.Dataset([{"pixels": image[None]} for image in pixels])
    how = {"preset": library.QuantizationPreset(preset), "fast_bias_correction": fast, "subset_size": len(pixels)}
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        model = library.quantize(onnx.load(str(fp32)), images, **how)
    onnx.save(model, str(path))


def onnxruntime_quantiser(fp32: Path, pixels: np.ndarray, path: Path, *, per_channel: bool) -> None:
    """Quantise with ONNX Runtime's own tool, by the smallest and the largest value of each tensor."""
    tool = importlib.import_module("onnxruntime.quantization")

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.images = iter(pixels[:64])  # it keeps all values of all tensors

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"pixels": image[None]}

    logging.disable(logging.WARNING)
    tool.quantize_static(str(fp32), str(path), Reader(), per_channel=per_channel, quant_format=tool.QuantFormat.QDQ)


def doubled(fp32: Path, pixels: np.ndarray, path: Path) -> None:
    """Quantise as an export does, then double the scale of a layer: the one of `DOUBLED` that changes answers most.

    In a residual branch that does little.
    """
    ours(fp32, pixels, path)
    logits, before = run_and_close(OnnxRunner(fp32), pixels[:64]), path.read_bytes()
    scales = [one.name for one in onnx.load(str(path)).graph.initializer if one.name.endswith("_weight_scale")]
    found = []
    for name in [scales[place] for place in np.linspace(0, len(scales) - 1, DOUBLED).astype(int)]:
        model = onnx.load_from_string(before)
        chosen = next(one for one in model.graph.initializer if one.name == name)
        chosen.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(chosen), name))
        onnx.save(model, str(path))
        found.append((kl(logits, run_and_close(OnnxRunner(path), pixels[:64])), path.read_bytes()))
    path.write_bytes(max(found)[1])


RECIPES: dict[str, Callable[[Path, np.ndarray, Path], None]] = {
    "ours": ours,
    "ours_tensorrt": partial(ours, layout="tensorrt"),
    "nncf_mixed_fast": partial(nncf, preset="mixed"),
    "nncf_symmetric_fast": partial(nncf, preset="performance"),
    "nncf_mixed_full": partial(nncf, preset="mixed", fast=False),
    "nncf_symmetric_full": partial(nncf, preset="performance", fast=False),
    "onnxruntime_minmax": partial(onnxruntime_quantiser, per_channel=True),
    "onnxruntime_minmax_per_tensor": partial(onnxruntime_quantiser, per_channel=False),
    "ours_one_scale_doubled": doubled,
}
TIMED = ("ours", "ours_tensorrt", "nncf_mixed_fast", "nncf_symmetric_fast", "onnxruntime_minmax")  # others: as these


@click.command()
@click.option("--runs", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--students", help="Folders of --runs, with commas between them; all by default.")
@click.option("--recipes", default=",".join(RECIPES), show_default=True)
@click.option("--only", default="fidelity,latency", show_default=True)
@click.option("--size", default=224, show_default=True, help="Of the pictures in the latency part, in pixels.")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--rounds", default=10, show_default=True)
@click.option("--slice", "slice_s", default=0.3, show_default=True, help="Timed seconds of a file in a round.")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True)
@click.option("--margin", default=2.0, show_default=True, help="Percent points, as export.margin.")
def main(runs: Path, students: str | None, **options: Any) -> None:
    """Print one JSON document: of each student, how each recipe's file stands to FP32, and the ratios of latency."""
    names = students.split(",") if students else sorted(path.name for path in runs.iterdir() if path.is_dir())
    options["recipes"] = options["recipes"].split(",")
    rows = []
    for name in names:
        run = Run(runs / name)
        row: dict[str, Any] = {
            "student": name,
            "model": run.recipe.student.model,
            "size": run.recipe.student.image_size,
        }
        with tempfile.TemporaryDirectory() as scratch:
            for part in options["only"].split(","):
                row[part] = PARTS[part](run, Path(scratch), **options)
        rows.append(row)
    machine = system.describe().model_dump(mode="json", include={"cpu", "cores", "os", "load_average", "versions"})
    click.echo(json.dumps({"options": options, "machine": machine, "students": rows}, indent=2))


def fidelity(run: Run, scratch: Path, *, recipes: list[str], margin: float, **_: Any) -> list[dict[str, Any]]:
    """Return how each recipe's file stands to FP32 on the evaluation images, in both runtimes, and the verdict."""
    evaluation, pixels, rows = read_evaluation(run.bundle), calibration_pixels(run), []
    for recipe in recipes:
        RECIPES[recipe](run.bundle / "model.onnx", pixels, path := scratch / f"{recipe}.onnx")
        for runtime, open_file in RUNTIMES.items():
            facts = judge(run_and_close(open_file(path, 1), evaluation.pixels), evaluation, margin)
            rows.append({"recipe": recipe, "runtime": runtime, **facts})
            click.echo(f"{run.name} {recipe} {runtime}: {facts}", err=True)
    return rows


def judge(logits: np.ndarray, evaluation: Evaluation, margin: float) -> dict[str, Any]:
    """Return a file's figures, the verdict, and how sure FP32 is where the two answers differ, and over all images."""
    found = compare_with_fp32(evaluation.logits, logits, evaluation.teacher_logits, evaluation.labels)
    shifted = np.exp(evaluation.logits - evaluation.logits.max(axis=1, keepdims=True))
    confidence = shifted.max(axis=1) / shifted.sum(axis=1)
    differ = evaluation.logits.argmax(axis=1) != logits.argmax(axis=1)
    return {
        "kept": found.holds(margin),
        "conditions": found.conditions(margin),
        **found.to_json(),
        "fp32_confidence": float(confidence.mean()),
        "fp32_confidence_where_they_differ": float(confidence[differ].mean()) if differ.any() else None,
    }


def latency(
    run: Run,
    scratch: Path,
    *,
    recipes: list[str],
    size: int,
    threads: str,
    rounds: int,
    slice_s: float,
    clock: str,
    **_: Any,
) -> dict[str, Any]:
    """Let FP32 and the files of the recipes take turns, with the same weights at another size."""
    pixels = calibration_pixels(run, size)
    files = {"fp32": scratch / "timed.onnx"}
    student = load_student(run)
    module = onnx_export_module(student.inference_model(), torch.from_numpy(pixels[:8]))
    export_onnx(
        module,
        files["fp32"],
        image_size=size,
        classes=run.recipe.classes,
        preprocessing=student.preprocessing,
        opset=20,
    )
    for recipe in TIMED:
        if recipe in recipes:
            RECIPES[recipe](files["fp32"], pixels, path := scratch / f"timed.{recipe}.onnx")
            files[recipe] = path
    found = {}
    for count in [int(one) for one in threads.split(",")]:
        opened = {
            f"{runtime}/{name}": open_file(path, count)
            for runtime, open_file in RUNTIMES.items()
            for name, path in files.items()
        }
        rounds_ms = take_turns(opened, list(pixels[:16, None]), rounds, slice_s, clock)
        found[str(count)] = {
            "p50_ms": {key: float(np.median(values)) for key, values in rounds_ms.items()},
            "faster_than_fp32": {
                key: round_ratio(rounds_ms[f"{key.split('/')[0]}/fp32"], rounds_ms[key]) for key in opened
            },
            "rounds_ms": rounds_ms,
        }
        click.echo(f"{run.name}, {count} threads: {found[str(count)]['faster_than_fp32']}", err=True)
    return found


def take_turns(
    opened: dict[str, Any], inputs: list[np.ndarray], rounds: int, slice_s: float, clock: str
) -> dict[str, list[float]]:
    """Return the median of each file in each round, in milliseconds; the order of a round is drawn.

    The CPU's clock counts what this process computes: with one thread that is the latency of a machine of its own.
    """
    timed = timed_runs if clock == "wall" else timed_cpu
    medians: dict[str, list[float]] = {key: [] for key in opened}
    for number in range(rounds + 1):
        for key in random.Random(number).sample(list(opened), len(opened)):
            _, samples_ns = timed(opened[key].run, inputs, slice_s, 5, 0)
            if number:  # the first round warms up
                medians[key].append(float(np.median(samples_ns)) / 1e6)
    return medians


def timed_cpu(
    run: Callable[[Any], Any], inputs: list[np.ndarray], seconds: float, at_least: int, turn: int
) -> tuple[int, list[int]]:
    """Run as `timed_runs` does; return the CPU time of each run in ns."""
    samples: list[int] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < at_least:
        start = time.process_time_ns()
        run(inputs[len(samples) % len(inputs)])
        samples.append(time.process_time_ns() - start)
    return turn, samples


def calibration_pixels(run: Run, size: int | None = None) -> np.ndarray:
    """Return images [n, S, S, 3] that the student learned from; few in another ``size``: no latency depends on them."""
    recipe, preprocessing = run.recipe, open_bundle(run.bundle).preprocessing
    if size is not None:
        preprocessing = type(preprocessing)(**{**vars(preprocessing), "image_size": size})
    images = read_image_index(recipe.data.image_spec, NullProgress())
    found = calibration_set(run, images, np.arange(0), preprocessing, recipe, lambda: images)
    return found.read(np.arange(min(32 if size else CALIBRATION_IMAGES, found.images)))


PARTS: dict[str, Callable[..., Any]] = {"fidelity": fidelity, "latency": latency}


if __name__ == "__main__":
    main()
