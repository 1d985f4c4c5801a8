"""A thread sweep: the latency of each artifact at several numbers of CPU threads, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.latency import LatencyPlan
from prgkit.evaluate.bench.options import comma
from prgkit.evaluate.bench.worker import Spec
from prgkit.evaluate.bench.workers import BenchContext
from prgkit.evaluate.report.samples import ThreadSweepSamples
from prgkit.evaluate.report.schema import ThreadSweep, ThreadSweepRow


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
    session = latency.measure(each, LatencyPlan(), context.part(f"threads {comma(tuple(counts))}"))
    rows = []
    for spec in swept:
        mine = [one for one in session.measured if one.spec.key == spec.key]
        rows.append(
            ThreadSweepRow(
                **spec.key,
                latency={
                    one.spec.threads: latency.summarize(one.rounds_ns, steady=one.steady)
                    for one in mine
                    if one.failed is None
                },
                failed={one.spec.threads: one.failed for one in mine if one.failed is not None},
            )
        )
    samples = [
        ThreadSweepSamples(**one.spec.key, threads=one.spec.threads, rounds_ns=one.rounds_ns)
        for one in session.measured
    ]
    return ThreadSweep(counts=list(counts), rows=rows), samples
