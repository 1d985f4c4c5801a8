"""The loops in which runs are timed: one after another, by a GPU's own clock, and at the rate of a camera."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any


def timed_runs(
    run: Callable[[Any], Any], rotation: Sequence[Any], seconds: float, at_least: int, turn: int
) -> tuple[int, list[int]]:
    """Run until ``seconds`` have passed and ``at_least`` runs are done; return the next turn and each run's ns."""
    clock, count = time.perf_counter_ns, len(rotation)
    samples: list[int] = []
    end = clock() + int(seconds * 1e9)
    while True:
        pixels = rotation[turn % count]
        start = clock()
        run(pixels)
        stop = clock()
        samples.append(stop - start)
        turn += 1
        if stop >= end and len(samples) >= at_least:
            return turn, samples


def clocked_runs(clocked: Callable[[Any], int], rotation: Sequence[Any], seconds: float) -> list[int]:
    """Run until ``seconds`` have passed; return the ns that each run says it took."""
    samples: list[int] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        samples.append(clocked(rotation[len(samples) % len(rotation)]))
    return samples


def fixed_rate_runs(
    run: Callable[[Any], Any],
    rotation: Sequence[Any],
    fps: float,
    seconds: float,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[int], list[int]]:
    """Run once for each frame due within ``seconds``; return each frame's ns since it was due, and its run's.

    A frame that finds the one before still running waits for it, as in a queue: a schedule that slips by what was slow
    would hide it. Where the queue only grows, the loop ends after twice the ``seconds``.
    """
    responses: list[int] = []
    runs: list[int] = []
    first = clock() + int(1e9 / fps)
    for frame in range(max(1, int(fps * seconds))):
        due = first + int(frame * 1e9 / fps)
        if (wait := due - clock()) > 0:
            sleep(wait / 1e9)
        start = clock()
        run(rotation[frame % len(rotation)])
        stop = clock()
        responses.append(stop - due)
        runs.append(stop - start)
        if stop - first > 2e9 * seconds:
            break
    return responses, runs
