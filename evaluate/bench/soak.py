"""A soak: one artifact runs for minutes without a rest, and the last minute is held against the first.

A board without a fan is fast until it is warm. A soak runs in windows; each keeps its median, its tail and what the
device shows of its clock, temperature and power. The ratio of the last minute to the first is that of their windows'
median latencies, with a 95 % bootstrap interval over windows, and becomes a word:

    throttled   slower: the whole interval lies above `SLOWER`; and the device said that it held itself back, or its
                clock fell by more than a twentieth
    slower      the same, but the device shows no reason
    unstable    not slower, but the medians of two windows lie further apart than `UNSTABLE`, or it became faster
    steady      none of these
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from prgkit.errors import BenchError
from prgkit.evaluate.bench.journal import BenchJournal
from prgkit.evaluate.bench.latency import label, recording_failure
from prgkit.evaluate.bench.worker import Pixels, Spec, Worker, artifact_key
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import P99_SAMPLES
from prgkit.evaluate.report.schema import (
    Int8Verdict,
    Interval,
    Row,
    Soak,
    SoakResult,
    SoakSamples,
    SoakSpan,
    SoakWindow,
)
from prgkit.evaluate.report.soak_section import MINUTE_S, SLOWER, UNSTABLE, known
from prgkit.evaluate.sensors import Meter, midway, power_source
from prgkit.evaluate.system import DeviceState, device_state
from prgkit.progress import duration

WINDOW_S = 5.0
LEAST_WINDOWS = 12  # of a soak too short for windows of five seconds
WARM_UP_S = 1.0
MOST_MINUTES = 24 * 60.0
FELL = 0.95  # a clock below this share of what it was explains why it is slower
NOTES, NOTE_S = 10, 30.0  # a soak says so many times how it goes, and not more often than that


@dataclass
class SoakProgress:
    """What a soak measured; ``failed`` says why the rest is missing."""

    spec: Spec
    failed: str | None = None
    windows: list[SoakWindow] = field(default_factory=list)
    # Single runs, in ns, of the first and the last minute alone: a day of them would fill the memory of a board.
    first: list[tuple[SoakWindow, list[int]]] = field(default_factory=list)
    last: list[tuple[SoakWindow, list[int]]] = field(default_factory=list)

    def add(self, window: SoakWindow, runs_ns: list[int], *, span_s: float) -> None:
        """Keep a window, and its runs where its middle lies in the first or, so far, in the last ``span_s``."""
        self.windows.append(window)
        if not self.first or middle_s(window) <= span_s:
            self.first.append((window, runs_ns))
        since_s = window.start_s + window.seconds - span_s
        self.last = [one for one in self.last if middle_s(one[0]) >= since_s] + [(window, runs_ns)]


def soak(
    spec: Spec,
    images: Pixels,
    minutes: float | None,
    *,
    fps: float | None,
    note: Callable[[str], None],
    kept: BenchJournal | None = None,
) -> tuple[Soak | None, SoakSamples]:
    """Run one artifact for ``minutes`` without a rest; return the report's section, and all windows.

    Args:
        spec: what is opened: the artifact that the bench's headline speaks of.
        images: real images [images, height, width, 3] that the runs take in turn.
        minutes: how long; None measures nothing.
        fps: the rate at which frames come; None runs back to back.
        note: told how it goes, now and then.
        kept: where the windows are kept as they come. A soak that was stopped begins anew, since a rest cools; the
            windows of the stopped one are returned beside the others. One that came to its end is not run again.
    """
    if minutes is None:
        return None, SoakSamples()
    journal = (kept or BenchJournal()).part("soak")
    whose = {"artifact": label(spec), "minutes": minutes, "fps": fps}
    stopped = begun(journal)
    latest = [record for record in journal.records if record.get("kind", "").startswith(journal.prefix)][-1:]
    if latest and "found" in latest[0] and latest[0]["whose"] == whose:
        return Soak.model_validate(latest[0]["found"]), SoakSamples(windows=stopped[-1], stopped=stopped[:-1])
    if stopped:
        lasted_s = sum(window.seconds for window in stopped[-1])
        journal.notes.append(
            f"A soak was stopped after {duration(lasted_s)}, and began anew, since a rest cools the device; the "
            "windows of the stopped one are in samples.json."
        )
        note(journal.notes[-1])
    rate = "back to back" if fps is None else f"at {fps:g} frames/s"
    note(f"soak: {label(spec)} for {minutes:g} min, {rate}")
    journal.add("begin", whose=whose)
    one = SoakProgress(spec)
    window_s = min(WINDOW_S, 60 * minutes / LEAST_WINDOWS)
    span_s = min(MINUTE_S, 60 * minutes / 3)
    with recording_failure(one), Worker(spec, images) as worker:
        worker.warm_up(batch=1, window_s=WARM_UP_S / 8, cap_s=WARM_UP_S)
        run_windows(one, worker, 60 * minutes, window_s=window_s, span_s=span_s, fps=fps, note=note, journal=journal)
    section = Soak(
        **artifact_key(spec),
        minutes=minutes,
        fps=fps,
        failed=one.failed,
        window_s=window_s,
        windows=len(one.windows),
        result=summarize(one, span_s=span_s) if one.windows else None,
    )
    if one.failed is None:
        journal.add("end", whose=whose, found=section.model_dump(mode="json"))
    return section, SoakSamples(windows=one.windows, stopped=stopped)


def soak_lead(
    rows: Sequence[Row],
    specs: Sequence[Spec | None],
    int8: Sequence[Int8Verdict],
    images: Pixels,
    minutes: float | None,
    **how: Any,
) -> tuple[Soak | None, SoakSamples]:
    """Soak the artifact that the bench's headline speaks of: the fastest that is as good as the best and was kept."""
    lead = formatting.lead_row(rows, int8)
    spec = next((spec for row, spec in zip(rows, specs, strict=True) if row is lead), None)
    return (None, SoakSamples()) if spec is None else soak(spec, images, minutes, **how)


def check_minutes(minutes: float | None) -> None:
    """Refuse a soak of no time, or of more than a day.

    Raises:
        BenchError: it is one of these.
    """
    if minutes is not None and not 0 < minutes <= MOST_MINUTES:
        raise BenchError(
            f"a soak of {minutes:g} minutes cannot be run",
            fix=f"give --soak minutes above 0 and up to {MOST_MINUTES:g}, a day, such as 30",
        )


def run_windows(
    one: SoakProgress,
    worker: Worker,
    total_s: float,
    *,
    window_s: float,
    span_s: float,
    fps: float | None,
    note: Callable[[str], None],
    journal: BenchJournal,
) -> None:
    """Run window after window until ``total_s`` have passed; between two, the worker waits for some milliseconds."""
    device, told_s, began = one.spec["device"], 0.0, time.perf_counter()
    while (start_s := time.perf_counter() - began) < total_s:
        meter, states = Meter(device), list[DeviceState]()

        def sample(meter: Meter = meter, states: list[DeviceState] = states) -> None:
            meter.sample()
            states.append(device_state(device))

        with midway(sample, after_s=window_s / 2):
            late = None
            if fps is None:
                runs = worker.measure(batch=1, seconds=window_s)
            else:
                responses, runs = worker.fixed_rate(fps=fps, seconds=window_s)
                late = int((np.asarray(responses) > 1e9 / fps).sum())
        end_s = time.perf_counter() - began
        reading, state = meter.read(), states[0] if states else DeviceState()
        window = SoakWindow(
            start_s=start_s,
            seconds=end_s - start_s,
            **percentiles_ms(runs)._asdict(),
            late=late,
            clock_mhz=state.clock_mhz,
            temperature_c=state.temperature_c,
            power_w=reading.power_w,
            throttling=reading.throttling,
        )
        one.add(window, runs, span_s=span_s)
        journal.add("window", **window.model_dump(mode="json"))
        if end_s < total_s and end_s - told_s >= max(total_s / NOTES, NOTE_S):
            told_s = end_s
            warmth = "" if window.temperature_c is None else f", {window.temperature_c:g} °C"
            left = duration(max(0.0, total_s - end_s))
            note(f"soak: p50 {formatting.ms(window.p50_ms)} ms{warmth}, {left} left")


class Percentiles(NamedTuple):
    """What is kept of a window's runs; p99 needs 1,000 of them."""

    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float | None
    max_ms: float


def percentiles_ms(runs_ns: Sequence[int]) -> Percentiles:
    """Return how many runs there were, their percentiles, and the slowest."""
    runs_ms = np.asarray(runs_ns) / 1e6
    p50, p90, p99 = (float(value) for value in np.percentile(runs_ms, [50, 90, 99]))
    return Percentiles(len(runs_ms), p50, p90, p99 if len(runs_ms) >= P99_SAMPLES else None, float(runs_ms.max()))


def middle_s(window: SoakWindow) -> float:
    """Return the middle of a window, in seconds since the soak began."""
    return window.start_s + window.seconds / 2


def begun(journal: BenchJournal) -> list[list[SoakWindow]]:
    """Return the windows of each soak that an earlier sitting began."""
    stopped: list[list[SoakWindow]] = []
    for record in journal.records:
        if record.get("kind") == f"{journal.prefix}begin":
            stopped.append([])
        elif record.get("kind") == f"{journal.prefix}window" and stopped:
            content = {key: value for key, value in record.items() if key not in ("kind", "at")}
            stopped[-1].append(SoakWindow.model_validate(content))
    return [windows for windows in stopped if windows]


def summarize(one: SoakProgress, *, span_s: float) -> SoakResult:
    """Return how a soak went, as far as it went."""
    windows = one.windows
    first, last = ([window for window, _ in end] for end in (one.first, one.last))
    ratio, interval = ratio_of(last, first)
    medians, powers_w = [window.p50_ms for window in windows], known(windows, "power_w")
    runs, seconds = sum(window.runs for window in windows), sum(window.seconds for window in windows)
    late = [window.late for window in windows if window.late is not None]
    return SoakResult(
        runs=runs,
        late=sum(late) if late else None,
        compared_s=span_s,
        first=span(one.first),
        last=span(one.last),
        ratio=ratio,
        ratio_interval=interval,
        fastest_p50_ms=min(medians),
        slowest_p50_ms=max(medians),
        power_source=power_source(one.spec["device"]) if powers_w else None,
        energy_mj=1000 * float(np.mean(powers_w)) * seconds / runs if powers_w else None,
        throttling=sorted({reason for window in windows for reason in window.throttling}),
        verdict=verdict(windows, first, last, interval),
    )


def span(end: Sequence[tuple[SoakWindow, list[int]]]) -> SoakSpan:
    """Return what the first or the last minute was like."""
    times, windows = percentiles_ms([run for _, runs in end for run in runs]), [window for window, _ in end]
    return SoakSpan(
        p50_ms=times.p50_ms,
        p99_ms=times.p99_ms,
        max_ms=times.max_ms,
        clock_mhz=mean(known(windows, "clock_mhz")),
        temperature_c=mean(known(windows, "temperature_c")),
        power_w=mean(known(windows, "power_w")),
    )


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None of nothing."""
    return float(np.mean(values)) if values else None


def ratio_of(
    last: Sequence[SoakWindow], first: Sequence[SoakWindow], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, Interval]:
    """Return the ratio of the windows' median latencies (their geometric means), with its 95 % bootstrap interval."""
    generator = np.random.default_rng(seed)
    logs = [np.log([window.p50_ms for window in windows]) for windows in (last, first)]
    drawn = [log[generator.integers(len(log), size=(resamples, len(log)))].mean(axis=1) for log in logs]
    low, high = np.exp(np.percentile(drawn[0] - drawn[1], [2.5, 97.5]))
    return float(np.exp(logs[0].mean() - logs[1].mean())), (float(low), float(high))


Verdict = Literal["steady", "unstable", "slower", "throttled"]


def verdict(
    windows: Sequence[SoakWindow], first: Sequence[SoakWindow], last: Sequence[SoakWindow], interval: Interval
) -> Verdict:
    """Return throttled, slower, unstable or steady, as the module says."""
    medians = [window.p50_ms for window in windows]
    if interval[0] > SLOWER:
        before, after = (mean(known(some, "clock_mhz")) for some in (first, last))
        fell = before is not None and after is not None and after < FELL * before
        return "throttled" if fell or any(window.throttling for window in windows) else "slower"
    return "unstable" if max(medians) > UNSTABLE * min(medians) or interval[1] < 1 / SLOWER else "steady"
