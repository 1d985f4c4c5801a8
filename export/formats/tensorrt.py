"""TensorRT engines, of both TensorRTs: built from the ONNX files, and compared where a GPU can run them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

import prgkit
from prgkit.errors import ExportError, NotWorthItError
from prgkit.export.bundle.artifact_cache import Origin
from prgkit.export.bundle.bundle import describe_artifact
from prgkit.export.bundle.engine_metadata import EngineMetadata, engine_metadata_path, write_engine_metadata
from prgkit.export.bundle.fidelity import int8_sentence
from prgkit.export.bundle.manifest import ENGINE, ONNX, QDQ, Artifact, NotBuilt, Parity
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import section
from prgkit.export.formats.tensorrt_build import build_engine, check_batch
from prgkit.export.runtimes.gpu import Backend, choose_backend, choose_targets, find_gpu, this_platform
from prgkit.export.runtimes.parity import require_agreement, run_and_close
from prgkit.export.runtimes.tensorrt import TensorRTRunner, why_not_here

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

BUILDING = ".building"  # in a bundle, while an engine is built


def require_tensorrt(options: ExportOptions) -> None:
    """Refuse what no engine can have, a machine on which no TensorRT is usable, and GPUs that it does not build for."""
    refuse_input(options)
    check_batch(options.batch_profile)
    choose_targets(choose_backend(options.backend).name, options.sm)


def refuse_input(options: ExportOptions) -> None:
    """Refuse class vectors as an input of engines.

    Raises:
        ExportError: they are asked for.
    """
    if options.class_vectors == "input" and options.trt:
        raise ExportError(
            "engines hold their class vectors; they cannot take them as an input",
            fix="export --open-vocabulary --trt; after prgkit relabel, export --trt in the bundle builds them again",
        )


def make_engines(precisions: Sequence[str], export: StudentExport) -> Made:
    """Build an engine of each ONNX file in some precisions that the export has made so far."""
    backend = choose_backend(export.options.backend)
    reference = Reference("torch", lambda: export.reference_logits)
    builder = EngineBuilder(export.folder, backend, export.options, export.pixels, reference, export.cache, export.note)
    sources = [one for one in export.artifacts if one.precision in precisions and is_source(one)]
    artifacts, not_built = builder.make_all(sources)
    return Made(artifacts, not_built, frozenset([f"{backend.name}-int8"] if "int8" in precisions else ()))


FLOAT_ENGINES = Format(
    "tensorrt",
    wanted=lambda options: options.trt,
    make=partial(make_engines, ("fp32", "fp16")),
    require=require_tensorrt,
    how_to_run=partial(section, "tensorrt.md"),
    asked_by="--trt",
)
INT8_ENGINES = Format(
    "tensorrt-int8",
    wanted=lambda options: options.trt and options.int8,
    make=partial(make_engines, ("int8",)),
    require=require_tensorrt,
    asked_by="--trt --int8",
)


class FinishedEngines(Protocol):
    """What knows of engines that are finished."""

    def get(self, name: str, made_from: Origin, make: Callable[[], Artifact]) -> Artifact:
        """Return an engine that is finished, or one that ``make`` finishes now."""
        ...

    def give_way(self, name: str) -> None:
        """Let go of the engine of that name: another is about to take its place."""
        ...


@dataclass(frozen=True)
class Reference:
    """What engines are compared with: its name, and its logits [n, classes], computed when they are asked for."""

    name: str
    logits: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class EngineBuilder:
    """Builds the engines of a bundle."""

    folder: Path  # of the bundle
    backend: Backend
    options: ExportOptions
    pixels: NDArray[np.uint8]  # [n, S, S, 3] that engines are compared on
    reference: Reference
    finished: FinishedEngines
    note: Callable[[str], None]

    def make_all(self, sources: Sequence[Artifact]) -> tuple[list[Artifact], list[NotBuilt]]:
        """Return the engines of ONNX artifacts, and why there is none where one is not worth it."""
        made: list[Artifact] = []
        not_built: list[NotBuilt] = []
        for source in sources:
            try:
                made.append(self.make(source))
            except NotWorthItError as error:
                name = engine_name(self.backend.name, source)
                not_built.append(NotBuilt(name=name, kept=False, why=error.what))
                self.note(f"{name}: {int8_sentence(not_built[-1])}")
        return made, not_built

    def make(self, source: Artifact) -> Artifact:
        """Return one engine: a finished one, or one built now from an ONNX artifact.

        Where the engine can run here, its logits must agree with the reference's. Only then it takes the place of one
        with its name.

        Raises:
            NotWorthItError: an INT8 engine would be larger than FP16's.
        """
        gpu, name, sm = find_gpu(), engine_name(self.backend.name, source), self.options.sm
        made_from: Origin = {
            "onnx": source.sha256,
            "versions": [prgkit.__version__, self.backend.name, self.backend.version],
            "platform": this_platform(),
            "batch": list(self.options.batch_profile),
            "targets": list(choose_targets(self.backend.name, sm)),
            "asked": list(sm or ()),  # tensorrt builds for a GPU model, or for its generation where that is asked for
            "gpu": [gpu.name, gpu.capability] if gpu else None,  # one that can run it compares it, too
            "compared": [self.reference.name, hashlib.sha256(self.pixels.tobytes()).hexdigest()],
        }
        return self.finished.get(name, made_from, lambda: self.build(source, name))

    def build(self, source: Artifact, name: str) -> Artifact:
        """Build an engine, compare it, and let it take the place of one with its name."""
        batch, precision = self.options.batch_profile, source.precision
        with room_in(self.folder) as work:
            metadata = build_engine(
                self.folder / source.file,
                work,
                precision=precision,
                batch=batch,
                backend=self.backend.name,
                sm=self.options.sm,
            )
            metadata, parity = self.compared(metadata, work, name)
            self.finished.give_way(name)
            for file in (work / metadata.file, engine_metadata_path(work / metadata.file)):
                file.replace(self.folder / file.name)
        counts = metadata.int8_convolutions
        partly = "" if counts is None else " in {} of {} convolutions".format(*counts)
        self.note(
            f"{metadata.file}: {self.backend.name} {metadata.backend_version}, {precision}{partly}, batch "
            f"{list(batch)}, for {', '.join(metadata.compute_capabilities)}, built in {metadata.build_s:.1f} s; "
            f"{metadata.note or f'it agrees with {self.reference.name}'}"
        )
        return describe_artifact(
            self.folder,
            metadata.file,
            name=name,
            format=ENGINE,
            precision=precision,
            backend=self.backend.name,
            export_options=("--trt", *([f"--{precision}"] if precision != "fp32" else [])),
            parity=parity,
            executed=metadata.executed,
            note=metadata.note,
        )

    def compared(self, metadata: EngineMetadata, work: Path, name: str) -> tuple[EngineMetadata, Parity | None]:
        """Compare an engine in ``work`` with the reference where it can run here; return its metadata, which says so.

        Raises:
            ParityError: they disagree.
        """
        path, parity = work / metadata.file, None
        if reason := why_not_here(metadata):
            facts = {"executed": False, "note": f"never executed here: {reason}"}
        else:
            logits, names = run_and_close(TensorRTRunner(path, name=name), self.pixels), (self.reference.name, name)
            parity = require_agreement(self.reference.logits(), logits, precision=metadata.precision, names=names)
            facts = {"executed": True, "note": None}
        metadata = metadata.model_copy(update=facts)
        write_engine_metadata(path, metadata)
        return metadata, parity


@contextmanager
def room_in(folder: Path) -> Iterator[Path]:
    """Give a folder in a bundle for an engine that is not whole and compared yet."""
    work = folder / BUILDING
    shutil.rmtree(work, ignore_errors=True)  # of a build that was killed
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_source(artifact: Artifact) -> bool:
    """Tell whether an artifact is an ONNX file that engines of its precision are built from."""
    return artifact.format == (QDQ if artifact.precision == "int8" else ONNX)


def engine_name(backend: str, source: Artifact) -> str:
    """Return the name of the engine that a backend builds from an ONNX artifact, as "tensorrt-int8"."""
    return f"{backend}-{source.name.removeprefix('onnx-').removesuffix('-tensorrt')}"
