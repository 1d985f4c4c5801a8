"""The README that travels in a bundle: what it is, and how each of its files is run without prgkit."""

from __future__ import annotations

from pathlib import Path, PurePath

from prgkit.config.image_size import size_told
from prgkit.export.bundle.manifest import FILE, QDQ, SCHEMA, Artifact, Manifest
from prgkit.export.formats import FORMATS
from prgkit.export.formats.snippets import section
from prgkit.storage.atomic import write_sealed, write_text

README = "README.md"
OLDEST_ONNXRUNTIME = {17: "1.12", 18: "1.15", 19: "1.16", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23"}  # by opset


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and the README that goes with it; the card of a bundle that was pulled stays."""
    path = folder / README
    if not (path.exists() and path.read_bytes().startswith(b"---")):  # its front matter
        write_text(path, readme(manifest))
    write_sealed(folder / FILE, {"schema": SCHEMA, **manifest.to_json()})


def readme(manifest: Manifest) -> str:
    """Return the bundle's README: what it is, how to run it with onnxruntime and TensorRT, and what lies beside it."""
    teacher, opset = manifest.teacher.model, manifest.export.opset
    others = [*(known.how_to_run(manifest) for known in FORMATS), section("other_classes.md", manifest)]
    return section(
        README,
        manifest,
        size=size_told(manifest.preprocessing.image_size),
        # Where a teacher lay is nobody's business.
        teacher=PurePath(teacher).name if teacher.startswith("local-dir:") else teacher,
        opset=opset,
        oldest_onnxruntime=OLDEST_ONNXRUNTIME[opset],
        whether_executed=whether_executed,
        others="".join(others),
    )


def whether_executed(artifact: Artifact) -> str:
    """Say of an artifact whether it ran on the machine that made it."""
    if artifact.format == QDQ:
        return f"in ONNX Runtime alone: {artifact.note}"
    return "yes" if artifact.executed else artifact.note or "never executed here"
