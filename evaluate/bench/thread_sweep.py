"""A thread sweep: the latency of each artifact at several numbers of CPU threads, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.journal import BenchJournal
from prgkit.evaluate.bench.worker import Pixels, Spec, artifact_key
from prgkit.evaluate.report.schema import ThreadSweep, ThreadSweepRow, ThreadSweepSamples


def thread_sweep(
    specs: Sequence[Spec],
    images: Pixels,
    counts: Sequence[int],
    *,
    seconds: float,
    note: Callable[[str], None],
    kept: BenchJournal | None = None,
    between_rounds: Callable[[int], None] = lambda round_: None,
) -> tuple[ThreadSweep | None, list[ThreadSweepSamples]]:
    """Measure every artifact on the CPU at each number of threads; return the report's section and all samples.

    All of them take turns, each in a process of its own: one that was measured minutes later than another would be
    compared with the machine's temperature as well. PyTorch is left out, as it is in no bundle.

    Args:
        specs: what the bench opened.
        images: real images [images, height, width, 3] that the timed runs take in turn.
        counts: the numbers of threads; none measures nothing.
        seconds: the time for warming up and measuring one artifact at one number of threads.
        note: told what is being done.
        kept: what an earlier sitting measured with these numbers of threads, gone on with and added to.
        between_rounds: called before each round with its number.
    """
    swept = [spec for spec in specs if spec["device"] == "cpu" and spec["kind"] != "torch"]
    if not counts or not swept:
        return None, []
    note(f"threads: {', '.join(map(str, counts))}")
    each = [{**spec, "threads": count} for spec in swept for count in counts]
    own = (kept or BenchJournal()).part(f"threads {','.join(map(str, counts))}")
    session = latency.measure(
        each, images, seconds=seconds, batches=(), kept=own, note=quiet, between_rounds=between_rounds
    )
    rows = []
    for spec in swept:
        mine = [one for one in session.measured if artifact_key(one.spec) == artifact_key(spec)]
        measured = [one for one in mine if one.failed is None]
        rows.append(
            ThreadSweepRow(
                **artifact_key(spec),
                latency={one.spec["threads"]: latency.summarize(one.rounds_ns, steady=one.steady) for one in measured},
                failed={one.spec["threads"]: one.failed for one in mine if one.failed is not None},
            )
        )
    samples = [
        ThreadSweepSamples(**artifact_key(one.spec), threads=one.spec["threads"], rounds_ns=one.rounds_ns)
        for one in session.measured
    ]
    return ThreadSweep(counts=list(counts), rows=rows), samples


def quiet(text: str) -> None:
    """Say nothing: the same artifact is opened once for each number of threads."""
