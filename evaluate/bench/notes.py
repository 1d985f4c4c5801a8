"""What a reader must know about single rows of a bench: what never ran, what failed, what was not steady."""

from __future__ import annotations

from collections.abc import Sequence

from prgkit.evaluate.bench.latency import Measured
from prgkit.evaluate.bench.workers import artifact_name
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.schema import FixedRate, Row, ThreadSweep


def failure_notes(thread_sweep: ThreadSweep | None, fixed_rate: FixedRate | None) -> list[str]:
    """Return why an artifact has no figure at a number of threads, or at a fixed rate."""
    notes = []
    for swept in thread_sweep.rows if thread_sweep else ():
        for count, reason in swept.failed.items():
            notes.append(f"{formatting.row_name(swept)} failed with {formatting.counted(count, 'thread')}: {reason}.")
    for row in fixed_rate.rows if fixed_rate else ():
        if row.failed is not None:
            notes.append(f"{formatting.row_name(row)} failed at the camera's rate: {row.failed}.")
    return notes


def row_notes(rows: Sequence[Row], measured: Sequence[Measured]) -> list[str]:
    """Return what a reader must know about single rows; what was never executed comes first, once for each reason."""
    notes = []
    absent = [row for row in rows if row.status == "not executed"]
    for reason in dict.fromkeys(row.reason for row in absent):
        names = ", ".join(formatting.row_name(row) for row in absent if row.reason == reason)
        notes.append(f"Never executed here: {names}; {reason}.")
    for row in rows:
        notes += notes_on(row)
    for one in measured:
        notes += [
            f"{artifact_name(one.spec)} has no figure at batch {batch}: {why}." for batch, why in one.unmeasured.items()
        ]
    return notes


def notes_on(row: Row) -> list[str]:
    """Return what a reader must know about one row."""
    name, notes = formatting.row_name(row), []
    if row.status == "failed":
        notes.append(f"{name} failed: {row.reason}.")
    if row.latency and not row.latency.steady:
        notes.append(f"{name} did not become steady while warming up: two windows' medians stayed over 2 % apart.")
    if row.latency and formatting.unstable(row.latency):
        low, high = (formatting.ms(bound(row.latency.round_p50_ms)) for bound in (min, max))
        notes.append(f"{name} was unstable: the median of a round moved between {low} and {high} ms.")
    if row.energy:
        energy_mj, power_w, source = row.energy.energy_mj, row.energy.power_w, row.energy.power_source
        notes.append(f"{name} took {energy_mj:.3g} mJ an image, at {power_w:.3g} W ({source}).")
    if row.switches:
        graph, wait = row.switches["cuda_graph"], row.switches["wait"]
        notes.append(f"{name} ran with: CUDA graph {graph}; wait for the GPU: {wait}.")
    if row.artifact == "torch":
        notes.append(f"{name} is PyTorch in eager mode, the student as it was trained: its branches are not fused.")
    if row.artifact == "torch-compiled" and row.status == "measured":
        notes.append(f"{name} is the same through torch.compile (inductor); its load time is that of compiling.")
    return notes
