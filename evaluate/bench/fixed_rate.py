"""Frames at the rate of a camera: how long each takes from when it is due, and how many are late.

Between two frames the processor rests, its clocks drop and its caches are taken by others: a run can take longer there
than in a tight loop. A frame is late when it is answered after the next one is due.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prgkit.evaluate.bench.journal import FramesRecord
from prgkit.evaluate.bench.worker import Spec
from prgkit.evaluate.bench.workers import BenchContext, open_workers, rotate
from prgkit.evaluate.report.formatting import P99_SAMPLES
from prgkit.evaluate.report.samples import FixedRateSamples
from prgkit.evaluate.report.schema import FixedRate, FixedRateRow, FrameTimes

ROUNDS = 5
WARM_UP_S = 1.0


def measure_fixed_rate(
    specs: Sequence[Spec], fps: float | None, context: BenchContext
) -> tuple[FixedRate | None, list[FixedRateSamples]]:
    """Give every artifact frames at ``fps`` for the context's seconds, in turns; return the section and all samples.

    Every turn is kept for itself, for a bench at the same rate to go on from. Without a rate nothing is measured.
    """
    if fps is None:
        return None, []
    context.note(f"fixed rate: {fps:g} frames a second")
    context = context.part(f"{fps:g} frames/s")
    records = context.journal.of(FramesRecord)
    done = {(record.round, record.artifact) for record in records}
    with open_workers(specs, context) as group:
        for index, worker in group.alive().items():
            with group.attempt(index):
                worker.warm_up(batch=1, window_s=WARM_UP_S / 8, cap_s=WARM_UP_S)
        for round_ in range(ROUNDS):
            context.before_round(round_)
            for index in rotate(list(group.alive()), round_):
                if (round_, index) in done:
                    continue
                with group.attempt(index):
                    responses, runs = group.workers[index].fixed_rate(fps=fps, seconds=context.seconds / ROUNDS)
                    record = FramesRecord(round=round_, artifact=index, responses_ns=responses, runs_ns=runs)
                    context.journal.add(record)
                    records.append(record)
    samples = [
        FixedRateSamples(
            **spec.key,
            responses_ns=[record.responses_ns for record in records if record.artifact == index],
            runs_ns=[record.runs_ns for record in records if record.artifact == index],
        )
        for index, spec in enumerate(specs)
    ]
    rows = [summarize(one, fps=fps, failed=group.failed.get(index)) for index, one in enumerate(samples)]
    return FixedRate(fps=fps, deadline_ms=1000 / fps, rows=rows), samples


def summarize(samples: FixedRateSamples, *, fps: float, failed: str | None = None) -> FixedRateRow:
    """Return what an artifact's frames took, in ms, and how many were late; or why it ``failed``."""
    key = {"artifact": samples.artifact, "backend": samples.backend, "device": samples.device}
    if failed is not None:
        return FixedRateRow(**key, failed=failed)
    responses_ms, runs_ms = (np.concatenate(rounds) / 1e6 for rounds in (samples.responses_ns, samples.runs_ns))
    times = FrameTimes(
        frames=len(responses_ms),
        p50_ms=float(np.median(responses_ms)),
        p99_ms=float(np.percentile(responses_ms, 99)) if len(responses_ms) >= P99_SAMPLES else None,
        max_ms=float(responses_ms.max()),
        run_p50_ms=float(np.median(runs_ms)),
        late=int((responses_ms > 1000 / fps).sum()),
    )
    return FixedRateRow(**key, times=times)
