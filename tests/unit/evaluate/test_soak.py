"""A soak: windows without a rest, the last minute against the first in a word, and what a kill leaves of it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prgkit.errors import BenchError
from prgkit.evaluate.bench import soak as module
from prgkit.evaluate.bench.journal import BenchJournal
from prgkit.evaluate.bench.options import BenchOptions
from prgkit.evaluate.bench.soak import SoakProgress, soak, soak_lead, summarize
from prgkit.evaluate.bench.worker import Spec, WorkerFailedError
from prgkit.evaluate.bench.workers import BenchContext
from prgkit.evaluate.report.html import page
from prgkit.evaluate.report.latency_sections import soak as soak_section
from prgkit.evaluate.report.markdown import table_header, table_rows
from prgkit.evaluate.report.samples import Samples, SoakSamples, SoakWindow, WarmUp
from prgkit.evaluate.report.schema import Int8Verdict, Latency, Report, Row, Soak
from prgkit.evaluate.report.sections import Document, Section

MS = 1_000_000
SPEC = Spec("onnx-fp32", "onnxruntime", "cpu")
PIXELS = np.zeros((2, 4, 4, 3), dtype=np.uint8)


def soaked(*medians_ms: float, failed: str | None = None, **seen: Any) -> tuple[Report, Samples]:
    """Return the report of a soak of half a minute a window, whose windows had these medians, and its windows."""
    one = SoakProgress(SPEC, minutes=len(medians_ms) / 2)
    for index, median_ms in enumerate(medians_ms):
        shown = {"clock_mhz": None, "temperature_c": None, "power_w": None, "throttling": []}
        shown |= {key: values[index] for key, values in seen.items()}
        runs_ns = [int(median_ms * MS)] * 1000
        times = module.percentiles_ms(runs_ns)._asdict()
        one.add(SoakWindow(start_s=30.0 * index, seconds=30.0, **times, **shown), runs_ns)
    found = Soak(
        **SPEC.key,
        **{"minutes": len(medians_ms) / 2, "fps": None, "failed": failed, "window_s": 30, "windows": len(medians_ms)},
        result=summarize(one),
    )
    return report_of(found), Samples(order=[], rows=[], soak=SoakSamples(windows=one.windows))


def run(minutes: float | None, *, fps: float | None = None, kept: BenchJournal | None = None, note: Any = print) -> Any:
    """Run a soak of the stand-in that the test has put in the worker's place."""
    context = BenchContext(PIXELS, seconds=1, journal=kept or BenchJournal(), note=note)
    return soak(SPEC, BenchOptions(soak_minutes=minutes, fps=fps), context)


def report_of(found: Soak | None) -> Report:
    """Return a report of nothing but a soak."""
    return Report.model_construct(soak=found)


def shown(report: Report, samples: Samples | None = None) -> Section:
    section = soak_section(report, samples)
    assert section is not None
    return section


def html_of(report: Report, samples: Samples) -> str:
    return page(Document("a bench", ((shown(report, samples),),)))


def test_the_last_minute_against_the_first() -> None:
    report, _ = soaked(2.0, 2.0, 2.2, 2.6, 3.0, 3.0)
    assert report.soak is not None
    found = report.soak.result
    assert found is not None
    assert (found.ratio, found.ratio_interval) == (pytest.approx(1.5), pytest.approx((1.5, 1.5)))
    assert (found.first.p50_ms, found.last.p50_ms, found.last.p99_ms) == (2.0, 3.0, 3.0)
    assert (report.soak.windows, found.runs, found.verdict) == (6, 6000, "slower")
    assert list(shown(report).summary) == [
        "Soak, onnx-fp32, 3 min back to back: slower, the last minute took 1.50 times the first (1.50–1.50), "
        "p50 2.00 → 3.00 ms."
    ]
    section = shown(report)
    assert "This device does not show its clock, its temperature, its power." in section.about
    assert table_rows(section)[1] == ["last minute", "3.00", "3.00", "3.00", "–", "–", "–"]
    assert [len(line) for line in table_rows(section)] == [len(table_header(section)[0])] * 2


def test_only_the_first_and_the_last_minute_keep_their_single_runs() -> None:
    one = SoakProgress(SPEC, minutes=10)
    for index in range(100):
        one.add(SoakWindow.model_construct(start_s=5.01 * index, seconds=5.0), [index])
    assert [runs for _, runs in one.first] == [[index] for index in range(12)]
    assert [runs for _, runs in one.last] == [[index] for index in range(88, 100)]


@pytest.mark.parametrize(
    ("medians", "seen", "word"),
    [
        ((2.0, 2.0, 2.0, 2.0, 2.09, 2.09), {}, "steady"),  # 4.5 %
        ((2.0, 2.0, 2.0, 2.0, 2.2, 2.0), {}, "steady"),  # its interval reaches down to 1
        ((2.0, 2.0, 2.3, 2.0, 2.0, 2.0), {}, "unstable"),
        ((2.0, 2.0, 2.0, 2.0, 1.88, 1.88), {}, "unstable"),  # faster is not steady
        ((2.0, 2.0, 2.0, 2.0, 2.2, 2.2), {}, "slower"),
        ((2.0, 2.0, 2.0, 2.0, 2.2, 2.2), {"clock_mhz": [1500, 1500, 1500, 1500, 1490, 1450]}, "slower"),
        ((2.0, 2.0, 2.0, 2.0, 2.2, 2.2), {"clock_mhz": [1500, 1500, 1500, 1500, 1300, 1300]}, "throttled"),
        ((2.0, 2.0, 2.0, 2.0, 2.2, 2.2), {"throttling": [[], [], [], [], ["too hot"], []]}, "throttled"),
        ((2.0, 2.0, 2.0, 2.0, 2.0, 2.0), {"throttling": [[], [], [], [], ["power cap"], []]}, "steady"),
    ],
)
def test_its_word_follows_the_thresholds(medians: tuple[float, ...], seen: Any, word: str) -> None:
    report, _ = soaked(*medians, **seen)
    assert report.soak is not None
    assert report.soak.result is not None
    assert report.soak.result.verdict == word


def test_what_the_device_shows_is_told_and_drawn() -> None:
    report, samples = soaked(
        *(2.0, 2.0, 2.2, 2.6, 3.0, 3.0),
        clock_mhz=[1500, 1500, 1400, 1200, 1000, 1000],
        temperature_c=[41.0, 45.0, None, 80.0, 84.0, 84.0],
        power_w=[6.0, 6.0, 5.0, 5.0, 4.0, 4.0],
        throttling=[[], [], [], ["too hot"], ["too hot"], []],
    )
    assert list(shown(report).summary) == [
        "Soak, onnx-fp32, 3 min back to back: throttled, the last minute took 1.50 times the first (1.50–1.50), "
        "p50 2.00 → 3.00 ms, 1,500 → 1,000 MHz, 43 → 84 °C, 6.0 → 4.0 W, the device said: too hot."
    ]
    assert report.soak is not None
    assert report.soak.result is not None
    assert report.soak.result.energy_mj == pytest.approx(5.0 * 180 / 6000 * 1000)  # 5 W for 180 s over 6,000 images
    assert "This device does not show" not in shown(report).about
    html = html_of(report, samples)
    assert html.count("<svg") == 2
    for drawn in html.split("<svg")[1:]:
        root = ElementTree.fromstring("<svg" + drawn.split("</svg>")[0] + "</svg>")
        lines = [one.get("points", "").split() for one in root.iter("{http://www.w3.org/2000/svg}polyline")]
        temperature = "Temperature" in drawn
        assert [len(points) for points in lines] == (
            [5] if temperature else [6, 6]
        )  # a window without one has no point


class Told:
    """Stands for the worker's process: slower with each window, on a clock that only its runs turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, killed_at: int | None = None, dies_at: int | None = None):
        self.now, self.windows, self.killed_at, self.dies_at = 0.0, 0, killed_at, dies_at
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module, "Worker", lambda spec, images: self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def warm_up(self, **_: Any) -> WarmUp:
        return WarmUp(steady=True, runs=1, seconds=0.0)

    def measure(self, *, batch: int, seconds: float) -> list[int]:
        if self.windows == self.killed_at:
            raise KeyboardInterrupt
        if self.windows == self.dies_at:
            raise WorkerFailedError("its process was ended by SIGKILL", alive=False)
        self.windows += 1
        self.now += seconds
        return [MS * self.windows] * 10

    def fixed_rate(self, *, fps: float, seconds: float) -> tuple[list[int], list[int]]:
        return [20 * MS, 5 * MS], self.measure(batch=1, seconds=seconds)[:2]


def test_a_soak_runs_for_its_time_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    Told(monkeypatch)
    said: list[str] = []
    found, raw = run(10, note=said.append)
    assert found is not None
    assert found.result is not None
    assert (found.windows, found.window_s, found.result.compared_s, found.result.late) == (120, 5, 60, None)
    assert [window.p50_ms for window in raw.windows] == list(range(1, 121))
    assert said[0] == "soak: onnx-fp32 for 10 min, back to back"
    assert said[1] == "soak: p50 12.0 ms, 9 min left"
    assert len(said) == 10  # one for each tenth but the last
    found, raw = run(0.5, fps=100, note=said.append)
    assert found is not None
    assert found.result is not None
    assert (found.windows, found.window_s, found.result.compared_s, found.result.late) == (12, 2.5, 10, 12)
    assert shown(report_of(found)).summary[0].endswith(", 12 of 24 frames late.")
    assert run(None, note=said.append) == (None, SoakSamples())
    assert soak_section(report_of(None)) is None


def test_a_soak_that_was_killed_begins_anew_and_its_windows_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Told(monkeypatch, killed_at=7)
    with pytest.raises(KeyboardInterrupt):
        run(1, kept=BenchJournal(tmp_path / "unfinished"))
    Told(monkeypatch)
    again = BenchJournal(tmp_path / "unfinished")
    said: list[str] = []
    found, raw = run(1, note=said.append, kept=again)
    assert found is not None
    assert found.windows == 12
    assert [[window.p50_ms for window in windows] for windows in raw.stopped] == [[1, 2, 3, 4, 5, 6, 7]]
    assert (
        again.notes[-1]
        == said[0]
        == (
            "A soak was stopped after 35 s, and began anew, since a rest cools the device; the windows of the stopped one "
            "are in samples.json."
        )
    )
    json.dumps(raw.model_dump(mode="json"), allow_nan=False)
    Told(monkeypatch, killed_at=0)  # killed after it, while the report was written: it is not run a third time
    third = BenchJournal(tmp_path / "unfinished")
    assert run(1, note=said.append, kept=third) == (found, raw)
    with pytest.raises(KeyboardInterrupt):
        run(2, note=said.append, kept=third)


def test_a_worker_that_dies_in_a_soak_leaves_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    Told(monkeypatch, dies_at=24)
    found, _ = run(10)
    report = report_of(found)
    assert (
        shown(report)
        .summary[0]
        .startswith(
            "Soak, onnx-fp32, 10 min back to back: failed: its process was ended by SIGKILL; until then slower, "
        )
    )
    Told(monkeypatch, dies_at=0)
    found, raw = run(10)
    report = report_of(found)
    assert list(shown(report).summary) == [
        "Soak, onnx-fp32, 10 min back to back: failed: its process was ended by SIGKILL."
    ]
    assert "<h2>Soak</h2>" in html_of(report, Samples(order=[], rows=[], soak=raw))
    assert "<svg" not in html_of(report, Samples(order=[], rows=[], soak=raw))


def test_the_artifact_of_the_headline_is_soaked(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(artifact: str, p50_ms: float, backend: str = "onnxruntime", status: Any = "measured") -> Row:
        whose = {"artifact": artifact, "device": "cpu", "backend": backend, "precision": artifact[5:]}
        latency = Latency.model_construct(p50_ms=p50_ms)
        return Row.model_construct(**whose, latency=latency, status=status, top1=60.0, agreement_fp32=99.0)

    rows = [row("onnx-fp32", 2.0), row("onnx-int8", 1.0), row("torch", 0.5, "torch")]
    rows.append(row("engine", 0.1, status="not executed"))
    specs = [Spec(name, "onnxruntime", "cpu") for name in ("onnx-fp32", "onnx-int8", "torch")]
    seen: list[str] = []
    monkeypatch.setattr(module, "soak", lambda spec, *_, **__: (seen.append(spec.artifact), {}))
    key = {"artifact": "onnx-int8", "backend": "onnxruntime", "device": "cpu"}
    for int8 in ([], [Int8Verdict.model_construct(**key, kept=False)]):
        soak_lead(rows, [*specs, None], int8, BenchOptions(soak_minutes=1), BenchContext(PIXELS, seconds=1))
    assert seen == ["onnx-int8", "onnx-fp32"]


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf"), 1441.0])
def test_a_soak_of_no_time_or_of_more_than_a_day_is_refused(minutes: float) -> None:
    with pytest.raises(BenchError) as caught:
        BenchOptions(soak_minutes=minutes).check()
    assert caught.value.fix == "give --soak minutes above 0 and up to 1440, a day, such as 30"
