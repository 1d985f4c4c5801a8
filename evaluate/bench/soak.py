"""A soak: one artifact runs for minutes without a rest, and the last minute is held against the first.

A board without a fan is fast until it is warm. A soak runs in windows; each keeps its median, its tail and what the
device shows of its clock, temperature and power. The ratio of the last minute to the first is that of their windows'
median latencies, with a 95 % interval over windows (Welch's t of the logarithms), and becomes a word:

    throttled   slower: the whole interval lies above `SLOWER`; and the device said that it held itself back, or its
                clock fell by more than a twentieth
    slower      the same, but the device shows no reason
    unstable    not slower, but the medians of two windows lie further apart than `UNSTABLE`, or it became faster
    steady      none of these
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from prgkit.evaluate.bench.journal import BenchJournal, SoakEnd, SoakStart
from prgkit.evaluate.bench.options import BenchOptions
from prgkit.evaluate.bench.worker import Spec, Worker, WorkerFailedError
from prgkit.evaluate.bench.workers import BenchContext, artifact_name
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import P99_SAMPLES
from prgkit.evaluate.report.latency_sections import MINUTE_S, SLOWER, UNSTABLE, known
from prgkit.evaluate.report.samples import SoakSamples, SoakWindow
from prgkit.evaluate.report.schema import Int8Verdict, Interval, Row, Soak, SoakResult, SoakSpan
from prgkit.evaluate.sensors import Meter, midway, power_source
from prgkit.evaluate.system import DeviceState, device_state
from prgkit.metrics import mean_interval
from prgkit.progress import duration

WINDOW_S = 5.0
LEAST_WINDOWS = 12  # of a soak too short for windows of five seconds
WARM_UP_S = 1.0
FELL = 0.95  # a clock below this share of what it was explains why it is slower
NOTES, NOTE_S = 10, 30.0  # a soak says so many times how it goes, and not more often than that

Span = list[tuple[SoakWindow, list[int]]]  # windows with their single runs, in ns
Verdict = Literal["steady", "unstable", "slower", "throttled"]


@dataclass
class SoakProgress:
    """What a soak has measured so far."""

    spec: Spec
    minutes: float
    fps: float | None = None
    windows: list[SoakWindow] = field(default_factory=list)
    # Single runs of the first and the last minute alone: a day of them would fill the memory of a board.
    first: Span = field(default_factory=list)
    last: Span = field(default_factory=list)

    @property
    def window_s(self) -> float:
        """How long a window is."""
        return min(WINDOW_S, 60 * self.minutes / LEAST_WINDOWS)

    @property
    def span_s(self) -> float:
        """How long the beginning and the end are that are compared."""
        return min(MINUTE_S, 60 * self.minutes / 3)

    def add(self, window: SoakWindow, runs_ns: list[int]) -> None:
        """Keep a window, and its runs where its middle lies in the first or, so far, in the last minute."""
        self.windows.append(window)
        if not self.first or middle_s(window) <= self.span_s:
            self.first.append((window, runs_ns))
        since_s = window.start_s + window.seconds - self.span_s
        self.last = [one for one in self.last if middle_s(one[0]) >= since_s] + [(window, runs_ns)]


def soak(spec: Spec, options: BenchOptions, context: BenchContext) -> tuple[Soak | None, SoakSamples]:
    """Run one artifact for the options' minutes without a rest; return the report's section, and all windows.

    A soak that was stopped begins anew, since a rest cools; the windows of the stopped one are returned beside the
    others. One that came to its end is not run again. Without minutes nothing is measured.
    """
    if options.soak_minutes is None:
        return None, SoakSamples()
    journal, fps = context.journal.part("soak"), options.fps
    start = SoakStart(artifact=artifact_name(spec), minutes=options.soak_minutes, fps=fps)
    stopped = windows_before(journal)
    last = journal.of(SoakStart, SoakWindow, SoakEnd)[-1:]
    if last and isinstance(last[0], SoakEnd) and last[0].start == start:
        return last[0].soak, SoakSamples(windows=stopped[-1], stopped=stopped[:-1])
    if stopped:
        lasted_s = sum(window.seconds for window in stopped[-1])
        journal.notes.append(
            f"A soak was stopped after {duration(lasted_s)}, and began anew, since a rest cools the device; the "
            "windows of the stopped one are in samples.json."
        )
        context.note(journal.notes[-1])
    context.note(
        f"soak: {start.artifact} for {start.minutes:g} min, "
        + ("back to back" if fps is None else f"at {fps:g} frames/s")
    )
    journal.add(start)
    progress, failed = SoakProgress(spec, start.minutes, fps), None
    try:
        with Worker(spec, context.images) as worker:
            worker.warm_up(batch=1, window_s=WARM_UP_S / 8, cap_s=WARM_UP_S)
            run_windows(progress, worker, journal=journal, note=context.note)
    except WorkerFailedError as error:
        failed = error.what
    section = Soak(
        **spec.key,
        minutes=start.minutes,
        fps=fps,
        failed=failed,
        window_s=progress.window_s,
        windows=len(progress.windows),
        result=summarize(progress) if progress.windows else None,
    )
    if failed is None:
        journal.add(SoakEnd(start=start, soak=section))
    return section, SoakSamples(windows=progress.windows, stopped=stopped)


def soak_lead(
    rows: Sequence[Row],
    specs: Sequence[Spec | None],
    int8: Sequence[Int8Verdict],
    options: BenchOptions,
    context: BenchContext,
) -> tuple[Soak | None, SoakSamples]:
    """Soak the artifact that the bench's headline speaks of: the fastest that is as good as the best and was kept."""
    lead = formatting.lead_row(rows, int8)
    spec = next((spec for row, spec in zip(rows, specs, strict=True) if row is lead), None)
    return (None, SoakSamples()) if spec is None else soak(spec, options, context)


def windows_before(journal: BenchJournal) -> list[list[SoakWindow]]:
    """Return the windows of each soak that began before the bench was stopped."""
    soaks: list[list[SoakWindow]] = []
    for record in journal.of(SoakStart, SoakWindow):
        if isinstance(record, SoakStart):
            soaks.append([])
        elif soaks and isinstance(record, SoakWindow):
            soaks[-1].append(record)
    return [windows for windows in soaks if windows]


def run_windows(progress: SoakProgress, worker: Worker, *, journal: BenchJournal, note: Callable[[str], None]) -> None:
    """Run window after window until the time has passed; between two, the worker waits for some milliseconds."""
    total_s, noted_s, began = 60 * progress.minutes, 0.0, time.perf_counter()
    while (start_s := time.perf_counter() - began) < total_s:
        window, runs_ns = run_window(progress, worker, start_s=start_s, began=began)
        progress.add(window, runs_ns)
        journal.add(window)
        end_s = window.start_s + window.seconds
        if end_s < total_s and end_s - noted_s >= max(total_s / NOTES, NOTE_S):
            noted_s = end_s
            temperature = "" if window.temperature_c is None else f", {window.temperature_c:g} °C"
            left = duration(max(0.0, total_s - end_s))
            note(f"soak: p50 {formatting.ms(window.p50_ms)} ms{temperature}, {left} left")


def run_window(progress: SoakProgress, worker: Worker, *, start_s: float, began: float) -> tuple[SoakWindow, list[int]]:
    """Run for one window that starts at ``start_s``; return it, and its single runs in ns."""
    device, window_s, fps = progress.spec.device, progress.window_s, progress.fps
    meter, states = Meter(device), list[DeviceState]()

    def sample() -> None:
        meter.sample()
        states.append(device_state(device))

    late = None
    with midway(sample, after_s=window_s / 2):
        if fps is None:
            runs_ns = worker.measure(batch=1, seconds=window_s)
        else:
            responses_ns, runs_ns = worker.fixed_rate(fps=fps, seconds=window_s)
            late = int((np.asarray(responses_ns) > 1e9 / fps).sum())
    end_s = time.perf_counter() - began
    reading, state = meter.read(), states[0] if states else DeviceState()
    window = SoakWindow(
        start_s=start_s,
        seconds=end_s - start_s,
        **percentiles_ms(runs_ns)._asdict(),
        late=late,
        clock_mhz=state.clock_mhz,
        temperature_c=state.temperature_c,
        power_w=reading.power_w,
        throttling=reading.throttling,
    )
    return window, runs_ns


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


def summarize(progress: SoakProgress) -> SoakResult:
    """Return how a soak went, as far as it went."""
    windows = progress.windows
    first, last = ([window for window, _ in span] for span in (progress.first, progress.last))
    ratio, interval = ratio_of(last, first)
    medians, powers_w = [window.p50_ms for window in windows], known(windows, "power_w")
    runs, seconds = sum(window.runs for window in windows), sum(window.seconds for window in windows)
    late = [window.late for window in windows if window.late is not None]
    return SoakResult(
        runs=runs,
        late=sum(late) if late else None,
        compared_s=progress.span_s,
        first=summarize_span(progress.first),
        last=summarize_span(progress.last),
        ratio=ratio,
        ratio_interval=interval,
        fastest_p50_ms=min(medians),
        slowest_p50_ms=max(medians),
        power_source=power_source(progress.spec.device) if powers_w else None,
        energy_mj=1000 * float(np.mean(powers_w)) * seconds / runs if powers_w else None,
        throttling=sorted({reason for window in windows for reason in window.throttling}),
        verdict=verdict(windows, first, last, interval),
    )


def summarize_span(span: Span) -> SoakSpan:
    """Return what the first or the last minute was like."""
    times, windows = percentiles_ms([run for _, runs in span for run in runs]), [window for window, _ in span]
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


def ratio_of(last: Sequence[SoakWindow], first: Sequence[SoakWindow]) -> tuple[float, Interval]:
    """Return the ratio of the windows' median latencies (their geometric means), with its 95 % interval."""
    after, before = (np.log([window.p50_ms for window in windows]) for windows in (last, first))
    low, high = mean_interval(after.tolist(), minus=before.tolist())
    return float(np.exp(after.mean() - before.mean())), (math.exp(low), math.exp(high))


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
