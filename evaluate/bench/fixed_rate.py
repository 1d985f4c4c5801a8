"""Frames at the rate of a camera: how long each takes from when it is due, and how many are late.

Between two frames the processor rests, its clocks drop and its caches are taken by others: a run can take longer there
than in a tight loop. A frame is late when it is answered after the next one is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from prgkit.evaluate.bench.journal import BenchJournal
from prgkit.evaluate.bench.latency import recording_failure, rotate
from prgkit.evaluate.bench.worker import Pixels, Spec, Worker, artifact_key
from prgkit.evaluate.report.formatting import P99_SAMPLES
from prgkit.evaluate.report.schema import FixedRate, FixedRateRow, FixedRateSamples, FrameTimes

ROUNDS = 5
WARM_UP_S = 1.0


@dataclass
class Frames:
    """What was measured of one artifact's frames; ``failed`` says why the rest is missing."""

    spec: Spec
    failed: str | None = None
    responses_ns: list[list[int]] = field(default_factory=list)  # [rounds][frames], since each was due
    runs_ns: list[list[int]] = field(default_factory=list)  # [rounds][frames], of the run alone


def measure_fixed_rate(
    specs: Sequence[Spec],
    images: Pixels,
    fps: float | None,
    *,
    seconds: float,
    note: Callable[[str], None],
    kept: BenchJournal | None = None,
    between_rounds: Callable[[int], None] = lambda round_: None,
) -> tuple[FixedRate | None, list[FixedRateSamples]]:
    """Give every artifact frames at ``fps`` for ``seconds``, in turns; return the report's section and all samples.

    Args:
        specs: what the bench opened.
        images: real images [images, height, width, 3] that the frames take in turn.
        fps: frames a second; None measures nothing.
        seconds: the time of each artifact, in `ROUNDS` turns.
        note: told what is being done.
        kept: what an earlier sitting measured at this rate, gone on with and added to, turn by turn.
        between_rounds: called before each round with its number.
    """
    if fps is None:
        return None, []
    note(f"fixed rate: {fps:g} frames a second")
    found = [Frames(spec) for spec in specs]
    own = (kept or BenchJournal()).part(f"{fps:g} frames/s")
    done = take_over(found, own)
    with ExitStack() as stack:
        workers: dict[int, Worker] = {}
        for index, one in enumerate(found):
            if one.failed is not None:
                continue
            with recording_failure(one, own, index):
                workers[index] = stack.enter_context(Worker(one.spec, images, patience_s=max(600.0, 20 * seconds)))
                workers[index].warm_up(batch=1, window_s=WARM_UP_S / 8, cap_s=WARM_UP_S)
        for round_ in range(ROUNDS):
            between_rounds(round_)
            for index in rotate([index for index, one in enumerate(found) if one.failed is None], round_):
                if (round_, index) in done:
                    continue
                with recording_failure(found[index], own, index):
                    responses, runs = workers[index].fixed_rate(fps=fps, seconds=seconds / ROUNDS)
                    found[index].responses_ns.append(responses)
                    found[index].runs_ns.append(runs)
                    own.add("turn", round=round_, artifact=index, responses=responses, runs=runs)
    samples = [
        FixedRateSamples(**artifact_key(one.spec), responses_ns=one.responses_ns, runs_ns=one.runs_ns) for one in found
    ]
    return FixedRate(fps=fps, deadline_ms=1000 / fps, rows=[summarize(one, fps=fps) for one in found]), samples


def take_over(found: Sequence[Frames], kept: BenchJournal) -> set[tuple[int, int]]:
    """Put what an earlier sitting found into its place; return the turns that were taken, as (round, artifact)."""
    for record in kept.of("failed"):
        found[record["artifact"]].failed = record["why"]
    for record in kept.of("turn"):
        found[record["artifact"]].responses_ns.append(record["responses"])
        found[record["artifact"]].runs_ns.append(record["runs"])
    return {(record["round"], record["artifact"]) for record in kept.of("turn")}


def summarize(one: Frames, *, fps: float) -> FixedRateRow:
    """Return what an artifact's frames took, in ms, and how many were late."""
    if one.failed is not None:
        return FixedRateRow(**artifact_key(one.spec), failed=one.failed)
    responses_ms, runs_ms = (np.concatenate(rounds) / 1e6 for rounds in (one.responses_ns, one.runs_ns))
    times = FrameTimes(
        frames=len(responses_ms),
        p50_ms=float(np.median(responses_ms)),
        p99_ms=float(np.percentile(responses_ms, 99)) if len(responses_ms) >= P99_SAMPLES else None,
        max_ms=float(responses_ms.max()),
        run_p50_ms=float(np.median(runs_ms)),
        late=int((responses_ms > 1000 / fps).sum()),
    )
    return FixedRateRow(**artifact_key(one.spec), times=times)
