"""`prgkit bench`, top to bottom: open the bundle, measure every artifact on this machine, say what was found."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import prgkit
from prgkit import metrics
from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate import system
from prgkit.evaluate.accuracy.examples import choose_pictures
from prgkit.evaluate.accuracy.opencv import opencv_notes
from prgkit.evaluate.accuracy.per_class import per_class
from prgkit.evaluate.accuracy.ticked import audit, find_ticks
from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.cases import OF_A_SPEC, Row, plan
from prgkit.evaluate.bench.fixed_rate import paced
from prgkit.evaluate.bench.journal import conditions, open_journal
from prgkit.evaluate.bench.latency import Measured
from prgkit.evaluate.bench.metadata import identity, made_by, subject, training, trust, vocabulary_notes
from prgkit.evaluate.bench.notes import apart_notes, row_notes
from prgkit.evaluate.bench.soak import check_minutes, soak_lead
from prgkit.evaluate.bench.stages import described, golden_pictures, scope_block
from prgkit.evaluate.bench.thread_sweep import thread_sweep
from prgkit.evaluate.report.load import SCHEMA
from prgkit.evaluate.report.regression import Gate, against, require_comparable
from prgkit.evaluate.report.write import write_report
from prgkit.evaluate.selection import choose, int8_notes, write_choice
from prgkit.export.bundle.bundle import Bundle, Evaluation, open_bundle, read_evaluation
from prgkit.export.bundle.fidelity import fidelity
from prgkit.export.runtimes import open_runner
from prgkit.export.runtimes.parity import check_golden
from prgkit.storage.atomic import sha256
from prgkit.storage.run import Run

DEFAULT_BATCHES = (1, 8, 32)
TIMED_IMAGES = 128
PREDICT_BATCH = 32


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
    gate: Gate | None = None,
    sweep_threads: Sequence[int] = (),
    fps: float | None = None,
    soak_minutes: float | None = None,
) -> dict[str, Any]:
    """Measure a bundle's artifacts on this machine, write the report into ``out`` and return it.

    Args:
        bundle_folder: the bundle, here or copied to a device.
        run_folder: the run it came from, where that is at hand: adds PyTorch itself and the training curves.
        out: where report.json, report.md, report.html and samples.json go.
        threads: threads of one call on the CPU; None takes every core that this process may use.
        seconds: the time for warming up and measuring one artifact; its scopes and its accuracy come on top.
        batches: the batch sizes of the throughput sweep.
        note: told what is being done.
        command: what the user typed, for the report.
        gate: the older report that the new one is held against, and by how much it may be worse.
        sweep_threads: numbers of CPU threads whose latencies are compared, after everything else.
        fps: the rate at which frames come, for response times and late frames; None for no frames.
        soak_minutes: how long the artifact that the headline speaks of runs without a rest, at the end; None leaves
            it out.

    Raises:
        BenchError: an option makes no sense, no artifact could be measured, or the baseline cannot be compared with.
        ExportError: the bundle, or something in it, is missing or damaged.
        ImagesError: something in the ticks cannot stand there.
    """
    check_options(threads=threads, seconds=seconds, batches=batches, fps=fps)
    check_minutes(soak_minutes)
    bundle = open_bundle(bundle_folder)
    evaluation = read_evaluation(bundle_folder)
    ticks = find_ticks(bundle, run_folder)  # a mistake in them is told before anything is measured
    facts = system.describe()
    threads = threads or system.usable_cores()
    if gate is not None:  # hours of measuring would not make them comparable
        require_comparable(gate, facts, identity(evaluation, bundle), threads=threads)
    rows, specs = plan(bundle, run_folder, facts, threads=threads, seconds=seconds)
    notes, pictures = golden_notes(bundle), golden_pictures(bundle)
    opened = [spec for spec in specs if spec is not None]
    timed = evenly(evaluation.pixels, TIMED_IMAGES)
    made_from = conditions(
        facts,
        files=files_under_test(bundle, run_folder),
        opened=[{key: spec[key] for key in OF_A_SPEC} for spec in opened],
        options=[threads, seconds, sorted(set(batches))],
    )
    with open_journal(out, made_from, note) as kept:
        monitor = system.SystemMonitor("cuda" if facts["gpus"] else "cpu")
        session = latency.measure(
            opened,
            timed,
            seconds=seconds,
            batches=sorted(set(batches)),
            predict=[
                evaluation.pixels[start : start + PREDICT_BATCH]
                for start in range(0, len(evaluation.pixels), PREDICT_BATCH)
            ],
            pictures=pictures,
            kept=kept,
            note=note,
            between_rounds=lambda round_: monitor.sample(),
        )
        apart: dict[str, Any] = {"note": note, "kept": kept, "between_rounds": lambda round_: monitor.sample()}
        by_threads, sweep_samples = thread_sweep(opened, timed, sweep_threads, seconds=seconds, **apart)
        at_rate, frames = paced(opened, timed, fps, seconds=seconds, **apart)
        measured = iter(session.measured)
        floor = bundle.manifest.fidelity_floor()
        for row, spec in zip(rows, specs, strict=True):
            if spec is not None:
                fill(row, next(measured), evaluation, floor=floor)
        if not any(row["status"] == "measured" for row in rows):
            reasons = "; ".join(f"{row['artifact']}: {row['reason']}" for row in rows)
            raise BenchError(
                f"no artifact could be measured: {reasons}",
                where=bundle_folder,
                fix="prgkit doctor says what can run here",
            )
        logits = [one.logits for one in session.measured]
        ran = [row for row, spec in zip(rows, specs, strict=True) if spec is not None]
        audited, audit_notes = audit(ticks, evaluation, bundle.classes, zip(ran, logits, strict=True))
        int8 = choose(bundle, rows, images=len(evaluation.pixels))
        soaked, windows = soak_lead(rows, specs, int8, timed, soak_minutes, fps=fps, note=note, kept=kept)
        facts |= monitor.facts()
        report = {
            "schema": SCHEMA,
            "prgkit": prgkit.__version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command
            or spelled_out(bundle_folder, threads, seconds, batches, sweep_threads, fps, soak_minutes),
            "machine": facts,
            **subject(bundle, evaluation, rows),
            "rows": rows,
            "scopes": described(pictures),
            "threads": by_threads,
            "paced": at_rate,
            "soak": soaked,
            "int8": int8,
            "audit": audited,
            "training": training(bundle, run_folder),
            "quality": trust(bundle, run_folder),
            "notes": [
                *notes,
                *vocabulary_notes(bundle),
                *kept.notes,
                *int8_notes(bundle, int8),
                *audit_notes,
                *system.remarks(facts),
                *row_notes(rows, session.measured),
                *apart_notes(by_threads, at_rate),
            ],
        }
        report["made_by"] = made_by(bundle, report["command"])
        report["per_class"] = per_class(evaluation, zip(ran, logits, strict=True), report, bundle.classes)
        if gate is not None:
            report["baseline"] = against(report, gate)
        write_choice(out, bundle, int8)
        note("writing the report")
        write_report(
            out,
            report,
            samples={**samples(session), "threads": sweep_samples, "paced": frames, "soak": windows},
            pictures=choose_pictures(evaluation, student_logits(session, evaluation), bundle.classes),
        )
    return report


def files_under_test(bundle: Bundle, run_folder: Path | None) -> list[str]:
    """Return the digests of all that is measured, and of the images that it is measured with."""
    digests = [artifact.sha256 for artifact in bundle.artifacts]
    paths = [bundle.folder / "evaluation" / "images.zip"]
    if run_folder is not None and Run(run_folder).weights.exists():
        paths.append(Run(run_folder).weights)
    return [*digests, *(sha256(path) for path in paths)]


def check_options(*, threads: int | None, seconds: float, batches: Sequence[int], fps: float | None) -> None:
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
    if fps is not None and not 0 < fps < math.inf:
        raise BenchError(f"no camera gives {fps:g} frames a second", fix="give --fps a number above 0, such as 30")


def fill(row: Row, one: Measured, evaluation: Evaluation, *, floor: float) -> None:
    """Put what was measured into its row; a failure keeps what came before it. INT8 is held to the ``floor``, in %."""
    row["load_ms"], row["peak_memory_mib"], row["switches"] = one.load_ms, one.peak_memory_mib, one.switches
    if one.rounds_ns:
        row["latency"] = latency.summary(one.rounds_ns, steady=one.warm_up is not None and one.warm_up.steady)
    row["energy"] = latency.energy(one)
    row["scopes"] = scope_block(one)
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
            row |= metrics.scores(
                one.logits, teacher=evaluation.teacher_logits, fp32=evaluation.logits, labels=evaluation.labels
            )
            if row["precision"] == "int8":
                same = round(row["agreement_fp32"] * len(one.logits) / 100)
                row["faithful"] = fidelity(same, len(one.logits)).holds(floor)
    row["status"], row["reason"] = ("measured", None) if failed is None else ("failed", failed)


def golden_notes(bundle: Bundle) -> list[str]:
    """Check that this machine prepares images as training did, and that its FP32 student answers as exported."""
    artifact = next((one for one in bundle.artifacts if one.format == "onnx" and one.precision == "fp32"), None)
    if artifact is None:
        return []
    try:
        runner = open_runner(bundle.folder, artifact, threads=1)
        check_golden(bundle, runner, precision="fp32")
        notes = opencv_notes(bundle, runner)
        runner.close()
    except PrgkitError as error:  # the measurement stands: it starts from prepared images
        return [f"Golden images: {error.what}."]
    return notes


def samples(session: latency.Session) -> dict[str, Any]:
    """Return every raw sample, with the order in which the artifacts took their turns."""
    rows = [
        {
            **{key: one.spec[key] for key in ("artifact", "backend", "device")},
            "warm_up": one.warm_up._asdict() if one.warm_up else None,
            "rounds": one.rounds_ns,
            "scopes": one.scopes_ns,
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


def spelled_out(
    bundle_folder: Path,
    threads: int,
    seconds: float,
    batches: Sequence[int],
    sweep_threads: Sequence[int],
    fps: float | None,
    soak_minutes: float | None,
) -> str:
    """Return a command that measures the same."""
    options = ["--threads", str(threads), "--seconds", f"{seconds:g}", "--batches", ",".join(map(str, batches))]
    if sweep_threads:
        options += ["--sweep-threads", ",".join(map(str, sweep_threads))]
    if fps is not None:
        options += ["--fps", f"{fps:g}"]
    if soak_minutes is not None:
        options += ["--soak", f"{soak_minutes:g}"]
    return shlex.join(["prgkit", "bench", "--run", str(bundle_folder), *options])
