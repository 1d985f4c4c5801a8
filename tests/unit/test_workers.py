"""Workers: in order and to the byte whatever the machine lacks, and gone when they are no longer needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from prgkit.errors import ImagesError, WorkerError
from prgkit.workers import work_ahead

TASKS = [(number, 1 + number % 3) for number in range(40)]  # the second task is larger than the first


def shape(task: tuple[int, int]) -> tuple[int, ...]:
    return task[1], 1000


def make(task: tuple[int, int], into: NDArray[np.uint8]) -> None:
    into[:] = task[0]


def check(workers: int, stop: Any = ()) -> set[int]:
    """Check every byte, and return by which processes they were made."""
    makers = set()

    def noting(task: tuple[int, int], into: NDArray[np.uint8]) -> None:
        make(task, into)
        into.reshape(-1)[:4] = np.frombuffer(np.uint32(os.getpid()).tobytes(), np.uint8)

    found = []
    for task, pixels in work_ahead(noting, shape, TASKS, workers=workers, stop=stop):
        makers.add(int(np.frombuffer(pixels.tobytes()[:4], np.uint32)[0]))
        assert (pixels.shape, set(pixels.reshape(-1)[4:].tolist())) == (shape(task), {task[0]})
        found.append(task)
    assert found == TASKS
    return makers


def test_results_come_in_order_from_every_worker() -> None:
    makers = check(3)
    assert len(makers) == 3
    assert not any(Path(f"/proc/{maker}").exists() for maker in makers)


def test_without_memory_to_share_results_go_through_the_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("prgkit.workers.mmap.mmap", refuse)
    assert len(check(2)) == 2


def test_with_fewer_processes_than_asked_for_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, left = os.fork, [2]

    def limited() -> int:
        if not left[0]:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left[0] -= 1
        return fork()

    monkeypatch.setattr("os.fork", limited)
    assert len(check(5)) == 2
    assert check(5) == {os.getpid()}


def test_a_worker_that_is_killed_is_told_at_once() -> None:
    def die(task: tuple[int, int], into: NDArray[np.uint8]) -> None:
        if task[0] == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        make(task, into)

    done, began = [], time.monotonic()
    with pytest.raises(WorkerError, match="a process that decodes images was ended by SIGKILL; the system") as caught:
        done.extend(task for task, _ in work_ahead(die, shape, TASKS, workers=2))
    assert done == TASKS[:7]
    assert time.monotonic() - began < 5
    assert (
        caught.value.fix
        == "the same command goes on from here; with --set training.workers=1, or 0, it takes less memory"
    )


@pytest.mark.parametrize("error", [ImagesError("gone", where="x", fix="y"), MemoryError(), ZeroDivisionError("a bug")])
def test_an_error_comes_in_its_turn(error: Exception) -> None:
    def fail(task: tuple[int, int], into: NDArray[np.uint8]) -> None:
        if task[0] == 3:
            raise error
        make(task, into)

    kind = {ImagesError: ImagesError, MemoryError: WorkerError}.get(type(error), RuntimeError)
    told, done = {ImagesError: "gone\n", WorkerError: "no memory left"}.get(kind, "ZeroDivisionError: a bug"), []
    with pytest.raises(kind, match=told):
        done.extend(task for task, _ in work_ahead(fail, shape, TASKS, workers=2))
    assert done == TASKS[:3]


def test_a_stop_is_heard_while_a_slow_worker_is_waited_for() -> None:
    stop: list[int] = []

    def stick(task: tuple[int, int], into: NDArray[np.uint8]) -> None:
        if task[0] == 5:
            time.sleep(60)
        make(task, into)

    began, done = time.monotonic(), []
    previous = signal.signal(signal.SIGALRM, lambda number, _: stop.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    done.extend(task for task, _ in work_ahead(stick, shape, TASKS, workers=2, stop=stop))
    signal.signal(signal.SIGALRM, previous)
    assert done == TASKS[:5]
    assert time.monotonic() - began < 10


ENDINGS = {
    "as a bug ends it": ("next(results); raise ZeroDivisionError", 1),
    "while the results are still held": ("next(results); import sys; sys.held = results", 0),
    "by kill -9": ("next(results); import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_worker_outlives_its_parent(ending: str, tmp_path: Path) -> None:
    statement, code = ENDINGS[ending]
    program = f"""
import os
from prgkit.workers import work_ahead
def make(task, into):
    open(f"{tmp_path}/{{os.getpid()}}", "w").close()
results = work_ahead(make, lambda task: (9,), range(10**6), workers=3)
other = work_ahead(make, lambda task: (9,), range(10**6), workers=1)
next(other)
{statement}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    until = time.monotonic() + 10
    while any(Path(f"/proc/{path.name}").exists() for path in tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) >= 2
    assert not [path.name for path in tmp_path.iterdir() if Path(f"/proc/{path.name}").exists()]


def test_a_full_shared_memory_disk_changes_nothing() -> None:
    folder = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {folder!r}); import test_workers; assert len(test_workers.check(3)) == 3"
    filled = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full"
    command = ["unshare", "-m", "bash", "-c", f'{filled} || exit 77; exec "$0" -c "$1"', sys.executable, program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("mounting is not allowed")
    assert done.returncode == 0, done.stderr
