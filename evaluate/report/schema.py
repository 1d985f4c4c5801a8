"""What report.json holds, key by key; its JSON schema in the reference is made from these models.

A key says its unit; shares of images (top1, agreement_*, ...) are in percent. None: not measured, or not shown here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from prgkit.errors import BenchError
from prgkit.evaluate.report.machine import Gpu as Gpu
from prgkit.evaluate.report.machine import Interval as Interval
from prgkit.evaluate.report.machine import Machine as Machine
from prgkit.evaluate.report.machine import Model as Model
from prgkit.export.bundle.manifest import NonInferiority
from prgkit.storage.documents import read_document
from prgkit.storage.quality import Statistics

REPORT_SCHEMA: Literal["prgkit.report/3"] = "prgkit.report/3"

Stage = Annotated[
    Literal["compute", "io", "pipeline", "end_to_end"],
    Field(
        description="Where a latency is counted from: compute, the GPU's own time for the network; io, from prepared "
        "pixels; pipeline, from a decoded image; end_to_end, from an encoded image. All end at logits in host memory."
    ),
]
STAGES: tuple[Stage, ...] = ("compute", "io", "pipeline", "end_to_end")
Status = Annotated[
    Literal["measured", "failed", "not executed"],
    Field(description="failed: it started and broke; not executed: it cannot run on this machine."),
]
Epoch = Annotated[dict[str, int | float], Field(description="epoch, loss, its terms by name, agreement in percent.")]


class ArtifactKey(Model):
    """Which figures these are: no two rows of a table have the same three."""

    artifact: str = Field(description="The artifact's name in the bundle, such as onnx-fp32.")
    backend: str = Field(description="What runs it, such as onnxruntime or tensorrt_rtx.")
    device: str = Field(description="Where it runs: cpu or cuda.")


class Latency(Model):
    """Wall-clock time of single runs after warming up, every run counted."""

    batch: int = Field(description="Images a run.")
    stage: Stage
    samples: int = Field(description="How many runs were timed.")
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float | None = Field(description="None of fewer than 1,000 runs.")
    max_ms: float
    p50_interval_ms: Interval = Field(description="95 % interval of the median, by Student's t over rounds.")
    round_p50_ms: list[float] = Field(description="The median of each round.")
    steady: bool = Field(description="Whether warming up ended with two windows whose medians are within 2 %.")
    rounds: int = Field(description="How many turns it took.")


class Energy(Model):
    """What the device drew while an artifact ran at batch 1, all that shares its sensor included."""

    power_w: float
    energy_mj: float = Field(description="Millijoules an image: the mean power times the mean latency.")
    power_source: str | None = Field(description="What the power is that of, and which sensor says so.")


class Throughput(Model):
    """Images per second at one batch size, slow runs included."""

    batch: int
    images_per_s: float


class Row(ArtifactKey):
    """One artifact under one runtime on one device: what it took, and how right and how faithful it is."""

    file: str | None = Field(description="Its file in the bundle.")
    precision: str
    threads: int | None = Field(description="CPU threads of a run; None on a GPU.")
    status: Status = "not executed"
    reason: str | None = Field(None, description="Why there are no figures, or not all of them.")
    size_mib: float | None = None
    load_ms: float | None = Field(None, description="Time to open the artifact, without importing its runtime.")
    peak_memory_mib: float | None = Field(None, description="Growth of its process, its runtime library included.")
    switches: dict[str, str] = Field({}, description="How the runtime launches and waits, where it has a choice.")
    latency: Latency | None = Field(None, description="At batch 1, from prepared pixels.")
    energy: Energy | None = None
    throughput: list[Throughput] = Field([], description="One entry a batch size.")
    latency_stages: dict[Stage, Latency] = Field({}, description="At batch 1, by where the time is counted from.")
    top1: float | None = Field(None, description="Percent of the labelled images.")
    top1_interval: Interval | None = None
    lead_bound: float | None = Field(
        None, description="Points by which top-1 is at least above the teacher's own: a one-sided 95 % bound, by image."
    )
    top5: float | None = Field(None, description="Percent; None with five classes or fewer.")
    calibration_error: float | None = Field(None, description="Expected, in percent points, as predict answers.")
    agreement_teacher: float | None = Field(None, description="Percent of images with the teacher's answer.")
    agreement_teacher_interval: Interval | None = None
    agreement_fp32: float | None = Field(None, description="Percent of images with the FP32 student's answer.")
    kl_teacher: float | None = Field(None, description="Mean KL(teacher || artifact) in nats.")
    comparison: NonInferiority | None = Field(None, description="Of INT8: how it stands to FP32 here.")
    faithful: bool | None = Field(None, description="Of INT8: whether it is as good as FP32 here.")


class RunFacts(Model):
    """The run that the bundle was exported from."""

    name: str
    student: str = Field(description="The student's timm model.")
    teacher: str
    objective: str
    uses_labels: bool = Field(False, description="Whether the student or its teacher learned from a few labels.")
    origin: str = Field("", description="What the student began with; empty: random weights.")
    classes: int
    epochs: int


class EvaluationImages(Model):
    """The images that quality was measured on."""

    images: int
    labelled: bool
    source: str
    digest: str = Field(description="The same where images, labels and relabelled classes are the same.")


class TeacherScores(Model):
    """How right the teacher is on the evaluation images; None without labels."""

    top1: float | None
    top5: float | None
    top1_uniform_prompts: float | None = Field(description="With all prompts weighted equally, uncorrected.")


class StudentScores(Model):
    """How right the FP32 student is on the evaluation images, and how often it gives the teacher's answer."""

    top1: float | None
    top5: float | None
    agreement: float | None


class StageImages(Model):
    """The images that the latency stages ran on."""

    images: int
    smallest: tuple[int, int] = Field(description="Width and height in pixels.")
    largest: tuple[int, int]


class ThreadSweepRow(ArtifactKey):
    """One artifact by the number of CPU threads."""

    latency: dict[int, Latency] = Field({}, description="By number of threads.")
    failed: dict[int, str] = Field({}, description="Why there is no latency, by number of threads.")


class ThreadSweep(Model):
    """Latency at several numbers of CPU threads, all artifacts in turns."""

    counts: list[int] = Field(description="The numbers of threads.")
    rows: list[ThreadSweepRow]


class FrameTimes(Model):
    """What frames at a fixed rate took."""

    frames: int
    p50_ms: float = Field(description="Median time from when a frame was due to its answer.")
    p99_ms: float | None = Field(description="None of fewer than 1,000 frames.")
    max_ms: float
    run_p50_ms: float = Field(description="Median time of the run alone.")
    late: int = Field(description="Frames answered after the next one was due.")


class FixedRateRow(ArtifactKey):
    """One artifact at a fixed rate: its times, or why there are none."""

    failed: str | None = None
    times: FrameTimes | None = None


class FixedRate(Model):
    """Frames that come at a fixed rate, as from a camera."""

    fps: float
    deadline_ms: float = Field(description="A frame answered later than this after it was due is late.")
    rows: list[FixedRateRow]


class SoakSpan(Model):
    """What the first or the last minute of a soak was like, in the mean over its windows."""

    p50_ms: float
    p99_ms: float | None
    max_ms: float
    clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


class SoakResult(Model):
    """How a soak went: its end held against its beginning."""

    runs: int
    late: int | None = Field(description="Late frames; None where runs went back to back.")
    compared_s: float = Field(description="The length of first and of last.")
    first: SoakSpan
    last: SoakSpan
    ratio: float = Field(description="Latency of last divided by that of first, by their windows' medians.")
    ratio_interval: Interval
    fastest_p50_ms: float = Field(description="The lowest median of a window.")
    slowest_p50_ms: float = Field(description="The highest median of a window.")
    power_source: str | None = None
    energy_mj: float | None = Field(None, description="Millijoules an image over the whole soak.")
    throttling: list[str] = Field([], description="Why the device held itself back, in words.")
    verdict: Literal["steady", "unstable", "slower", "throttled"]


class Soak(ArtifactKey):
    """One artifact that ran for minutes without a rest."""

    minutes: float
    fps: float | None = Field(description="The rate of its frames; None where runs went back to back.")
    failed: str | None = None
    window_s: float = Field(description="The length of a window.")
    windows: int
    result: SoakResult | None = Field(None, description="None where it failed within the first window.")


class Int8Verdict(ArtifactKey):
    """Whether one INT8 file is used on this machine: it must be as good as FP32, and faster than FP32 and FP16."""

    kept: bool
    faithful: bool = Field(description="Whether it is as good as FP32.")
    faster: bool = Field(description="Whether the whole interval of the ratio lies below 1.")
    comparison: NonInferiority
    margin: float = Field(description="Percent points that it may be worse than FP32.")
    against: str = Field(description="The faster one of FP32 and FP16.")
    ratio: float = Field(description="Its latency divided by that of the other.")
    ratio_interval: Interval


class TickedShare(Model):
    """On how many of the images that a person ticked an answer is right."""

    images: int
    right: int
    top1: float
    top1_interval: Interval


class TickedRow(ArtifactKey):
    """An artifact on the ticked images; where the teacher is wrong and nobody said what is right, it is between two."""

    images: int
    right: int
    unknown: int = Field(description="Images whose right class is not known, with another answer than the teacher's.")
    top1: float = Field(description="Percent, with all unknown counted as wrong.")
    top1_at_most: float = Field(description="Percent, with all unknown counted as right.")
    top1_interval: Interval = Field(description="Covers both.")


class Audit(Model):
    """How right teacher and artifacts are on the images that a person ticked."""

    images: int = Field(description="Images on the sheet.")
    ticked: int
    teacher: TickedShare
    rows: list[TickedRow]


class ClassShare(Model):
    """One class: how often student and teacher are right on its images, or agree on it where there are no labels."""

    name: str
    images: int
    student: float | None = Field(description="Percent; None where the class has no image.")
    student_interval: Interval | None
    teacher: float | None = Field(description="Percent; None without labels.")
    teacher_interval: Interval | None


class ConfusedPair(Model):
    """A class and another one that the student takes it for."""

    name: str
    answer: str
    images: int
    teacher_too: int = Field(description="On how many of these images the teacher gives the same wrong answer.")


class PerClass(Model):
    """Class by class, for the artifact that the headline speaks of."""

    artifact: str = Field(description="The artifact, as people read its name.")
    measure: Literal["recall", "agreement"] = Field(description="recall with labels, agreement with the teacher else.")
    classes: list[ClassShare]
    pairs: list[ConfusedPair] = Field(description="The most frequent mistakes, or differences, first.")


class BaselineLine(ArtifactKey):
    """One figure held against the same one of an older report."""

    threads: int | None
    what: Literal["latency", "size", "top1", "agreement_teacher", "agreement_fp32", "missing"]
    verdict: Literal["worse", "better", "same", "noise"]
    reason: str | None = Field(None, description="Why it is missing now.")
    before: float | None = None
    before_interval: Interval | None = None
    now: float | None = None
    now_interval: Interval | None = None
    change_percent: float | None = Field(None, description="Of a latency or a size.")
    change_points: float | None = Field(None, description="Of a share of images, in percent points.")


class BaselineComparison(Model):
    """This report held against an older one."""

    file: str
    created: str
    run: str
    tolerance: float = Field(description="How much a latency or a size may grow: 0.05 is 5 %.")
    lines: list[BaselineLine]
    regressions: int
    new: list[str] = Field(description="Artifacts that are not in the older report.")
    notes: list[str]


class Report(Model):
    """report.json: everything that a bench found on one machine."""

    schema_version: Literal["prgkit.report/3"] = Field(REPORT_SCHEMA, alias="schema")
    prgkit: str = Field(description="The version that measured.")
    created: str = Field(description="When, in UTC.")
    command: str
    made_by: list[str] = Field([], description="The commands that make the bundle again.")
    machine: Machine
    run: RunFacts
    evaluation: EvaluationImages
    teacher: TeacherScores
    student: StudentScores
    accuracy_ratio: float | None = Field(description="The student's top-1 divided by the teacher's.")
    rows: list[Row]
    stage_images: StageImages | None = None
    thread_sweep: ThreadSweep | None = None
    fixed_rate: FixedRate | None = None
    soak: Soak | None = None
    int8: list[Int8Verdict] = Field([], description="ONNX Runtime's INT8 files on the CPU; the first one is used.")
    audit: Audit | None = None
    training: list[Epoch] = Field([])
    pseudo_labels: Statistics | None = Field(None, description="The run's quality.json, known before training.")
    per_class: PerClass | None = None
    baseline: BaselineComparison | None = None
    notes: list[str] = Field([])

    def to_frame(self) -> Any:
        """Return the rows as a pandas DataFrame, an artifact a line; figures within figures have dotted names.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        pandas: Any = importlib.import_module("pandas")
        return pandas.json_normalize([row.model_dump(mode="json") for row in self.rows])


def measured_latency(row: Row) -> Latency:
    """Return the latency of a row that was measured, which has one."""
    assert row.latency is not None
    return row.latency


def report_file(path: Path) -> Path:
    """Return where a report is: a bench's folder stands for the report.json in it."""
    return path / "report.json" if path.is_dir() else path


def read_report(path: Path) -> Report:
    """Read the report.json of a bench; its folder does as well.

    Raises:
        BenchError: there is none, it is damaged, or it is of another schema.
    """
    fix = "name the report.json that prgkit bench wrote, or measure again: prgkit bench"
    what = "the report of a bench"
    return read_document(report_file(path), Report, REPORT_SCHEMA, what=what, fix=fix, error=BenchError, sealed=False)
