"""A gate: hold a bench's report against an older one, and tell what became worse from what is noise.

A latency is worse where the ratio of the medians is beyond the tolerance and their 95 % intervals do not overlap; of a
bench that was unstable, the range of its rounds' medians, from the 10th to the 90th percentile, counts in place of the
interval. A size has no noise: the tolerance alone decides. A share of images (top-1, or agreement with the teacher
where there are no labels; agreement with FP32) is worse where it lies below the 95 % interval of the baseline's: both
were counted on the same images, so less than that is as much as the choice of the images could have done.

PyTorch's row is left out: it is there for comparison, and no device runs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prgkit.errors import BenchError
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.machine import RUNTIMES
from prgkit.evaluate.report.schema import (
    BaselineComparison,
    BaselineLine,
    EvaluationImages,
    Interval,
    Latency,
    Machine,
    Report,
    Row,
    measured_latency,
    read_report,
    report_file,
)
from prgkit.evaluate.report.sections import Cell, Chip, Column, Section, table_row
from prgkit.evaluate.report.terminal import Table, table
from prgkit.metrics import wilson

Share = Literal["top1", "agreement_teacher", "agreement_fp32"]
What = Share | Literal["latency", "size", "missing"]
Verdict = Literal["worse", "better", "same", "noise"]


@dataclass(frozen=True)
class Gate:
    """An older report, where it lies, and by how much a latency or a size may grow: 0.05 is 5 %."""

    path: Path
    report: Report
    tolerance: float


def open_gate(path: Path, tolerance: float, *, out: Path) -> Gate:
    """Read a baseline for a bench whose report goes to ``out``.

    Raises:
        BenchError: it cannot be read, nothing was measured in it, or the new report would overwrite it.
    """
    report, path = read_report(path), report_file(path)
    if not any(row.status == "measured" for row in gated(report)):
        raise BenchError(
            "nothing was measured in the baseline, so nothing could be worse", where=path, fix="name another report"
        )
    if path.resolve() == (out / "report.json").resolve():
        raise BenchError(
            "the new report would overwrite its baseline, and the next bench would be held against that",
            where=path,
            fix="copy the baseline elsewhere, or write the new report elsewhere with --out FOLDER",
        )
    return Gate(path, report, tolerance)


def require_comparable(gate: Gate, machine: Machine, evaluation: EvaluationImages, *, threads: int) -> None:
    """Refuse a baseline whose figures mean something else, before anything is measured.

    Another machine is refused rather than warned of: its latency says nothing here, and a gate that leaves latency out
    would stay green whatever became slower. Other images, or other threads, are refused for the same reason.

    Raises:
        BenchError: the baseline is of another machine, of other evaluation images, or of other threads.
    """
    old_machine, new_machine = machine_name(gate.report.machine), machine_name(machine)
    if old_machine != new_machine:
        raise BenchError(
            f"the baseline was measured on another machine: {old_machine}; this is {new_machine}",
            where=gate.path,
            fix="keep a baseline for each machine; prgkit bench --merge shows the reports of several side by side",
        )
    if gate.report.evaluation.digest != evaluation.digest:
        before, now = formatting.images_text(gate.report.evaluation), formatting.images_text(evaluation)
        images = f"{before}, now {now}" if before != now else f"{before} each"
        raise BenchError(
            f"the baseline was measured on other evaluation images ({images})",
            where=gate.path,
            fix="measure the older bundle again on these, or make this report the baseline",
        )
    known = sorted({row.threads for row in gated(gate.report) if row.device == "cpu" and row.threads})
    if known and threads not in known:
        counts = ",".join(map(str, known))
        raise BenchError(
            f"the baseline was measured with --threads {counts}, and this would be with --threads {threads}",
            where=gate.path,
            fix=f"--threads {known[0]}",
        )


def machine_name(machine: Machine) -> str:
    """Return what makes latencies comparable: processor, cores and GPUs."""
    cores = formatting.counted(machine.usable_cores, "core")
    return ", ".join([machine.cpu, cores, *(gpu.name for gpu in machine.gpus)])


def against(report: Report, gate: Gate) -> BaselineComparison:
    """Return the section of the new report that holds it against its baseline, line by line."""
    old, new = ({row_place(row): row for row in gated(one)} for one in (gate.report, report))
    images = gate.report.evaluation.images, report.evaluation.images
    lines: list[BaselineLine] = []
    for place, before in old.items():
        if before.status != "measured":
            continue  # there is nothing to be worse than
        now = new.get(place)
        if now is None or now.status != "measured":
            why = "not in this bench" if now is None else f"{formatting.missing_chip(now).text}: {now.reason}"
            lines.append(baseline_line(before, "missing", "worse", reason=why))
            continue
        quality: Share = "top1" if before.top1 is not None and now.top1 is not None else "agreement_teacher"
        compared = [
            latency_line(before, now, gate.tolerance),
            size_line(before, now, gate.tolerance),
            share_line(quality, before, now, images),
            share_line("agreement_fp32", before, now, images),
        ]
        lines += [line for line in compared if line is not None]
    return BaselineComparison(
        file=str(gate.path),
        created=gate.report.created,
        run=gate.report.run.name,
        tolerance=gate.tolerance,
        lines=lines,
        regressions=sum(line.verdict == "worse" for line in lines),
        new=[formatting.row_name(row) for place, row in new.items() if place not in old],
        notes=differences(gate.report, report),
    )


def gated(report: Report) -> list[Row]:
    """Return the rows that a gate judges."""
    return [row for row in report.rows if row.backend != "torch"]


def row_place(row: Row) -> tuple[str | int | None, ...]:
    """Return what makes two rows the same artifact in the same place.

    OpenVINO runs INT8 from its own layout where a bundle has that, else from TensorRT's, else from ONNX Runtime's.
    """
    artifact, *where = formatting.row_key(row)
    return (
        artifact.removesuffix("-tensorrt").removesuffix("-openvino") if row.backend == "openvino" else artifact,
        *where,
        row.threads,
    )


def baseline_line(row: Row, what: What, verdict: Verdict, **figures: Any) -> BaselineLine:
    """Return one line of the comparison, whose row's it is included."""
    place = {"artifact": row.artifact, "backend": row.backend, "device": row.device, "threads": row.threads}
    return BaselineLine.model_validate({**place, "what": what, "verdict": verdict, **figures})


def latency_line(before: Row, now: Row, tolerance: float) -> BaselineLine:
    """Compare two medians at batch 1, in ms, by their ratio."""
    old, new = measured_latency(before), measured_latency(now)
    intervals = {"before_interval": bounds_ms(old), "now_interval": bounds_ms(new)}
    (old_low, old_high), (new_low, new_high) = intervals.values()
    verdict = cost_verdict(old.p50_ms, new.p50_ms, tolerance)
    if verdict != "same" and new_low <= old_high and old_low <= new_high:
        verdict = "noise"
    return baseline_line(before, "latency", verdict, **costs(old.p50_ms, new.p50_ms), **intervals)


def bounds_ms(latency: Latency) -> Interval:
    """Return the interval of a median, or the range of its rounds' medians where these moved apart.

    An interval over rounds says how sure a median is under the load of its bench; where the load changed within it, it
    may have changed between two benches as well. The 10th and the 90th percentile are the range's ends: a device that
    throttles after its first round is slower, whatever that round was.
    """
    low, high = latency.p50_interval_ms
    if formatting.unstable(latency):
        least, most = np.percentile(latency.round_p50_ms, [10, 90])
        low, high = min(low, float(least)), max(high, float(most))
    return low, high


def size_line(before: Row, now: Row, tolerance: float) -> BaselineLine | None:
    """Compare two files' sizes, in MiB, by their ratio."""
    old, new = before.size_mib, now.size_mib
    if not old or not new:
        return None
    return baseline_line(before, "size", cost_verdict(old, new, tolerance), **costs(old, new))


def costs(old: float, new: float) -> dict[str, float]:
    """Return two costs and the change from one to the other."""
    return {"before": old, "now": new, "change_percent": 100 * (new / old - 1)}


def cost_verdict(old: float, new: float, tolerance: float) -> Verdict:
    """Return what a ratio of two costs means; just the tolerance is within it, whatever floating point makes of it."""
    ratio = new / old
    if ratio > 1 + tolerance and not math.isclose(ratio, 1 + tolerance, rel_tol=1e-9):
        return "worse"
    return "better" if ratio < 1 / (1 + tolerance) else "same"


def share_line(name: Share, before: Row, now: Row, images: tuple[int, int]) -> BaselineLine | None:
    """Compare two shares of images, in percent, with what the choice of the baseline's images could have done."""
    old, new = getattr(before, name), getattr(now, name)
    if old is None or new is None:
        return None
    low, high = before_interval = wilson(round(old * images[0] / 100), images[0])
    now_interval = wilson(round(new * images[1] / 100), images[1])
    intervals = {"before_interval": before_interval, "now_interval": now_interval}
    verdict: Verdict = "worse" if new < low else "better" if new > high else "same"
    return baseline_line(before, name, verdict, before=old, now=new, change_points=new - old, **intervals)


def differences(old: Report, new: Report) -> list[str]:
    """Return what else is not as it was, for whoever looks for the cause."""
    installed = [[report.machine.versions.get(name) or "not installed" for report in (old, new)] for name in RUNTIMES]
    facts: list[tuple[str, object, object]] = [
        *((name, before, now) for name, (before, now) in zip(RUNTIMES, installed, strict=True)),
        ("The governor", old.machine.governor, new.machine.governor),
        ("Whether the clocks are locked", old.machine.clocks_locked, new.machine.clocks_locked),
        ("The student", old.run.student, new.run.student),
        ("The teacher", old.run.teacher, new.run.teacher),
    ]
    notes = [f"{what} was {before} and is {now}." for what, before, now in facts if before != now]
    if old.teacher != new.teacher:
        notes.append("The teacher answers differently: agreement with it is not agreement with the same answers.")
    return notes


def regressions(comparison: BaselineComparison, *, path: Path) -> BenchError | None:
    """Return the error that tells what became worse, or None where nothing did."""
    worse = [f"  {line_text(line)}" for line in comparison.lines if line.verdict == "worse"]
    if not worse:
        return None
    count = f"{formatting.counted(len(worse), 'regression')} against {comparison.file}:"
    fix = "make it good again, or accept it: this report.json is then the next baseline"
    return BenchError("\n".join([count, *worse]), where=path, fix=fix)


NAMES = {
    "latency": "p50",
    "size": "size",
    "top1": "top-1",
    "agreement_teacher": "= teacher",
    "agreement_fp32": "= FP32",
    "missing": "itself",
}


def line_text(line: BaselineLine) -> str:
    """Return a line in words: whose, what, before, now, and the change."""
    if line.what == "missing":
        return f"{formatting.row_name(line)}: {line.reason}"
    intervals = ""
    if line.before_interval and line.now_interval:
        bounds = formatting.interval_ms if line.what == "latency" else formatting.interval
        intervals = f" (95 %: {bounds(line.before_interval)}, now {bounds(line.now_interval)})"
    before, now, change = line_figures(line)
    return f"{formatting.row_name(line)}: {NAMES[line.what]} {before} → {now}, {change}{intervals}"


def line_figures(line: BaselineLine) -> tuple[str, str, str]:
    """Return a line's figures: before, now and the change, with their units."""
    before, now = line.before, line.now
    if before is None or now is None:
        return "measured", "missing", ""
    if line.what == "latency":
        return f"{formatting.ms(before)} ms", f"{formatting.ms(now)} ms", f"{line.change_percent:+.1f} %"
    if line.what == "size":
        return f"{formatting.mib(before)} MiB", f"{formatting.mib(now)} MiB", f"{line.change_percent:+.1f} %"
    return formatting.percent(before), formatting.percent(now), f"{line.change_points:+.1f} points"


HOW = (
    "A latency is worse where it grew beyond the tolerance and the 95 % intervals of the medians do not overlap (where "
    "the rounds of a bench were unstable, the range of their medians, 10th to 90th percentile, stands in for its "
    "interval); a size, where it grew beyond the tolerance; a share of images, where it lies below the baseline's 95 % "
    "interval."
)
CHIPS: dict[str, Literal["bad", "good"]] = {"worse": "bad", "better": "good"}


def against_baseline(report: Report) -> Section | None:
    """Return what became worse, what better, and what else is not as it was; None where there is no baseline."""
    comparison = report.baseline
    if comparison is None:
        return None
    new = [f"Not in the baseline: {', '.join(comparison.new)}."] if comparison.new else []
    return Section(
        "Against the baseline",
        f"{baseline_headline(comparison)} {HOW}",
        (
            Column("Artifact", short="artifact", left=True),
            Column("Figure", short="figure", left=True),
            *(Column(name.capitalize(), short=name) for name in ("before", "now", "change")),
            Column("Verdict", short="verdict"),
        ),
        tuple(
            table_row(
                formatting.row_name(line),
                NAMES[line.what],
                *line_figures(line),
                Cell("", chip=Chip(line.verdict, CHIPS.get(line.verdict, ""))),
            )
            for line in comparison.lines
        ),
        notes=(*new, *comparison.notes),
    )


def baseline_table(report: Report) -> Table:
    """Return a report held against its baseline for the terminal."""
    section = against_baseline(report)
    assert section is not None
    assert report.baseline is not None
    return table(section, title=baseline_headline(report.baseline), notes=section.notes)


def baseline_headline(comparison: BaselineComparison) -> str:
    """Return what was compared with what, and how it ended, in one sentence."""
    count = comparison.regressions
    result = formatting.counted(count, "regression") if count else "no regression"
    return (
        f"Against {comparison.file} (run {comparison.run}, {comparison.created[:10]}), tolerance "
        f"{100 * comparison.tolerance:g} %: {result}."
    )
