"""Give a bundle its TensorRT engines, where it was exported or on the device it was copied to."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import prgkit
from prgkit.config.recipe import validate
from prgkit.errors import ExportError, NotWorthItError
from prgkit.export.bundle.artifact_cache import Origin, alone_in, files_of, is_whole
from prgkit.export.bundle.bundle import QDQ, Bundle, describe_artifact, open_bundle, read_evaluation, write_manifest
from prgkit.export.bundle.engine_metadata import EngineMetadata, engine_metadata_path, write_engine_metadata
from prgkit.export.bundle.fidelity import int8_sentence
from prgkit.export.bundle.manifest import Artifact, Manifest, NotBuilt, Parity
from prgkit.export.formats.tensorrt import build_engine
from prgkit.export.runtimes.base import open_runner
from prgkit.export.runtimes.gpu import Backend, choose_backend, choose_targets, find_gpu, this_platform
from prgkit.export.runtimes.parity import require_agreement, run_batches
from prgkit.export.runtimes.tensorrt import TensorRTRunner, why_not_here
from prgkit.storage.atomic import fingerprint

PARITY_IMAGES = 256
BUILDING = ".building"  # in a bundle, while an engine is built
MAKES = {"int8": " --trt"}  # what asks for TensorRT's layout of a precision


def build_engines(
    folder: Path,
    *,
    fp16: bool,
    int8: bool = False,
    batch: tuple[int, int, int] | None = None,
    backend: str | None = None,
    sm: Sequence[str] | None = None,
    note: Callable[[str], None],
) -> Manifest:
    """Build the engines of a bundle that exists, needing neither torch nor onnx, and return its new manifest.

    One that is not worth building is not kept: the manifest says why.

    ``batch`` is [min, opt, max], by default that of the bundle's recipe; ``sm`` are GPU generations, as
    "SM86" or "SM80+".

    Raises:
        BackendError: no TensorRT is usable here.
        ExportError: the bundle is damaged or holds no ONNX file of that precision, or the build failed.
        RunError: another process is building here.
        ParityError: an engine that can run here disagrees with its ONNX file; the one before it stays.
    """
    chosen = choose_backend(backend)
    with alone_in(folder):
        bundle = open_bundle(folder, verify=("onnx", QDQ))
        batch = batch or validate(bundle.manifest.recipe, where=folder).export.batch
        sources = sources_of(bundle, ["fp32", *(["fp16"] if fp16 else []), *(["int8"] if int8 else [])])
        pixels = read_evaluation(folder, limit=PARITY_IMAGES).pixels
        manifest = bundle.manifest

        @cache
        def reference_logits() -> NDArray[np.float32]:
            reference = open_runner(folder, sources[0])
            logits = run_batches(reference, pixels)
            reference.close()
            return logits

        def save(artifacts: Iterable[Artifact]) -> None:
            nonlocal manifest
            manifest = manifest.model_copy(update={"artifacts": tuple(artifacts)})
            write_manifest(folder, manifest)

        def finished(name: str, made_from: Origin, make: Callable[[], Artifact]) -> Artifact:
            before = next((artifact for artifact in manifest.artifacts if artifact.name == name), None)
            if before and before.made_from == fingerprint(made_from) and is_whole(folder, before):
                note(f"{before.file}: finished before, and made from the same; it is kept")
                return before
            try:
                made = make().model_copy(update={"made_from": fingerprint(made_from)})
            except NotWorthItError:
                giving_way(name)
                for path in files_of(folder, before) if before else ():
                    path.unlink(missing_ok=True)
                raise
            save([*manifest.artifacts, made])
            return made

        def giving_way(name: str) -> None:  # a kill now leaves no claim about a file that is gone
            save(artifact for artifact in manifest.artifacts if artifact.name != name)

        _, not_kept = make_engines(
            folder,
            sources,
            backend=chosen,
            batch=batch,
            sm=sm,
            pixels=pixels,
            reference=sources[0].name,
            reference_logits=reference_logits,
            finished=finished,
            note=note,
            giving_way=giving_way,
        )
        anew = {engine_name(chosen.name, source) for source in sources}
        others = [facts for facts in manifest.not_kept if facts.name not in anew]
        manifest = manifest.model_copy(update={"not_kept": (*others, *not_kept)})
        write_manifest(folder, manifest)
        return manifest


def sources_of(bundle: Bundle, wanted: Sequence[str]) -> list[Artifact]:
    """Return the ONNX artifacts that engines of these precisions are built from, FP32's first.

    Raises:
        ExportError: there is none of one of them.
    """
    can = [source for source in bundle.artifacts if source.format == (QDQ if source.precision == "int8" else "onnx")]
    sources = [source for precision in wanted for source in can if source.precision == precision]
    missing = [precision for precision in wanted if precision not in {source.precision for source in sources}]
    refused = [
        facts for facts in bundle.manifest.not_kept if not isinstance(facts, NotBuilt) and facts.layout == "tensorrt"
    ]
    if missing == ["int8"] and refused:
        raise ExportError(int8_sentence(refused[0]), where=bundle.folder, fix="build without --int8")
    if missing:
        raise ExportError(
            f"the bundle has no {missing[0]} ONNX file to build from",
            where=bundle.folder,
            fix=f"export it where the student was trained: prgkit export --{missing[0]}{MAKES.get(missing[0], '')}",
        )
    return sources


def make_engines(
    folder: Path, sources: Sequence[Artifact], *, backend: Backend, note: Callable[[str], None], **build: Any
) -> tuple[list[Artifact], list[NotBuilt]]:
    """Return the manifest entries of the engines of ONNX artifacts, and why there is none where one is not worth it.

    The rest is as for `make_engine`.
    """
    made: list[Artifact] = []
    not_built: list[NotBuilt] = []
    for source in buildable(sources, backend):
        try:
            made.append(make_engine(folder, source, backend=backend, note=note, **build))
        except NotWorthItError as error:
            not_built.append(NotBuilt(name=engine_name(backend.name, source), kept=False, why=error.what))
            note(f"{not_built[-1].name}: {int8_sentence(not_built[-1])}")
    return made, not_built


def make_engine(
    folder: Path,
    source: Artifact,
    *,
    backend: Backend,
    batch: tuple[int, int, int],
    sm: Sequence[str] | None,
    pixels: NDArray[np.uint8],
    reference: str,
    reference_logits: Callable[[], NDArray[np.float32]],
    finished: Callable[[str, Origin, Callable[[], Artifact]], Artifact],
    note: Callable[[str], None],
    giving_way: Callable[[str], None] = lambda name: None,
) -> Artifact:
    """Return the manifest entry of one engine: that of a ``finished`` one, or of one built now from an ONNX artifact.

    Where the engine can run here, its logits must agree with ``reference_logits``, those of the runner ``reference``.
    Only then it takes the place of one with its name, after ``giving_way``.

    Raises:
        NotWorthItError: an INT8 engine would be larger than FP16's.
    """
    gpu, name, precision = find_gpu(), engine_name(backend.name, source), source.precision
    made_from: Origin = {
        "onnx": source.sha256,
        "versions": [prgkit.__version__, backend.name, backend.version],
        "platform": this_platform(),
        "batch": list(batch),
        "targets": list(choose_targets(backend.name, sm)),
        "asked": list(sm or ()),  # tensorrt builds for a GPU model, or for its generation where that is asked for
        "gpu": [gpu.name, gpu.capability] if gpu else None,  # one that can run it compares it, too
        "compared": [reference, hashlib.sha256(pixels.tobytes()).hexdigest()],
    }

    def build() -> Artifact:
        with room_in(folder) as work:
            card = build_engine(
                folder / source.file, work, precision=precision, batch=batch, backend=backend.name, sm=sm
            )
            card, parity = compared(
                card, work, name=name, pixels=pixels, reference=reference, reference_logits=reference_logits
            )
            giving_way(name)
            for file in (work / card.file, engine_metadata_path(work / card.file)):
                file.replace(folder / file.name)
        partly = "" if card.int8_convolutions is None else " in {} of {} convolutions".format(*card.int8_convolutions)
        note(
            f"{card.file}: {backend.name} {card.backend_version}, {precision}{partly}, batch {list(batch)}, for "
            f"{', '.join(card.compute_capabilities)}, built in {card.build_s:.1f} s; "
            f"{card.note or f'it agrees with {reference}'}"
        )
        return describe_artifact(
            folder,
            card.file,
            name=name,
            format="engine",
            precision=precision,
            backend=backend.name,
            executed=card.executed,
            note=card.note,
            parity=parity,
        )

    return finished(name, made_from, build)


@contextmanager
def room_in(folder: Path) -> Iterator[Path]:
    """Give a folder in a bundle for an engine that is not whole and compared yet."""
    work = folder / BUILDING
    shutil.rmtree(work, ignore_errors=True)  # of a build that was killed
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def compared(
    card: EngineMetadata,
    folder: Path,
    *,
    name: str,
    pixels: NDArray[np.uint8],
    reference: str,
    reference_logits: Callable[[], NDArray[np.float32]],
) -> tuple[EngineMetadata, Parity | None]:
    """Compare an engine in ``folder`` with the reference where it can run here; return its card, which says so."""
    path, parity = folder / card.file, None
    if reason := why_not_here(card):
        card = card.model_copy(update={"executed": False, "note": f"never executed here: {reason}"})
    else:
        runner = TensorRTRunner(path, name=name)
        try:
            logits = run_batches(runner, pixels)
            parity = require_agreement(reference_logits(), logits, precision=card.precision, names=(reference, name))
        finally:
            runner.close()
        card = card.model_copy(update={"executed": True, "note": None})
    write_engine_metadata(path, card)
    return card, parity


def engine_name(backend: str, source: Artifact) -> str:
    """Return the name of the engine that a backend builds from an ONNX artifact, as "tensorrt-int8-heavy"."""
    return f"{backend}-{source.name.removeprefix('onnx-').removesuffix('-tensorrt')}"


def buildable(sources: Sequence[Artifact], backend: Backend) -> list[Artifact]:
    """Return the ONNX artifacts of which a backend builds engines: for TensorRT for RTX one of each precision.

    Its engines compute only convolutions of many weights in INT8 (see `leave_small_in_fp16`), so of the INT8 files the
    last, which has the others in float where there are two, loses nothing and rounds least.
    """
    last = {source.precision: source for source in sources}
    return [source for source in sources if backend.name != "tensorrt_rtx" or source is last[source.precision]]
