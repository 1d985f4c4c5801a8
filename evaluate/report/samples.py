"""What samples.json holds: every raw sample of a bench, in nanoseconds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prgkit.evaluate.report.schema import ArtifactKey, Model, Stage

SAMPLES_SCHEMA: Literal["prgkit.samples/2"] = "prgkit.samples/2"


class WarmUp(Model):
    """How a warm-up ended."""

    steady: bool = Field(description="Whether two successive windows' medians came within 2 %.")
    runs: int
    seconds: float


class ThroughputSamples(Model):
    """The runs at one batch size."""

    batch: int
    runs_ns: list[int]


class RowSamples(ArtifactKey):
    """Every timed run of one artifact."""

    warm_up: WarmUp | None = None
    rounds_ns: list[list[int]] = Field([], description="[rounds][runs] at batch 1.")
    stages_ns: dict[Stage, list[list[int]]] = Field({}, description="[rounds][runs] at batch 1, by latency stage.")
    throughput: list[ThroughputSamples] = Field([])


class ThreadSweepSamples(ArtifactKey):
    """Every timed run of one artifact at one number of CPU threads."""

    threads: int
    rounds_ns: list[list[int]] = Field(description="[rounds][runs] at batch 1.")


class FixedRateSamples(ArtifactKey):
    """Every frame of one artifact."""

    responses_ns: list[list[int]] = Field(description="[rounds][frames], from when each was due to its answer.")
    runs_ns: list[list[int]] = Field(description="[rounds][frames], of the run alone.")


class SoakWindow(Model):
    """Some seconds of a soak."""

    start_s: float = Field(description="Since the soak began.")
    seconds: float
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float | None = Field(description="None of fewer than 1,000 runs.")
    max_ms: float
    late: int | None = Field(None, description="Late frames; None where runs went back to back.")
    clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttling: list[str] = Field([])


class SoakSamples(Model):
    """The windows of a soak; single runs are not kept, since a day of them would fill a board's memory."""

    windows: list[SoakWindow] = Field([])
    stopped: list[list[SoakWindow]] = Field([], description="The windows of soaks that were stopped and began anew.")


class Samples(Model):
    """samples.json: every raw sample of a bench."""

    schema_version: Literal["prgkit.samples/2"] = Field(SAMPLES_SCHEMA, alias="schema")
    order: list[list[int]] = Field(description="[rounds][turns], indices of rows in the order of their turns.")
    rows: list[RowSamples]
    thread_sweep: list[ThreadSweepSamples] = Field([])
    fixed_rate: list[FixedRateSamples] = Field([])
    soak: SoakSamples = SoakSamples()
