"""What a bundle's manifest.json says: what made the student, what goes in and comes out, and every artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from prgkit.config.image_size import Size
from prgkit.config.sections import Export
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ExportError
from prgkit.storage.documents import read_document
from prgkit.storage.quality import Statistics

SCHEMA = "prgkit.bundle/3"
FILE = "manifest.json"
EXPORT_AGAIN = "export it again: prgkit export"
ONNX = "onnx"  # the format of a file that ONNX Runtime runs
QDQ = "onnx-tensorrt"  # of an INT8 file that TensorRT builds from; ONNX Runtime runs it, but slowly
EXPLAIN = "onnx-explain"  # of an ONNX file whose second output says where each class was found; never measured
OPENVINO_QDQ = "onnx-openvino"  # of an INT8 file for OpenVINO; ONNX Runtime runs it, but slowly
NCHW = "onnx-nchw"  # of an ONNX file for other runtimes: normalised floats in, never run or measured by us
EMBEDDING = "onnx-embedding"  # of an ONNX file that gives a unit vector in the teacher's space, and no logits
ENGINE = "engine"  # of a TensorRT engine
LITERT = "litert"  # of a .tflite file
EXECUTORCH = "executorch"  # of a .pte file
NCNN = "ncnn"  # of a folder with ncnn's two files
COREML = "coreml"  # of an .mlpackage
QNN = "qnn"  # of an ONNX file that holds a program for a Qualcomm NPU
KL_SHARE = 0.1  # of FP32's divergence from the teacher, by which another file's may be larger
LEAST_KL = 0.01  # nats by which it may be larger in any case: FP32's may be next to nothing
MATRIX = "class_vectors"  # of an open vocabulary: the tensor in its ONNX files, and the same beside them
VECTORS = f"{MATRIX}.npy"  # [C, D] float32
PARTS = ("evaluation", "golden")  # the folders of a bundle with its images and what is known of them


class Facts(BaseModel):
    """What is written to a file: immutable, and no key that is not known. What was not given is not in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return self.model_dump(mode="json", exclude_unset=True)


class TensorSpec(Facts):
    """An input or output of a network; in its shape a word or -1 stands for any number."""

    name: str
    dtype: str
    layout: str | None = None
    shape: tuple[int | str, ...]
    values: str | None = None  # what is done to pixels before, where the network does not do it itself
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


class Parity(Facts):
    """How closely two sets of logits agree on the same images."""

    images: int
    max_abs_difference: float
    tolerance: float | None  # None where the precision is judged by top-1 alone
    top1_agreement: float  # percent
    kl: float  # mean KL(reference || other) of the softmax, in nats


class PairedShares(Facts):
    """On how many of the same images the FP32 file and another are right."""

    images: int
    fp32: float  # percent
    file: float  # percent
    won: int  # images on which the file alone is right
    lost: int  # images on which FP32 alone is right
    bounds: tuple[float, float]  # of file - fp32 in percent points, each one-sided at 95 %


class NonInferiority(Facts):
    """Whether a file is as good as the FP32 file: both are judged by the teacher, and by the truth where known."""

    images: int
    agreement_fp32: float  # percent of images with FP32's answer: a figure, by which nothing is judged
    teacher: PairedShares  # right is the teacher's answer
    labels: PairedShares | None = None  # right is the label, or what a person ticked, on the images that have one
    kl_fp32: float  # mean KL(teacher || FP32) in nats
    kl: float  # mean KL(teacher || file)
    kl_bound: float  # the upper 95 % bound, one-sided, of how much larger it is than FP32's

    def holds(self, margin: float) -> bool:
        """Tell whether the file is surely less than ``margin`` percent points worse than the FP32 file.

        Labels of some of the images are too few to show that: they refuse what is surely worse by them.
        """
        return all(self.conditions(margin).values())

    @property
    def kl_allowed(self) -> float:
        """By how many nats its divergence from the teacher may be larger than FP32's."""
        return max(KL_SHARE * self.kl_fp32, LEAST_KL)

    def conditions(self, margin: float) -> dict[Literal["teacher", "labels", "kl"], bool]:
        """Return by what the file is judged, and whether it holds there."""
        found: dict[Literal["teacher", "labels", "kl"], bool] = {
            "teacher": self.teacher.bounds[0] >= -margin,
            "kl": self.kl_bound <= self.kl_allowed,
        }
        if self.labels is not None:
            bounds = self.labels.bounds
            found["labels"] = bounds[0] >= -margin if self.labels.images == self.images else bounds[1] >= 0
        return found


Layout = Literal["onnxruntime", "openvino", "tensorrt"]
OwnQuantiser = Literal["litert", "executorch"]  # runtimes whose INT8 files their own quantiser makes


class Quantization(Facts):
    """How an INT8 file was made, and how it stands to FP32; after a relabel what does not depend on the classes."""

    name: str = ""
    layout: Layout | OwnQuantiser = "onnxruntime"
    calibration_images: int = 0
    kept: bool = True
    clip_quantile: float | None = None  # the share of the images clipped on either side of a tensor's range
    margin: float  # percent points that it may be worse than FP32
    comparison: NonInferiority | None = None
    made_from: str | None = None


class TooFewImages(Facts):
    """An INT8 file that was not made: with every answer right that is FP32's, nothing would be sure of it."""

    name: str = ""
    layout: Layout | OwnQuantiser = "onnxruntime"
    calibration_images: int = 0
    kept: Literal[False] = False
    margin: float  # percent points
    images: int


class NotBuilt(Facts):
    """An engine that was not built, and why."""

    name: str
    kept: Literal[False] = False
    why: str


NotKept = Quantization | TooFewImages | NotBuilt


class Artifact(Facts):
    """A file that runs the student, and how it was checked."""

    name: str
    file: str
    format: str
    precision: str
    backend: str
    bytes: int
    sha256: str
    executed: bool
    note: str | None
    parity: Parity | None
    input: TensorSpec | None = None  # where it is not the manifest's
    quantization: Quantization | None = None
    export_options: tuple[str, ...] = ()  # that `prgkit export` is given to make it
    made_from: str | None = None  # fingerprint of all that decides the file; None: the next export makes it anew


class RunFacts(Facts):
    """The run that trained the student."""

    name: str
    fingerprint: str
    student_sha256: str | None = None
    objective: str
    learned_labels: bool = False
    epochs: int
    best_epoch: int | None = None
    images: int | None = None  # that were used
    training: tuple[dict[str, JsonValue], ...] = ()  # a record an epoch
    quality: Statistics | None = None  # of the pseudo-labels


class TeacherFacts(Facts):
    """The teacher."""

    model: str
    weights: str | None = None
    fingerprint: str


class StudentFacts(Facts):
    """The student's network."""

    model: str
    initial: str | None = None
    origin: str = ""  # what it began with, in words; empty: random weights
    parameters: int | None = None
    image_size: Size | None = None


class ClassScoring(Facts):
    """How features are scored by the teacher's class vectors, where the student has no class head."""

    teacher: str  # fingerprint
    templates: tuple[str, ...]
    class_vectors: Literal["initializer", "input"]  # of the ONNX files
    width: int
    logit_scale: float
    relabelled: str | None = None  # when other classes took the place of those that the student learned with
    input: TensorSpec | None = None  # the files' second one, where the class vectors are an input


class EvaluationFacts(Facts):
    """The images that the bundle is evaluated on."""

    images: int
    labelled: bool
    source: str


RejectionScore = Literal["energy", "probability"]  # of an image: low where it shows none of the classes


class Confidence(Facts):
    """What the confidences of the FP32 student are worth, on images that it did not learn from."""

    temperature: float  # logits are divided by it before the softmax
    fitted_to: Literal["teacher", "ticks"]  # whose answers are the right ones
    images: int  # with a right answer
    calibration_error: float  # expected, in percent points, with the temperature
    uncalibrated_error: float  # and without
    right: tuple[float, ...]  # the confidence of every right answer, in ascending order
    wrong: tuple[float, ...]
    held_out: int  # images, ticked or not
    reject_below: float  # what 95 % of those reach, of logits / temperature
    reject_by: RejectionScore = "energy"


class Manifest(Facts):
    """All that is known of a bundle."""

    prgkit: str
    created: str
    run: RunFacts
    recipe: dict[str, JsonValue]
    teacher: TeacherFacts
    student: StudentFacts
    open_vocabulary: ClassScoring | None = None
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    input: TensorSpec
    output: TensorSpec
    artifacts: tuple[Artifact, ...]
    not_kept: tuple[NotKept, ...] = ()
    evaluation: EvaluationFacts
    confidence: Confidence | None = None  # None: too few held-out images, or other classes since
    checksums: dict[str, str] = {}  # SHA-256 of the images, logits and labels, by path in the bundle

    @property
    def export(self) -> Export:
        """The recipe's section on exports."""
        return Export.model_validate(self.recipe.get("export") or {}, strict=False)

    @property
    def temperature(self) -> float:
        """What logits are divided by before the softmax: 1 where nothing is known."""
        return self.confidence.temperature if self.confidence else 1.0

    @property
    def relabelled(self) -> str | None:
        """When the classes were changed, or None."""
        return self.open_vocabulary.relabelled if self.open_vocabulary else None

    @property
    def margin(self) -> float:
        """By how many percent points INT8 may be worse: the last export's, by which what stayed was judged again."""
        return self.export.margin


def exports_of(artifacts: Sequence[Artifact]) -> list[list[str]]:
    """Return the options of the exports that make artifacts: of one, or of one for each of Qualcomm's chips.

    An export takes one chip, and keeps what those before it made. --trt is last: what says how engines are built
    follows it.
    """
    chips = [artifact.export_options for artifact in artifacts if artifact.format == QNN]
    others = dict.fromkeys(word for one in artifacts if one.format != QNN for word in one.export_options)
    return [sorted([*others, *chip], key="--trt".__eq__) for chip in chips or [()]]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the bundle in ``folder``.

    Raises:
        ExportError: there is none, or it is damaged, or of another version; names what makes it anew.
    """
    path = folder / FILE
    if not path.exists():
        raise ExportError("there is no bundle here", where=folder, fix="make one: prgkit export")
    manifest = read_document(path, Manifest, SCHEMA, what="a bundle's manifest", fix=EXPORT_AGAIN, error=ExportError)
    for artifact in manifest.artifacts:
        require_inside(artifact.file, path)
    for name in manifest.checksums:
        if name != VECTORS:
            require_inside(name, path, folders=PARTS)
    return manifest


def require_inside(file: str, path: Path, *, folders: Sequence[str] = ()) -> None:
    """Refuse a file that would not lie in the bundle itself, or not in one of its ``folders``, named in ``path``.

    Raises:
        ExportError: it would not.
    """
    name = PureWindowsPath(file.rpartition("/")[2]).name  # in no folder of Windows either, and on no drive
    if name in ("", "..") or file not in ([f"{folder}/{name}" for folder in folders] or [name]):
        raise ExportError(
            f"{path.name} names a file outside the bundle: {file!r}",
            where=path,
            fix="copy the bundle again, or make it again: prgkit export",
        )
