"""What a bench has measured so far, kept as it comes, so that one that was killed loses no more than a round.

Going on has to be honest: samples of another machine, another file or another day must not be mixed into one figure.
So a bench goes on only with the same artifacts, options, versions and processor since the same start of the system, and
only within `SITTING_S` of the last sample; every worker is opened and warmed up anew, and the report says that it was
measured in two sittings. What came before under other conditions is never used: it stays, in a folder of its own.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate.report.schema import Machine
from prgkit.storage.atomic import fingerprint, sha256, write_bytes
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked

SITTING_S = 600.0
# What describes the machine and does not change while a bench is under way.
LASTING = (
    "cpu",
    "cores",
    "usable_cores",
    "governor",
    "clock_range_mhz",
    "memory_gib",
    "kernel",
    "versions",
    "power_mode",
)
BOOT = Path("/proc/sys/kernel/random/boot_id")

Record = dict[str, Any]


class BenchJournal:
    """A journal of samples and logits in a folder; without a folder, it keeps nothing."""

    def __init__(self, folder: Path | None = None, conditions: Any = None) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.records: list[Record] = []
        self.prefix = ""
        if folder is None:
            return
        now, made_from = time.time(), fingerprint(conditions)
        self.file = Journal(folder / "journal.jsonl", Record)
        before = read_records(self.file.path)
        if any("kind" in record and not record["kind"].endswith("failed") for record in before):  # measured something
            age_s = now - max(record["at"] for record in before)
            if before[0].get("conditions") == made_from and 0 <= age_s <= SITTING_S:
                self.records = before
                self.file.replace(before)
                self.notes.append(self.resumed(age_s))
            else:
                self.notes.append(self.set_aside(before))
        elif folder.exists():
            self.remove()
        self.append({"conditions": made_from})

    def part(self, name: str) -> BenchJournal:
        """Return the same journal for a part of the bench, whose kinds of records are its own."""
        part = copy.copy(self)  # the records are shared
        part.prefix = f"{self.prefix}{name}: "
        return part

    def of(self, kind: str) -> list[Record]:
        """Return the records of one kind, in the order in which they were measured."""
        return [record for record in self.records if record.get("kind") == self.prefix + kind]

    def add(self, kind: str, **facts: Any) -> None:
        """Keep what has just been measured."""
        if self.folder is not None:
            self.append({"kind": self.prefix + kind, **facts})

    def add_array(self, kind: str, array: NDArray[Any], **facts: Any) -> None:
        """Keep an array in a file of its own, and after it the record that names it."""
        if self.folder is None:
            return
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        path = self.folder / f"{kind}-{len(self.records)}.npy"
        write_bytes(path, buffer.getvalue())
        self.append({"kind": self.prefix + kind, "file": path.name, "sha256": sha256(path), **facts})

    def array(self, record: Record) -> NDArray[Any] | None:
        """Return a record's array, or None where its file is not what was written."""
        path = (self.folder or Path()) / record["file"]
        if not path.is_file() or sha256(path) != record["sha256"]:
            return None
        array: NDArray[Any] = np.load(path, allow_pickle=False)
        return array

    def append(self, record: Record) -> None:
        """Write one line."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records.append({"at": time.time(), **record})
        self.file.append(self.records[-1])

    def resumed(self, age_s: float) -> str:
        """Say what this bench goes on from."""
        sittings = 1 + sum("conditions" in record for record in self.records)
        return (
            f"Measured in {sittings} sittings: the one before was stopped after {len(self.of('round'))} rounds, and "
            f"this one went on {age_s:.0f} s later with new processes, warmed up again."
        )

    def set_aside(self, before: Sequence[Record]) -> str:
        """Move what was measured under other conditions out of the way, and say where it is."""
        assert self.folder is not None
        began = datetime.fromtimestamp(before[0]["at"], timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        place = self.folder.with_name(f"stopped-{began}")
        if place.exists():
            raise PrgkitError(f"{place.name} is there already", where=place, fix="move it elsewhere")
        self.folder.rename(place)
        rounds = sum(record.get("kind") == "round" for record in before)
        return (
            f"A bench that was stopped after {rounds} rounds, too long ago or under other conditions, is not part of "
            f"this one: its samples are in {place.name}."
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
        kept = BenchJournal(folder / "unfinished", made_from)
        for line in kept.notes:
            note(line)
        try:
            yield kept
        except BenchError:  # it came to its end, and has nothing to show
            kept.remove()
            raise
        kept.remove()


def read_records(path: Path) -> list[Record]:
    """Return the records up to the first damaged line: what came after it belongs to an order that is lost."""
    records: list[Record] = []
    for _, record in Journal(path, Record).lines():
        if record is None or not isinstance(record.get("at"), float):
            break
        records.append(record)
    return records


def conditions(machine: Machine, **measured: Any) -> dict[str, Any]:
    """Return what has to be the same for samples to belong together: the machine, and what is ``measured`` how."""
    boot = BOOT.read_text().strip() if BOOT.exists() else ""  # after a start, the machine is cold
    gpus = [[gpu.name, gpu.driver] for gpu in machine.gpus]
    return {"machine": [*(getattr(machine, key) for key in LASTING), gpus], "boot": boot, **measured}
