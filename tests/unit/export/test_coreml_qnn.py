"""Core ML and QNN: what is written here says what it should, and nothing claims that it was executed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

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
