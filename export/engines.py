"""Give a bundle that exists its TensorRT engines, on the device that it was copied to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from prgkit.errors import ExportError, NotWorthItError
from prgkit.export.bundle.artifact_cache import Origin, alone_in, files_of, is_whole
from prgkit.export.bundle.bundle import Bundle, noise, open_bundle, read_evaluation
from prgkit.export.bundle.fidelity import int8_sentence
from prgkit.export.bundle.manifest import ONNX, QDQ, Artifact, Manifest, NotBuilt
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.tensorrt import EngineBuilder, Reference, engine_name, is_source
from prgkit.export.readme import write_manifest
from prgkit.export.runtimes import open_runner
from prgkit.export.runtimes.gpu import choose_backend
from prgkit.export.runtimes.parity import run_and_close
from prgkit.storage.atomic import fingerprint

PARITY_IMAGES = 256
MAKES = {"int8": " --trt"}  # what asks for TensorRT's layout of a precision


def build_engines(folder: Path, options: ExportOptions, *, note: Callable[[str], None]) -> Manifest:
    """Build the engines of a bundle that exists, needing neither torch nor onnx, and return its new manifest.

    One that is not worth building is not kept: the manifest says why. Of the options only ``fp16``, ``int8``, ``batch``
    (by default that of the bundle's recipe), ``backend`` and ``sm`` count.

    Raises:
        BackendError: no TensorRT is usable here.
        ExportError: the bundle is damaged or holds no ONNX file of that precision, or the build failed.
        RunError: another process is building here.
        ParityError: an engine that can run here disagrees with its ONNX file; the one before it stays.
    """
    backend = choose_backend(options.backend)
    with alone_in(folder):
        bundle = open_bundle(folder, verify=(ONNX, QDQ))
        options = replace(options, batch=options.batch or bundle.manifest.export.batch)
        kinds = {"fp32": True, "fp16": options.fp16, "int8": options.int8}
        sources = sources_of(bundle, [precision for precision, wanted in kinds.items() if wanted])
        pixels = read_evaluation(folder, limit=PARITY_IMAGES).pixels
        pixels = pixels if len(pixels) else noise(bundle, PARITY_IMAGES)
        engines = EnginesInPlace(bundle, note)
        reference = Reference(sources[0].name, cache(lambda: run_and_close(open_runner(folder, sources[0]), pixels)))
        builder = EngineBuilder(folder, backend, options, pixels, reference, engines, note)
        _, not_built = builder.make_all(sources)
        engines.settle(not_built, decided={engine_name(backend.name, source) for source in sources})
        return engines.manifest


class EnginesInPlace:
    """The engines of a bundle that exists: its manifest is written anew with each that is finished."""

    def __init__(self, bundle: Bundle, note: Callable[[str], None]) -> None:
        self.folder, self.manifest, self.note = bundle.folder, bundle.manifest, note

    def get(self, name: str, made_from: Origin, make: Callable[[], Artifact]) -> Artifact:
        """Return an engine that is finished, or one that ``make`` finishes now."""
        before = next((artifact for artifact in self.manifest.artifacts if artifact.name == name), None)
        if before and before.made_from == fingerprint(made_from) and is_whole(self.folder, before):
            self.note(f"{before.file}: finished before, and made from the same; it is kept")
            return before
        try:
            made = make().model_copy(update={"made_from": fingerprint(made_from)})
        except NotWorthItError:
            self.give_way(name)
            for path in files_of(self.folder, before) if before else ():
                path.unlink(missing_ok=True)
            raise
        self.write([*self.manifest.artifacts, made])
        return made

    def give_way(self, name: str) -> None:
        """Take an engine out of the manifest: a kill now leaves no claim about a file that is gone."""
        self.write(artifact for artifact in self.manifest.artifacts if artifact.name != name)

    def settle(self, not_built: Sequence[NotBuilt], *, decided: set[str]) -> None:
        """Write down which of the engines that were ``decided`` on were not built."""
        others = [facts for facts in self.manifest.not_kept if facts.name not in decided]
        self.manifest = self.manifest.model_copy(update={"not_kept": (*others, *not_built)})
        write_manifest(self.folder, self.manifest)

    def write(self, artifacts: Iterable[Artifact]) -> None:
        """Write the manifest with other artifacts."""
        self.manifest = self.manifest.model_copy(update={"artifacts": tuple(artifacts)})
        write_manifest(self.folder, self.manifest)


def sources_of(bundle: Bundle, wanted: Sequence[str]) -> list[Artifact]:
    """Return the ONNX artifacts that engines of these precisions are built from, FP32's first.

    Raises:
        ExportError: there is none of one of them.
    """
    can = [source for source in bundle.artifacts if is_source(source)]
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
