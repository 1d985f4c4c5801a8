"""ONNX in FP32 and FP16: pixels in, logits out, the class names in the file; and the embedding, a file of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prgkit.errors import ParityError
from prgkit.export.bundle.bundle import describe_artifact
from prgkit.export.bundle.manifest import EMBEDDING, ONNX, Artifact
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.snippets import section
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.export.runtimes.parity import run_and_close

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

CPU_FP16 = "ONNX Runtime's CPU provider computes in float32 with the float16 weights"
LEAST_COSINE = {"fp32": 0.9999, "int8": 0.0}  # to PyTorch's; INT8's is told, and its answers are judged as ever


def make_fp32(export: StudentExport) -> Made:
    """Trace the student and write it."""
    from prgkit.export.formats.onnx_export import export_onnx

    def write(path: Path) -> None:
        export_onnx(
            export.module,
            path,
            image_size=export.preprocessing.image_size,
            classes=export.classes,
            preprocessing=export.preprocessing.to_dict(),
            opset=export.options.opset,
        )

    how = {"format": ONNX, "precision": "fp32", "runner": quiet_runner}
    return Made([export.finish(ONNX_FP32.name, "model.onnx", write=write, **how)])


def make_fp16(export: StudentExport) -> Made:
    """Halve the FP32 file's weights and activations."""
    how: dict[str, Any] = {"format": ONNX, "precision": "fp16", "note": CPU_FP16, "runner": quiet_runner}
    how |= {"write": export.write_fp16, "export_options": ("--fp16",)}
    return Made([export.finish(ONNX_FP16.name, "model.fp16.onnx", **how)])


def make_embedding(export: StudentExport) -> Made:
    """Cut the scoring off the FP32 file, and off INT8's where there is one; say how near each is to PyTorch."""
    sources = [one for one in export.artifacts if one.format == ONNX and one.precision in LEAST_COSINE]
    return Made([embedding_of(export, source) for source in sources])


def embedding_of(export: StudentExport, source: Artifact) -> Artifact:
    """Write and check the embedding of a file with an open vocabulary.

    Raises:
        ParityError: a file in FP32 does not give PyTorch's embedding.
    """
    from prgkit.export.formats.open_vocabulary import write_embedding

    file = source.file.replace("model.", "model.embedding.", 1)
    write_embedding(export.folder / source.file, export.folder / file)
    runner = quiet_runner(export.folder / file)
    cosines = (run_and_close(runner, export.pixels) * export.reference_features).sum(axis=1)
    told = (
        f"cosine to PyTorch's {cosines.mean():.4f} on average and {cosines.min():.4f} at least, {len(cosines)} images"
    )
    if not cosines.min() >= LEAST_COSINE[source.precision]:
        fix = "this export must not be deployed; try another opset, and report the figures above"
        raise ParityError(f"{file} does not give PyTorch's embedding: {told}", fix=fix)
    export.note(f"{file}: {source.precision}, {told}")
    return describe_artifact(
        export.folder,
        file,
        name=source.name.replace("onnx", EMBEDDING, 1),
        format=EMBEDDING,
        precision=source.precision,
        backend=runner.backend,
        executed=True,
        note=told,
        parity=None,
        export_options=("--embedding", *source.export_options),
    )


def quiet_runner(path: Path) -> OnnxRunner:
    """Open a file with threads that do not wait busily."""
    return OnnxRunner(path, spin=False)


ONNX_FP32 = Format(
    "onnx-fp32",
    "distill",
    wanted=lambda options: True,
    make=make_fp32,
    how_to_run=partial(section, "onnxruntime.md"),
)
ONNX_FP16 = Format("onnx-fp16", "distill", wanted=lambda options: options.fp16, make=make_fp16)
ONNX_EMBEDDING = Format(
    EMBEDDING,
    "distill",
    wanted=lambda options: options.embedding,
    make=make_embedding,
    how_to_run=partial(section, "embedding.md"),
)
