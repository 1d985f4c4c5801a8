"""What a report says in words: its headline, its names and its numbers, the same in the terminal, Markdown and HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prgkit.evaluate.report.plots.figures import milliseconds
from prgkit.evaluate.report.schema import (
    ArtifactKey,
    EvaluationImages,
    Int8Verdict,
    Interval,
    Latency,
    Report,
    Row,
    Throughput,
    TickedRow,
    TickedShare,
    measured_latency,
)
from prgkit.metrics import wilson

NONE = "–"
# What runs a file that ONNX Runtime runs as well: names tell them apart. An engine's or PyTorch's says so itself.
RUNTIMES = {
    "openvino": "OpenVINO",
    "onnxruntime-openvino": "OpenVINO EP",
    "onnxruntime-tensorrt": "TensorRT EP",
}
FAMILIES = {
    "repvit": "RepViT",
    "efficientnet": "EfficientNet",
    "mobilenetv3": "MobileNetV3",
    "mobilenetv4": "MobileNetV4",
    "fastvit": "FastViT",
    "resnet": "ResNet",
    "convnext": "ConvNeXt",
}


P99_SAMPLES = 1000  # below this, the 99th percentile is one or two outliers


def headline(report: Report) -> str:
    """Return the one sentence of the report: how much of the teacher the student keeps, and how fast."""
    row, student = lead_row(report.rows, report.int8), model_name(report.run.student)
    if row is None:
        return f"{student}: nothing could be measured on this machine"
    speed = f"{milliseconds(measured_latency(row).p50_ms)} ms an image on {place(report, row)}"
    if doubt := doubted(report):
        return (
            f"{student} at {speed}: its teacher's answers look like chance, so keeping to them means nothing ({doubt})"
        )
    return f"{student} {kept(report, row)} at {speed}"


def doubted(report: Report) -> str:
    """Return why nothing can be learned from the teacher, or nothing; where there are labels, they decide."""
    images, top1 = report.evaluation.images, report.teacher.top1
    if top1 is None:
        return str(next(iter((report.pseudo_labels or {}).get("doubts", ())), ""))
    chance = 100 / report.run.classes
    if wilson(round(images * top1 / 100), images)[0] > chance:
        return ""
    return f"right on {percent(top1)} of {counted(images, 'labelled image')}, where chance gives {percent(chance)}"


def kept(report: Report, row: Row) -> str:
    """Return what the student keeps of its teacher, as a verb and its object."""
    teacher, top1 = report.teacher.top1, row.top1
    if teacher and top1 is not None:
        ratio = 100 * top1 / teacher
        if ratio > 100:
            interval = row.top1_interval
            verb = "matches" if interval and interval[0] <= teacher else "beats"  # more than chance would give
            return f"{verb} its teacher's accuracy ({percent(top1)} against {percent(teacher)})"
        return f"keeps {percent(ratio)} of its teacher's accuracy"
    if row.agreement_teacher is not None:
        return f"gives its teacher's answer on {percent(row.agreement_teacher)} of the images"
    return "runs"


def place(report: Report, row: Row) -> str:
    """Return what a row ran on: ``2 threads of AMD EPYC``, or the GPU's name; and what ran it, as row_name does."""
    runtime = RUNTIMES.get(row.backend)
    return processor(report, row) + (f", with {runtime}" if runtime else "")


def processor(report: Report, row: Row) -> str:
    """Return the processor that a row ran on, with the threads that it took of a CPU."""
    machine = report.machine
    if row.device != "cpu" and machine.gpus:
        return str(machine.gpus[0].name)
    threads = threads_of(row)
    return f"{threads} of {machine.cpu}" if threads else str(machine.cpu)


def unstable(latency: Latency) -> bool:
    """Return whether the medians of a bench's rounds lie so far apart that its figures are of that hour alone."""
    return max(latency.round_p50_ms) > 1.1 * min(latency.round_p50_ms)


def threads_of(row: Row) -> str:
    """Return a row's number of CPU threads in words, or nothing where there is none."""
    return counted(row.threads, "thread") if row.threads else ""


def counted(count: int, what: str) -> str:
    """Return a number of things."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def lead_row(rows: Sequence[Row], int8: Sequence[Int8Verdict]) -> Row | None:
    """Return the row to speak of: the fastest whose quality is within a point of the best, PyTorch only if alone."""
    ran = [row for row in rows if row.status == "measured" and not refused(int8, row)]
    ran = [row for row in ran if row.backend != "torch"] or ran
    if not ran:
        return None
    best = max(quality(row) for row in ran)
    return min((row for row in ran if quality(row) >= best - 1), key=lambda row: measured_latency(row).p50_ms)


def refused(int8: Sequence[Int8Verdict], row: Row) -> bool:
    """Return whether a row is of INT8 and does not hold the floor, or is what was not kept of ONNX Runtime's here."""
    verdict = next((verdict for verdict in int8 if row_key(verdict) == row_key(row)), None)
    return row.faithful is False if verdict is None else not verdict.kept


def score(row: Row, *, labelled: bool) -> tuple[float | None, Interval | None]:
    """Return a row's accuracy, or its agreement with the teacher, in percent with its interval."""
    return (row.top1, row.top1_interval) if labelled else (row.agreement_teacher, row.agreement_teacher_interval)


def quality(row: Row) -> float:
    """Return a row's accuracy where labels exist, else its agreement with the teacher."""
    value = row.agreement_teacher if row.top1 is None else row.top1
    return 0.0 if value is None else float(value)


def measured(report: Report) -> list[Row]:
    """Return the rows that have a latency and no failure."""
    return [row for row in report.rows if row.status == "measured"]


def row_name(row: ArtifactKey) -> str:
    """Return a row's name: the artifact, with its runtime and device where these are not ONNX Runtime and the CPU."""
    more = [RUNTIMES.get(row.backend, ""), "" if row.device == "cpu" else row.device]
    told = ", ".join(filter(None, more))
    return f"{row.artifact} ({told})" if told else row.artifact


def row_key(row: ArtifactKey) -> tuple[str, str, str]:
    """Return what no two rows of a report share: the artifact, what runs it, and where."""
    return row.artifact, row.backend, row.device


def why_missing(row: Row) -> str:
    """Return why a row has no figures."""
    return f"{'never executed here' if row.status == 'not executed' else row.status}: {row.reason}"


def model_name(name: str) -> str:
    """Return a timm model's name as papers print it: ``repvit_m0_9`` is RepViT-M0.9; other names stay as they are."""
    name = name.rpartition("/")[2] if ":" in name else name  # hf-hub:timm/NAME
    family, _, rest = name.split(".")[0].partition("_")
    if family not in FAMILIES:
        return name
    variant = re.sub(r"(?<=\d)_(?=\d)", ".", rest).replace("_", "-")
    return f"{FAMILIES[family]}-{variant[:1].upper()}{variant[1:]}" if variant else FAMILIES[family]


def percent(value: float | None) -> str:
    """Return a share with one decimal; what is not quite everything never rounds up to it."""
    if value is None:
        return NONE
    return "99.9 %" if 99.9 <= value < 100 else f"{value:.1f} %"


def interval(bounds: Interval | None, *, digits: int = 1) -> str:
    """Return an interval's bounds."""
    return "" if bounds is None else f"{bounds[0]:.{digits}f}–{bounds[1]:.{digits}f}"


def interval_ms(bounds: Interval) -> str:
    """Return the bounds of a latency."""
    return f"{milliseconds(bounds[0])}–{milliseconds(bounds[1])}"


def ms(value: float | None) -> str:
    """Return a latency, or a dash where there is none."""
    return NONE if value is None else milliseconds(value)


def mib(value: float | None) -> str:
    """Return a size with a sensible precision."""
    return (
        NONE if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    )


def rate(value: float | None) -> str:
    """Return images per second."""
    return NONE if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def best_throughput(row: Row) -> Throughput | None:
    """Return the batch size that moves the most images, with its rate."""
    return max(row.throughput, key=lambda entry: float(entry.images_per_s), default=None)


def batches(report: Report) -> list[int]:
    """Return every batch size that any row ran."""
    return sorted({entry.batch for row in measured(report) for entry in row.throughput})


def evaluated_on(evaluation: EvaluationImages) -> str:
    """Return what the quality was measured on."""
    kind = "labelled images" if evaluation.labelled else "images without labels"
    return f"{evaluation.images:,} {kind} held out of training"


def teacher_and_student(report: Report) -> list[tuple[str, str, str, str]]:
    """Return the comparison's lines: who, top-1, top-5, agreement with the teacher."""
    teacher, student = report.teacher, report.student
    by, without = (", corrected", ", uncorrected") if (report.pseudo_labels or {}).get("correction") else ("", "")
    lines = [(f"Teacher: {report.run.teacher}{by}", percent(teacher.top1), percent(teacher.top5), NONE)]
    if teacher.top1_uniform_prompts is not None:
        equally = percent(teacher.top1_uniform_prompts)
        lines.append((f"Teacher, prompts weighted equally{without}", equally, NONE, NONE))
    name = f"Student: {model_name(report.run.student)}"
    return [*lines, (name, percent(student.top1), percent(student.top5), percent(student.agreement))]


def audit_lines(report: Report) -> list[tuple[str, str, str, str]]:
    """Return the audit's lines: who, on how many of the ticked images right, the 95 % interval, of how many images."""
    found = report.audit
    if not found:
        return []
    rows: list[tuple[str, TickedShare | TickedRow]] = [
        (f"Teacher: {report.run.teacher}", found.teacher),
        *((row_name(row), row) for row in found.rows),
    ]
    return [
        (who, audited(figures), interval(figures.top1_interval) + " %", f"{figures.images:,}") for who, figures in rows
    ]


def audit_summary(report: Report) -> list[str]:
    """Return the audit in one sentence, if there was one."""
    lines = audit_lines(report)
    names = ["the teacher", *(who for who, *_ in lines[1:])]
    said = [
        f"{who} {right} ({bounds}) of {images}" for who, (_, right, bounds, images) in zip(names, lines, strict=False)
    ]
    return [f"Audit, right on ticked images (95 % interval): {'; '.join(said)}."] if said else []


def audited(figures: TickedShare | TickedRow) -> str:
    """Return an accuracy on ticked images, as bounds where some of them are open."""
    low, high = figures.top1, figures.top1_at_most if isinstance(figures, TickedRow) else figures.top1
    return percent(low) if low == high else f"{percent(low).removesuffix(' %')}–{percent(high)}"


def audit_about(report: Report) -> str:
    """Return what the audit's figures are figures of."""
    found = report.audit
    assert found is not None
    return (
        f"On {found.ticked:,} ticked images of a sample of {found.images:,}, in which every unlabelled image had "
        "the same chance to be. Artifacts are judged on those that are also in the evaluation set. Whoever ticks sees "
        "the teacher's answer, and people tend to agree: if anything, the figures are too high."
    )


def audit_so_far(found: dict[str, Any]) -> str:
    """Return what an audit holds and says so far, for the terminal."""
    teacher = found["teacher"]
    if teacher is None:
        return (
            f"{found['images']:,} of {found['drawn_from']:,} images to tick in a browser; put the ticks.csv that it "
            f"saves in the place of {found['ticks']}, then: prgkit bench"
        )
    return (
        f"{found['ticked']:,} of {found['images']:,} ticked; the teacher is right on {percent(teacher['top1'])} of "
        f"them (95 % interval {interval(teacher['top1_interval'])} %)"
    )


def machine_facts(report: Report) -> list[tuple[str, str]]:
    """Return the machine as pairs of a name and a value, leaving out what it did not say."""
    facts = report.machine
    clocks, warmth = facts.clocks_mhz, facts.temperatures_c
    if facts.clocks_locked is None:
        rule = "not readable here"
    else:
        rule = ("locked" if facts.clocks_locked else "unlocked") + f", {interval(facts.clock_range_mhz, digits=0)} MHz"
    load = facts.load_average
    pairs = [
        ("Processor", f"{facts.cpu}, {facts.usable_cores} of {facts.cores} cores usable"),
        *[("GPU", f"{gpu.name}, driver {gpu.driver}") for gpu in facts.gpus],
        ("Memory", f"{facts.memory_gib} GiB" if facts.memory_gib else ""),
        ("System", f"{facts.os}, {facts.architecture}{', virtual machine' if facts.virtual else ''}"),
        ("Clocks", rule + (f"; {min(clocks)}–{max(clocks)} MHz seen" if clocks else "")),
        ("Governor", facts.governor or ""),
        ("Power mode", facts.power_mode or ""),
        ("Temperature", f"{min(warmth)}–{max(warmth)} °C" if warmth else ""),
        ("Busy before", f"{facts.busy_cores} cores" if facts.busy_cores is not None else ""),
        ("Load average before", " ".join(map(str, load)) if load else ""),
        ("Python", facts.python),
        ("Runtimes", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
    ]
    return [(name, value) for name, value in pairs if value]


def commands(report: Report) -> list[str]:
    """Return every command that led to the report, the one that was typed last."""
    return [*report.made_by, report.command]


HOW = (
    "Latency is the wall-clock time of one call at batch 1, from pixels to logits in host memory (scope: io), timed in "
    "a process of its own after warming up. Artifacts take turns over several rounds; every run counts, none is "
    "trimmed. The interval of the median is a 95 % bootstrap over rounds; p99 needs 1,000 runs. Intervals of shares "
    "are Wilson's, 95 %. Load time excludes the import of the runtime; peak memory is how far a process grows from "
    "before that import to the end of its first batch-1 runs. All samples are in samples.json."
)
