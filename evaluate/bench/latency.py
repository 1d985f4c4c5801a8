"""Measure artifacts side by side: steady-state warm-up, interleaved rounds, every sample kept, intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prgkit.evaluate.bench.journal import BenchJournal
from prgkit.evaluate.bench.worker import Pixels, Spec, Worker, WorkerFailedError, artifact_key
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import P99_SAMPLES
from prgkit.evaluate.report.schema import STAGES, ArtifactKey, Energy, Latency, Stage, WarmUp
from prgkit.evaluate.sensors import Meter, midway, power_source

ROUNDS = 10
# A runtime's threads spin for a moment after their last run; these untimed runs outlast the previous artifact's.
SETTLE_S = 0.1
# How the seconds of an artifact are spent; predicting the evaluation images comes on top.
WARM_UP_SHARE, LATENCY_SHARE, THROUGHPUT_SHARE = 0.2, 0.55, 0.25
STAGE_SHARE, STAGE_ROUNDS = 0.2, 5  # of an artifact's seconds, on top of them
# A model of seconds a run would overstay by whole rounds: past this many times its share it has no further turns.
OVERSTAY = 1.5
LEAST_ROUNDS = 3


class Fallible(Protocol):
    """Something whose ``failed`` says why the rest of it is missing."""

    failed: str | None


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
    sweep_ns: dict[int, list[int]] = field(default_factory=dict)  # batch -> [runs]
    unmeasured: dict[int, str] = field(default_factory=dict)  # batch -> why there are no runs
    powers_w: list[float] = field(default_factory=list)  # [rounds], where the device shows what it draws
    latency_s: float = 0.0  # spent on its rounds
    throughput_s: float = 0.0  # spent on its sweep
    stages_ns: dict[Stage, list[list[int]]] = field(default_factory=dict)  # stage -> [rounds][runs], batch 1
    logits: NDArray[np.float32] | None = None  # [images, classes]

    @property
    def steady(self) -> bool:
        """Whether it was warm when its rounds began."""
        return self.warm_up is not None and self.warm_up.steady


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images and how one becomes an input: what the stages that begin before pixels run on."""

    files: Sequence[bytes]
    preprocessing: dict[str, Any]


@dataclass
class Session:
    """Everything that one bench measured, with the order in which the artifacts took their turns."""

    measured: list[Measured]
    order: list[list[int]]  # [rounds][turns], indices into measured


def measure(
    specs: Sequence[Spec],
    images: Pixels,
    *,
    seconds: float,
    batches: Sequence[int],
    rounds: int = ROUNDS,
    predict: Sequence[Pixels] = (),
    pictures: EncodedImages | None = None,
    kept: BenchJournal | None = None,
    note: Callable[[str], None] = lambda text: None,
    between_rounds: Callable[[int], None] = lambda round_: None,
) -> Session:
    """Measure each artifact in its own process for about ``seconds``; one that fails leaves the others going.

    Args:
        specs: what each worker opens.
        images: real images [images, height, width, 3] that the timed runs take in turn.
        seconds: the time for warming up and measuring one artifact.
        batches: the batch sizes of the throughput sweep; latency is always batch 1.
        rounds: how many turns each artifact takes at batch 1.
        predict: batches of images whose logits are wanted, from the same worker and file.
        pictures: what the latency stages run on, side by side; None leaves them out.
        kept: what an earlier sitting measured, gone on with and added to; None keeps nothing.
        note: told what is being done.
        between_rounds: called before each round with its number.
    """
    session = Session([Measured(spec) for spec in specs], [])
    kept = kept or BenchJournal()
    take_over(session, kept)
    with ExitStack() as stack:
        workers: dict[int, Worker] = {}
        for index, one in enumerate(session.measured):
            if one.failed is not None:
                continue
            note(f"opening {label(one.spec)}")
            with recording_failure(one, kept, index):
                workers[index] = stack.enter_context(Worker(one.spec, images, patience_s=max(600.0, 20 * seconds)))
                one.load_ms = workers[index].load_ms
        warm_up(session, workers, seconds=seconds, kept=kept, note=note)
        latency_rounds(
            session, workers, seconds=seconds, rounds=rounds, kept=kept, note=note, between_rounds=between_rounds
        )
        throughput_sweep(session, workers, seconds=seconds, batches=batches, kept=kept, note=note)
        if pictures is not None:
            stage_rounds(session, workers, pictures, seconds=seconds, kept=kept, note=note)
        predictions(session, workers, predict, kept=kept, note=note)
    return session


def take_over(session: Session, kept: BenchJournal) -> None:
    """Put what an earlier sitting measured into its place; how the artifacts opened and warmed up is not part of it.

    One that failed has missed turns that it cannot make up for, so it stays failed.
    """
    for record in kept.of("round"):
        session.order.append(record["turns"])
        for index, samples, seconds in record["samples"]:
            session.measured[index].rounds_ns.append(samples)
            session.measured[index].latency_s += seconds
        for index, watts in record["power"]:
            session.measured[index].powers_w.append(watts)
    for record in kept.of("sweep"):
        one = session.measured[record["artifact"]]
        one.sweep_ns[record["batch"]] = record["samples"]
        one.throughput_s += record["seconds"]
    for record in kept.of("stages"):
        for index, stage, samples in record["samples"]:
            session.measured[index].stages_ns.setdefault(stage, []).append(samples)
    for record in kept.of("failed"):
        session.measured[record["artifact"]].failed = record["why"]
    for record in kept.of("logits"):
        session.measured[record["artifact"]].logits = kept.array(record)


def warm_up(
    session: Session, workers: dict[int, Worker], *, seconds: float, kept: BenchJournal, note: Callable[[str], None]
) -> None:
    """Bring every artifact to its steady state, and read its memory while it has seen batch 1 only."""
    cap_s = WARM_UP_SHARE * seconds
    for index, worker in alive(session, workers):
        one = session.measured[index]
        note(f"warming up {label(one.spec)}")
        with recording_failure(one, kept, index):
            one.warm_up = worker.warm_up(batch=1, window_s=cap_s / 8, cap_s=cap_s)
            one.peak_memory_mib = worker.peak_memory_mib()
            one.switches = worker.switches()


def latency_rounds(
    session: Session,
    workers: dict[int, Worker],
    *,
    seconds: float,
    rounds: int,
    kept: BenchJournal,
    note: Callable[[str], None],
    between_rounds: Callable[[int], None],
) -> None:
    """Let the artifacts take turns at batch 1, starting each round with another, so that drift hits all alike."""
    slice_s = max(LATENCY_SHARE * seconds / rounds - SETTLE_S, 0.2 * LATENCY_SHARE * seconds / rounds)
    note(f"latency: {rounds} rounds, artifacts interleaved")
    for round_ in range(len(session.order), rounds):
        between_rounds(round_)
        turns = rotate(
            [index for index, _ in alive(session, workers) if has_time(session.measured[index], seconds)], round_
        )
        session.order.append(turns)
        measured, power = [], []
        for index in turns:
            one = session.measured[index]
            start, meter = time.perf_counter(), Meter(one.spec["device"])
            with recording_failure(one, kept, index):
                settle_s = SETTLE_S if len(turns) > 1 else 0.0
                with midway(meter.sample, after_s=settle_s + slice_s / 2):
                    samples = workers[index].measure(batch=1, seconds=slice_s, settle_s=settle_s)
                one.rounds_ns.append(samples)
                measured.append((index, samples, time.perf_counter() - start))
                if (watts := meter.read().power_w) is not None:
                    one.powers_w.append(watts)
                    power.append((index, watts))
            one.latency_s += time.perf_counter() - start
        kept.add("round", turns=turns, samples=measured, power=power)


def has_time(one: Measured, seconds: float) -> bool:
    """Return whether an artifact takes another turn at batch 1."""
    return len(one.rounds_ns) < LEAST_ROUNDS or one.latency_s < OVERSTAY * LATENCY_SHARE * seconds


def throughput_sweep(
    session: Session,
    workers: dict[int, Worker],
    *,
    seconds: float,
    batches: Sequence[int],
    kept: BenchJournal,
    note: Callable[[str], None],
) -> None:
    """Run each artifact at each batch size; one that refuses a size (a fixed batch, no memory) keeps the others."""
    if batches:
        note(f"throughput: batch {', '.join(map(str, batches))}")
    slice_s = THROUGHPUT_SHARE * seconds / max(1, len(batches))
    for turn, batch in enumerate(batches):
        for index in rotate([index for index, _ in alive(session, workers)], turn):
            one = session.measured[index]
            if batch in one.sweep_ns:
                continue
            if one.throughput_s > OVERSTAY * THROUGHPUT_SHARE * seconds:
                one.unmeasured[batch] = "its time was up"
                continue
            start = time.perf_counter()
            try:
                # The settling runs allocate for this batch size and let the previous artifact's threads come to rest.
                one.sweep_ns[batch] = workers[index].measure(
                    batch=batch, seconds=0.7 * slice_s, at_least=2, settle_s=0.3 * slice_s
                )
            except WorkerFailedError as error:
                if error.alive:
                    one.unmeasured[batch] = error.what
                else:
                    one.failed = f"batch {batch}: {error.what}"
                    kept.add("failed", artifact=index, why=one.failed)
            if batch not in one.sweep_ns:
                one.throughput_s += time.perf_counter() - start
                continue
            spent_s = sum(one.sweep_ns[batch]) / 1e9  # what compiles for a new size has as much time for the next
            one.throughput_s += spent_s
            kept.add("sweep", artifact=index, batch=batch, samples=one.sweep_ns[batch], seconds=spent_s)


def stage_rounds(
    session: Session,
    workers: dict[int, Worker],
    pictures: EncodedImages,
    *,
    seconds: float,
    kept: BenchJournal,
    note: Callable[[str], None],
) -> None:
    """Let the artifacts take turns from pixels, from a decoded picture and from its file; this time comes on top."""
    note("latency stages: io, pipeline, end-to-end")
    able: dict[int, Sequence[Stage]] = {}
    for index, worker in alive(session, workers):
        with recording_failure(session.measured[index], kept, index):
            able[index] = worker.take_images(pictures.files, pictures.preprocessing)
    slice_s = STAGE_SHARE * seconds / (STAGE_ROUNDS * len(STAGES))
    for round_ in range(len(kept.of("stages")), STAGE_ROUNDS):
        measured = []
        for index in rotate([index for index, _ in alive(session, workers)], round_):
            one = session.measured[index]
            with recording_failure(one, kept, index):
                for stage in able[index]:
                    settle_s = min(SETTLE_S, slice_s)
                    samples = workers[index].measure_stage(stage, seconds=slice_s, settle_s=settle_s)
                    one.stages_ns.setdefault(stage, []).append(samples)
                    measured.append((index, stage, samples))
        kept.add("stages", samples=measured)


def predictions(
    session: Session,
    workers: dict[int, Worker],
    batches: Sequence[Pixels],
    *,
    kept: BenchJournal,
    note: Callable[[str], None],
) -> None:
    """Collect every artifact's logits from the worker that was timed."""
    if not len(batches):
        return
    note(f"accuracy: {sum(len(pixels) for pixels in batches)} images")
    for index, worker in alive(session, workers):
        one = session.measured[index]
        if one.logits is not None:
            continue
        with recording_failure(one, kept, index):
            parts = [worker.predict(pixels) for pixels in batches]
            one.logits = np.concatenate(parts)  # [images, classes]
            kept.add_array("logits", one.logits, artifact=index)


def alive(session: Session, workers: dict[int, Worker]) -> list[tuple[int, Worker]]:
    """Return the workers that have not failed, with their artifact's index."""
    return [(index, worker) for index, worker in workers.items() if session.measured[index].failed is None]


@contextmanager
def recording_failure(one: Fallible, kept: BenchJournal | None = None, index: int = 0) -> Iterator[None]:
    """Turn a worker's failure inside the block into its row's reason, so that the others go on.

    ``kept`` is told of the one with that ``index``, so that a bench that goes on knows.
    """
    try:
        yield
    except WorkerFailedError as error:
        one.failed = error.what
        if kept is not None:
            kept.add("failed", artifact=index, why=one.failed)


def rotate(turns: list[int], by: int) -> list[int]:
    """Return ``turns`` with another first each time."""
    start = by % len(turns) if turns else 0
    return turns[start:] + turns[:start]


def summarize(rounds_ns: Sequence[Sequence[int]], *, steady: bool, batch: int = 1, stage: Stage = "io") -> Latency:
    """Return percentiles over all runs, and the interval of their median over rounds."""
    samples_ms = np.concatenate([np.asarray(samples, dtype=np.float64) for samples in rounds_ns]) / 1e6
    p50, p90, p95, p99 = (float(value) for value in np.percentile(samples_ms, [50, 90, 95, 99]))
    low_ns, high_ns = median_interval(rounds_ns)
    return Latency(
        batch=batch,
        stage=stage,
        samples=len(samples_ms),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99 if len(samples_ms) >= P99_SAMPLES else None,
        max_ms=float(samples_ms.max()),
        p50_interval_ms=(low_ns / 1e6, high_ns / 1e6),
        round_p50_ms=[float(np.median(samples)) / 1e6 for samples in rounds_ns],
        steady=steady,
        rounds=len(rounds_ns),
    )


def median_interval(rounds: Sequence[Sequence[int]], *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median, drawing whole rounds: successive samples correlate."""
    generator = np.random.default_rng(seed)
    arrays = [np.asarray(samples, dtype=np.float64) for samples in rounds]
    drawn = generator.integers(len(arrays), size=(resamples, len(arrays)))  # [resamples, rounds]
    medians = [float(np.median(np.concatenate([arrays[index] for index in row]))) for row in drawn]
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def energy(one: Measured) -> Energy | None:
    """Return what an artifact drew in its rounds at batch 1, its processor or board included; None where none shows."""
    if not one.powers_w:
        return None
    runs_ns = [run for round_ in one.rounds_ns for run in round_]
    power_w = float(np.mean(one.powers_w))
    return Energy(
        power_w=power_w,
        energy_mj=power_w * float(np.mean(runs_ns)) / 1e6,  # of an image: watts times its mean milliseconds
        power_source=power_source(one.spec["device"]),
    )


def images_per_s(batch: int, samples_ns: Sequence[int]) -> float:
    """Return the images that went through per second over the whole run, slow runs included."""
    return batch * len(samples_ns) / (sum(samples_ns) / 1e9)


def label(spec: Spec) -> str:
    """Return how people read an artifact's name: as in the report."""
    return formatting.row_name(ArtifactKey(**artifact_key(spec)))
