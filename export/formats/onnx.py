"""ONNX in FP32 and FP16: pixels in, logits out; and files of their own for heat maps and for the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prgkit.errors import ExportError, ParityError
from prgkit.export.bundle.bundle import describe_artifact
from prgkit.export.bundle.manifest import EMBEDDING, EXPLAIN, ONNX, Artifact
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import section
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.export.runtimes.parity import run_and_close

if TYPE_CHECKING:
    from prgkit.export.formats.onnx_export import OnnxExportModule
    from prgkit.export.formats.student_export import StudentExport

CPU_FP16 = "ONNX Runtime's CPU provider computes in float32 with the float16 weights"
LEAST_COSINE = {"fp32": 0.9999, "int8": 0.0}  # to PyTorch's; INT8's is told, and its answers are judged as ever


def make_fp32(export: StudentExport) -> Made:
    """Trace the student and write it."""

    def write(path: Path) -> None:
        write_fp32(export, path, export.module)

    return Made(
        [export.finish(ONNX_FP32.name, "model.onnx", write=write, format=ONNX, precision="fp32", runner=quiet_runner)]
    )


def write_fp32(
    export: StudentExport, path: Path, module: OnnxExportModule, outputs: Sequence[str] = ("logits",)
) -> None:
    """Write a module of the student's as FP32."""
    from prgkit.export.formats.onnx_export import export_onnx

    facts = export.preprocessing
    export_onnx(
        module,
        path,
        image_size=facts.image_size,
        classes=export.classes,
        preprocessing=facts,
        opset=export.options.opset,
        outputs=outputs,
    )


def make_fp16(export: StudentExport) -> Made:
    """Halve the FP32 file's weights and activations."""
    artifact = export.finish(
        ONNX_FP16.name,
        "model.fp16.onnx",
        write=export.write_fp16,
        format=ONNX,
        precision="fp16",
        runner=quiet_runner,
        note=CPU_FP16,
        export_options=("--fp16",),
    )
    return Made([artifact])


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


def make_explain(export: StudentExport) -> Made:
    """Trace the student once more; its head at each place of the last feature map is a second output.

    Such maps are class activation maps (Zhou et al., 2016).
    """

    from prgkit.export.formats.onnx_export import with_evidence

    def write(path: Path) -> None:
        write_fp32(export, path, with_evidence(export.module, export.pixels), outputs=("logits", "evidence"))

    artifact = export.finish(
        ONNX_EXPLAIN.name,
        "model.explain.onnx",
        write=write,
        runner=quiet_runner,
        kind=" with evidence",
        format=EXPLAIN,
        precision="fp32",
        export_options=("--explain",),
    )
    return Made([artifact])


def require_own_head(options: ExportOptions) -> None:
    """Refuse class vectors, which an embedding asks for, too: the unit length of all features is no place's share."""
    if options.class_vectors or options.embedding:
        raise ExportError("there are no heat maps of a student that is scored by class vectors", fix="leave one out")


ONNX_FP32 = Format(
    "onnx-fp32",
    wanted=lambda options: True,
    make=make_fp32,
    how_to_run=partial(section, "onnxruntime.md"),
)
ONNX_FP16 = Format("onnx-fp16", wanted=lambda options: options.fp16, make=make_fp16, asked_by="--fp16")
ONNX_EXPLAIN = Format(
    "onnx-explain",
    wanted=lambda options: options.explain,
    make=make_explain,
    require=require_own_head,
    how_to_run=partial(section, "explain.md"),
    asked_by="--explain",
)
ONNX_EMBEDDING = Format(
    EMBEDDING,
    wanted=lambda options: options.embedding,
    make=make_embedding,
    how_to_run=partial(section, "embedding.md"),
    asked_by="--embedding",
)
