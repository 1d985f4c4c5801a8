"""What a bench measures: a row for everything that could run on this machine, and what a worker opens for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prgkit.evaluate.bench.worker import Spec
from prgkit.evaluate.report.schema import Row
from prgkit.export.bundle.bundle import Bundle
from prgkit.export.bundle.manifest import VECTORS
from prgkit.export.runtimes import RUNTIMES, setups
from prgkit.export.runtimes.base import Setup


def plan(
    bundle: Bundle, run_folder: Path | None, *, gpu: bool, threads: int, seconds: float = 0.0
) -> tuple[list[Row], list[Spec | None]]:
    """Return a row for everything that could run, with what a worker opens, or None and the reason in the row.

    Args:
        bundle: whose artifacts run.
        run_folder: the run it came from, where that is at hand: PyTorch runs what is in it.
        gpu: whether the machine has an NVIDIA GPU.
        threads: threads of one call on the CPU.
        seconds: the time for each artifact; a short bench leaves out what takes long to open.
    """
    rows: list[Row] = []
    specs: list[Spec | None] = []

    def add(row: Row, setup: Setup, reason: str | None) -> None:
        rows.append(row.model_copy(update={"reason": reason}))
        specs.append(None if reason else named(setup, row))

    scoring = bundle.manifest.open_vocabulary
    vectors, scale = (bundle.folder / VECTORS, scoring.logit_scale) if scoring else (None, 1.0)
    files = [(artifact, bundle.folder) for artifact in bundle.artifacts]
    if run_folder is not None:
        files += [(artifact, run_folder) for runtime in RUNTIMES for artifact in runtime.from_run(run_folder)]
    for artifact, folder in files:
        for setup in setups(artifact, folder, bundle.artifacts):
            if seconds < setup.variant.least_seconds:
                continue
            on_cpu = threads if setup.variant.device == "cpu" else None
            setup = replace(setup, threads=on_cpu, class_vectors=vectors, logit_scale=scale)
            reason = setup.why_not_here(gpu=gpu)
            if reason is None or setup.variant.always_listed:
                add(blank(setup), setup, reason)
    return rows, specs


def named(setup: Setup, row: Row) -> Spec:
    """Return what a worker opens, and whose figures these are."""
    return Spec(row.artifact, row.backend, row.device, row.threads, setup.variant.takes_threads, setup)


def blank(setup: Setup) -> Row:
    """Return a row without a figure yet."""
    return Row(
        artifact=setup.artifact.name + setup.variant.suffix,
        backend=setup.variant.backend,
        device=setup.variant.device,
        file=setup.artifact.file,
        precision=setup.artifact.precision,
        threads=setup.threads,
        size_mib=round(setup.artifact.bytes / (1 << 20), 3),
    )
