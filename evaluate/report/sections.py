"""The sections of a report: what each shows, and in which words."""

from __future__ import annotations

from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import NONE, P99_SAMPLES
from prgkit.evaluate.report.schema import STAGES, Report, Stage

PACED_HEADER = ["frames", "p50 ms", "p99 ms", "slowest ms", "run p50 ms", "late"]


SWEEP_HOW = (
    "Latency at batch 1 by the number of CPU threads, in a session of its own in which all take turns; in brackets, "
    "how many times faster than with the fewest threads."
)


SCOPE_NAMES = {"compute": "compute", "io": "io", "pipeline": "pipeline", "end_to_end": "end-to-end"}


def scope_columns(report: Report) -> list[Stage]:
    """Return the scopes of a table: what only GPUs have is left out where none was measured."""
    gpus = any("compute" in row.latency_stages for row in formatting.measured(report))
    return [scope for scope in STAGES if gpus or scope != "compute"]


def scope_header(report: Report) -> list[str]:
    """Return the columns of the scopes' table."""
    return ["p50 ms", *(SCOPE_NAMES[scope] for scope in scope_columns(report))]


def scope_lines(report: Report) -> list[list[str]]:
    """Return each measured row's medians by scope: from pixels, from a decoded picture, from its file."""
    rows = [row for row in formatting.measured(report) if row.latency_stages]
    return [
        [
            formatting.row_name(row),
            *(
                formatting.ms(row.latency_stages[scope].p50_ms if scope in row.latency_stages else None)
                for scope in scope_columns(report)
            ),
        ]
        for row in rows
    ]


def scope_about(report: Report) -> str:
    """Return what the scopes are, and which pictures they ran on."""
    found = report.stage_images
    assert found is not None
    smallest, largest = ("×".join(map(str, size)) for size in (found.smallest, found.largest))
    size = f"{smallest} px" if smallest == largest else f"{smallest} to {largest} px"
    compute = "compute, the GPU's own time by CUDA events; " if "compute" in scope_columns(report) else ""
    return (
        f"Median latency at batch 1 by where it is counted from: {compute}io, from prepared pixels; pipeline, from "
        "a decoded picture, so with resizing and cropping; end-to-end, from the PNG file in memory, so with "
        f"decoding as well. In turns, in one process, with Pillow, on the bundle's "
        f"{found.images} golden pictures ({size})."
    )


def paced_lines(report: Report) -> list[list[str]]:
    """Return a line for each artifact; none where no frames were paced."""
    lines = []
    for one in report.fixed_rate.rows if report.fixed_rate else ():
        name = formatting.row_name(one)
        if one.times is None:
            lines.append([name, "failed", *[NONE] * (len(PACED_HEADER) - 2)])
            continue
        times = one.times
        figures = map(formatting.ms, (times.p50_ms, times.p99_ms, times.max_ms, times.run_p50_ms))
        lines.append([name, *figures, f"{times.late:,} of {times.frames:,}"])
    return lines


def paced_said(report: Report) -> list[str]:
    """Return the frames in a sentence for each artifact, for the terminal."""
    found = report.fixed_rate
    if not found:
        return []
    rate = f"at {found.fps:g} frames/s"
    return [
        f"{name} {rate}: " + ("failed." if p50 == "failed" else f"p50 {p50} ms, slowest {slowest} ms, late {late}.")
        for name, p50, _, slowest, _, late in paced_lines(report)
    ]


def paced_about(report: Report) -> str:
    """Return what the figures are figures of."""
    found = report.fixed_rate
    assert found is not None
    return (
        f"{found.fps:g} frames a second, each timed from when it was due, so with waiting for the one before; late "
        f"after {formatting.ms(found.deadline_ms)} ms. Clocks drop between frames, so a run may take longer here "
        f"than in the tight loop that gives the artifacts' latency. p99 needs {P99_SAMPLES:,} frames."
    )


def sweep_header(report: Report) -> list[str]:
    """Return the columns of the sweep's table."""
    assert report.thread_sweep is not None
    return ["p50 ms", *(f"{count} thread{'' if count == 1 else 's'}" for count in report.thread_sweep.counts)]


def sweep_lines(report: Report) -> list[list[str]]:
    """Return each artifact's medians, with the gain over the least number of threads; none without a sweep."""
    found = report.thread_sweep
    if not found:
        return []
    lines = []
    for row in found.rows:
        base = row.latency.get(min(found.counts))
        cells = [formatting.row_name(row)]
        for count in found.counts:
            one = row.latency.get(count)
            if one is None:
                cells.append("failed")
            elif one is base or base is None:
                cells.append(formatting.ms(one.p50_ms))
            else:
                cells.append(f"{formatting.ms(one.p50_ms)} ({base.p50_ms / one.p50_ms:.2f}×)")
        lines.append(cells)
    return lines


def sweep_said(report: Report) -> list[str]:
    """Return the sweep in a sentence for each artifact, for the terminal."""
    names = sweep_header(report)[1:] if report.thread_sweep else []
    said = []
    for artifact, *cells in sweep_lines(report):
        parts = ", ".join(f"{name} {cell}" for name, cell in zip(names, cells, strict=True))
        said.append(f"{artifact}, p50 ms: {parts}.")
    return said
