"""Core ML and QNN: what is written here says what it should, and nothing claims that it was executed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prgkit.config.sections import Export
from prgkit.errors import BackendError, ExportError
from prgkit.export.bundle.artifact_cache import ArtifactCache
from prgkit.export.formats.mobile.coreml import COREML_FORMAT
from prgkit.export.formats.mobile.qnn import QNN_FORMAT
from prgkit.export.formats.options import ExportOptions
from prgkit.export.runtimes import setups
from tests.conftest import SIZE, Exported, export_family
from tests.unit.export.test_ncnn import student_export


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """timm's smallest student."""
    pytest.importorskip("torch")
    return export_family("test_efficientnet", tmp_path_factory.mktemp("small"))


def cache_of(folder: Path) -> ArtifactCache:
    folder.mkdir(parents=True)
    return ArtifactCache(folder, bundle=folder / "none", note=lambda _: None)


def test_a_core_ml_package_has_image_in_and_classes_out(student: Exported, tmp_path: Path) -> None:
    tools = pytest.importorskip("coremltools")
    folder = tmp_path / "bundle"
    export = student_export(student, folder, cache_of(folder), formats=("coreml",))
    (artifact,) = COREML_FORMAT.make(export).artifacts
    assert (artifact.name, artifact.file, artifact.precision) == ("coreml-fp32", "model.mlpackage", "fp32")
    assert (artifact.executed, artifact.parity) == (False, None)
    assert artifact.note == "never executed here: Core ML runs on Apple's systems"
    assert list(setups(artifact, folder, [artifact])) == []
    spec = tools.models.MLModel(str(folder / artifact.file), skip_model_load=True).get_spec()
    (given,) = spec.description.input
    assert (given.name, given.type.imageType.width, given.type.imageType.height) == ("image", SIZE, SIZE)
    assert given.type.imageType.colorSpace == given.type.imageType.RGB
    assert [one.name for one in spec.description.output] == ["classLabel", "classLabel_probs"]
    description = spec.description
    assert (description.predictedFeatureName, description.predictedProbabilitiesName) == (
        "classLabel",
        "classLabel_probs",
    )
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    assert block.operations[-1].type == "classify"
    classes = block.operations[-1].inputs["classes"].arguments[0].value.immediateValue.list.values
    listed = [one.immediateValue.tensor.strings.values[0] for one in classes]
    assert listed == [f"thing {number}" for number in range(20)]
    weights = folder / artifact.file / "Data/com.apple.CoreML/weights/weight.bin"
    assert 0.9 < weights.stat().st_size / student.fp32.stat().st_size < 1.1  # FP32
    assert "preprocessing" in spec.description.metadata.userDefined


def test_a_program_for_an_npu_is_one_node_with_the_same_input_and_output(student: Exported, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime_qnn")
    folder = tmp_path / "bundle"
    export = student_export(student, folder, cache_of(folder), qnn="sm8650")
    (artifact,) = QNN_FORMAT.make(export).artifacts
    assert (artifact.name, artifact.file, artifact.precision) == ("qnn-sm8650", "model.sm8650.qnn.onnx", "fp16")
    assert (artifact.executed, artifact.backend) == (False, "onnxruntime-qnn, SM8650")
    model = onnx.load(str(folder / artifact.file))
    assert [(node.op_type, node.domain) for node in model.graph.node] == [("EPContext", "com.microsoft")]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["pixels", "logits"]


def test_the_commands_that_make_files_for_two_chips_again_are_two() -> None:
    from prgkit.cli.main import cli
    from prgkit.evaluate.bench.metadata import made_by
    from prgkit.export.bundle.manifest import exports_of

    asked = [("--int8", "--trt"), ("--coreml", "--fp16"), ("--qnn", "SM8650"), ("--qnn", "SM8750"), ("--fp16",)]
    artifacts = [SimpleNamespace(format=options[0][2:], export_options=options) for options in asked]
    told = [["--int8", "--coreml", "--fp16", "--qnn", chip, "--trt"] for chip in ("SM8650", "SM8750")]
    assert exports_of(artifacts) == told
    manifest: Any = SimpleNamespace(
        run=SimpleNamespace(name="a"), relabelled=None, open_vocabulary=None, export=Export()
    )
    bundle: Any = SimpleNamespace(folder=Path(), manifest=manifest, artifacts=artifacts)
    commands = made_by(bundle, "prgkit distill a bench")
    assert commands == [f"prgkit export {' '.join(options)} --run runs/a" for options in told]
    for command, chip in zip(commands, ("SM8650", "SM8750"), strict=True):
        with cli.commands["export"].make_context("export", command.split()[2:]) as parsed:
            assert parsed.params["qnn"] == chip
    assert exports_of(artifacts[:1]) == [["--int8", "--trt"]]
    assert exports_of([]) == [[]]


def test_the_engines_of_each_backend_are_built_again_by_a_command_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.evaluate.bench.metadata import made_by
    from prgkit.export import relabel

    kinds = (("tensorrt", "fp32"), ("tensorrt_rtx", "fp32"), ("tensorrt_rtx", "fp16"))
    artifacts = [
        SimpleNamespace(file=f"{backend}.{precision}.engine", format="engine", backend=backend, precision=precision,
                        export_options=("--trt", "--fp16") if precision == "fp16" else ("--trt",))
        for backend, precision in kinds
    ]  # fmt: skip
    for one in artifacts:
        (tmp_path / one.file).touch()
    cards = {one.file: SimpleNamespace(backend=one.backend, batch=(1, 1, 8)) for one in artifacts}
    module = "prgkit.export.bundle.engine_metadata.load_engine_metadata"
    monkeypatch.setattr(module, lambda path: cards[path.name])
    manifest: Any = SimpleNamespace(
        run=SimpleNamespace(name="a"), relabelled=None, open_vocabulary=None, export=Export()
    )
    bundle: Any = SimpleNamespace(folder=tmp_path, manifest=manifest, artifacts=artifacts)
    assert made_by(bundle, "distill") == [
        "prgkit export --fp16 --trt --backend tensorrt --batch 1,1,8 --run runs/a",
        "prgkit export --fp16 --trt --backend tensorrt_rtx --batch 1,1,8 --run runs/a",
    ]
    notes: list[str] = []
    relabel.leave_engines(bundle, tmp_path, SimpleNamespace(note=notes.append))
    assert [note.partition("; ")[2] for note in notes] == [
        f"prgkit export --trt --backend tensorrt --batch 1,1,8 --run {tmp_path} builds them again",
        f"prgkit export --trt --fp16 --backend tensorrt_rtx --batch 1,1,8 --run {tmp_path} builds them again",
    ]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_made_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for known, options, extra in (
        (COREML_FORMAT, ExportOptions(formats=("coreml",)), "coreml"),
        (QNN_FORMAT, ExportOptions(qnn="SM8650"), "qnn"),
    ):
        with pytest.raises(BackendError) as caught:
            known.require(options)
        assert caught.value.fix == f"pip install 'prgkit[{extra}]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ExportError, match="--qnn: SM1 is not known") as refused:
        QNN_FORMAT.require(ExportOptions(qnn="SM1"))
    assert str(refused.value.fix).startswith("one of: SM8450, ")
