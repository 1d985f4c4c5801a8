"""One resident process per artifact: it opens a runner, predicts and measures when told, else sleeps."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate.bench.timing import clocked_runs, fixed_rate_runs, timed_runs
from prgkit.evaluate.report.samples import WarmUp
from prgkit.evaluate.report.schema import STAGES, Stage
from prgkit.native_output import redirect_output
from prgkit.workers import no_main_script

if TYPE_CHECKING:
    from prgkit.data.preprocessing import Preprocessing
    from prgkit.export.runtimes.base import Runner, Setup

Pixels = NDArray[np.uint8]  # [batch, height, width, 3]
P = ParamSpec("P")
R = TypeVar("R")

# Rotating inputs must not crowd the device's memory: at most this many arrays, and this many bytes, per batch size.
ROTATED_ARRAYS = 64
ROTATED_BYTES = 64 << 20


@dataclass(frozen=True)
class Spec:
    """What a worker opens, and whose figures these are; it can be sent to another process."""

    artifact: str
    backend: str
    device: str
    threads: int | None = None
    takes_threads: bool = False  # whether another number of threads makes a difference
    setup: Setup | None = None  # how the file is opened

    @property
    def key(self) -> dict[str, str]:
        """Whose figures these are, as the models of a report name it."""
        return {"artifact": self.artifact, "backend": self.backend, "device": self.device}


class WorkerFailedError(BenchError):
    """A worker that died, or whose runner refused; ``alive`` tells which."""

    def __init__(self, what: str, *, alive: bool) -> None:
        super().__init__(what)
        self.alive = alive


class Resident:
    """What a worker holds: the open runner and the images that it measures with."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.turn = 0
        self.rotations: dict[int, list[Pixels]] = {}

    def open(self, images: Pixels) -> float:
        """Open the artifact; return the ms that took, without the import of the runtime library."""
        self.images = images
        self.rotation(1)  # before the baseline: the harness's own memory is not the artifact's
        reset_peak()
        self.baseline_mib = resident_mib()
        opening = opener(self.spec)
        start = time.perf_counter_ns()
        self.runner: Runner = opening()
        return (time.perf_counter_ns() - start) / 1e6

    def predict(self, pixels: Pixels) -> NDArray[np.float32]:
        """Return the logits [batch, classes]."""
        return self.runner.run(pixels)

    def warm_up(self, *, batch: int, window_s: float, cap_s: float) -> WarmUp:
        """Run windows of ``window_s`` until two in a row have medians within 2 %, or ``cap_s`` have passed."""
        start = time.perf_counter()
        before, runs = None, 0
        while True:
            samples = self.measure(batch=batch, seconds=window_s, at_least=3)
            runs += len(samples)
            median = float(np.median(samples))
            passed = time.perf_counter() - start
            if before is not None and abs(median - before) <= 0.02 * before:
                return WarmUp(steady=True, runs=runs, seconds=passed)
            if passed >= cap_s:
                return WarmUp(steady=False, runs=runs, seconds=passed)
            before = median

    def measure(self, *, batch: int, seconds: float, at_least: int = 1, settle_s: float = 0.0) -> list[int]:
        """Return the ns of every run within ``seconds``, and of ``at_least``, after ``settle_s`` of untimed runs."""
        return self.settled_runs(self.runner.run, self.rotation(batch), seconds, at_least, settle_s)

    def settled_runs(
        self, run: Callable[[Any], Any], rotation: Sequence[Any], seconds: float, at_least: int, settle_s: float
    ) -> list[int]:
        """Run untimed for ``settle_s``, then return the ns of each timed run."""
        gc.collect()
        gc.disable()  # a collection of the harness's own garbage is not the artifact's latency
        try:
            if settle_s:
                self.turn, _ = timed_runs(run, rotation, settle_s, 1, self.turn)
            self.turn, samples = timed_runs(run, rotation, seconds, at_least, self.turn)
        finally:
            gc.enable()
        return samples

    def take_images(self, files: Sequence[bytes], preprocessing: Preprocessing) -> list[Stage]:
        """Keep the images, encoded and decoded, and what prepares them; return the stages that can be measured."""
        from prgkit.data.preprocessing import load_image

        self.prepare = preprocessing.prepare
        self.load = load_image
        self.files, self.decoded = list(files), [load_image(file) for file in files]
        return [stage for stage in STAGES if stage != "compute" or hasattr(self.runner, "compute_ns")]

    def measure_stage(self, stage: Stage, *, seconds: float, settle_s: float) -> list[int]:
        """Return the ns of every run from pixels (io), a decoded image (pipeline) or its file (end_to_end).

        The stage compute is what a GPU itself takes, by its own clock.
        """
        if stage == "compute":
            runner: Any = self.runner  # not every one has such a clock
            return clocked_runs(runner.compute_ns, self.rotation(1), seconds)
        run = self.runner.run
        starts: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
            "io": (run, self.rotation(1)),
            "pipeline": (lambda image: run(self.prepare(image)[None]), self.decoded),
            "end_to_end": (lambda file: run(self.prepare(self.load(file))[None]), self.files),
        }
        whole, rotation = starts[stage]
        return self.settled_runs(whole, rotation, seconds, 1, settle_s)

    def fixed_rate(self, *, fps: float, seconds: float) -> tuple[list[int], list[int]]:
        """Return the ns of every frame that comes at a rate: from when it was due, and of its run alone.

        The garbage collector works as it does in an application.
        """
        return fixed_rate_runs(self.runner.run, self.rotation(1), fps, seconds)

    def peak_memory_mib(self) -> float:
        """Return how far the process grew, runtime library included, since before it opened the artifact."""
        return max(0.0, peak_mib() - self.baseline_mib)

    def switches(self) -> dict[str, str]:
        """Return how the runner launches and waits, where it can do so in several ways; known after its first runs."""
        return dict(getattr(self.runner, "switches", {}))

    def rotation(self, batch: int) -> list[Pixels]:
        """Return the arrays [batch, height, width, 3] that runs take in turn, made once."""
        if batch not in self.rotations:
            count = len(self.images)
            arrays = max(2, min(ROTATED_ARRAYS, count, ROTATED_BYTES // (batch * self.images[0].nbytes)))
            starts = [index * count // arrays for index in range(arrays)]
            self.rotations[batch] = [self.images[np.arange(start, start + batch) % count] for start in starts]
        return self.rotations[batch]


def remote(method: Callable[Concatenate[Resident, P], R]) -> Callable[Concatenate[Worker, P], R]:
    """Return what lets a worker's process call a method of its `Resident`, and gives what that returns."""

    def ask(worker: Worker, /, *arguments: P.args, **options: P.kwargs) -> R:
        answer: R = worker.ask(method.__name__, *arguments, **options)
        return answer

    return ask


class Worker:
    """A process that holds one artifact open. Its methods raise WorkerFailedError, and nothing else, when it fails."""

    def __init__(self, spec: Spec, images: Pixels, *, patience_s: float = 600) -> None:
        self.spec = spec
        self.patience_s = patience_s
        self.log = tempfile.NamedTemporaryFile(prefix="prgkit-worker-", suffix=".log")  # noqa: SIM115 (closed in close)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.log.name, spec), daemon=True)
        try:
            with no_main_script():
                self.process.start()
            theirs.close()  # so that its death reads as the end of the pipe
            self.load_ms = remote(Resident.open)(self, images)
        except BaseException:
            self.close()
            raise

    predict = remote(Resident.predict)
    warm_up = remote(Resident.warm_up)
    measure = remote(Resident.measure)
    take_images = remote(Resident.take_images)
    measure_stage = remote(Resident.measure_stage)
    fixed_rate = remote(Resident.fixed_rate)
    peak_memory_mib = remote(Resident.peak_memory_mib)
    switches = remote(Resident.switches)

    def ask(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Send one command and wait for its answer."""
        try:
            self.connection.send((command, arguments, options))
            if not self.connection.poll(self.patience_s):
                self.process.kill()
                raise WorkerFailedError(f"no answer to {command} within {self.patience_s:.0f} s", alive=False)
            outcome, value = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerFailedError(self.cause_of_death(), alive=False) from error
        if outcome == "error":
            raise WorkerFailedError(value, alive=True)
        return value

    def cause_of_death(self) -> str:
        """Say how the process ended, with the last thing that it printed."""
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            hint = ", as when memory runs out" if -code == signal.SIGKILL else ""
            how = f"was ended by {signal.Signals(-code).name}{hint}"
        else:
            how = f"ended with exit code {code}"
        printed = [
            line.strip() for line in Path(self.log.name).read_text(errors="replace").splitlines() if line.strip()
        ]
        return f"its process {how}" + (f": {shorten(printed[-1])}" if printed else "")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.connection.close()
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()
        self.log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(connection: Connection, log: str, spec: Spec) -> None:
    """Be the worker: answer commands until the other end closes. It blocks on the pipe, so idle it uses no core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides who ends
    redirect_output(log)  # a crash's last words are its reason
    resident = Resident(spec)
    try:
        while True:
            command, arguments, options = connection.recv()
            try:
                answer = ("ok", getattr(resident, command)(*arguments, **options))
            except Exception as error:
                answer = ("error", reason(error))
            connection.send(answer)
    except (EOFError, OSError):  # the parent has closed its end, or is gone
        return


def opener(spec: Spec) -> Callable[[], Runner]:
    """Import all that a specification needs, and return what opens it: this alone is the time that loading takes."""
    assert spec.setup is not None
    setup = replace(spec.setup, threads=spec.threads)
    setup.load_libraries()
    return setup.open


def reason(error: Exception) -> str:
    """Return one line that says what went wrong."""
    if isinstance(error, PrgkitError):
        return shorten(error.what)
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return shorten(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def shorten(text: str, limit: int = 240) -> str:
    """Return ``text`` on at most ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def reset_peak() -> None:
    """Ask Linux to forget the process's peak so far; where it refuses, the peak includes Python's start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def resident_mib() -> float:
    """Return the process's memory now."""
    value = status_mib("VmRSS")
    return peak_mib() if value is None else value


def peak_mib() -> float:
    """Return the process's highest memory so far."""
    value = status_mib("VmHWM")
    if value is not None:
        return value
    import resource  # here, since Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)


def status_mib(field: str) -> float | None:
    """Return a memory field of /proc/self/status, or None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), None)
