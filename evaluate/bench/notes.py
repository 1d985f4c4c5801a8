"""What a reader must know about single rows of a bench: what never ran, what failed, what was not steady."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.latency import Measured
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import Row


def apart_notes(by_threads: dict[str, Any] | None, at_rate: dict[str, Any] | None) -> list[str]:
    """Return why an artifact has no figure at a number of threads, or at a camera's rate."""
    notes = []
    for row in by_threads["rows"] if by_threads else ():
        for count, why in row["failed"].items():
            threads = formatting.counted(int(count), "thread")
            notes.append(f"{formatting.row_name(row)} failed with {threads}: {why}.")
    for row in at_rate["rows"] if at_rate else ():
        if row["failed"] is not None:
            notes.append(f"{formatting.row_name(row)} failed at the camera's rate: {row['failed']}.")
    return notes


def row_notes(rows: Sequence[Row], measured: Sequence[Measured]) -> list[str]:
    """Return what a reader must know about single rows; what was never executed comes first, once for each reason."""
    notes = []
    absent = [row for row in rows if row["status"] == "not executed"]
    for reason in dict.fromkeys(row["reason"] for row in absent):
        names = ", ".join(formatting.row_name(row) for row in absent if row["reason"] == reason)
        notes.append(f"Never executed here: {names}; {reason}.")
    for row in rows:
        name, found = formatting.row_name(row), row["latency"]
        if row["status"] == "failed":
            notes.append(f"{name} failed: {row['reason']}.")
        if found and not found["steady"]:
            notes.append(f"{name} did not become steady while warming up: two windows' medians stayed over 2 % apart.")
        if found and formatting.unstable(found):
            low, high = (formatting.ms(bound(found["round_p50_ms"])) for bound in (min, max))
            notes.append(f"{name} was unstable: the median of a round moved between {low} and {high} ms.")
        if drawn := row.get("energy"):
            notes.append(
                f"{name} took {drawn['energy_mj']:.3g} mJ an image, at {drawn['power_w']:.3g} W ({drawn['power_of']})."
            )
        if switches := row.get("switches"):
            notes.append(f"{name} ran with: CUDA graph {switches['cuda_graph']}; wait for the GPU: {switches['wait']}.")
        if row["artifact"] == "torch":
            notes.append(f"{name} is PyTorch in eager mode, the student as it was trained: its branches are not fused.")
        if row["artifact"] == "torch-compiled" and row["status"] == "measured":
            notes.append(f"{name} is the same through torch.compile (inductor); its load time is that of compiling.")
    for one in measured:
        notes += [
            f"{latency.label(one.spec)} has no figure at batch {batch}: {why}." for batch, why in one.unmeasured.items()
        ]
    return notes
