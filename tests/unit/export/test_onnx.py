"""ONNX export: two student families, really exported; equal to PyTorch, small, and honest about FP16."""

from __future__ import annotations

import copy
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

import prgkit  # noqa: E402
from prgkit.errors import ExportError  # noqa: E402
from prgkit.export.formats.onnx_export import (  # noqa: E402
    OnnxExportModule,
    export_onnx,
    lower_opset,
    onnx_export_module,
    rehearse_fp16,
    write_fp16,
)
from prgkit.export.formats.onnx_int8 import ONNX_INT8  # noqa: E402
from prgkit.export.formats.options import ExportOptions  # noqa: E402
from prgkit.export.runtimes.onnxruntime import OnnxRunner  # noqa: E402
from prgkit.export.runtimes.parity import compare, require_agreement, run_batches  # noqa: E402
from prgkit.export.runtimes.pytorch import TorchRunner  # noqa: E402


def logits_of(module, pixels):
    return run_batches(TorchRunner(module), pixels)


def ops(path):
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def test_fused_equals_unfused_and_has_no_batch_norm_left_in_repvit(exported):
    before, after = logits_of(exported.student, exported.pixels), logits_of(exported.module, exported.pixels)
    assert np.abs(before - after).max() <= 1e-4 * max(1, np.abs(before).max())
    assert (before.argmax(1) == after.argmax(1)).all()
    assert len(set(before.argmax(1))) > 3, "the pictures must not all be one class"
    layers = [type(layer).__name__ for layer in exported.module.modules()]
    if "repvit" in type(exported.module.network).__name__.lower():
        assert not [name for name in layers if "BatchNorm" in name]


def test_fusing_leaves_the_student_as_it_was(exported):
    weights = {name: value.clone() for name, value in exported.student.state_dict().items()}
    onnx_export_module(exported.student, torch.from_numpy(exported.pixels[:8]))
    after = exported.student.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_a_fusion_that_changes_the_logits_is_refused(repvit, monkeypatch):
    def broken(model):
        from prgkit.student.model import reparameterised

        fused = reparameterised(model)
        with torch.no_grad():
            next(iter(fused.parameters())).mul_(1.01)
        return fused

    monkeypatch.setattr("prgkit.export.formats.onnx_export.reparameterised", broken)
    with pytest.raises(ExportError, match=r"on 16 images: max abs difference \d.*\(allowed .*\), top-1 agreement"):
        onnx_export_module(repvit.student, torch.from_numpy(repvit.pixels[:16]))


def agreement(reference, runner, pixels, *, precision):
    logits = (run_batches(reference, pixels), run_batches(runner, pixels))
    return require_agreement(*logits, precision=precision, names=(reference.name, runner.name))


def test_onnx_runtime_agrees_with_torch_in_fp32(exported):
    runner = OnnxRunner(exported.fp32, threads=1)
    parity = agreement(TorchRunner(exported.student), runner, exported.pixels, precision="fp32")
    assert parity.images == 256
    assert parity.max_abs_difference <= parity.tolerance
    assert parity.top1_agreement == 100.0


def test_onnx_runtime_agrees_with_torch_in_fp16(exported):
    runner = OnnxRunner(exported.fp16, threads=1)
    parity = agreement(TorchRunner(exported.student), runner, exported.pixels, precision="fp16")
    assert parity.top1_agreement >= 99.0
    assert parity.max_abs_difference > 0, "float16 weights cannot give the very same logits"


def test_fp16_arithmetic_rehearsed_agrees(exported):
    pixels = exported.pixels[:128]
    rehearsed = rehearse_fp16(exported.module, torch.from_numpy(pixels)).numpy()
    reference = logits_of(exported.student, pixels)
    parity = compare(reference, rehearsed, precision="fp16")
    assert (
        parity.top1_agreement >= 97
    )  # 99 once trained: an untrained EfficientNet has near ties and amplifies rounding
    assert parity.kl < 1e-2
    stored = run_batches(OnnxRunner(exported.fp16, threads=1), pixels)
    assert parity.max_abs_difference > np.abs(stored - reference).max(), (
        "activations are rounded too, not weights alone"
    )


def test_real_images_agree(exported):
    shard = real_shard()
    if shard is None:
        pytest.skip("no CIFAR-100 shard here")
    pixels = np.stack([exported.preprocessing.prepare(picture) for picture in pictures_of(shard, 256)])
    reference = TorchRunner(exported.student)
    onnx_export_module(exported.student, torch.from_numpy(pixels))
    agreement(reference, OnnxRunner(exported.fp32, threads=1), pixels, precision="fp32")
    agreement(reference, OnnxRunner(exported.fp16, threads=1), pixels, precision="fp16")


def test_the_batch_is_free(exported):
    runner = OnnxRunner(exported.fp32, threads=1)
    whole = runner.run(exported.pixels[:7])
    for count in (1, 2, 5):
        np.testing.assert_allclose(runner.run(exported.pixels[:count]), whole[:count], atol=1e-5)


def test_the_file_says_all_that_is_needed_to_use_it(exported):
    for path in (exported.fp32, exported.fp16):
        model = onnx.load(str(path))
        assert model.ir_version == 9, "the lowest that opset 20 allows: ONNX Runtime 1.17 refuses 10"
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
        pixels, logits = model.graph.input[0], model.graph.output[0]
        assert (pixels.name, shape_of(pixels), pixels.type.tensor_type.elem_type) == (
            "pixels",
            ["batch", 64, 64, 3],
            onnx.TensorProto.UINT8,
        )
        assert (logits.name, shape_of(logits), logits.type.tensor_type.elem_type) == (
            "logits",
            ["batch", 20],
            onnx.TensorProto.FLOAT,
        )
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(facts["classes"]) == [f"thing {number}" for number in range(20)]
        assert json.loads(facts["preprocessing"]) == exported.preprocessing.to_dict()
        assert facts["prgkit"] == prgkit.__version__
        assert not [initializer for initializer in model.graph.initializer if initializer.external_data]


def test_nothing_of_this_machine_is_in_the_file(exported):
    data = exported.fp32.read_bytes()
    assert b'.py"' not in data
    assert b"File " not in data
    assert str(Path.home()).encode() not in data or str(Path.home()) == "/"


def test_pixels_are_cast_before_they_are_transposed(exported):
    assert ops(exported.fp32)[:4] == ["Cast", "Transpose", "Mul", "Add"]
    assert ops(exported.fp16)[:5] == ["Cast", "Transpose", "Mul", "Add", "Cast"]
    assert ops(exported.fp16)[-1] == "Cast"


def test_preprocessing_costs_four_nodes_and_no_shape_arithmetic(exported):
    """A plain export of the fused network from float images is the peer: ours may have four nodes more."""
    example = torch.zeros(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1)
    plain = torch.onnx.export(
        exported.module.network, (example,), dynamo=True, opset_version=20, dynamic_shapes=({0: batch},), verbose=False
    )
    ours = ops(exported.fp32)
    assert len(ours) <= len(plain.model_proto.graph.node) + 4
    assert not {"Shape", "Range", "Gather", "BatchNormalization", "Identity"} & set(ours)


def test_fp16_holds_no_float32_between_its_edges(exported):
    model = onnx.load(str(exported.fp16))
    kinds = {initializer.name: initializer.data_type for initializer in model.graph.initializer}
    normalising = {name for node in model.graph.node[:4] for name in node.input}
    floats = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}
    assert floats <= normalising
    assert exported.fp16.stat().st_size < 0.52 * exported.fp32.stat().st_size


@pytest.mark.parametrize(("opset", "ir"), [(17, 8), (18, 8), (19, 9), (21, 10)])
def test_another_opset_says_the_lowest_ir_and_computes_the_same(exported, tmp_path, opset, ir):
    path = tmp_path / "m.onnx"
    facts = {"image_size": 64, "classes": ["a"] * 20, "preprocessing": exported.preprocessing}
    export_onnx(exported.module, path, opset=opset, **facts)
    write_fp16(path, tmp_path / "m.fp16.onnx")
    for file in (path, tmp_path / "m.fp16.onnx"):
        model = onnx.load(str(file))
        assert (model.ir_version, [(one.domain, one.version) for one in model.opset_import]) == (ir, [("", opset)])
    agreement(TorchRunner(exported.student), OnnxRunner(path, threads=1), exported.pixels[:64], precision="fp32")
    # opset 18 gave reductions their axes as an input; before it they are an attribute, and no constant is left over
    means = [node for node in onnx.load(str(path)).graph.node if node.op_type == "ReduceMean"]
    assert means
    assert all(len(node.input) == (1 if opset < 18 else 2) for node in means)


def test_an_operator_that_an_opset_does_not_know_is_named():
    graph = onnx.helper.make_graph([onnx.helper.make_node("Mish", ["x"], ["y"])], "g", [], [])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    with pytest.raises(ExportError, match="cannot be written in opset 17: its Mish came with opset 18"):
        lower_opset(model, 17)
    with pytest.raises(ExportError, match="cannot be written in opset 19: PyTorch did not"):
        lower_opset(model, 19)


def test_int8_for_tensorrt_in_an_opset_without_fp16_scales_is_refused_at_once():
    ONNX_INT8.require(ExportOptions(opset=17, int8=True))
    ONNX_INT8.require(ExportOptions(opset=19, int8=True, trt=True))
    with pytest.raises(ExportError, match=r"INT8 for TensorRT cannot be written in opset 18: its scales are FP16"):
        ONNX_INT8.require(ExportOptions(opset=18, int8=True, trt=True))


def test_the_exporter_prints_nothing(repvit, tmp_path, capfd):
    export_onnx(
        repvit.module, tmp_path / "m.onnx", image_size=64, classes=["a"], preprocessing=repvit.preprocessing, opset=19
    )
    assert tuple(capfd.readouterr()) == ("", "")
    assert onnx.load(str(tmp_path / "m.onnx")).opset_import[0].version == 19


def test_an_activation_beyond_float16_is_refused_by_name(repvit):
    module = copy.deepcopy(repvit.module)
    with torch.no_grad():
        module.network.stem.conv1.bias.fill_(6e4)  # fits; a sum of 216 of them does not
        module.network.stem.conv2.weight.fill_(1)
    with pytest.raises(ExportError) as caught:
        rehearse_fp16(module, torch.from_numpy(repvit.pixels[:4]))
    assert caught.value.what.startswith("FP16 cannot hold this student: network.stem.conv2 reaches 1")
    assert caught.value.what.endswith("on real images, and float16 ends at 65,504")
    assert caught.value.fix.startswith("export without --fp16, and without --int8 --trt, whose file is made of FP16's;")


def test_a_layer_with_a_million_is_refused_by_name(repvit):
    module = copy.deepcopy(repvit.module)
    with torch.no_grad():
        module.network.stages[1].blocks[0].token_mixer.bias.fill_(1e6)
    with pytest.raises(ExportError, match=r"a weight of network\.stages\.1\.blocks\.0\.token_mixer reaches 1,000,000 "):
        rehearse_fp16(module, torch.from_numpy(repvit.pixels[:4]))


def test_a_residual_sum_beyond_float16_is_refused():
    class Doubling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Identity(), torch.nn.Linear(3, 2)

        def forward(self, images):
            kept = self.first(images.amax((2, 3)) + 40_000)
            return self.last(kept + kept)

    module = OnnxExportModule(Doubling(), torch.zeros(3), torch.ones(3))
    with pytest.raises(ExportError, match=r"network\.last reaches 80,"):
        rehearse_fp16(module, torch.zeros((1, 4, 4, 3), dtype=torch.uint8))


def test_activations_that_are_nan_are_refused():
    module = OnnxExportModule(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)), torch.zeros(3), torch.ones(3)
    )
    with torch.no_grad():
        module.network[1].bias.fill_(torch.nan)
    with pytest.raises(ExportError, match=r"network\.1 reaches nan"):
        rehearse_fp16(module, torch.zeros((1, 4, 4, 3), dtype=torch.uint8))


def test_a_weight_beyond_float16_is_refused_by_name(repvit, tmp_path):
    model = onnx.load(str(repvit.fp32))
    weight = next(entry for entry in model.graph.initializer if entry.name == "network.head.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = -70_000
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match=r"weight network\.head\.weight reaches 70,000"):
        write_fp16(tmp_path / "m.onnx", tmp_path / "h.onnx")
    assert not (tmp_path / "h.onnx").exists()


def test_only_our_own_files_become_fp16(tmp_path):
    helper = onnx.helper
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["pixels"], ["logits"], "relu")],
        "other",
        [value("pixels", onnx.TensorProto.FLOAT, [1])],
        [value("logits", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "m.onnx")
    )
    with pytest.raises(ExportError, match="does not begin with prgkit's preprocessing"):
        write_fp16(tmp_path / "m.onnx", tmp_path / "h.onnx")


def shape_of(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def real_shard():
    shard = Path(os.environ.get("PRGKIT_DATA", "not given")) / "cifar100" / "test-000000.tar"
    return shard if shard.exists() else None


def pictures_of(shard, count):
    with tarfile.open(shard) as archive:
        members = [member for member in archive if member.name.endswith((".png", ".jpg", ".webp"))][:count]
        return [Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB") for member in members]
