"""The words of a report: names of artifacts and machines, numbers with units; the same in all its forms."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prgkit.evaluate.report.schema import (
    ArtifactKey,
    EvaluationImages,
    Int8Verdict,
    Interval,
    Latency,
    Report,
    Row,
    Throughput,
    measured_latency,
)
from prgkit.evaluate.report.sections import Chip

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
    return score(row, labelled=row.top1 is not None)[0] or 0.0


def measured(report: Report) -> list[Row]:
    """Return the rows that have a latency and no failure."""
    return [row for row in report.rows if row.status == "measured"]


def row_name(row: ArtifactKey) -> str:
    """Return a row's name: the artifact, with its runtime and device where these are not ONNX Runtime and the CPU."""
    more = [RUNTIMES.get(row.backend, ""), "" if row.device == "cpu" else row.device]
    where = ", ".join(filter(None, more))
    return f"{row.artifact} ({where})" if where else row.artifact


def row_key(row: ArtifactKey) -> tuple[str, str, str]:
    """Return what no two rows of a report share: the artifact, what runs it, and where."""
    return row.artifact, row.backend, row.device


def missing_chip(row: Row) -> Chip:
    """Return in a word why a row has no figures."""
    return Chip("failed", "bad") if row.status == "failed" else Chip("never executed here", brief="not run")


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
    return f"{ms(bounds[0])}–{ms(bounds[1])}"


def ms(value: float | None) -> str:
    """Return a latency with three significant digits, or a dash where there is none."""
    if value is None:
        return NONE
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def mib(value: float | None) -> str:
    """Return a size with a sensible precision."""
    if value is None:
        return NONE
    return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f}"


def rate(value: float | None) -> str:
    """Return images per second."""
    return NONE if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def best_throughput(row: Row) -> Throughput | None:
    """Return the batch size that moves the most images, with its rate."""
    return max(row.throughput, key=lambda entry: float(entry.images_per_s), default=None)


def evaluated_on(evaluation: EvaluationImages) -> str:
    """Return what the quality was measured on."""
    if evaluation.images == 0:
        return "no images, since none came with the bundle"
    return f"{images_text(evaluation)} held out of training"


def images_text(evaluation: EvaluationImages) -> str:
    """Return how many images there are, and of which kind."""
    return f"{evaluation.images:,} {'labelled images' if evaluation.labelled else 'images without labels'}"
