"""An export while it is made: the student, what its files are compared on, and which of them are finished."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import prgkit
from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.data.ticks import Tick
from prgkit.export.bundle.artifact_cache import ArtifactCache, Origin, remove
from prgkit.export.bundle.bundle import describe_artifact
from prgkit.export.bundle.manifest import EMBEDDING, NCHW, Artifact
from prgkit.export.formats.onnx_export import Embedding, OnnxExportModule, onnx_export_module, rehearse_fp16, write_fp16
from prgkit.export.formats.open_vocabulary import make_input
from prgkit.export.formats.options import ExportOptions
from prgkit.export.runtimes.base import Runner
from prgkit.export.runtimes.onnxruntime import NormalisingRunner, OnnxRunner
from prgkit.export.runtimes.parity import require_agreement, run_and_close, run_batches
from prgkit.export.runtimes.pytorch import TorchRunner
from prgkit.storage.atomic import sha256
from prgkit.student.heads import OpenVocabulary
from prgkit.student.model import Normalised

WRITERS = ("timm", "onnx", "onnxscript", "onnxruntime")  # besides torch: what writes ONNX files, and compares them


@dataclass(frozen=True)
class CalibrationSet:
    """Images that the student learned from, none of them in the evaluation set."""

    images: int
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]  # places [n], below `images`, to pixels [n, S, S, 3]


@dataclass(frozen=True, eq=False)
class StudentExport:
    """What every format is made from, and what is made so far; the student is fused and asked only where needed."""

    student: nn.Module  # uint8 pixels [batch, S, S, 3] to logits, unfused
    classes: Sequence[str]
    preprocessing: Preprocessing
    options: ExportOptions
    pixels: NDArray[np.uint8]  # [n, S, S, 3] real images on which every artifact must agree with PyTorch
    calibration: Callable[[], CalibrationSet] | None
    folder: Path  # of the bundle that is made
    work: Path  # for files that do not stay
    cache: ArtifactCache
    origin: Origin
    note: Callable[[str], None]
    ticks: Collection[Tick] = ()  # what a person said of the evaluation images
    artifacts: list[Artifact] = field(default_factory=list)  # that are made so far

    @cached_property
    def module(self) -> OnnxExportModule:
        """The fused student."""
        return onnx_export_module(self.student, torch.from_numpy(self.pixels))

    @cached_property
    def reference_logits(self) -> NDArray[np.float32]:
        """PyTorch's logits [n, classes] of the pixels."""
        return run_batches(TorchRunner(self.student), self.pixels)

    @cached_property
    def reference_features(self) -> NDArray[np.float32]:
        """PyTorch's unit features [n, D] of the pixels, of a student with an open vocabulary."""
        embedding = Embedding(cast(OpenVocabulary, self.student.model))
        parts = torch.split(torch.from_numpy(self.pixels), 32)
        with torch.no_grad():
            features = torch.cat([embedding(cast(Normalised, self.student).images(part)) for part in parts])
        return nn.functional.normalize(features, dim=1).numpy()

    @cached_property
    def program(self) -> Path:
        """The fused student as a program of torch.export, of one picture: what other converters than ONNX's read."""
        example = torch.zeros((1, *sides(self.preprocessing.image_size), 3), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(self.module, (), {"pixels": example})
            torch.export.save(program, path := self.work / "program.pt2")
        return path

    @cached_property
    def fp16_file(self) -> Path:
        """The FP16 ONNX file: the bundle's own, or one that does not stay."""
        if self.options.fp16:
            return self.folder / "model.fp16.onnx"
        self.write_fp16(path := self.work / "model.fp16.onnx")
        return path

    def write_fp16(self, path: Path) -> None:
        """Write the FP16 ONNX file, once FP16 arithmetic is known to hold the student.

        Raises:
            ExportError: a value does not fit.
            ParityError: it gives other answers than PyTorch.
        """
        rehearsed = rehearse_fp16(self.module, torch.from_numpy(self.pixels)).numpy()
        names = ("torch", "FP16 arithmetic, rehearsed")
        require_agreement(self.reference_logits, rehearsed, precision="fp16", names=names)
        write_fp16(self.folder / "model.onnx", path)

    def finish(
        self, name: str, file: str, *, write: Callable[[Path], None], converters: Sequence[str] = (), **how: Any
    ) -> Artifact:
        """Return the artifact of what ``write`` writes; how it is described and compared is `describe`'s.

        ``converters`` are the packages that write it, where they are others than those of ONNX files.
        """

        def make() -> Artifact:
            remove(self.folder / file)  # of another origin: a folder would stand in the way
            write(self.folder / file)
            return self.describe(name, file, **how)

        return self.cache.get(name, self.origin_by(converters), make)

    def origin_by(self, converters: Sequence[str]) -> Origin:
        """Return what decides a file that these packages write."""
        versions: Origin = {"converters": [metadata.version(name) for name in converters]} if converters else {}
        return self.origin | versions

    def describe(
        self,
        name: str,
        file: str,
        *,
        runner: Callable[[Path], Runner] | None,
        precision: str,
        kind: str = "",
        **facts: Any,
    ) -> Artifact:
        """Assert that a file agrees with PyTorch and return what is known of it.

        ``runner`` opens it, None where nothing here can run it, as the ``note`` says; ``kind`` is said after its
        precision; ``facts`` are other fields of `Artifact`.

        Raises:
            ParityError: it does not.
        """
        if runner is None:
            self.note(f"{file}: {precision}{kind}, {facts['note']}")
            return describe_artifact(
                self.folder, file, name=name, precision=precision, parity=None, executed=False, **facts
            )
        opened = runner(self.folder / file)
        logits = run_and_close(opened, self.pixels)
        parity = require_agreement(self.reference_logits, logits, precision=precision, names=("torch", name))
        self.note(
            f"{file}: {precision}{kind}, max abs difference {parity.max_abs_difference:.2g}, "
            f"top-1 agreement {parity.top1_agreement:.2f} % on {parity.images} images"
        )
        known = {"backend": opened.backend, "executed": True, "note": None, **facts}
        return describe_artifact(self.folder, file, name=name, precision=precision, parity=parity, **known)

    def take_class_vectors(self, artifact: Artifact) -> Artifact:
        """Turn the class vectors of an ONNX artifact into an input, and assert that it says the same.

        Such a file is made anew at each export: what is made from it needs the vectors in it.
        """
        if artifact.format == EMBEDDING:
            return artifact
        path = self.folder / artifact.file

        def logits() -> NDArray[np.float32]:
            with_floats = artifact.format == NCHW
            runner = NormalisingRunner(path, self.preprocessing) if with_floats else OnnxRunner(path, spin=False)
            return run_and_close(runner, self.pixels)

        before = logits()
        make_input(path)
        names = (f"{path.name} that holds its class vectors", "the same that takes them")
        require_agreement(before, logits(), precision=artifact.precision, names=names)
        return artifact.model_copy(update={"made_from": None, "bytes": path.stat().st_size, "sha256": sha256(path)})


def origin_of(
    student: nn.Module,
    pixels: NDArray[np.uint8],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    options: ExportOptions,
) -> Origin:
    """Return all that decides an ONNX file and its parity: an artifact of the same origin need not be made again."""
    weights = hashlib.sha256(repr(student).encode())
    for name, tensor in student.state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "student": weights.hexdigest(),
        "images": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "opset": options.opset,
        "versions": [prgkit.__version__, torch.__version__, *(metadata.version(name) for name in WRITERS)],
    }
