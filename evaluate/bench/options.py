"""What a bench is asked to measure."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from prgkit.errors import BenchError
from prgkit.workers import available_cores, core_limit

LONGEST_SOAK_MINUTES = 24 * 60.0


class BenchOptions(BaseModel):
    """How to measure; `check` refuses what cannot be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int | None = None  # of one call on the CPU; None takes every core that this process may use
    seconds: float = 10.0  # for warming up and measuring one artifact; its latency stages and accuracy come on top
    batches: tuple[int, ...] = (1, 8, 32)  # of the throughput sweep
    sweep_threads: tuple[int, ...] = ()  # numbers of CPU threads whose latencies are compared, after everything else
    fps: float | None = None  # the rate at which frames come, for response times and late frames; None for no frames
    soak_minutes: float | None = None  # how long the best artifact runs without a rest, at the end; None for no soak

    def check(self) -> None:
        """Refuse what cannot be measured, before anything is opened.

        Raises:
            BenchError: an option makes no sense.
        """
        for threads in (self.threads, *self.sweep_threads):
            if threads is not None and threads < 1:
                raise BenchError(
                    f"{threads} threads cannot run anything",
                    fix="give --threads 1 or more, or leave it out for every core; --sweep-threads from 1, too",
                )
        require_cores(self.threads, self.sweep_threads)
        if not self.seconds > 0 or not math.isfinite(self.seconds):
            raise BenchError(
                f"{self.seconds:g} s is no time to measure in", fix="give --seconds a number above 0, such as 10"
            )
        if bad := [batch for batch in self.batches if batch < 1]:
            raise BenchError(
                f"a batch of {bad[0]} images cannot be run", fix="give --batches whole numbers from 1, such as 1,8,32"
            )
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise BenchError(
                f"no camera gives {self.fps:g} frames a second", fix="give --fps a number above 0, such as 30"
            )
        if self.soak_minutes is not None and not 0 < self.soak_minutes <= LONGEST_SOAK_MINUTES:
            raise BenchError(
                f"a soak of {self.soak_minutes:g} minutes cannot be run",
                fix=f"give --soak minutes above 0 and up to {LONGEST_SOAK_MINUTES:g}, a day, such as 30",
            )

    def command(self, bundle_folder: Path, *, threads: int) -> str:
        """Return a command that measures the same on as many ``threads``."""
        options = ["--threads", str(threads), "--seconds", f"{self.seconds:g}", "--batches", comma(self.batches)]
        if self.sweep_threads:
            options += ["--sweep-threads", comma(self.sweep_threads)]
        if self.fps is not None:
            options += ["--fps", f"{self.fps:g}"]
        if self.soak_minutes is not None:
            options += ["--soak", f"{self.soak_minutes:g}"]
        return shlex.join(["prgkit", "bench", "--run", str(bundle_folder), *options])


def require_cores(threads: int | None, sweep_threads: Sequence[int]) -> None:
    """Refuse more threads than this process has cores: they would wait for each other, and look tens of times slower.

    Raises:
        BenchError: there are too few.
    """
    cores = available_cores()
    for option, count in (("--threads", threads or 0), ("--sweep-threads", max(sweep_threads, default=0))):
        if count > cores:
            usable = f"{cores} core{'' if cores == 1 else 's'}"
            raise BenchError(
                f"{option} {count} is more than the {usable} that this process may use ({core_limit()}): threads that "
                "wait for each other look tens of times slower",
                fix=f"give {option} numbers up to {cores}, or leave it out",
            )


def comma(numbers: tuple[int, ...]) -> str:
    """Return numbers as an option takes them."""
    return ",".join(map(str, numbers))
