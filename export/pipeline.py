"""From a trained student to a bundle: what `prgkit export` does, top to bottom."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import prgkit
from prgkit.errors import DiskFullError, ExportError
from prgkit.export.bundle import contract, describe_artifact, write_evaluation, write_golden, write_manifest
from prgkit.export.engines import make_engine
from prgkit.export.onnx import deployable, export_onnx, rehearse_fp16, write_fp16
from prgkit.export.parity import require_agreement, run_batches
from prgkit.export.runners import OnnxRunner, TorchRunner
from prgkit.export.tensorrt import check_batch, choose_backend
from prgkit.files import readable_bytes, require_space
from prgkit.images import Preprocessing

CPU_FP16 = "ONNX Runtime's CPU provider computes in float32 with the float16 weights"


@dataclass(frozen=True)
class ExportOptions:
    """What to export besides FP32 ONNX."""

    opset: int = 20
    fp16: bool = False
    trt: bool = False
    batch: tuple[int, int, int] = (1, 1, 32)  # of the engines: min, opt, max
    backend: str | None = None  # None: tensorrt where a GPU is, else tensorrt_rtx
    sm: tuple[str, ...] | None = None  # GPU generations, as "SM86"; None: all that tensorrt_rtx builds for


@dataclass(frozen=True)
class HeldOut:
    """The images that the bundle is evaluated on, prepared for the student, and what the teacher says of them."""

    prepared: Iterable[NDArray[np.uint8]]  # n times [S, S, 3]
    teacher_logits: NDArray[np.float32]  # [n, classes]
    teacher_uniform_logits: NDArray[np.float32]  # [n, classes]
    labels: NDArray[np.int64] | None  # [n]
    source: str


def export_student(
    student: nn.Module,
    folder: Path,
    *,
    pixels: NDArray[np.uint8],
    golden: Sequence[Image.Image],
    held_out: HeldOut,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    facts: dict[str, Any],
    options: ExportOptions,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Write the bundle of ``student`` (uint8 NHWC pixels to logits, unfused) and return its manifest.

    ``pixels`` [256 or more, S, S, 3] are real images on which every artifact must agree with PyTorch; ``facts`` are the
    manifest's ``run``, ``recipe``, ``teacher`` and ``student``. A bundle that exists is replaced by a whole one.

    Raises:
        ExportError: the student cannot be exported as asked.
        BackendError: an engine was asked for and no TensorRT is usable; said before any work is done.
        ParityError: an artifact disagrees with PyTorch; no manifest is written.
    """
    check_batch(options.batch)
    backend = choose_backend(options.backend) if options.trt else None
    images = torch.from_numpy(pixels)
    with room_for(folder, expected_bytes(student, preprocessing, held_out, options)), building(folder) as new:
        module = deployable(student, images)
        reference_logits = run_batches(TorchRunner(student), pixels)

        size = preprocessing.image_size
        export_onnx(
            module,
            new / "model.onnx",
            image_size=size,
            classes=classes,
            preprocessing=preprocessing.to_dict(),
            opset=options.opset,
        )
        artifacts = [onnx_artifact(new, "model.onnx", "fp32", pixels, reference_logits, note)]
        if options.fp16:
            rehearsed = rehearse_fp16(module, images).numpy()
            require_agreement(
                reference_logits, rehearsed, precision="fp16", names=("torch", "FP16 arithmetic, rehearsed")
            )
            write_fp16(new / "model.onnx", new / "model.fp16.onnx")
            artifacts.append(onnx_artifact(new, "model.fp16.onnx", "fp16", pixels, reference_logits, note))
        if backend:
            artifacts += [
                make_engine(
                    new,
                    source,
                    backend=backend.name,
                    batch=options.batch,
                    pixels=pixels,
                    sm=options.sm,
                    reference="torch",
                    reference_logits=reference_logits,
                    note=note,
                )
                for source in list(artifacts)
            ]

        runner = OnnxRunner(new / "model.onnx", spin=False)
        inputs = np.stack([preprocessing.prepare(picture) for picture in golden])  # [16, S, S, 3]
        write_golden(new, golden, inputs, runner.run(inputs))
        write_evaluation(
            new,
            held_out.prepared,
            teacher_logits=held_out.teacher_logits,
            teacher_uniform_logits=held_out.teacher_uniform_logits,
            labels=held_out.labels,
            student=runner.run,
        )
        runner.close()
        evaluation = {
            "images": len(held_out.teacher_logits),
            "labelled": held_out.labels is not None,
            "source": held_out.source,
        }
        manifest = {
            "prgkit": prgkit.__version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **facts,
            **contract(preprocessing, classes),
            "artifacts": artifacts,
            "evaluation": evaluation,
        }
        write_manifest(new, manifest)
    return manifest


def onnx_artifact(
    folder: Path,
    file: str,
    precision: str,
    pixels: NDArray[np.uint8],
    reference_logits: NDArray[np.float32],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Assert that an ONNX file agrees with PyTorch and return its manifest entry."""
    name = f"onnx-{precision}"
    runner = OnnxRunner(folder / file, name=name, spin=False)
    parity = require_agreement(
        reference_logits, run_batches(runner, pixels), precision=precision, names=("torch", name)
    )
    runner.close()
    note(
        f"{file}: {precision}, max abs difference {parity.max_abs_difference:.2g}, "
        f"top-1 agreement {parity.top1_agreement:.2f} % on {parity.images} images"
    )
    return describe_artifact(
        folder,
        file,
        name=name,
        format_="onnx",
        precision=precision,
        backend="onnxruntime",
        executed=True,
        note=CPU_FP16 if precision == "fp16" else None,
        parity=parity.to_dict(),
    )


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Give a folder beside ``folder`` that takes its place when all went well, and is removed when not.

    Measurements made on the old bundle (its ``bench`` folder) move into the new one: they are the user's.
    """
    new, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # the last export was killed between the two renames below
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
        raise ExportError(
            "the folder holds something that is not a bundle", where=folder, fix="remove it, or choose another"
        )
    new.mkdir(parents=True)
    try:
        yield new
        if (folder / "bench").exists():
            shutil.copytree(folder / "bench", new / "bench")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def room_for(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Refuse where the bundle does not fit; where the disk fills up all the same, say how much was needed."""
    fix = "free some space and export again"
    require_space(folder, needed_bytes, "the bundle", fix=fix)
    try:
        yield
    except DiskFullError as error:
        need = f"the bundle needs {readable_bytes(needed_bytes)}"
        raise DiskFullError(f"{error.what}; {need}", where=folder, fix=fix) from error


def expected_bytes(student: nn.Module, preprocessing: Preprocessing, held_out: HeldOut, options: ExportOptions) -> int:
    """Estimate the bundle's size from above."""
    weights = 4 * sum(parameter.numel() for parameter in student.parameters())
    copies = (1.0 + 0.5 * options.fp16) * (1.0 + 1.4 * options.trt)
    pictures = len(held_out.teacher_logits) * preprocessing.image_size**2 * 3
    return int(weights * copies) + pictures + (16 << 20)
