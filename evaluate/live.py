"""Pictures that come over time: the frames of a video or a camera, files dropped into a folder, paths on stdin."""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from prgkit.data.decode import image_suffixes, suffix_of
from prgkit.errors import BackendError, ImagesError

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv"})
ADDRESS = re.compile(r"(rtsps?|https?|udp|tcp)://")
TICK_SECONDS = 0.001  # to which a video's times are exact
POLL_SECONDS = 0.5  # between two looks into a watched folder
SETTLED_SECONDS = 1.0  # a file that has not changed for so long is whole
Reader: TypeAlias = Callable[[], Image.Image]


def is_video(given: str) -> bool:
    """Tell whether this names a video: a file by its suffix, an address, or a camera by its number."""
    return suffix_of(given) in VIDEO_SUFFIXES or is_live(given)


def is_live(given: str) -> bool:
    """Tell whether frames come whether or not they are taken: from a camera's number, or from an address."""
    return bool(ADDRESS.match(given)) or (given.isdecimal() and not os.path.lexists(given))


def comes_over_time(given: str) -> bool:
    """Tell whether this stands for pictures that come one after the other, of which none may wait for the next."""
    return given == "-" or is_live(given)


def frames(source: str, fps: float | None, note: Callable[[str], None]) -> Iterator[tuple[str, Reader]]:
    """Yield the frames of a video, at most ``fps`` a second, each with its time in it as ``source/0012.345s``.

    Of a camera or a stream always the newest is yielded, with the time of day (UTC) at which it came, as
    ``source/20261130T081500.123Z``: what comes while one is looked at is skipped, and counted.

    Raises:
        BackendError: OpenCV is not installed.
        ImagesError: the video cannot be opened.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is said below
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise BackendError("a video needs OpenCV", fix="pip install 'prgkit[video]'") from error
    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    try:
        if not capture.isOpened():
            kind = "camera" if source.isdecimal() else "video"
            raise ImagesError(
                f"{kind} {source} cannot be opened", fix="play it with ffplay or VLC to see what is wrong"
            )
        yield from (newest_frames if is_live(source) else recorded_frames)(cv2, capture, source, fps, note)
    finally:
        capture.release()


def recorded_frames(
    cv2: Any, capture: Any, source: str, fps: float | None, note: Callable[[str], None]
) -> Iterator[tuple[str, Reader]]:
    """Yield the frames of a file, by their own times; those between two that are wanted are not even decoded."""
    rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    place, seconds, due, period = -1, -TICK_SECONDS, 0.0, 1 / fps if fps else 0.0
    while capture.grab():
        place += 1
        # Where the file or OpenCV knows no times, that is 0 of each frame; no two frames have the same name.
        told = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 or place / rate
        seconds = max(told, seconds + TICK_SECONDS)
        reached = seconds + TICK_SECONDS
        if reached < due:
            continue
        due = reached - reached % period + period if period else 0.0  # one frame of each period
        readable, frame = capture.retrieve()
        if readable:
            yield f"{source}/{seconds:08.3f}s", reader_of(frame)
    if place < 0:
        raise ImagesError(
            f"{source} has no frame that can be read", fix="convert it: ffmpeg -i IN -c:v libx264 OUT.mp4"
        )


def newest_frames(
    cv2: Any, capture: Any, source: str, fps: float | None, note: Callable[[str], None]
) -> Iterator[tuple[str, Reader]]:
    """Yield the newest frame of a camera or a stream, until it ends; a thread takes them all, so that none is old."""
    start, started, taken, yielded = time.monotonic(), datetime.now(timezone.utc), 0, 0
    newest: list[tuple[float, Any]] = []
    arrived, ended = threading.Condition(), threading.Event()

    def take() -> None:
        nonlocal taken
        while not ended.is_set():
            readable, frame = capture.read()
            with arrived:
                if readable:
                    taken += 1
                    newest[:] = [(time.monotonic() - start, frame)]
                else:
                    ended.set()
                arrived.notify()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        due = 0.0
        while True:
            with arrived:
                arrived.wait_for(lambda: newest or ended.is_set())
                if not newest:
                    break
                seconds, frame = newest.pop()
            if seconds >= due:
                due = max(due + 1 / fps, seconds) if fps else 0.0
                yielded += 1
                came = started + timedelta(seconds=seconds)
                yield f"{source}/{came:%Y%m%dT%H%M%S}.{came.microsecond // 1000:03}Z", reader_of(frame)
    finally:
        ended.set()
        thread.join(5)
        note(f"{source}: {yielded} of {taken} frames answered, the others skipped so that no answer is late")


def reader_of(frame: Any) -> Reader:
    """Return what turns a frame of OpenCV's, BGR, into a picture."""
    return lambda: Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))


class WrittenOver(str):
    """The path of a picture that is another since it was yielded: it is to be asked about again."""


class Seen(NamedTuple):
    """A file as it was when it was looked at."""

    facts: tuple[int, int]  # its size, and when it was written by the clock of the machine that keeps it
    since: float  # by this process's clock
    shrank: bool = False  # it is no picture that comes slowly, but one that is written over again and again


def watched(folder: Path) -> Iterator[str]:
    """Yield the paths of the pictures in a folder, then of those put there or written over, once whole; without end.

    Raises:
        ImagesError: there is no such folder, or no more.
    """
    if not folder.is_dir():
        raise ImagesError("there is no such folder to watch", where=folder, fix=f"mkdir -p {folder}")
    seen: dict[str, Seen] = {}
    yielded: dict[str, tuple[int, int]] = {}
    while True:
        for name in pictures_in(folder):
            try:
                status = (folder / name).stat()
            except OSError:  # it is gone again
                continue
            facts, now, last = (status.st_size, status.st_mtime_ns), time.monotonic(), seen.get(name)
            if last is None or facts != last.facts:
                shrank = last is not None and (last.shrank or facts[0] < last.facts[0])
                seen[name] = Seen(facts, now, shrank)
            elif facts != yielded.get(name) and (last.shrank or now - last.since >= SETTLED_SECONDS):
                path = str(folder / name)
                path = WrittenOver(path) if name in yielded else path
                yielded[name] = facts
                yield path
        time.sleep(POLL_SECONDS)


def pictures_in(folder: Path) -> list[str]:
    """Return the names of a watched folder's pictures, sorted."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        what = f"the watched folder can no longer be read: {error.strerror}"
        raise ImagesError(what, where=folder, fix="bring it back, and give the same command again") from error
    return [name for name in names if not name.startswith(".") and suffix_of(name) in image_suffixes()]


def paths_on_stdin() -> Iterator[str]:
    """Yield the paths that stand on stdin, one a line."""
    for line in sys.stdin:
        if text := line.rstrip("\r\n"):
            yield text
