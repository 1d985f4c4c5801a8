"""A thread sweep: the latency of each artifact at several numbers of CPU threads, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.journal import BenchJournal
from prgkit.evaluate.bench.worker import Pixels, Spec
from prgkit.evaluate.report import formatting


def thread_sweep(
    specs: Sequence[Spec],
    images: Pixels,
    counts: Sequence[int],
    *,
    seconds: float,
    note: Callable[[str], None],
    kept: BenchJournal | None = None,
    between_rounds: Callable[[int], None] = lambda round_: None,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
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
    swept = [spec for spec in specs if spec["device"] == "cpu" and spec["takes_threads"]]
    if not counts or not swept:
        return None, []
    note(f"threads: {', '.join(map(str, counts))}")
    each = [{**spec, "threads": count} for spec in swept for count in counts]
    own = (kept or BenchJournal()).part(f"threads {','.join(map(str, counts))}")
    session = latency.measure(
        each, images, seconds=seconds, batches=(), kept=own, note=quiet, between_rounds=between_rounds
    )
    rows: dict[Any, dict[str, Any]] = {}
    for one in session.measured:
        whose = {key: one.spec[key] for key in ("artifact", "backend", "device")}
        row = rows.setdefault(formatting.row_key(whose), {**whose, "latency": {}, "failed": {}})
        count = str(one.spec["threads"])  # JSON's keys are strings
        if one.failed is None:
            row["latency"][count] = latency.summary(
                one.rounds_ns, steady=one.warm_up is not None and one.warm_up.steady
            )
        else:
            row["failed"][count] = one.failed
    samples = [
        {**{key: one.spec[key] for key in ("artifact", "backend", "threads")}, "rounds": one.rounds_ns}
        for one in session.measured
    ]
    return {"counts": list(counts), "rows": list(rows.values())}, samples


def quiet(text: str) -> None:
    """Say nothing: the same artifact is opened once for each number of threads."""
