"""Measure artifacts side by side: steady-state warm-up, interleaved rounds, every sample kept, intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from prgkit.data.preprocessing import Preprocessing
from prgkit.evaluate.bench.journal import BatchRecord, RoundRecord, RoundTurn, StageRecord, StageTurn
from prgkit.evaluate.bench.options import comma
from prgkit.evaluate.bench.worker import Pixels, Spec, Worker, WorkerFailedError
from prgkit.evaluate.bench.workers import BenchContext, WorkerGroup, artifact_name, open_workers, rotate
from prgkit.evaluate.report.formatting import P99_SAMPLES
from prgkit.evaluate.report.samples import ThreadSweepSamples, WarmUp
from prgkit.evaluate.report.schema import STAGES, Energy, Interval, Latency, Stage, ThreadSweep, ThreadSweepRow
from prgkit.evaluate.sensors import Meter, midway, power_source
from prgkit.metrics import mean_interval

ROUNDS = 10
# A runtime's threads spin for a moment after their last run; these untimed runs outlast the previous artifact's.
SETTLE_S = 0.1
# How the seconds of an artifact are spent; predicting the evaluation images comes on top.
WARM_UP_SHARE, LATENCY_SHARE, THROUGHPUT_SHARE = 0.2, 0.55, 0.25
STAGE_SHARE, STAGE_ROUNDS = 0.2, 5  # of an artifact's seconds, on top of them
# A model of seconds a run would overstay by whole rounds: past this many times its share it has no further turns.
OVERSTAY = 1.5
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images and how one becomes an input: what the stages that begin before pixels run on."""

    files: Sequence[bytes]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class LatencyPlan:
    """What is measured of each artifact besides its latency, which is always of batch 1."""

    rounds: int = ROUNDS  # how many turns each artifact takes at batch 1
    batches: Sequence[int] = ()  # the batch sizes of the throughput sweep
    encoded: EncodedImages | None = None  # what the latency stages run on; None leaves them out
    predict: Sequence[Pixels] = ()  # batches of images whose logits are wanted, from the same worker and file


@dataclass
class Measured:
    """What was measured of one artifact; ``failed`` says why the rest is missing."""

    spec: Spec
    failed: str | None = None
    load_ms: float | None = None
    peak_memory_mib: float | None = None
    switches: dict[str, str] = field(default_factory=dict)  # how it launches and waits, where there is a choice
    warm_up: WarmUp | None = None
    rounds_ns: list[list[int]] = field(default_factory=list)  # [rounds][runs], batch 1
    batches_ns: dict[int, list[int]] = field(default_factory=dict)  # batch -> [runs]
    unmeasured: dict[int, str] = field(default_factory=dict)  # batch -> why there are no runs
    powers_w: list[float] = field(default_factory=list)  # [rounds], where the device shows what it draws
    latency_s: float = 0.0  # spent on its rounds
    throughput_s: float = 0.0  # spent on its batch sizes
    stages_ns: dict[Stage, list[list[int]]] = field(default_factory=dict)  # stage -> [rounds][runs], batch 1
    logits: NDArray[np.float32] | None = None  # [images, classes]

    @property
    def steady(self) -> bool:
        """Whether it was warm when its rounds began."""
        return self.warm_up is not None and self.warm_up.steady


@dataclass
class Session:
    """Everything that one bench measured, with the order in which the artifacts took their turns."""

    measured: list[Measured]
    order: list[list[int]] = field(default_factory=list)  # [rounds][turns], indices into measured
    stage_rounds: int = 0

    def add(self, record: RoundRecord | BatchRecord | StageRecord) -> None:
        """Put what was measured into its place: now, or before the bench was stopped."""
        if isinstance(record, RoundRecord):
            self.order.append(record.turns)
            for turn in record.measured:
                one = self.measured[turn.artifact]
                one.rounds_ns.append(turn.runs_ns)
                one.latency_s += turn.seconds
                one.powers_w += [] if turn.power_w is None else [turn.power_w]
        elif isinstance(record, BatchRecord):
            self.measured[record.artifact].batches_ns[record.batch] = record.runs_ns
            self.measured[record.artifact].throughput_s += record.seconds
        else:
            self.stage_rounds += 1
            for stage_turn in record.measured:
                rounds = self.measured[stage_turn.artifact].stages_ns.setdefault(stage_turn.stage, [])
                rounds.append(stage_turn.runs_ns)


def measure(specs: Sequence[Spec], plan: LatencyPlan, context: BenchContext) -> Session:
    """Measure each artifact in its own process for about the context's seconds; a failure leaves the others going."""
    session = Session([Measured(spec) for spec in specs])
    journal = context.journal
    # How the artifacts opened and warmed up before the bench was stopped is not taken over.
    for records in (journal.of(RoundRecord), journal.of(BatchRecord), journal.of(StageRecord)):
        for record in records:
            session.add(record)
    for index, logits in journal.logits().items():
        session.measured[index].logits = logits
    with open_workers(specs, context) as group:
        warm_up(session, group, context)
        latency_rounds(session, group, context, rounds=plan.rounds)
        throughput_sweep(session, group, context, batches=plan.batches)
        if plan.encoded is not None:
            stage_rounds(session, group, context, images=plan.encoded)
        predict(session, group, context, batches=plan.predict)
        for index, reason in group.failed.items():
            session.measured[index].failed = reason
    return session


def sweep_threads(
    specs: Sequence[Spec], counts: Sequence[int], context: BenchContext
) -> tuple[ThreadSweep | None, list[ThreadSweepSamples]]:
    """Measure every artifact on the CPU at each number of threads; return the report's section and all samples.

    All of them take turns, each in a process of its own: one that was measured minutes later than another would be
    compared with the machine's temperature as well. PyTorch is left out, as it is in no bundle. Without counts nothing
    is measured.
    """
    swept = [spec for spec in specs if spec.device == "cpu" and spec.takes_threads]
    if not counts or not swept:
        return None, []
    context.note(f"threads: {', '.join(map(str, counts))}")
    each = [replace(spec, threads=count) for spec in swept for count in counts]
    session = measure(each, LatencyPlan(), context.part(f"threads {comma(tuple(counts))}"))
    rows = []
    for spec in swept:
        mine = [one for one in session.measured if one.spec.key == spec.key]
        rows.append(
            ThreadSweepRow(
                **spec.key,
                latency={
                    one.spec.threads: summarize(one.rounds_ns, steady=one.steady) for one in mine if one.failed is None
                },
                failed={one.spec.threads: one.failed for one in mine if one.failed is not None},
            )
        )
    samples = [
        ThreadSweepSamples(**one.spec.key, threads=one.spec.threads, rounds_ns=one.rounds_ns)
        for one in session.measured
    ]
    return ThreadSweep(counts=list(counts), rows=rows), samples


def warm_up(session: Session, group: WorkerGroup, context: BenchContext) -> None:
    """Bring every artifact to its steady state, and read its memory while it has seen batch 1 only."""
    cap_s = WARM_UP_SHARE * context.seconds
    for index, worker in group.alive().items():
        one = session.measured[index]
        one.load_ms = worker.load_ms
        context.note(f"warming up {artifact_name(one.spec)}")
        with group.attempt(index):
            one.warm_up = worker.warm_up(batch=1, window_s=cap_s / 8, cap_s=cap_s)
            one.peak_memory_mib = worker.peak_memory_mib()
            one.switches = worker.switches()


def latency_rounds(session: Session, group: WorkerGroup, context: BenchContext, *, rounds: int) -> None:
    """Let the artifacts take turns at batch 1, starting each round with another, so that drift hits all alike."""
    share_s = LATENCY_SHARE * context.seconds / rounds
    slice_s = max(share_s - SETTLE_S, 0.2 * share_s)
    context.note(f"latency: {rounds} rounds, artifacts interleaved")
    for round_ in range(len(session.order), rounds):
        context.before_round(round_)
        turns = [index for index in group.alive() if has_time(session.measured[index], context.seconds)]
        turns = rotate(turns, round_)
        settle_s = SETTLE_S if len(turns) > 1 else 0.0
        measured = []
        for index in turns:
            with group.attempt(index):
                device = session.measured[index].spec.device
                measured.append(take_turn(index, group.workers[index], device, slice_s=slice_s, settle_s=settle_s))
        record = RoundRecord(turns=turns, measured=measured)
        context.journal.add(record)
        session.add(record)


def take_turn(index: int, worker: Worker, device: str, *, slice_s: float, settle_s: float) -> RoundTurn:
    """Return an artifact's runs within ``slice_s``, and what the device drew in the midst of them."""
    start, meter = time.perf_counter(), Meter(device)
    with midway(meter.sample, after_s=settle_s + slice_s / 2):
        runs_ns = worker.measure(batch=1, seconds=slice_s, settle_s=settle_s)
    power_w = meter.read().power_w
    return RoundTurn(artifact=index, runs_ns=runs_ns, seconds=time.perf_counter() - start, power_w=power_w)


def has_time(one: Measured, seconds: float) -> bool:
    """Return whether an artifact takes another turn at batch 1."""
    return len(one.rounds_ns) < LEAST_ROUNDS or one.latency_s < OVERSTAY * LATENCY_SHARE * seconds


def throughput_sweep(session: Session, group: WorkerGroup, context: BenchContext, *, batches: Sequence[int]) -> None:
    """Run each artifact at each batch size; one that refuses a size (a fixed batch, no memory) keeps the others."""
    if batches:
        context.note(f"throughput: batch {', '.join(map(str, batches))}")
    share_s = THROUGHPUT_SHARE * context.seconds
    for turn, batch in enumerate(batches):
        for index in rotate(list(group.alive()), turn):
            one = session.measured[index]
            if batch in one.batches_ns:
                continue
            if one.throughput_s > OVERSTAY * share_s:
                one.unmeasured[batch] = "its time was up"
                continue
            start = time.perf_counter()
            with group.attempt(index):
                record = run_batch(index, group.workers[index], batch, slice_s=share_s / len(batches))
                if isinstance(record, BatchRecord):
                    context.journal.add(record)
                    session.add(record)
                    continue
                one.unmeasured[batch] = record
            one.throughput_s += time.perf_counter() - start


def run_batch(index: int, worker: Worker, batch: int, *, slice_s: float) -> BatchRecord | str:
    """Return an artifact's runs at a batch size, or why it refuses that size.

    Raises:
        WorkerFailedError: its process has died of it.
    """
    try:
        # The settling runs allocate for this batch size and let the previous artifact's threads come to rest.
        runs_ns = worker.measure(batch=batch, seconds=0.7 * slice_s, at_least=2, settle_s=0.3 * slice_s)
    except WorkerFailedError as error:
        if error.alive:
            return error.what
        raise WorkerFailedError(f"batch {batch}: {error.what}", alive=False) from error
    # Only the runs count: what compiles for a new size has as much time for the next.
    return BatchRecord(artifact=index, batch=batch, runs_ns=runs_ns, seconds=sum(runs_ns) / 1e9)


def stage_rounds(session: Session, group: WorkerGroup, context: BenchContext, *, images: EncodedImages) -> None:
    """Let the artifacts take turns from pixels, from a decoded image and from its file; this time comes on top."""
    context.note("latency stages: io, pipeline, end-to-end")
    stages: dict[int, Sequence[Stage]] = {}
    for index, worker in group.alive().items():
        with group.attempt(index):
            stages[index] = worker.take_images(images.files, images.preprocessing)
    slice_s = STAGE_SHARE * context.seconds / (STAGE_ROUNDS * len(STAGES))
    for round_ in range(session.stage_rounds, STAGE_ROUNDS):
        measured = []
        for index in rotate(list(group.alive()), round_):
            with group.attempt(index):
                for stage in stages[index]:
                    settle_s = min(SETTLE_S, slice_s)
                    runs_ns = group.workers[index].measure_stage(stage, seconds=slice_s, settle_s=settle_s)
                    measured.append(StageTurn(artifact=index, stage=stage, runs_ns=runs_ns))
        record = StageRecord(measured=measured)
        context.journal.add(record)
        session.add(record)


def predict(session: Session, group: WorkerGroup, context: BenchContext, *, batches: Sequence[Pixels]) -> None:
    """Collect every artifact's logits from the worker that was timed."""
    if not len(batches):
        return
    context.note(f"accuracy: {sum(len(pixels) for pixels in batches)} images")
    for index, worker in group.alive().items():
        one = session.measured[index]
        if one.logits is not None:
            continue
        with group.attempt(index):
            one.logits = np.concatenate([worker.predict(pixels) for pixels in batches])  # [images, classes]
            context.journal.add_logits(index, one.logits)


def summarize(rounds_ns: Sequence[Sequence[int]], *, steady: bool, batch: int = 1, stage: Stage = "io") -> Latency:
    """Return percentiles over all runs, and the interval of their median over rounds."""
    samples_ms = np.concatenate([np.asarray(samples, dtype=np.float64) for samples in rounds_ns]) / 1e6
    p50, p90, p95, p99 = (float(value) for value in np.percentile(samples_ms, [50, 90, 95, 99]))
    medians_ms = [float(np.median(samples)) / 1e6 for samples in rounds_ns]
    return Latency(
        batch=batch,
        stage=stage,
        samples=len(samples_ms),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99 if len(samples_ms) >= P99_SAMPLES else None,
        max_ms=float(samples_ms.max()),
        p50_interval_ms=median_interval(p50, medians_ms),
        round_p50_ms=medians_ms,
        steady=steady,
        rounds=len(rounds_ns),
    )


def median_interval(median: float, rounds: Sequence[float]) -> Interval:
    """Return the 95 % interval of a median by Student's t over the logarithms of its rounds' medians.

    Rounds count, and not runs, since successive runs correlate. Where rounds fall into two kinds the median of all runs
    can lie outside; then the interval is widened to hold it.
    """
    low, high = map(math.exp, mean_interval(np.log(rounds).tolist()))
    return min(low, median), max(high, median)


def energy(one: Measured) -> Energy | None:
    """Return what an artifact drew in its rounds at batch 1, its processor or board included; None where none shows."""
    if not one.powers_w:
        return None
    runs_ns = [run for round_ in one.rounds_ns for run in round_]
    power_w = float(np.mean(one.powers_w))
    return Energy(
        power_w=power_w,
        energy_mj=power_w * float(np.mean(runs_ns)) / 1e6,  # of an image: watts times its mean milliseconds
        power_source=power_source(one.spec.device),
    )


def images_per_s(batch: int, samples_ns: Sequence[int]) -> float:
    """Return the images that went through per second over the whole run, slow runs included."""
    return batch * len(samples_ns) / (sum(samples_ns) / 1e9)
