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

    PyTorch runs what is in the run that the bundle came from, where that is at hand. ``threads`` are those of one call
    on the CPU; a bench of few ``seconds`` an artifact leaves out what takes long to open.
    """
    rows: list[Row] = []
    specs: list[Spec | None] = []
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
                row = blank(setup, reason)
                takes_threads = setup.variant.takes_threads
                spec = Spec(row.artifact, row.backend, row.device, row.threads, takes_threads, setup)
                rows.append(row)
                specs.append(None if reason else spec)
    return rows, specs


def blank(setup: Setup, reason: str | None) -> Row:
    """Return a row without a figure yet, with the reason where there will be none."""
    return Row(
        artifact=setup.artifact.name + setup.variant.suffix,
        backend=setup.variant.backend,
        device=setup.variant.device,
        file=setup.artifact.file,
        precision=setup.artifact.precision,
        threads=setup.threads,
        size_mib=round(setup.artifact.bytes / (1 << 20), 3),
        reason=reason,
    )
