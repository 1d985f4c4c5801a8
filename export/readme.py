"""The README that travels in a bundle: what it is, and how each of its files is run without prgkit."""

from __future__ import annotations

from pathlib import Path, PurePath

from prgkit.config.image_size import sides, size_told
from prgkit.export.bundle.manifest import FILE, QDQ, SCHEMA, Artifact, Manifest
from prgkit.export.formats import FORMATS
from prgkit.export.formats.snippets import python_lines, takes_class_vectors, vocabulary_section
from prgkit.storage.atomic import write_sealed, write_text

OLDEST_ONNXRUNTIME = {17: "1.12", 18: "1.15", 19: "1.16", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23"}  # by opset


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and the README that goes with it."""
    write_text(folder / "README.md", readme(manifest))
    write_sealed(folder / FILE, {"schema": SCHEMA, **manifest.to_json()})


def readme(manifest: Manifest) -> str:
    """Return the bundle's README: what it is, how to run it with onnxruntime and TensorRT, and what lies beside it."""
    size, classes = manifest.preprocessing.image_size, len(manifest.classes)
    height, width = sides(size)
    teacher = manifest.teacher.model
    if teacher.startswith("local-dir:"):
        teacher = PurePath(teacher).name  # where it lay is nobody's business
    rows = "\n".join(
        f"| {artifact.file} | {artifact.precision} | {artifact.backend} | {whether_executed(artifact)} |"
        for artifact in manifest.artifacts
    )
    began = f"\n\nThe student began with {manifest.student.origin}." if manifest.student.origin else ""
    by_what = "the range that each one's values speak for"
    if manifest.preprocessing.grey_range:
        by_what = "the range of the images that were learned from"
    scoring, opset = manifest.open_vocabulary, manifest.export.opset
    takes_vectors = takes_class_vectors(manifest)
    second = f" and `class_vectors` [classes, {scoring.width}] float32" if scoring and takes_vectors else ""
    others = [*(known.how_to_run(manifest) for known in FORMATS), vocabulary_section(manifest)]
    return f"""# {manifest.student.model}, {classes} classes, {size_told(size)} px

Made by prgkit from the teacher {teacher}. Input `pixels` [batch, {height}, {width}, 3] uint8 RGB{second}, output
`logits` [batch, {classes}] float32. Mean and standard deviation are applied inside; class names are in the file, as
JSON.{began}

| file | precision | runs with | executed where it was made |
|---|---|---|---|
{rows}

The ONNX files are of opset {opset}, which ONNX Runtime {OLDEST_ONNXRUNTIME[opset]} and newer read; for an older one
export again with `export.opset` set to a lower number, down to 17.

## Python, with onnxruntime alone

```python
{python_lines(manifest.preprocessing, takes_vectors=takes_vectors)}
```

Pictures of every kind are read as they were for training: upright, transparency on white, and grey of more than 8 bits
by {by_what}. OpenCV's `imread` is another reader: it gives BGR,
drops transparency, so that what lies under it shows, and keeps the upper 8 of 16 bits. Its resize is another one, too:
where OpenCV is installed, `prgkit bench` says by how much.

{"".join(others)}
## What else is here

`golden/` holds source pictures, prepared inputs and expected logits; `evaluation/` held-out images with the teacher's
and the student's logits. `prgkit bench` in this folder checks the first and measures on the second.
"""


def whether_executed(artifact: Artifact) -> str:
    """Say of an artifact whether it ran on the machine that made it."""
    if artifact.format == QDQ:
        return f"in ONNX Runtime alone: {artifact.note}"
    return "yes" if artifact.executed else artifact.note or "never executed here"
