"""How long work reports: stages with progress, and notes; the command line draws them."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What long work reports to: the terminal, nobody, or a callback of yours."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """A stage of ``total`` units begins; the one before has ended."""

    def advance(self, count: int, facts: str = "") -> None:
        """``count`` more units are done; ``facts`` says what they showed."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


def silent(text: str) -> None:
    """Tell no one."""


class NullProgress:
    """Reports to nobody."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """Tell no one."""

    def advance(self, count: int, facts: str = "") -> None:
        """Tell no one."""

    def note(self, text: str) -> None:
        """Tell no one."""


NULL_PROGRESS = NullProgress()


def duration(seconds: float) -> str:
    """Return a time as people say it: ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
