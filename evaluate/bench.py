"""`prgkit bench`, top to bottom: open the bundle, measure every artifact on this machine, say what was found."""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import Any

import numpy as np

import prgkit
from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate import accuracy, latency, machine, wording
from prgkit.evaluate.latency import Measured
from prgkit.evaluate.pictures import choose_pictures
from prgkit.evaluate.report import SCHEMA, write_report
from prgkit.evaluate.worker import Spec
from prgkit.export.bundle import Bundle, Evaluation, check_golden, open_bundle, read_evaluation
from prgkit.export.card import load_card
from prgkit.export.runners import OnnxRunner, why_not_here
from prgkit.files import read_json
from prgkit.run import Run

Row = dict[str, Any]
DEFAULT_BATCHES = (1, 8, 32)
TIMED_IMAGES = 128
PREDICT_BATCH = 32
NOT_TRAINING = {"learning_rate", "seconds", "images_per_s", "step"}


def bench(
    bundle_folder: Path,
    *,
    run_folder: Path | None,
    out: Path,
    threads: int | None,
    seconds: float,
    batches: Sequence[int] = DEFAULT_BATCHES,
    note: Callable[[str], None],
    command: str | None = None,
) -> dict[str, Any]:
    """Measure a bundle's artifacts on this machine, write the report into ``out`` and return it.

    Args:
        bundle_folder: the bundle, here or copied to a device.
        run_folder: the run it came from, where that is at hand: adds PyTorch itself and the training curves.
        out: where report.json, report.md, report.html and samples.json go.
        threads: threads of one call on the CPU; None takes every core that this process may use.
        seconds: the time for warming up and measuring one artifact; its accuracy comes on top.
        batches: the batch sizes of the throughput sweep.
        note: told what is being done.
        command: what the user typed, for the report.

    Raises:
        BenchError: an option makes no sense, or no artifact could be measured.
        ExportError: the bundle, or something in it, is missing or damaged.
    """
    check_options(threads=threads, seconds=seconds, batches=batches)
    bundle = open_bundle(bundle_folder)
    evaluation = read_evaluation(bundle_folder)
    facts = machine.describe()
    threads = threads or machine.usable_cores()
    rows, specs = plan(bundle, run_folder, facts, threads=threads)
    notes = golden_notes(bundle)
    watch = machine.Watch()
    session = latency.measure(
        [spec for spec in specs if spec is not None],
        evenly(evaluation.pixels, TIMED_IMAGES),
        seconds=seconds,
        batches=sorted(set(batches)),
        predict=[
            evaluation.pixels[start : start + PREDICT_BATCH]
            for start in range(0, len(evaluation.pixels), PREDICT_BATCH)
        ],
        note=note,
        between_rounds=lambda round_: watch.sample(),
    )
    facts |= watch.facts()
    measured = iter(session.measured)
    for row, spec in zip(rows, specs, strict=True):
        if spec is not None:
            fill(row, next(measured), evaluation)
    if not any(row["status"] == "measured" for row in rows):
        reasons = "; ".join(f"{row['artifact']}: {row['reason']}" for row in rows)
        raise BenchError(
            f"no artifact could be measured: {reasons}", where=bundle_folder, fix="prgkit doctor says what can run here"
        )
    report = {
        "schema": SCHEMA,
        "prgkit": prgkit.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command or spelled_out(bundle_folder, threads=threads, seconds=seconds, batches=batches),
        "machine": facts,
        **subject(bundle, evaluation, rows),
        "rows": rows,
        "training": training(bundle, run_folder),
        "quality": trust(bundle, run_folder),
        "notes": [*notes, *machine.remarks(facts), *row_notes(rows, session.measured)],
    }
    note("writing the report")
    write_report(
        out,
        report,
        samples=samples(session),
        pictures=choose_pictures(evaluation, student_logits(session, evaluation), bundle.classes),
    )
    return report


def check_options(*, threads: int | None, seconds: float, batches: Sequence[int]) -> None:
    """Refuse what cannot be measured, before anything is opened."""
    if threads is not None and threads < 1:
        raise BenchError(
            f"{threads} threads cannot run anything", fix="give --threads 1 or more, or leave it out for every core"
        )
    if not seconds > 0 or not math.isfinite(seconds):
        raise BenchError(f"{seconds:g} s is no time to measure in", fix="give --seconds a number above 0, such as 10")
    if bad := [batch for batch in batches if batch < 1]:
        raise BenchError(
            f"a batch of {bad[0]} images cannot be run", fix="give --batches whole numbers from 1, such as 1,8,32"
        )


def plan(
    bundle: Bundle, run_folder: Path | None, facts: dict[str, Any], *, threads: int
) -> tuple[list[Row], list[Spec | None]]:
    """Return a row for everything that could run, with what a worker opens, or None and the reason in the row."""
    rows: list[Row] = []
    specs: list[Spec | None] = []

    def add(row: Row, spec: Spec | None) -> None:
        rows.append(row)
        specs.append(spec)

    for artifact in bundle.artifacts:
        path = bundle.folder / artifact["file"]
        if artifact["format"] == "engine":
            reason = why_not_here(load_card(path))
            spec = None if reason else {"kind": "engine", "path": str(path)}
            row = blank(artifact["name"], artifact, device="cuda", threads=None)
            if reason:
                row["reason"] = reason
            add(row, spec and named(spec, row))
            continue
        for provider, device in providers(facts):
            row = blank(artifact["name"], artifact, device=device, threads=threads if device == "cpu" else None)
            add(row, named({"kind": "onnx", "path": str(path), "provider": provider}, row))
    if run_folder is not None and Run(run_folder).weights.exists() and importlib.util.find_spec("torch"):
        weights = Run(run_folder).weights
        kept = {"file": weights.name, "backend": "torch", "precision": "fp32", "bytes": weights.stat().st_size}
        row = blank("torch", kept, device="cpu", threads=threads)
        add(row, named({"kind": "torch", "path": str(run_folder)}, row))
    return rows, specs


def providers(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the ONNX Runtime providers that can run here, with the device of each."""
    import onnxruntime

    here = [("CPUExecutionProvider", "cpu")]
    if facts["gpus"] and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        here.append(("CUDAExecutionProvider", "cuda"))
    return here


def blank(name: str, artifact: dict[str, Any], *, device: str, threads: int | None) -> Row:
    """Return a row with every key of the schema and no figure yet."""
    return {
        "artifact": name,
        "file": artifact["file"],
        "backend": artifact["backend"],
        "device": device,
        "precision": artifact["precision"],
        "threads": threads,
        "status": "not executed",
        "reason": None,
        "size_mib": round(artifact["bytes"] / (1 << 20), 3),
        "load_ms": None,
        "peak_memory_mib": None,
        "latency": None,
        "throughput": [],
        **dict.fromkeys(("top1", "top1_interval", "top5", "calibration_error")),
        **dict.fromkeys(("agreement_teacher", "agreement_teacher_interval", "agreement_fp32", "kl_teacher")),
    }


def named(spec: Spec, row: Row) -> Spec:
    """Return a specification that also says whose it is."""
    return {**spec, **{key: row[key] for key in ("artifact", "backend", "device", "threads")}}


def fill(row: Row, one: Measured, evaluation: Evaluation) -> None:
    """Put what was measured into its row; a failure keeps what came before it."""
    row["load_ms"], row["peak_memory_mib"] = one.load_ms, one.peak_memory_mib
    if one.rounds_ns:
        row["latency"] = latency.summary(one.rounds_ns, steady=one.warm_up is not None and one.warm_up.steady)
    row["throughput"] = [
        {"batch": batch, "images_per_s": latency.images_per_s(batch, samples_ns)}
        for batch, samples_ns in one.sweep_ns.items()
    ]
    failed = one.failed
    if one.logits is not None:
        broken = np.flatnonzero(~np.isfinite(one.logits).all(axis=1))  # the images
        if len(broken):
            failed = (
                f"its logits are not finite on {len(broken)} of {len(one.logits)} images, first on image {broken[0]}"
            )
        else:
            row |= accuracy.scores(
                one.logits, teacher=evaluation.teacher_logits, fp32=evaluation.logits, labels=evaluation.labels
            )
    row["status"], row["reason"] = ("measured", None) if failed is None else ("failed", failed)


def subject(bundle: Bundle, evaluation: Evaluation, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the report's parts on the run, the evaluation set, the teacher and the student."""
    manifest, labels = bundle.manifest, evaluation.labels
    teacher = accuracy.scores(evaluation.teacher_logits, labels=labels)
    uniform = accuracy.scores(evaluation.teacher_uniform_logits, labels=labels)
    # The student's figures are its FP32 file's as measured here; where that could not run, as exported.
    reference = next((row for row in rows if row["artifact"] == "onnx-fp32" and row["status"] == "measured"), None)
    student = reference or accuracy.scores(evaluation.logits, teacher=evaluation.teacher_logits, labels=labels)
    name = " ".join(str(manifest["teacher"][key]) for key in ("model", "weights") if manifest["teacher"].get(key))
    if name.startswith("local-dir:"):
        name = PurePath(name).name  # where it lay is nobody's business
    return {
        "run": {
            "name": manifest["run"]["name"],
            "student": manifest["student"]["model"],
            "teacher": name,
            "objective": manifest["run"]["objective"],
            "classes": len(bundle.classes),
            "epochs": manifest["run"]["epochs"],
        },
        "evaluation": {
            "images": len(evaluation.pixels),
            "labelled": labels is not None,
            "source": manifest["evaluation"]["source"],
        },
        "teacher": {"top1": teacher["top1"], "top5": teacher["top5"], "top1_uniform_prompts": uniform["top1"]},
        "student": {"top1": student["top1"], "top5": student["top5"], "agreement": student["agreement_teacher"]},
        "ratio": student["top1"] / teacher["top1"] if teacher["top1"] else None,
    }


def golden_notes(bundle: Bundle) -> list[str]:
    """Check that this machine prepares images as training did, and that its FP32 student answers as exported."""
    artifact = next((one for one in bundle.artifacts if one["format"] == "onnx" and one["precision"] == "fp32"), None)
    if artifact is None:
        return []
    try:
        runner = OnnxRunner(bundle.folder / artifact["file"], threads=1, name=artifact["name"])
        check_golden(bundle, runner, precision="fp32")
        runner.close()
    except PrgkitError as error:  # the measurement stands: it starts from prepared images
        return [f"Golden images: {error.what}."]
    return []


def row_notes(rows: Sequence[Row], measured: Sequence[Measured]) -> list[str]:
    """Return what a reader must know about single rows; what was never executed comes first, once for each reason."""
    notes = []
    absent = [row for row in rows if row["status"] == "not executed"]
    for reason in dict.fromkeys(row["reason"] for row in absent):
        names = ", ".join(wording.row_name(row) for row in absent if row["reason"] == reason)
        notes.append(f"Never executed here: {names}; {reason}.")
    for row in rows:
        name, found = wording.row_name(row), row["latency"]
        if row["status"] == "failed":
            notes.append(f"{name} failed: {row['reason']}.")
        if found and not found["steady"]:
            notes.append(f"{name} did not become steady while warming up: two windows' medians stayed over 2 % apart.")
        if found and max(found["round_p50_ms"]) > 1.1 * min(found["round_p50_ms"]):
            low, high = (wording.ms(bound(found["round_p50_ms"])) for bound in (min, max))
            notes.append(f"{name} was unstable: the median of a round moved between {low} and {high} ms.")
        if row["backend"] == "torch":
            notes.append(f"{name} is PyTorch in eager mode, the student as it was trained: its branches are not fused.")
    for one in measured:
        notes += [
            f"{latency.label(one.spec)} has no figure at batch {batch}: {why}." for batch, why in one.unmeasured.items()
        ]
    return notes


def training(bundle: Bundle, run_folder: Path | None) -> list[dict[str, Any]]:
    """Return each epoch's loss, its terms and the agreement: the run's, or on a device what the bundle took along."""
    records = Run(run_folder).metrics() if run_folder is not None else bundle.manifest["run"].get("training", [])
    return [
        {key: value for key, value in record.items() if key not in NOT_TRAINING and isinstance(value, (int, float))}
        for record in records
    ]


def trust(bundle: Bundle, run_folder: Path | None) -> dict[str, Any] | None:
    """Return what was known of the pseudo-labels before training: the run's, or what the bundle took along."""
    if run_folder is not None and Run(run_folder).quality_file.exists():
        found: dict[str, Any] | None = read_json(Run(run_folder).quality_file)
    else:
        found = bundle.manifest["run"].get("quality")
    return found


def samples(session: latency.Session) -> dict[str, Any]:
    """Return every raw sample, with the order in which the artifacts took their turns."""
    rows = [
        {
            "artifact": one.spec["artifact"],
            "device": one.spec["device"],
            "warm_up": one.warm_up._asdict() if one.warm_up else None,
            "rounds": one.rounds_ns,
            "throughput": [{"batch": batch, "samples": values} for batch, values in one.sweep_ns.items()],
        }
        for one in session.measured
    ]
    return {"schema": "prgkit.samples/1", "unit": "ns", "order": session.order, "rows": rows}


def student_logits(session: latency.Session, evaluation: Evaluation) -> Any:
    """Return the FP32 student's logits [images, classes] as measured here, or as exported where it did not run."""
    found = (one.logits for one in session.measured if one.spec["artifact"] == "onnx-fp32" and one.failed is None)
    return next((logits for logits in found if logits is not None), evaluation.logits)


def evenly(pixels: Any, count: int) -> Any:
    """Return up to ``count`` images, spread over all of them."""
    return pixels[np.unique(np.linspace(0, len(pixels) - 1, min(count, len(pixels))).astype(int))]


def spelled_out(bundle_folder: Path, *, threads: int, seconds: float, batches: Sequence[int]) -> str:
    """Return a command that measures the same."""
    options = ["--threads", str(threads), "--seconds", f"{seconds:g}", "--batches", ",".join(map(str, batches))]
    return shlex.join(["prgkit", "bench", "--run", str(bundle_folder), *options])
