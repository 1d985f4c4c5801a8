"""What a bench has measured so far, kept as it comes, so that one that was killed loses no more than a round.

Going on has to be honest: samples of another machine, another file or another day must not be mixed into one figure.
So a bench goes on only with the same artifacts, options, versions and processor since the same start of the system, and
only within `MOST_PAUSE_S` of the last sample; every worker is opened and warmed up anew, and the report says that it
was measured in two sittings. What came before under other conditions is never used: it stays, in a folder of its own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate.report.schema import Machine, Model, Soak, Stage
from prgkit.storage.atomic import fingerprint, sha256
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked
from prgkit.storage.reproducible import write_array

MOST_PAUSE_S = 600.0
# What describes the machine and does not change while a bench is under way.
LASTING = (
    *("cpu", "cores", "usable_cores", "governor", "clock_range_mhz"),
    *("memory_gib", "kernel", "versions", "power_mode"),
)
BOOT = Path("/proc/sys/kernel/random/boot_id")


class RoundTurn(Model):
    """An artifact's turn in a round at batch 1."""

    artifact: int
    runs_ns: list[int]
    seconds: float
    power_w: float | None


class RoundRecord(Model):
    """A round at batch 1: whose turns they were, and what was measured."""

    turns: list[int]
    measured: list[RoundTurn]


class BatchRecord(Model):
    """An artifact's runs at a batch size."""

    artifact: int
    batch: int
    runs_ns: list[int]
    seconds: float


class StageTurn(Model):
    """An artifact's turn at a latency stage."""

    artifact: int
    stage: Stage
    runs_ns: list[int]


class StageRecord(Model):
    """A round of the latency stages."""

    measured: list[StageTurn]


class LogitsRecord(Model):
    """An artifact's logits, which lie in a file beside the journal."""

    artifact: int
    file: str
    sha256: str


class FramesRecord(Model):
    """An artifact's turn at a fixed rate."""

    round: int
    artifact: int
    responses_ns: list[int]
    runs_ns: list[int]


class SoakStart(Model):
    """What a soak that began was asked to do."""

    artifact: str
    minutes: float
    fps: float | None


class SoakEnd(Model):
    """A soak that came to its end."""

    start: SoakStart
    soak: Soak


class FailureRecord(Model):
    """An artifact that failed."""

    artifact: int
    reason: str


AnyRecord = TypeVar("AnyRecord", bound=Model)
Line = dict[str, Any]  # of the journal: when, which kind, and the record


class BenchJournal:
    """A journal of samples and logits in a folder; without a folder, it keeps nothing."""

    def __init__(self, folder: Path | None = None, conditions: Any = None) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.lines: list[Line] = []
        self.prefix = ""
        if folder is None:
            return
        now, made_from = time.time(), fingerprint(conditions)
        self.file = Journal(folder / "journal.jsonl", Line)
        before = read_lines(self.file.path)
        kinds = [line["kind"] for line in before if "kind" in line]
        if any(not kind.endswith(FailureRecord.__name__) for kind in kinds):  # measured something
            age_s = now - max(line["at"] for line in before)
            if before[0].get("conditions") == made_from and 0 <= age_s <= MOST_PAUSE_S:
                self.lines = before
                self.file.replace(before)
                self.notes.append(self.resumed(age_s))
            else:
                self.notes.append(self.set_aside(before))
        elif folder.exists():
            self.remove()
        self.append({"conditions": made_from})

    def part(self, name: str) -> BenchJournal:
        """Return the same journal for a part of the bench, whose records are its own."""
        part = copy.copy(self)  # the lines and the notes are shared
        part.prefix = f"{self.prefix}{name}: "
        return part

    def of(self, *kinds: type[AnyRecord]) -> list[AnyRecord]:
        """Return the records of some kinds, in the order in which they were measured."""
        by_name = {self.prefix + kind.__name__: kind for kind in kinds}
        return [
            by_name[line["kind"]].model_validate({key: line[key] for key in line if key not in ("at", "kind")})
            for line in self.lines
            if line.get("kind") in by_name
        ]

    def add(self, record: Model) -> None:
        """Keep what has just been measured."""
        if self.folder is not None:
            self.append({"kind": self.prefix + type(record).__name__, **record.model_dump(mode="json")})

    def add_logits(self, artifact: int, logits: NDArray[np.float32]) -> None:
        """Keep an artifact's logits [images, classes] in a file of their own, and after it the record that names it."""
        if self.folder is None:
            return
        path = self.folder / f"logits-{len(self.lines)}.npy"
        write_array(path, logits)
        self.add(LogitsRecord(artifact=artifact, file=path.name, sha256=sha256(path)))

    def logits(self) -> dict[int, NDArray[np.float32]]:
        """Return the logits by artifact, without those whose file is not what was written."""
        folder = self.folder or Path()
        return {
            record.artifact: np.load(folder / record.file, allow_pickle=False)
            for record in self.of(LogitsRecord)
            if (folder / record.file).is_file() and sha256(folder / record.file) == record.sha256
        }

    def append(self, line: Line) -> None:
        """Write one line."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines.append({"at": time.time(), **line})
        self.file.append(self.lines[-1])

    def resumed(self, age_s: float) -> str:
        """Say what this bench goes on from."""
        sittings, rounds = 1 + sum("conditions" in line for line in self.lines), len(self.of(RoundRecord))
        return (
            f"Measured in {sittings} sittings: the one before was stopped after {rounds} rounds, and "
            f"this one went on {age_s:.0f} s later with new processes, warmed up again."
        )

    def set_aside(self, before: Sequence[Line]) -> str:
        """Move what was measured under other conditions out of the way, and say where it is."""
        assert self.folder is not None
        began = datetime.fromtimestamp(before[0]["at"], timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        aside = self.folder.with_name(f"stopped-{began}")
        if aside.exists():
            raise PrgkitError(f"{aside.name} is there already", where=aside, fix="move it elsewhere")
        self.folder.rename(aside)
        rounds = sum(line.get("kind") == RoundRecord.__name__ for line in before)
        return (
            f"A bench that was stopped after {rounds} rounds, too long ago or under other conditions, is not part of "
            f"this one: its samples are in {aside.name}."
        )

    def remove(self) -> None:
        """Remove the journal: the report holds all of it."""
        if self.folder is not None and self.folder.exists():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()


@contextmanager
def open_journal(folder: Path, made_from: Any, note: Callable[[str], None]) -> Iterator[BenchJournal]:
    """Measure into ``folder``, alone; go on with what a killed bench left there, and keep it until all went well.

    Raises:
        RunError: another process is measuring into it.
    """
    with locked(folder, "bench"):
        journal = BenchJournal(folder / "unfinished", made_from)
        for line in journal.notes:
            note(line)
        try:
            yield journal
        except BenchError:  # it came to its end, and has nothing to show
            journal.remove()
            raise
        journal.remove()


def read_lines(path: Path) -> list[Line]:
    """Return the lines up to the first damaged one: what came after it belongs to an order that is lost."""
    lines: list[Line] = []
    for _, line in Journal(path, Line).lines():
        if line is None or not isinstance(line.get("at"), float):
            break
        lines.append(line)
    return lines


def conditions(machine: Machine, **measured: Any) -> dict[str, Any]:
    """Return what has to be the same for samples to belong together: the machine, and what is ``measured`` how."""
    boot = BOOT.read_text().strip() if BOOT.exists() else ""  # after a start, the machine is cold
    gpus = [[gpu.name, gpu.driver] for gpu in machine.gpus]
    return {"machine": [*(getattr(machine, key) for key in LASTING), gpus], "boot": boot, **measured}
