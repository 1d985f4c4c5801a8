"""Processes that work ahead: results come in order, a death is told at once, and no shared-memory disk is needed.

What a worker makes lies in memory that forks share and that no file system holds. PyTorch's loader puts it into
/dev/shm, of which containers have 64 MB, and waits for ever where that is full; its queues' semaphores lie there, too.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import PrgkitError, WorkerError

AHEAD = 2  # tasks that each worker has, where results need not go through its pipe
POLL_SECONDS = 0.2  # between two looks at whether to stop, while a result is waited for
HAS_FORK = hasattr(os, "fork")
Task = TypeVar("Task")
Bytes = NDArray[np.uint8]


class Worker(NamedTuple):
    """A process, and what tasks and results go through."""

    process: BaseProcess
    pipe: Connection


class SharedMemory(NamedTuple):
    """Memory that processes share, in slots of one size, or none; a result that does not fit goes through the pipe."""

    buffer: mmap.mmap | None
    slot_bytes: int
    slots: int

    def place(self, number: int, shape: tuple[int, ...]) -> Bytes | None:
        """Return where result ``number`` lies, as long as it is the last one of its slot."""
        size = math.prod(shape)
        if self.buffer is None or size > self.slot_bytes:
            return None
        return np.frombuffer(self.buffer, np.uint8, size, number % self.slots * self.slot_bytes).reshape(shape)


def work_ahead(
    make: Callable[[Task, Bytes], None],
    shape: Callable[[Task], tuple[int, ...]],
    tasks: Iterable[Task],
    *,
    workers: int,
    stop: Sequence[int] = (),
) -> Iterator[tuple[Task, Bytes]]:
    """Yield each task, in order, with the bytes of its ``shape`` that ``make`` filled in one of ``workers`` processes.

    The bytes are to be copied before the next ones are asked for. Once ``stop`` holds something, what is not made yet
    is not waited for, and the rest is left out. Where no process can be started, the work is done in this one.

    Raises:
        WorkerError: a worker was killed, or had no memory left.
        Exception: what ``make`` raised, in order.
    """
    plan = enumerate(tasks)
    first = next(plan, None)
    if first is None:
        return
    memory = shared(math.prod(shape(first[1])), AHEAD * workers + 1)
    with started(workers, _work, make, shape, memory) as team:
        if not team:
            for _, task in (first, *plan):
                made_here = np.empty(shape(task), np.uint8)
                make(task, made_here)
                yield task, made_here
            return
        # A worker that waits for its result to be taken out of the pipe would not take another task out of it.
        most = len(team) * (AHEAD if memory.buffer else 1)
        waiting: deque[tuple[int, Task]] = deque()

        def hand_out(number: int, task: Task) -> None:
            with contextlib.suppress(OSError):  # a death is told when the result is asked for
                team[number % len(team)].pipe.send((number, task))
            waiting.append((number, task))

        def fill_up() -> None:
            while len(waiting) < most and (following := next(plan, None)) is not None:
                hand_out(*following)

        hand_out(*first)
        fill_up()
        while waiting:
            number, task = waiting.popleft()
            worker = team[number % len(team)]
            while not worker.pipe.poll(POLL_SECONDS):
                if stop:
                    return
            made = result_of(worker)
            if made is None:
                made = memory.place(number, shape(task))
            fill_up()
            if made is not None:
                yield task, made


def shared(slot_bytes: int, slots: int) -> SharedMemory:
    """Return memory for so many results, where forks can share it."""
    try:
        return SharedMemory(mmap.mmap(-1, max(1, slots * slot_bytes)) if HAS_FORK else None, slot_bytes, slots)
    except OSError:  # not as much as that
        return SharedMemory(None, slot_bytes, slots)


@contextmanager
def started(count: int, work: Callable[..., None], *arguments: Any) -> Iterator[list[Worker]]:
    """Start ``count`` processes, or as many as the system allows; they are gone when this ends, whatever ends it."""
    team: list[Worker] = []
    try:
        for _ in range(count):
            try:
                team.append(start(work, *arguments))
            except OSError:  # no more processes, or no more open files
                break
        yield team
    finally:
        for worker in team:
            _running.discard(worker)
            worker.process.kill()
            worker.process.join(5)
            worker.pipe.close()


def start(work: Callable[..., None], *arguments: Any) -> Worker:
    """Start one process that does ``work(pipe, *arguments)``."""
    context: Any = multiprocessing.get_context("fork" if HAS_FORK else None)
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    worker = Worker(process, ours)
    _running.add(worker)  # before the fork, which closes its copy of our end
    try:
        with signals_waiting():
            process.start()
    except BaseException:
        _running.discard(worker)
        ours.close()
        raise
    finally:
        theirs.close()
    return worker


@contextmanager
def signals_waiting() -> Iterator[None]:
    """Let a Ctrl-C wait until a process that begins has said that it will not listen to it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def no_main_script() -> Iterator[None]:
    """Keep a process that is started inside from running the caller's script first, which may have no main guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def result_of(worker: Worker) -> Bytes | None:
    """Return what a worker sends: its result, or None where that lies in the shared memory.

    Raises:
        WorkerError: the worker has died, or memory ran out.
        Exception: what it raised.
    """
    try:
        sent = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(1)
        code = worker.process.exitcode or 0
        raise died(f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}") from None
    if isinstance(sent, MemoryError):
        raise died("found no memory left")
    if isinstance(sent, BaseException):
        raise sent
    return sent  # type: ignore[no-any-return]


def died(how: str) -> WorkerError:
    """Build the error for a worker that is no more."""
    return WorkerError(
        f"a process that decodes images {how}; the system ends what is too large when memory runs out",
        fix="the same command goes on from here; with --set training.workers=1, or 0, it takes less memory",
    )


def _work(
    pipe: Connection, make: Callable[[Any, Bytes], None], shape: Callable[[Any], tuple[int, ...]], memory: SharedMemory
) -> None:
    """Make what is asked for until there is nobody left to ask."""
    # Ctrl-C, and often SIGTERM, reach the whole process group; the process that is worked for alone decides what they
    # mean, and a worker that died of one would take the checkpoint with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "torch" in sys.modules:  # a fork has none of its parent's OpenMP threads, and would wait for them for ever
        sys.modules["torch"].set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, task = pipe.recv()
            pipe.send(_attempt(make, task, shape(task), memory.place(number, shape(task))))


def _attempt(
    make: Callable[[Any, Bytes], None], task: Any, shape: tuple[int, ...], place: Bytes | None
) -> Bytes | Exception | None:
    """Return None for what was made in its place, what was made elsewhere, or what went wrong."""
    try:
        made = np.empty(shape, np.uint8) if place is None else place
        make(task, made)
        return made if place is None else None
    except (PrgkitError, MemoryError) as error:
        return error
    except Exception:
        return RuntimeError(f"in a process that decodes images:\n{traceback.format_exc()}")


_running: set[Worker] = set()


def _forget() -> None:
    """Close a fork's copies of our ends: a worker is to learn that its parent is gone, whoever else was forked."""
    while _running:
        _running.pop().pipe.close()


def _end_all() -> None:
    """End what still runs: at its exit Python asks by a signal to which no worker listens, and waits."""
    for worker in _running:
        worker.process.kill()


if HAS_FORK:
    os.register_at_fork(after_in_child=_forget)
atexit.register(_end_all)


def available_cores() -> int:
    """Return how many cores this process really has: a container, Slurm or taskset may leave it few of many."""
    return max(1, min(bound_cores(), *quotas()))


def bound_cores() -> int:
    """Return how many cores the system would ever run this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def core_limit() -> str:
    """Say what it is that leaves this process no more cores."""
    if min(quotas()) < bound_cores():
        return "by its container's quota"
    if bound_cores() < (os.cpu_count() or 0):
        return "by its CPU affinity: taskset, Slurm or a container"
    return "all that there are"


def quotas() -> list[int]:
    """Return the cores that control groups allow this process, rounded up, as far as anything is set."""
    found = [1 << 16]
    with contextlib.suppress(OSError, ValueError):
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        found.append(math.ceil(int(limit) / int(period)))
    with contextlib.suppress(OSError, ValueError):
        limit, period = (Path("/sys/fs/cgroup/cpu", f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
        if int(limit) > 0:
            found.append(math.ceil(int(limit) / int(period)))
    return found


def default_workers() -> int:
    """Return how many processes decode: half the cores, since the other half trains where there is no GPU."""
    return max(1, min(8, available_cores() // 2))
