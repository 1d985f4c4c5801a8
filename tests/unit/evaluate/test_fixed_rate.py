"""Frames at a rate, on a clock that the test turns: waiting counts, nothing is dropped, lateness is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prgkit.evaluate.bench.fixed_rate import measure_fixed_rate, summarize
from prgkit.evaluate.bench.notes import failure_notes
from prgkit.evaluate.bench.timing import fixed_rate_runs
from prgkit.evaluate.bench.worker import Spec
from prgkit.evaluate.bench.workers import BenchContext
from prgkit.evaluate.report.latency_sections import fixed_rate as fixed_rate_section
from prgkit.evaluate.report.markdown import table_header, table_rows
from prgkit.evaluate.report.samples import FixedRateSamples
from prgkit.evaluate.report.schema import FixedRate, Report, ThreadSweep

MS = 1_000_000
SPEC: dict[str, Any] = {"artifact": "onnx-fp32", "backend": "onnxruntime", "device": "cpu"}


class Clock:
    """Time that passes only where something sleeps or runs."""

    def __init__(self, *runs_ms: int) -> None:
        self.now, self.runs_ms, self.seen = 0, list(runs_ms), []  # type: ignore[var-annotated]

    def read(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)

    def run(self, given: Any) -> None:
        self.seen.append(given)
        self.now += self.runs_ms.pop(0) * MS


def at_100_fps(clock: Clock, *, seconds: float) -> tuple[list[float], list[float]]:
    responses, runs = fixed_rate_runs(clock.run, ["a", "b"], 100, seconds, clock=clock.read, sleep=clock.sleep)
    return [ns / MS for ns in responses], [ns / MS for ns in runs]


def test_a_frame_that_waits_for_the_one_before_is_timed_from_when_it_was_due() -> None:
    clock = Clock(4, 23, 4, 4, 4)
    # Due at 0, 10, 20, 30, 40 ms: the second runs until 33, the third from 33 to 37, the fourth from 37 to 41.
    assert at_100_fps(clock, seconds=0.05) == ([4, 23, 17, 11, 5], [4, 23, 4, 4, 4])
    assert clock.seen == ["a", "b", "a", "b", "a"]


def test_a_queue_that_only_grows_ends_after_twice_the_time() -> None:
    responses, runs = at_100_fps(Clock(*[30] * 50), seconds=0.5)
    assert len(runs) == 34  # 34 runs of 30 ms are the first to pass 1 s
    assert responses[:3] == [30, 50, 70]


def test_late_frames_are_counted_and_p99_needs_a_thousand() -> None:
    one = FixedRateSamples(
        **SPEC, responses_ns=[[4 * MS, 23 * MS], [17 * MS, 10 * MS]], runs_ns=[[4 * MS, 20 * MS], [6 * MS, 8 * MS]]
    )
    found = summarize(one, fps=100)
    assert found.model_dump() == {
        **SPEC, "failed": None, "times": {
            "frames": 4, "p50_ms": 13.5, "p99_ms": None, "max_ms": 23.0, "run_p50_ms": 7.0, "late": 2
        },
    }  # fmt: skip
    many = FixedRateSamples(**SPEC, responses_ns=[[MS] * 1000], runs_ns=[[MS] * 1000])
    times = summarize(many, fps=100).times
    assert times is not None
    assert times.p99_ms == pytest.approx(1.0)
    rows = [found, summarize(FixedRateSamples(**SPEC, responses_ns=[], runs_ns=[]), fps=100, failed="died")]
    report = Report.model_construct(fixed_rate=FixedRate(fps=100.0, deadline_ms=10.0, rows=rows))
    section = fixed_rate_section(report)
    assert section is not None
    assert table_rows(section) == [
        ["onnx-fp32", "13.5", "–", "23.0", "7.00", "2 of 4"], ["onnx-fp32", "failed", "–", "–", "–", "–"]
    ]  # fmt: skip
    assert table_header(section)[0] == ["frames", "p50 ms", "p99 ms", "slowest ms", "run p50 ms", "late"]
    assert section.summary == (
        "onnx-fp32 at 100 frames/s: p50 13.5 ms, slowest 23.0 ms, late 2 of 4.", "onnx-fp32 at 100 frames/s: failed."
    )  # fmt: skip
    swept = {"counts": [1, 64], "rows": [{**SPEC, "artifact": "b", "failed": {"1": "none", "64": "two at most"}}]}
    assert failure_notes(ThreadSweep.model_validate(swept), report.fixed_rate) == [
        "b failed with 1 thread: none.", "b failed with 64 threads: two at most.",
        "onnx-fp32 failed at the camera's rate: died.",
    ]  # fmt: skip
    assert failure_notes(None, None) == []
    assert "late after 10.0 ms. Clocks drop between frames" in section.about
    assert fixed_rate_section(Report.model_construct()) is None


def test_without_a_rate_nothing_is_opened() -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert measure_fixed_rate([Spec(**SPEC)], None, BenchContext(images, seconds=1)) == (None, [])
