"""What the parts of a bench share: images, journal and notes; and workers side by side, of which some may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from prgkit.evaluate.bench.journal import BenchJournal, FailureRecord
from prgkit.evaluate.bench.worker import Pixels, Spec, Worker, WorkerFailedError
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.schema import ArtifactKey
from prgkit.progress import silent


@dataclass(frozen=True)
class BenchContext:
    """What every part of a bench is given."""

    images: Pixels  # [images, height, width, 3], real ones that the timed runs take in turn
    seconds: float  # for warming up and measuring one artifact
    journal: BenchJournal = field(default_factory=BenchJournal)  # what was measured before, gone on with and added to
    note: Callable[[str], None] = silent  # told what is being done
    before_round: Callable[[int], None] = lambda _: None  # called before each round with its number

    def part(self, name: str) -> BenchContext:
        """Return the context of a part whose records are its own, and that says nothing."""
        return replace(self, journal=self.journal.part(name), note=silent)


class WorkerGroup:
    """Workers by the index of their artifact; ``failed`` says why one is missing or had to stop."""

    def __init__(self, context: BenchContext) -> None:
        self.journal = context.journal
        # What failed before a bench was stopped has missed turns that it cannot make up for, so it stays failed.
        self.failed = {record.artifact: record.reason for record in self.journal.of(FailureRecord)}
        self.workers: dict[int, Worker] = {}

    def alive(self) -> dict[int, Worker]:
        """Return the workers that have not failed."""
        return {index: worker for index, worker in self.workers.items() if index not in self.failed}

    @contextmanager
    def attempt(self, index: int) -> Iterator[None]:
        """Turn an artifact's failure inside the block into its reason, so that the others go on."""
        try:
            yield
        except WorkerFailedError as error:
            self.failed[index] = error.what
            self.journal.add(FailureRecord(artifact=index, reason=error.what))


@contextmanager
def open_workers(specs: Sequence[Spec], context: BenchContext) -> Iterator[WorkerGroup]:
    """Open a worker for each artifact, for as long as the block runs."""
    group = WorkerGroup(context)
    patience_s = max(600.0, 20 * context.seconds)
    with ExitStack() as stack:
        for index, spec in enumerate(specs):
            if index in group.failed:
                continue
            context.note(f"opening {artifact_name(spec)}")
            with group.attempt(index):
                group.workers[index] = stack.enter_context(Worker(spec, context.images, patience_s=patience_s))
        yield group


def rotate(turns: list[int], by: int) -> list[int]:
    """Return ``turns`` with another first each time, so that drift hits all alike."""
    start = by % len(turns) if turns else 0
    return turns[start:] + turns[:start]


def artifact_name(spec: Spec) -> str:
    """Return how people read an artifact's name: as in the report."""
    return formatting.row_name(ArtifactKey(**spec.key))
