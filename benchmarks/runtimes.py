"""How fast a student's files are in every runtime that is installed, against timm's own ONNX file of the same weights.

    python benchmarks/runtimes.py --bundles bundles/ > results/runtimes.json

A student that has no bundle in the folder yet is exported first, with random weights: what a file computes in how much
time does not depend on them. Each file has a process of its own, as in `prgkit bench`; all take turns in random order,
at batch 1. A ratio is the median over rounds of the ratio within a round, with its 95 % bootstrap interval, and below 1
where the first is faster. Runtimes and formats that are not installed are left out, and named.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.utils.onnx import onnx_export

from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import PrgkitError
from prgkit.evaluate import system
from prgkit.evaluate.bench.latency import SETTLE_S
from prgkit.evaluate.bench.worker import Spec, Worker, WorkerFailedError
from prgkit.export.bundle.bundle import Bundle, describe_artifact, open_bundle, read_evaluation
from prgkit.export.formats import FORMATS
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.student_export import CalibrationSet
from prgkit.export.pipeline import EvaluationSet, ExportImages, StudentOrigin, TrainedStudent, export_student
from prgkit.export.runtimes import RUNTIMES, setups
from prgkit.export.runtimes.base import Runner, Setup, Variant
from prgkit.export.runtimes.onnxruntime import ONNXRUNTIME, OnnxRunner, normalised
from prgkit.export.runtimes.openvino import OPENVINO, OpenVinoRunner
from prgkit.metrics import agreement
from prgkit.student.model import reparameterised

STUDENTS = "repvit_m0_9,repvit_m1_1,efficientnet_b0,efficientnet_lite0"
MOBILE = ("litert", "executorch", "ncnn")  # formats that are asked for where what makes them is installed
PEER, PEER_FILE = "timm", "model.timm.onnx"
CLASSES, IMAGES = 100, 64
STATISTICS = Preprocessing(224, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Student(torch.nn.Module):
    """A timm model and its normalisation, as it is exported: pixels [batch, S, S, 3] uint8 to logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.mean: torch.Tensor
        self.std: torch.Tensor
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(getattr(STATISTICS, name)))

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.model(((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2))


class PeerRunner:
    """A file that takes normalised floats, which it is given ready: to prepare them is no part of a run."""

    max_batch: int | None = 1

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.name, self.backend, self.device = PEER, inner.backend, inner.device
        self.ready: dict[int, Any] = {}  # by where the pixels lie, which a bench gives again and again

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        place = pixels.ctypes.data
        if place not in self.ready:
            self.ready[place] = pixels, normalised(pixels, STATISTICS)  # with the pixels, so that they stay there
        return self.inner.run(self.ready[place][1])

    def close(self) -> None:
        self.inner.close()


def open_peer(setup: Setup) -> Runner:
    """Open timm's file in the runtime that the variant names."""
    runner = OnnxRunner if setup.variant.backend == "onnxruntime" else OpenVinoRunner
    return PeerRunner(runner(setup.path, threads=setup.threads))


@dataclass
class Subject:
    """What takes turns, and what cannot here."""

    specs: dict[str, Spec] = field(default_factory=dict)  # by runtime/artifact
    left_out: dict[str, str] = field(default_factory=dict)


@click.command()
@click.option("--bundles", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--students", default=STUDENTS, show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--slice", "slice_s", default=0.3, show_default=True, help="Timed seconds of a file in a round.")
def main(bundles: Path, students: str, threads: str, rounds: int, slice_s: float) -> None:
    """Print one JSON document of ratios, with the median of every round beside them."""
    rows = []
    for name in students.split(","):
        folder = bundles / name
        if not (folder / "manifest.json").exists() or not (bundles / f"{name}.{PEER_FILE}").exists():
            export_untrained(name, folder)
        bundle = open_bundle(folder)
        subject = what_runs(bundle, bundles / f"{name}.{PEER_FILE}")
        row: dict[str, Any] = {"student": name, "image_size": bundle.preprocessing.image_size}
        row["bytes"] = {artifact.file: artifact.bytes for artifact in bundle.artifacts}
        row["left_out"] = subject.left_out
        for count in threads.split(","):
            click.echo(f"{name}: threads: {count}", err=True)
            row.setdefault("measured", []).append(side_by_side(bundle, subject, int(count), rounds, slice_s))
        rows.append(row)
    kept = {"cpu", "cores", "os", "load_average", "versions"}
    here = system.describe().model_dump(mode="json", include=kept)
    options = {"threads": threads, "rounds": rounds, "slice_s": slice_s}
    click.echo(json.dumps({"options": options, "machine": here, "students": rows}, indent=2))


def export_untrained(name: str, folder: Path) -> None:
    """Export a student with random weights in every format that can be made here, and timm's file of the same."""
    torch.manual_seed(0)
    student = Student(timm.create_model(name, num_classes=CLASSES).eval())
    pixels = np.random.default_rng(0).integers(0, 256, (2 * IMAGES, 224, 224, 3), dtype=np.uint8)
    teacher = 10 * np.eye(CLASSES, dtype=np.float32)[np.arange(IMAGES) % CLASSES]
    asked = ExportOptions(int8=True, margin=100.0, formats=tuple(form for form in MOBILE if why_not_made(form) is None))
    facts = {
        "run": {"name": name, "fingerprint": "0" * 16, "objective": "none", "epochs": 0},
        "recipe": {},
        "teacher": {"model": "none", "fingerprint": "0" * 16},
        "student": {"model": name},
    }
    export_student(
        TrainedStudent(student, [f"class {place}" for place in range(CLASSES)], STATISTICS, origin(facts)),
        ExportImages(
            pixels[:IMAGES],
            [Image.fromarray(picture) for picture in pixels[:2]],
            EvaluationSet(iter(pixels[:IMAGES]), teacher, teacher, None, "noise", keys=("0" * 32,) * IMAGES),
            lambda: CalibrationSet(IMAGES // 2, lambda places: pixels[IMAGES + places]),
        ),
        folder,
        asked,
        note=lambda text: click.echo(f"{name}: {text}", err=True),
    )
    with contextlib.redirect_stdout(None):
        fused = reparameterised(student.model)
        onnx_export(fused, str(folder.parent / f"{name}.{PEER_FILE}"), input_size=(3, 224, 224), batch_size=1)


def origin(facts: dict[str, Any]) -> StudentOrigin:
    """Return what the manifest says of where a student is from."""
    return StudentOrigin.model_validate(facts)


def why_not_made(name: str) -> str | None:
    """Return why a format cannot be made here, or None where it can."""
    known = next((one for one in FORMATS if one.name == name), None)
    if known is None:
        return "no such format"
    try:
        known.require(ExportOptions(formats=(name,)))
    except PrgkitError as error:
        return f"{error.what}: {error.fix}"
    return None


def what_runs(bundle: Bundle, peer: Path) -> Subject:
    """Return all that can take turns here on the CPU, and why the rest cannot."""
    subject = Subject()
    for artifact in bundle.artifacts:
        for setup in setups(artifact, bundle.folder, bundle.artifacts):
            key = f"{setup.variant.backend}/{artifact.name}"
            if setup.variant.device == "cpu" and (why := setup.why_not_here(gpu=False)):
                subject.left_out[key] = why
            elif setup.variant.device == "cpu":
                subject.specs[key] = Spec(artifact.name, setup.variant.backend, "cpu", takes_threads=True, setup=setup)
    run = {spec.setup.runtime.name for spec in subject.specs.values() if spec.setup}
    for runtime in RUNTIMES:
        if runtime.name not in run and runtime.name in MOBILE:
            subject.left_out[runtime.name] = why_not_made(runtime.name) or "its files are not in the bundle"
    facts = {"precision": "fp32", "backend": "timm", "executed": True, "note": None, "parity": None}
    artifact = describe_artifact(peer.parent, peer.name, name=PEER, format="onnx", **facts)
    for runtime in (ONNXRUNTIME, OPENVINO):
        setup = Setup(
            replace(runtime, open=open_peer), Variant("CPU", runtime.name, "cpu"), artifact, folder=peer.parent
        )
        if setup.why_not_here(gpu=False) is None or runtime is ONNXRUNTIME:
            subject.specs[f"{runtime.name}/{PEER}"] = Spec(PEER, runtime.name, "cpu", takes_threads=True, setup=setup)
    return subject


def side_by_side(bundle: Bundle, subject: Subject, threads: int, rounds: int, slice_s: float) -> dict[str, Any]:
    """Let all files take turns, each in its own process, and return their medians and ratios."""
    pixels = read_evaluation(bundle.folder, limit=IMAGES).pixels
    logits: dict[str, NDArray[np.float32]] = {}
    turns: dict[str, Callable[[float], float]] = {}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as open_workers:
        for key, spec in subject.specs.items():
            try:
                worker = open_workers.enter_context(Worker(replace(spec, threads=threads), pixels))
                logits[key] = np.concatenate(
                    [worker.predict(pixels[place : place + 1]) for place in range(len(pixels))]
                )
            except WorkerFailedError as error:
                left_out[key] = str(error)
                continue
            turns[key] = lambda seconds, worker=worker: median_ms(worker, seconds)  # type: ignore[misc]
        rounds_ms = take_turns(turns, rounds, slice_s)
    first = f"onnxruntime/{PEER}"
    return {
        "threads": threads,
        "left_out": left_out,
        "p50_ms": {key: round(float(np.median(medians)), 4) for key, medians in rounds_ms.items()},
        "to_timm_in_onnxruntime": {key: ratio(medians, rounds_ms[first]) for key, medians in rounds_ms.items()},
        "int8_to_fp32": {
            key: ratio(rounds_ms[key], rounds_ms[fp32])
            for key in rounds_ms
            if "int8" in key and (fp32 := fp32_of(key, rounds_ms))
        },
        "same_answer_as_timm_percent": {key: agreement(values, logits[first]) for key, values in logits.items()},
        "rounds_ms": rounds_ms,
    }


def fp32_of(key: str, rounds_ms: dict[str, list[float]]) -> str | None:
    """Return the FP32 row of the same runtime."""
    runtime = key.split("/")[0]
    rows = [other for other in rounds_ms if other.startswith(f"{runtime}/") and PEER not in other]
    return next((other for other in rows if "int8" not in other and "fp16" not in other), None)


def median_ms(worker: Worker, seconds: float) -> float:
    """Return the median ms of a slice's runs in a worker, after untimed ones that outlast who ran before."""
    return float(np.median(worker.measure(batch=1, seconds=seconds, at_least=5, settle_s=SETTLE_S))) / 1e6


def take_turns(turns: dict[str, Callable[[float], float]], rounds: int, slice_s: float) -> dict[str, list[float]]:
    """Return the median of each file's runs in each round, after a round that warms up; the order is random."""
    generator = random.Random(0)
    medians: dict[str, list[float]] = {key: [] for key in turns}
    for number in range(rounds + 1):
        for key in generator.sample(list(turns), len(turns)):
            taken = turns[key](slice_s)
            if number:
                medians[key].append(round(taken, 5))
    return medians


def ratio(ones: list[float], others: list[float]) -> dict[str, float]:
    """Return the median over rounds of the ratio within a round, and its 95 % interval, drawing rounds."""
    ratios = np.asarray(ones) / np.asarray(others)  # [rounds]
    drawn = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return {"median": round(float(np.median(ratios)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


if __name__ == "__main__":
    importlib.import_module("runtimes").main()  # by its name, by which processes of their own find `open_peer`
