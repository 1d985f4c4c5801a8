"""`prgkit bench`, top to bottom: open the bundle, measure every artifact here, judge it, write the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import prgkit
from prgkit import metrics
from prgkit.data.ticks import Tick
from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate import system
from prgkit.evaluate.accuracy.opencv import opencv_notes
from prgkit.evaluate.accuracy.per_class import per_class
from prgkit.evaluate.accuracy.ticked import audit_section, find_ticks
from prgkit.evaluate.bench import latency, metadata
from prgkit.evaluate.bench.cases import plan
from prgkit.evaluate.bench.fixed_rate import measure_fixed_rate
from prgkit.evaluate.bench.journal import conditions, open_journal
from prgkit.evaluate.bench.latency import LatencyPlan, Measured, sweep_threads
from prgkit.evaluate.bench.notes import failure_notes, row_notes
from prgkit.evaluate.bench.options import BenchOptions
from prgkit.evaluate.bench.soak import soak_lead
from prgkit.evaluate.bench.worker import Pixels, Spec
from prgkit.evaluate.bench.workers import BenchContext
from prgkit.evaluate.heat_map import with_heat_maps
from prgkit.evaluate.report.bench_report import write_report
from prgkit.evaluate.report.examples import choose_examples
from prgkit.evaluate.report.regression import Gate, against, require_comparable
from prgkit.evaluate.report.samples import RowSamples, Samples, ThroughputSamples
from prgkit.evaluate.report.schema import FixedRate, Int8Verdict, Machine, Report, Row, Soak, ThreadSweep, Throughput
from prgkit.evaluate.selection import int8_notes, judge_int8, write_selection
from prgkit.export.bundle.bundle import Bundle, Evaluation, noise, open_bundle, read_evaluation
from prgkit.export.bundle.fidelity import compare_with_fp32, known_classes, paired_shares
from prgkit.export.runtimes import open_runner
from prgkit.export.runtimes.parity import check_golden
from prgkit.storage.atomic import sha256
from prgkit.storage.run import Run
from prgkit.workers import available_cores

TIMED_IMAGES = 128
PREDICT_BATCH = 32


@dataclass(frozen=True)
class Subject:
    """What a bench is about: a bundle, its evaluation images, what a person ticked of them, and where it came from."""

    bundle: Bundle
    evaluation: Evaluation
    ticks: list[Tick]
    run_folder: Path | None


@dataclass(frozen=True)
class Results:
    """What was measured, and what follows from it."""

    rows: list[Row]  # in the order of the cases
    logits: list[tuple[Row, NDArray[np.float32] | None]]  # [images, classes] of each row that ran
    session: latency.Session
    thread_sweep: ThreadSweep | None
    fixed_rate: FixedRate | None
    int8: list[Int8Verdict]
    soak: Soak | None
    samples: Samples


def bench(
    bundle_folder: Path,
    options: BenchOptions,
    *,
    out: Path,
    note: Callable[[str], None],
    run_folder: Path | None = None,
    command: str | None = None,
    gate: Gate | None = None,
) -> Report:
    """Measure a bundle's artifacts on this machine, write the report into ``out`` and return it.

    Args:
        bundle_folder: the bundle, here or copied to a device.
        options: what to measure, and for how long.
        out: where report.json, report.md, report.html and samples.json go.
        note: told what is being done.
        run_folder: the run it came from, where that is at hand: adds PyTorch itself and the training curves.
        command: what the user typed.
        gate: the older report that the new one is held against.

    Raises:
        BenchError: an option makes no sense, no artifact could be measured, or the baseline cannot be compared with.
        ExportError: the bundle, or something in it, is missing or damaged.
        ImagesError: something in the ticks cannot stand there.
    """
    options.check()
    bundle = open_bundle(bundle_folder)  # what is wrong with it is told before anything is measured
    subject = Subject(bundle, read_evaluation(bundle_folder), find_ticks(bundle, run_folder), run_folder)
    machine, threads = system.describe(), options.threads or available_cores()
    if gate is not None:  # refused before it is measured, not after
        images = metadata.evaluation_images(subject.evaluation, bundle)
        require_comparable(gate, machine, images, threads=threads)
    # One spec a row; None where the row cannot run here, with its reason.
    rows, specs = plan(bundle, run_folder, gpu=bool(machine.gpus), threads=threads, seconds=options.seconds)
    notes = [*golden_notes(bundle), *metadata.confidence_notes(bundle, subject.evaluation)]
    made_from = conditions(
        machine,
        files=files_under_test(subject),
        opened=[{**spec.key, "threads": spec.threads} for spec in specs if spec is not None],
        options=[threads, options.seconds, sorted(set(options.batches))],
    )
    with open_journal(out, made_from, note) as journal:
        monitor = system.SystemMonitor("cuda" if machine.gpus else "cpu")
        context = BenchContext(
            images=timed_images(subject),
            seconds=options.seconds,
            journal=journal,
            note=note,
            before_round=lambda round_: monitor.sample(),
        )
        results = measure(subject, rows, specs, options, context)
        notes += [*metadata.vocabulary_notes(bundle), *journal.notes]
        command = command or options.command(bundle_folder, threads=threads)
        report = make_report(subject, results, monitor.add_to(machine), command, notes)
        if gate is not None:
            report = report.model_copy(update={"baseline": against(report, gate)})
        note("writing the report")
        write(out, subject, results, report)
    return report


def files_under_test(subject: Subject) -> list[str]:
    """Return the digests of all that is measured, and of the images that it is measured with."""
    paths = [subject.bundle.folder / "evaluation" / "images.zip"] if len(subject.evaluation.pixels) else []
    if subject.run_folder is not None and Run(subject.run_folder).weights.exists():
        paths.append(Run(subject.run_folder).weights)
    return [*(artifact.sha256 for artifact in subject.bundle.artifacts), *(sha256(path) for path in paths)]


def golden_notes(bundle: Bundle) -> list[str]:
    """Check that this machine prepares images as training did, and that its FP32 student answers as exported."""
    if bundle.manifest.evaluation.images == 0:
        return ["This bundle was published without its images: latency is measured on noise, and nothing is judged."]
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


def timed_images(subject: Subject) -> Pixels:
    """Return up to `TIMED_IMAGES` images, spread over all of them; noise where the bundle has none."""
    pixels = subject.evaluation.pixels
    if len(pixels) == 0:
        return noise(subject.bundle, TIMED_IMAGES)
    places = np.unique(np.linspace(0, len(pixels) - 1, min(TIMED_IMAGES, len(pixels))).astype(int))
    spread: Pixels = pixels[places]
    return spread


def measure(
    subject: Subject, rows: list[Row], specs: list[Spec | None], options: BenchOptions, context: BenchContext
) -> Results:
    """Measure the cases side by side, judge them, and soak the best.

    Raises:
        BenchError: no artifact could be measured.
    """
    opened = [spec for spec in specs if spec is not None]
    pixels = subject.evaluation.pixels
    measuring = LatencyPlan(
        batches=sorted(set(options.batches)),
        encoded=metadata.golden_images(subject.bundle),
        predict=[pixels[start : start + PREDICT_BATCH] for start in range(0, len(pixels), PREDICT_BATCH)],
    )
    session = latency.measure(opened, measuring, context)
    thread_sweep, sweep_samples = sweep_threads(opened, options.sweep_threads, context)
    fixed_rate, frames = measure_fixed_rate(opened, options.fps, context)
    measured = iter(session.measured)
    pairs = [(row, None if spec is None else next(measured)) for row, spec in zip(rows, specs, strict=True)]
    rows = [row if one is None else with_results(row, one, subject) for row, one in pairs]
    if not any(row.status == "measured" for row in rows):
        reasons = "; ".join(f"{row.artifact}: {row.reason}" for row in rows)
        raise BenchError(
            f"no artifact could be measured: {reasons}",
            where=subject.bundle.folder,
            fix="prgkit doctor says what can run here",
        )
    int8 = judge_int8(subject.bundle, rows)
    soaked, windows = soak_lead(rows, specs, int8, options, context)
    return Results(
        rows=rows,
        logits=[(row, one.logits) for row, (_, one) in zip(rows, pairs, strict=True) if one is not None],
        session=session,
        thread_sweep=thread_sweep,
        fixed_rate=fixed_rate,
        int8=int8,
        soak=soaked,
        samples=Samples(
            order=session.order,
            rows=[row_samples(one) for one in session.measured],
            thread_sweep=sweep_samples,
            fixed_rate=frames,
            soak=windows,
        ),
    )


def with_results(row: Row, one: Measured, subject: Subject) -> Row:
    """Return the row filled in with latency, throughput and accuracy; a failure keeps what was measured before it."""
    figures: dict[str, object] = {
        "load_ms": one.load_ms,
        "peak_memory_mib": one.peak_memory_mib,
        "switches": one.switches,
        "latency": latency.summarize(one.rounds_ns, steady=one.steady) if one.rounds_ns else None,
        "energy": latency.energy(one),
        "latency_stages": {
            stage: latency.summarize(rounds_ns, steady=True, stage=stage) for stage, rounds_ns in one.stages_ns.items()
        },
        "throughput": [
            Throughput(batch=batch, images_per_s=latency.images_per_s(batch, runs_ns))
            for batch, runs_ns in one.batches_ns.items()
        ],
    }
    failed = one.failed
    if one.logits is not None:
        broken = np.flatnonzero(~np.isfinite(one.logits).all(axis=1))  # the images
        if len(broken):
            failed = (
                f"its logits are not finite on {len(broken)} of {len(one.logits)} images, first on image {broken[0]}"
            )
        else:
            figures |= {**accuracy(row, one.logits, subject), "lead_bound": lead_bound(one.logits, subject)}
    return Row.model_validate({**dict(row), **figures, "status": "failed" if failed else "measured", "reason": failed})


def accuracy(row: Row, logits: NDArray[np.float32], subject: Subject) -> dict[str, object]:
    """Return how right a row's logits [images, classes] are, and how faithful; of INT8, whether it is as good."""
    evaluation = subject.evaluation
    scores = metrics.scores(logits, teacher=evaluation.teacher_logits, fp32=evaluation.logits, labels=evaluation.labels)
    figures: dict[str, object] = scores._asdict()
    if evaluation.labels is not None:
        figures["calibration_error"] = metrics.calibration_error(
            logits / subject.bundle.manifest.temperature, evaluation.labels
        )
    if row.precision == "int8":
        known = known_classes(evaluation, subject.ticks, subject.bundle.classes)
        found = compare_with_fp32(evaluation.logits, logits, evaluation.teacher_logits, known)
        figures |= {"comparison": found, "faithful": found.holds(subject.bundle.manifest.margin)}
    return figures


def lead_bound(logits: NDArray[np.float32], subject: Subject) -> float | None:
    """Return by how many points logits [images, classes] are at least more often right than the teacher's own answers.

    The teacher's own are those before any correction. The bound is `metrics.paired_bound`; None without labels.
    """
    evaluation, statistics = subject.evaluation, metadata.pseudo_labels(subject.bundle, subject.run_folder)
    if evaluation.labels is None:
        return None
    corrected = statistics is not None and statistics.correction is not None
    teacher = evaluation.teacher_uniform_logits if corrected else evaluation.teacher_logits
    return paired_shares(teacher, logits, evaluation.labels).bounds[0]


def row_samples(one: Measured) -> RowSamples:
    """Return every timed run of one artifact."""
    return RowSamples(
        **one.spec.key,
        warm_up=one.warm_up,
        rounds_ns=one.rounds_ns,
        stages_ns=one.stages_ns,
        throughput=[ThroughputSamples(batch=batch, runs_ns=runs) for batch, runs in one.batches_ns.items()],
    )


def make_report(subject: Subject, results: Results, machine: Machine, command: str, notes: Sequence[str]) -> Report:
    """Put the report together; ``notes`` are those that are known before what the results say."""
    bundle, evaluation, run_folder = subject.bundle, subject.evaluation, subject.run_folder
    teacher, student = metadata.teacher_scores(evaluation), metadata.student_scores(evaluation, results.rows)
    audited, audit_notes = audit_section(subject.ticks, evaluation, bundle.classes, results.logits)
    return Report(
        prgkit=prgkit.__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        made_by=metadata.made_by(bundle, command),
        machine=machine,
        run=metadata.run_facts(bundle),
        evaluation=metadata.evaluation_images(evaluation, bundle),
        teacher=teacher,
        student=student,
        accuracy_ratio=student.top1 / teacher.top1 if student.top1 is not None and teacher.top1 else None,
        rows=results.rows,
        stage_images=metadata.stage_images(metadata.golden_images(bundle)),
        thread_sweep=results.thread_sweep,
        fixed_rate=results.fixed_rate,
        soak=results.soak,
        int8=results.int8,
        audit=audited,
        training=metadata.training_records(bundle, run_folder),
        pseudo_labels=metadata.pseudo_labels(bundle, run_folder),
        per_class=per_class(evaluation, results.logits, results.int8, bundle.classes),
        notes=[
            *notes,
            *int8_notes(bundle, results.int8),
            *audit_notes,
            *system.machine_notes(machine),
            *row_notes(results.rows, results.session.measured),
            *failure_notes(results.thread_sweep, results.fixed_rate),
        ],
    )


def write(out: Path, subject: Subject, results: Results, report: Report) -> None:
    """Write the report, and what `predict` runs on this machine from now on."""
    write_selection(out, subject.bundle, results.int8)
    logits = student_logits(results.session, subject.evaluation)
    logits = logits / subject.bundle.manifest.temperature  # as sure as predict
    examples = choose_examples(subject.evaluation, logits, subject.bundle.classes)
    write_report(out, report, samples=results.samples, pictures=with_heat_maps(examples, subject.bundle))


def student_logits(session: latency.Session, evaluation: Evaluation) -> Any:
    """Return the FP32 student's logits [images, classes] as measured here, or as exported where it did not run."""
    measured = (one.logits for one in session.measured if one.spec.artifact == "onnx-fp32" and one.failed is None)
    return next((logits for logits in measured if logits is not None), evaluation.logits)
