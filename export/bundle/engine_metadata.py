"""The card beside an engine: what built it, from what, for which GPU; an engine is code, and not loaded without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prgkit.errors import ExportError
from prgkit.export.bundle.manifest import ENGINE, Artifact, Facts, TensorSpec
from prgkit.storage.atomic import sha256, write_sealed
from prgkit.storage.documents import read_document

SCHEMA = "prgkit.engine/2"
REBUILD = "prgkit export --trt"


class EngineMetadata(Facts):
    """What is known of an engine; an engine without its card is not loaded."""

    file: str
    bytes: int
    sha256: str
    onnx: str
    onnx_sha256: str
    backend: str
    backend_version: str
    precision: str
    tf32: bool  # whether FP32 products may be rounded to TF32's 10 bits
    batch: tuple[int, int, int]  # min, opt, max
    compute_capabilities: tuple[str, ...]
    gpu: str | None  # the GPU it was built on; None where it was built without one
    input: TensorSpec
    output: TensorSpec
    layer_dtypes: dict[str, dict[str, int]]  # of the parsed network: layer type -> output type -> count
    inspected_dtypes: dict[str, int] | None  # of the built engine, where a GPU could open it
    build_s: float
    executed: bool
    note: str | None
    driver: str | None = None  # the newest CUDA that the driver of the building machine runs, as "13.0"
    platform: str | None = None  # that an engine is bound to, as "Linux x86_64"
    hardware_compatibility: str | None = None  # of tensorrt alone: that GPU model (NONE) or more; None elsewhere
    timing_cache: str | None = None  # of tensorrt alone: "used", or "new" where there was none for this GPU
    int8_convolutions: tuple[int, int] | None = None  # how many run in INT8, of how many in the file


def write_engine_metadata(engine_path: Path, metadata: EngineMetadata) -> None:
    """Write the card beside its engine."""
    write_sealed(engine_metadata_path(engine_path), {"schema": SCHEMA, **metadata.to_json()})


def load_engine_metadata(engine_path: Path) -> EngineMetadata:
    """Read an engine's card and verify that the engine is the one it describes.

    Raises:
        ExportError: no metadata, no engine, or an engine that is truncated, changed or foreign; names what rebuilds it.
    """
    fix = f"build it again: {REBUILD}"
    if not engine_path.exists():
        raise ExportError(f"there is no engine {engine_path.name}", where=engine_path.parent, fix=fix)
    path = engine_metadata_path(engine_path)
    if not path.exists():
        raise ExportError(
            f"{engine_path.name} has no card ({path.name}): an engine of unknown origin is code, and is not loaded",
            where=engine_path.parent,
            fix=fix,
        )
    metadata = read_document(path, EngineMetadata, SCHEMA, what="an engine's card", fix=fix, error=ExportError)
    fix, size = f"build it again: {rebuild(metadata)}", engine_path.stat().st_size
    if size != metadata.bytes:
        raise ExportError(
            f"{engine_path.name} is truncated: {size} of {metadata.bytes} bytes", where=engine_path, fix=fix
        )
    if sha256(engine_path) != metadata.sha256:
        raise ExportError(f"{engine_path.name} is not the engine its card describes", where=engine_path, fix=fix)
    return metadata


def rebuild(metadata: EngineMetadata) -> str:
    """Return the command that builds an engine like this one again, in its bundle and on the machine at hand."""
    kind = {"fp16": " --fp16", "int8": " --int8"}.get(metadata.precision, "")
    return f"{REBUILD}{kind} --backend {metadata.backend} --batch {','.join(map(str, metadata.batch))}"


def builds_of(folder: Path, artifacts: Sequence[Artifact]) -> list[list[str]]:
    """Return for each backend that built engines of a bundle which options of `prgkit export` say so, and the batch."""
    first: dict[str, Artifact] = {}
    for artifact in artifacts:
        if artifact.format == ENGINE:
            first.setdefault(artifact.backend, artifact)
    cards = [load_engine_metadata(folder / artifact.file) for artifact in first.values()]
    return [["--backend", card.backend, "--batch", ",".join(map(str, card.batch))] for card in cards]


def engine_metadata_path(engine_path: Path) -> Path:
    """Return where an engine's card is."""
    return engine_path.with_name(engine_path.name + ".json")
