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
from prgkit.evaluate.report.load import read_report, report_file
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
)
from prgkit.evaluate.report.sections import Cell, Chip, Column, Section, table_row
from prgkit.evaluate.report.terminal import Table, table
from prgkit.metrics import wilson

# Of what runs the artifacts.
VERSIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "openvino", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Gate:
    """An older report, where it lies, and by how much a latency or a size may grow: 0.05 is 5 %."""

    path: Path
    report: Report
    tolerance: float


class RegressionError(BenchError):
    """Something is worse than in the baseline; everything was measured and written all the same."""


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
    old, here = (machine_name(facts) for facts in (gate.report.machine, machine))
    if old != here:
        raise BenchError(
            f"the baseline was measured on another machine: {old}; this is {here}",
            where=gate.path,
            fix="keep a baseline for each machine; prgkit bench --merge shows the reports of several side by side",
        )
    if not same_images(gate.report.evaluation, evaluation):
        before, now = (f"{facts.images:,} {labels(facts)}" for facts in (gate.report.evaluation, evaluation))
        told = f"{before}, now {now}" if before != now else f"{before} each"
        raise BenchError(
            f"the baseline was measured on other evaluation images ({told})",
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


def machine_name(facts: Machine) -> str:
    """Return what makes latencies comparable: processor, cores and GPUs."""
    cores = facts.usable_cores
    processor = f"{facts.cpu}, {cores} core{'' if cores == 1 else 's'}"
    return ", ".join([processor, *(gpu.name for gpu in facts.gpus)])


def same_images(old: EvaluationImages, new: EvaluationImages) -> bool:
    """Return whether two evaluation sets are one, as far as both reports say what they hold."""
    digests = [old.digest, new.digest]
    if None not in digests:
        return digests[0] == digests[1]
    return (old.images, old.labelled) == (new.images, new.labelled)


def labels(facts: EvaluationImages) -> str:
    """Return what kind of images they are."""
    return "labelled images" if facts.labelled else "images without labels"


def against(report: Report, gate: Gate) -> BaselineComparison:
    """Return the section of the new report that holds it against its baseline, line by line."""
    old, new = ({key(row): row for row in gated(one)} for one in (gate.report, report))
    lines: list[BaselineLine] = []
    for place, before in old.items():
        if before.status != "measured":
            continue  # there is nothing to be worse than
        now = new.get(place)
        if now is None or now.status != "measured":
            why = "not in this bench" if now is None else formatting.why_missing(now)
            lines.append(BaselineLine(**whose(before), what="missing", verdict="worse", reason=why))
            continue
        images = gate.report.evaluation.images, report.evaluation.images
        quality: Share = "top1" if before.top1 is not None and now.top1 is not None else "agreement_teacher"
        found = [
            latency_line(before, now, gate.tolerance),
            size_line(before, now, gate.tolerance),
            share_line(quality, before, now, images),
            share_line("agreement_fp32", before, now, images),
        ]
        lines += [line for line in found if line is not None]
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


def whose(row: Row) -> dict[str, Any]:
    """Return what says whose line it is."""
    return {"artifact": row.artifact, "backend": row.backend, "device": row.device, "threads": row.threads}


def gated(report: Report) -> list[Row]:
    """Return the rows that a gate judges."""
    return [row for row in report.rows if row.backend != "torch"]


def key(row: Row) -> tuple[Any, ...]:
    """Return what makes two rows the same artifact in the same place.

    OpenVINO runs INT8 from TensorRT's layout where a bundle has that, from ONNX Runtime's where not.
    """
    artifact, *where = formatting.row_key(row)
    return artifact.removesuffix("-tensorrt") if row.backend == "openvino" else artifact, *where, row.threads


def latency_line(before: Row, now: Row, tolerance: float) -> BaselineLine:
    """Compare two medians at batch 1, in ms, by their ratio."""
    old, new = measured_latency(before), measured_latency(now)
    (old_low, old_high), (new_low, new_high) = bounds = [bounds_ms(old), bounds_ms(new)]
    ratio = new.p50_ms / old.p50_ms
    found = verdict(ratio, tolerance)
    return BaselineLine(
        **whose(before),
        what="latency",
        before=old.p50_ms,
        before_interval=bounds[0],
        now=new.p50_ms,
        now_interval=bounds[1],
        change_percent=100 * (ratio - 1),
        verdict=found if found == "same" or new_low > old_high or new_high < old_low else "noise",
    )


def bounds_ms(latency: Latency) -> Interval:
    """Return the interval of a median, or the range of its rounds' medians where these moved apart.

    A bootstrap over rounds says how sure a median is under the load of its bench; where the load changed within it, it
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
    if not before.size_mib or not now.size_mib:
        return None
    ratio = now.size_mib / before.size_mib
    return BaselineLine(
        **whose(before),
        what="size",
        before=before.size_mib,
        now=now.size_mib,
        change_percent=100 * (ratio - 1),
        verdict=verdict(ratio, tolerance),
    )


Share = Literal["top1", "agreement_teacher", "agreement_fp32"]


def share_line(name: Share, before: Row, now: Row, images: tuple[int, int]) -> BaselineLine | None:
    """Compare two shares of images, in percent, with what the choice of the baseline's images could have done."""
    old, new = getattr(before, name), getattr(now, name)
    if old is None or new is None:
        return None
    intervals = [wilson(round(share * count / 100), count) for share, count in zip((old, new), images, strict=True)]
    low, high = intervals[0]
    return BaselineLine(
        **whose(before),
        what=name,
        before=old,
        before_interval=intervals[0],
        now=new,
        now_interval=intervals[1],
        change_points=new - old,
        verdict="worse" if new < low else "better" if new > high else "same",
    )


def verdict(ratio: float, tolerance: float) -> Literal["worse", "better", "same"]:
    """Return what a ratio of two costs means; just the tolerance is within it, whatever floating point makes of it."""
    if ratio > 1 + tolerance and not math.isclose(ratio, 1 + tolerance, rel_tol=1e-9):
        return "worse"
    return "better" if ratio < 1 / (1 + tolerance) else "same"


def differences(old: Report, new: Report) -> list[str]:
    """Return what else is not as it was, for whoever looks for the cause."""
    told = []
    for name in VERSIONS:
        before, now = (report.machine.versions.get(name) for report in (old, new))
        if before != now:
            told.append(f"{name} was {before or 'not installed'} and is {now or 'not installed'}.")
    for name, what in (("governor", "The governor"), ("clocks_locked", "Whether the clocks are locked")):
        before, now = (getattr(report.machine, name) for report in (old, new))
        if before != now:
            told.append(f"{what} was {before} and is {now}.")
    for name, what in (("student", "The student"), ("teacher", "The teacher")):
        before, now = (getattr(report.run, name) for report in (old, new))
        if before != now:
            told.append(f"{what} was {before} and is {now}.")
    if old.teacher != new.teacher:
        told.append("The teacher answers differently: agreement with it is not agreement with the same answers.")
    if None in (old.evaluation.digest, new.evaluation.digest):
        told.append("Not both reports say which images they were measured on: they are taken to be the same.")
    return told


def regressions(comparison: BaselineComparison, *, path: Path) -> RegressionError | None:
    """Return the error that tells what became worse, or None where nothing did."""
    worse = [line for line in comparison.lines if line.verdict == "worse"]
    if not worse:
        return None
    return RegressionError(
        "\n".join(
            [
                f"{formatting.counted(len(worse), 'regression')} against {comparison.file}:",
                *(f"  {line_text(line)}" for line in worse),
            ]
        ),
        where=path,
        fix="make it good again, or accept it: this report.json is then the next baseline",
    )


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
