"""The terminal: results on stdout; progress, notes and everything else for people on stderr."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from prgkit.progress import duration

LINE = 80  # columns, where text is wrapped
PIPED = 120  # a pipe has no width; a file of it should hold whole lines
SECONDS_A_LINE = 30.0  # between two lines of progress, where no bar can move


class Terminal:
    """What a chain of commands prints, and the progress bar of the stage it is in (a `prgkit.progress.Progress`)."""

    def __init__(self, *, says_results: bool, shows_progress: bool) -> None:
        self.out = Console(
            quiet=not says_results, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED
        )
        self.err = Console(stderr=True, quiet=not shows_progress, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._live: Live | None = None
        self._facts = Text(style="dim", no_wrap=True, overflow="ellipsis")
        self._log: StageLog | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_stage()

    def say(self, *parts: str | tuple[str, str]) -> None:
        """Print one line of a result, from plain text and (text, style) pairs; brackets in it are just brackets."""
        self.end_stage()
        self.out.print(Text.assemble(*parts))

    def show(self, table: RenderableType) -> None:
        """Print a table."""
        self.end_stage()
        self.out.print(table)

    def verbatim(self, text: str) -> None:
        """Print text as it is, to the last space."""
        self.end_stage()
        self.out.out(text, end="")

    def document(self, text: str) -> None:
        """Print a document in place of all results; a pipe that is closed early is no error of ours."""
        self.end_stage()
        Console(highlight=False).out(text)

    def listing(self, rows: Mapping[str, str]) -> None:
        """Print names and what is said of each in two columns, wrapped."""
        indent = max(map(len, rows)) + 4
        for name, text in rows.items():
            lines = textwrap.wrap(text, LINE - indent, break_long_words=False, break_on_hyphens=False)
            value = f"\n{' ' * indent}".join(lines)
            self.say(f"  {name:<{indent - 2}}{value}".rstrip())

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage: a bar with count, speed and time left, or a line now and then where no bar can move."""
        self.end_stage()
        if not self.err.is_terminal or self.err.quiet:
            self.note(f"{stage}: {total:,} {unit}")
            self._log = None if self.err.quiet else StageLog(stage, total, unit)
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description:>8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        self._bar.add_task(stage, total=total, rate="", unit=unit)
        self._facts.plain = ""
        self._live = Live(Group(self._bar, self._facts), console=self.err)
        self._live.start()

    def advance(self, count: int, facts: str = "") -> None:
        """Move the bar; the facts have the line below it, where they push nothing off the screen."""
        if self._log is not None and (line := self._log.advance(count, facts, time.monotonic())):
            self.note(line)
        if self._bar is None:
            return
        task = self._bar.tasks[0]
        rate = f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else ""
        self._bar.update(task.id, advance=count, rate=rate)
        if facts:
            self._facts.plain = f"{'':>8} {facts}"

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.err.print(Text(text))

    def end_stage(self) -> None:
        """Take the bar away."""
        self._log = None
        if self._live is not None:
            self._live.stop()
            self._live = self._bar = None


class StageLog:
    """How far a stage is, for a log: a line is due when `SECONDS_A_LINE` have passed since the last."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.before = 0
        self.began = self.told = 0.0

    def advance(self, count: int, facts: str, now: float) -> str | None:
        """Count on, and return a line if one is due."""
        self.done += count
        if not self.began:  # the first step warms up, or counts what an earlier process did: it says nothing of speed
            self.before, self.began, self.told = self.done, now, now
        if now - self.told < SECONDS_A_LINE:
            return None
        self.told = now
        return self.line(facts, now - self.began)

    def line(self, facts: str, seconds: float) -> str:
        """Say how many are done, how fast, how long it still takes, and what they showed."""
        parts = [f"{self.stage}: {self.done:,}/{self.total:,} {self.unit}"]
        if speed := (self.done - self.before) / seconds:
            rate = f"{speed:,.0f} {self.unit}/s" if speed >= 10 else f"{speed:.2g} {self.unit}/s"
            parts += [rate, f"{duration((self.total - self.done) / speed)} left"]
        return "  ".join([*parts, facts]).rstrip()
