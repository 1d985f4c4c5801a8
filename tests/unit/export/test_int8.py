"""INT8: the graph that is written, the comparison with FP32 that decides whether it is kept, and what becomes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import numpy_helper  # noqa: E402

from prgkit.config.recipe import load_recipe  # noqa: E402
from prgkit.data.index import read_image_index  # noqa: E402
from prgkit.data.preprocessing import Preprocessing  # noqa: E402
from prgkit.data.ticks import Tick  # noqa: E402
from prgkit.errors import ExportError, TargetsError  # noqa: E402
from prgkit.evaluate.bench.bench import Subject, accuracy  # noqa: E402
from prgkit.evaluate.predict import Model  # noqa: E402
from prgkit.evaluate.report.formatting import lead_row, refused  # noqa: E402
from prgkit.evaluate.report.schema import Int8Verdict, Latency, Row  # noqa: E402
from prgkit.evaluate.selection import int8_notes, judge_int8, write_selection  # noqa: E402
from prgkit.export import engines  # noqa: E402
from prgkit.export.bundle.artifact_cache import refused_by  # noqa: E402
from prgkit.export.bundle.bundle import open_bundle, read_evaluation  # noqa: E402
from prgkit.export.bundle.fidelity import compare_with_fp32, images_needed, int8_sentence, known_classes, too_few  # noqa: E402
from prgkit.export.bundle.manifest import Quantization  # noqa: E402
from prgkit.export.formats import tensorrt_precision  # noqa: E402
from prgkit.export.formats.onnx_export import OnnxExportModule, export_onnx  # noqa: E402
from prgkit.export.formats.options import ExportOptions  # noqa: E402
from prgkit.export.formats.student_export import CalibrationSet, StudentExport  # noqa: E402
from prgkit.export.formats.tensorrt_build import build_engine  # noqa: E402
from prgkit.export.from_run import calibration_set, evaluation_positions  # noqa: E402
from prgkit.export.int8 import nncf  # noqa: E402
from prgkit.export.int8.calibration import Spread, measure_spreads  # noqa: E402
from prgkit.export.int8.files import Int8Judge  # noqa: E402
from prgkit.export.int8.qdq import Quantizable, find_convolutions, tensors_of, weight_scales  # noqa: E402
from prgkit.export.int8.quantise import quantise, root_kl  # noqa: E402
from prgkit.export.pipeline import EvaluationSet, ExportImages, StudentOrigin, TrainedStudent, export_student  # noqa: E402
from prgkit.export.runtimes import setups  # noqa: E402
from prgkit.export.runtimes.gpu import probe_backend  # noqa: E402
from prgkit.export.runtimes.onnxruntime import OnnxRunner  # noqa: E402
from prgkit.export.runtimes.parity import run_and_close  # noqa: E402
from prgkit.progress import NullProgress  # noqa: E402
from prgkit.storage.atomic import read_sealed, sha256, write_sealed  # noqa: E402
from prgkit.storage.run import Run  # noqa: E402
from prgkit.teacher.zero_shot import SavedAdjustment  # noqa: E402
from prgkit.training.prepare import hold_out  # noqa: E402


def build_engines(folder, *, note, **options):
    return engines.build_engines(folder, ExportOptions(**options), note=note)


needs_rtx = pytest.mark.skipif(
    not probe_backend("tensorrt_rtx").usable, reason="tensorrt_rtx is not installed: pip install 'prgkit[rtx]'"
)


@pytest.fixture(scope="session")
def quantised(exported, tmp_path_factory):
    """Both layouts of a real student, calibrated on 64 images."""
    folder = tmp_path_factory.mktemp("int8")
    nodes = find_convolutions(exported.fp32)
    spreads = measure_spreads(exported.fp32, tensors_of(exported.fp32, nodes), exported.pixels[:64])
    files = {"onnxruntime": folder / "model.int8.onnx", "tensorrt": folder / "model.int8.tensorrt.onnx"}
    Quantizable(exported.fp32, spreads, 0.02, "onnxruntime").write(files["onnxruntime"], nodes)
    Quantizable(exported.fp16, spreads, 0.02, "tensorrt").write(files["tensorrt"], nodes)
    return SimpleNamespace(exported=exported, nodes=nodes, files=files)


def opened(path):
    model = onnx.load(str(path))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    return model, constants, makers


@pytest.mark.parametrize("layout", ["onnxruntime", "tensorrt"])
def test_weights_are_symmetric_with_a_scale_for_each_channel(quantised, layout):
    model, constants, makers = opened(quantised.files[layout])
    convolutions = [node for node in model.graph.node if node.name in quantised.nodes and node.op_type == "Conv"]
    assert len(convolutions) == len(quantised.nodes) > 25
    before = opened(quantised.exported.fp32)
    originals = {node.name: before[1][node.input[1]] for node in before[0].graph.node if node.op_type == "Conv"}
    kind = np.float32 if layout == "onnxruntime" else np.float16
    for node in convolutions:
        dequantise = makers[node.input[1]]
        values, scales, zeros = (constants[name] for name in dequantise.input)
        assert (values.dtype, scales.dtype) == (np.int8, kind)
        assert len(scales) == len(values) == len(originals[node.name])
        assert not zeros.any()
        assert dequantise.attribute[0].i == 0, "the scales run along the output channels"
        error = np.abs(values * scales[:, None, None, None].astype(np.float64) - originals[node.name])
        half_a_step = 0.51 if layout == "onnxruntime" else 0.6  # the FP16 file has rounded weights and scales
        assert (error <= half_a_step * scales[:, None, None, None].astype(np.float64) + 1e-7).all()


def test_activations_are_uint8_for_onnx_runtime_and_int8_around_zero_for_tensorrt(quantised):
    for layout, kind in (("onnxruntime", np.uint8), ("tensorrt", np.int8)):
        model, constants, makers = opened(quantised.files[layout])
        pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        zeros = [constants[node.input[2]] for node in pairs]
        assert pairs
        assert {zero.dtype for zero in zeros} == {np.dtype(kind)}
        if layout == "tensorrt":
            assert not any(zero.any() for zero in zeros)
            continue
        assert any(zero.any() for zero in zeros), "a range that is not symmetric has a zero-point"
        for node in model.graph.node:  # a convolution runs in 8 bits only from end to end
            if node.name in quantised.nodes:
                biases = [makers[name].input[0] for name in node.input[2:]]
                assert all(constants[name].dtype == np.int32 for name in biases)
                takers = [taker.op_type for taker in model.graph.node if node.output[0] in taker.input]
                assert takers == ["QuantizeLinear"]


@pytest.mark.parametrize("layout", ["onnxruntime", "tensorrt"])
def test_preprocessing_input_output_and_metadata_stay(quantised, layout):
    source = onnx.load(str(quantised.exported.fp32 if layout == "onnxruntime" else quantised.exported.fp16))
    model, _, makers = opened(quantised.files[layout])
    assert [list(model.graph.input), list(model.graph.output)] == [list(source.graph.input), list(source.graph.output)]
    assert list(model.metadata_props) == list(source.metadata_props)
    assert (model.ir_version, model.opset_import[0].version) == (9, 20)
    nodes = [node for node in model.graph.node if node.op_type != "DequantizeLinear"]
    assert [node.op_type for node in nodes[:4]] == ["Cast", "Transpose", "Mul", "Add"]
    assert not any(
        makers[name].op_type == "DequantizeLinear" for node in nodes[:4] for name in node.input if name in makers
    )
    head = next(node for node in model.graph.node if node.op_type == "Gemm")
    assert "dequantised" not in "".join(head.input), "the head stays in float"


@pytest.mark.parametrize("layout", ["onnxruntime", "tensorrt"])
def test_it_runs_and_mostly_says_the_same(quantised, layout):
    exported = quantised.exported
    reference, logits = (
        run_and_close(OnnxRunner(path), exported.pixels[64:]) for path in (exported.fp32, quantised.files[layout])
    )
    least = 0.8 if exported.fp32.parent.name.startswith("repvit") else 0.6  # random weights: answers are close calls
    assert (reference.argmax(axis=1) == logits.argmax(axis=1)).mean() > least
    source = exported.fp32 if layout == "onnxruntime" else exported.fp16
    assert quantised.files[layout].stat().st_size < (0.45 if layout == "onnxruntime" else 0.7) * source.stat().st_size


def test_root_kl_is_the_mean_of_the_images_roots():
    wanted = np.log(np.array([[0.5, 0.5], [0.5, 0.5], [0.8, 0.2]], np.float32))
    found = np.log(np.array([[0.2, 0.8], [0.5, 0.5], [0.8, 0.2]], np.float32)) + 3  # a shift changes no softmax
    kl = 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8)
    assert root_kl(wanted, found) == pytest.approx(np.sqrt(kl) / 3, rel=1e-5)
    assert root_kl(wanted, wanted) == 0


def test_one_image_that_explodes_does_not_outweigh_all_others():
    """The mean of KL itself would prefer the second: 4.5 against 5.0 nats an image."""
    wanted = np.zeros((100, 2), np.float32)
    wanted[0] = (1000, 0)
    one_lost, all_blurred = wanted.copy(), wanted.copy()
    one_lost[0] = (0, 500)
    all_blurred[1:] = (10.4, 0)
    assert root_kl(wanted, one_lost) < 0.2 * root_kl(wanted, all_blurred)


def test_a_range_leaves_out_the_images_that_explode_and_holds_zero():
    spread = Spread()
    spread.add(np.linspace(1, 2, 98, dtype=np.float32)[:, None, None] * np.ones((98, 3, 3), np.float32))
    spread.add(np.stack([np.full((3, 3), 500.0), np.full((3, 3), -300.0)]).astype(np.float32))
    assert spread.range(0, symmetric=False) == (-300, 500)
    assert spread.range(0, symmetric=True) == (-500, 500)
    assert spread.range(0.02, symmetric=False) == pytest.approx((0, 2), abs=0.02)
    assert spread.range(0.02, symmetric=True) == pytest.approx((-2, 2), abs=0.02)
    assert spread.range(0.5, symmetric=False)[1] == pytest.approx(1.5, abs=0.02)


def test_an_images_own_range_leaves_out_its_most_extreme_values():
    spread = Spread()
    values = np.linspace(-1, 1, 20_000, dtype=np.float32)[None]
    values[0, 7], values[0, 9] = 80, -90  # two of twenty thousand
    spread.add(values)
    assert spread.range(0, symmetric=False) == pytest.approx((-1, 1), abs=0.01)


def test_activations_that_are_no_numbers_are_refused():
    with pytest.raises(ExportError, match="its activations are infinite or no numbers"):
        Spread().add(np.array([[1.0, np.nan]], np.float32))


def test_few_images_of_which_one_explodes_still_give_the_others_range():
    """Interpolated between the two largest of 16, the range would be half of the outlier's."""
    spread = Spread()
    spread.add(np.array([[1.0]] * 15 + [[1000.0]], np.float32))
    assert spread.range(0.04, symmetric=False) == (0, 1)


def test_no_two_neighbours_saturate_sixteen_bits():
    """255 x 127 + 255 x 127 would be 64,770; kernels without VNNI make 32,767 of it."""
    weight = np.zeros((3, 4, 1, 1))
    weight[0, :, 0, 0] = (1.0, 1.0, 0.0, 0.0)  # neighbours of one sign
    weight[1, :, 0, 0] = (1.0, -1.0, 0.0, 0.0)  # of two: their products cancel
    weight[2, :, 0, 0] = (0.0, -1.0, -1.0, 0.0)  # of two pairs
    assert weight_scales(weight, "onnxruntime") == pytest.approx([2 / 127, 1 / 127, 1 / 127])
    assert weight_scales(weight, "tensorrt") == pytest.approx([1 / 127] * 3)


def test_neighbours_are_those_of_the_kernels_order_odd_channels_and_all():
    """Rows, columns, then channels: with three of them the third is a neighbour of the next column's first."""
    weight = np.zeros((2, 3, 1, 2))  # [out, in, h, w]
    weight[0, 2, 0, 0] = weight[0, 0, 0, 1] = 1  # neighbours
    weight[1, 0, 0, 0] = weight[1, 0, 0, 1] = 1  # of one channel, and none
    assert weight_scales(weight, "onnxruntime") == pytest.approx([2 / 127, 1 / 127])
    assert weight_scales(np.ones((1, 3, 1, 1)), "onnxruntime") == pytest.approx([2 / 127])


def test_the_weights_of_a_file_obey_that(quantised):
    model, constants, makers = opened(quantised.files["onnxruntime"])
    most = 0
    for node in model.graph.node:
        if node.name in quantised.nodes:
            steps = constants[makers[node.input[1]].input[0]].astype(int)  # [out, in, h, w]
            pairs = steps.transpose(0, 2, 3, 1).reshape(len(steps), -1, 2)
            assert pairs.clip(min=0).sum(axis=2).max() <= 128
            assert pairs.clip(max=0).sum(axis=2).min() >= -128
            most = max(most, np.abs(pairs).max())
    assert most > 96, "seven bits would do that too"


def compared(*, lost, images, won=0, labels=None):
    """Two students of two classes: FP32 has the teacher's answer but for ``won`` images, INT8 but for the last lost."""
    teacher = np.tile(np.float32([10, 0]), (images, 1))
    fp32, int8 = teacher / 10, teacher / 10
    fp32[:won] = int8[images - lost :] = (0, 1)
    return compare_with_fp32(fp32, int8, teacher, labels)


def test_a_file_is_as_good_where_the_bound_of_the_paired_difference_is_within_the_margin():
    """Of 1,000 images 20 are lost and 20 won: z sqrt(0.04 / 1000) = 1.04 points, and a little for the score test."""
    found = compared(lost=20, won=20, images=1000)
    assert (found.agreement_fp32, found.teacher.fp32, found.teacher.file) == pytest.approx((96, 98, 98))
    assert (found.teacher.won, found.teacher.lost) == (20, 20)
    assert found.teacher.bounds == pytest.approx((-1.07, 1.07), abs=0.01)
    assert (found.holds(1.1), found.holds(1.0)) == (True, False)
    assert not compared(lost=40, images=1000).holds(2), "as many differ, all of them to the worse"
    assert compared(lost=0, images=134).holds(2)
    assert not compared(lost=0, images=132).holds(2), "z^2 / (132 + z^2) = 2.01 %"


def test_the_divergence_from_the_teacher_may_rise_by_a_tenth():
    """Logits that say nothing are KL = log 2 - H away; twice as sure ones have the same answers."""
    teacher = np.tile(np.log(np.float32([0.8, 0.2])), (400, 1))
    fp32 = np.tile(np.log(np.float32([0.6, 0.4])), (400, 1))
    before = 0.8 * np.log(0.8 / 0.6) + 0.2 * np.log(0.2 / 0.4)
    found = compare_with_fp32(fp32, np.zeros_like(fp32), teacher)
    after = 0.8 * np.log(0.8 / 0.5) + 0.2 * np.log(0.2 / 0.5)
    assert (found.kl_fp32, found.kl, found.kl_bound) == pytest.approx((before, after, after - before), rel=1e-5)
    assert found.conditions(2) == {"teacher": True, "kl": False}
    assert compare_with_fp32(fp32, 1.05 * fp32, teacher).holds(2), "surer, as the teacher is"


def test_labels_of_all_images_decide_and_those_of_some_refuse_what_is_surely_worse():
    everywhere = np.zeros(1000, int)
    ticked = np.full(1000, -1)
    ticked[-100:] = 0  # where all that differ are
    assert compared(lost=10, images=1000, labels=everywhere).holds(2)
    some = compared(lost=1, images=1000, labels=ticked)
    assert (some.labels.images, some.labels.lost) == (100, 1)
    assert some.labels.bounds[0] < -2
    assert some.holds(2), "100 images are too few to show that it is as good"
    assert compared(lost=10, images=1000, labels=ticked).conditions(2) == {"teacher": True, "kl": True, "labels": False}
    assert compared(lost=10, images=1000, labels=np.full(1000, -1)).labels is None


def test_what_is_ticked_is_known_of_the_images_that_travel():
    evaluation = SimpleNamespace(labels=None, keys=("a", "b", "c", "d"))
    ticks = [Tick(1, "", "b", "cat", "90", right=True), Tick(2, "", "c", "cat", "90", right=False, named="dog")]
    ticks.append(Tick(3, "", "d", "cat", "90", right=False))  # and nobody says what it is
    assert known_classes(evaluation, ticks, ["dog", "cat"]).tolist() == [-1, 1, 0, -1]


def test_sentences_say_what_decided_and_how_many_images_would_tell():
    found = compared(lost=12, won=12, images=500)
    kept = [Quantization(kept=found.holds(margin), margin=margin, comparison=found) for margin in (3, 2)]
    figures = (
        "the same answer as the teacher on 97.60 % of 500 images (FP32 97.60 %), at worst -1.69 points, {} allowed"
    )
    assert int8_sentence(kept[0]).startswith(f"as good as FP32: {figures.format(3)}; KL to the teacher 0.")
    assert int8_sentence(kept[0]).endswith("; the same answer as FP32 on 95.20 %")
    strict = Quantization(kept=False, margin=1.5, comparison=found)
    assert int8_sentence(strict).startswith(
        f"INT8 is not kept: it is not surely as good as FP32: {figures.format(1.5)}"
    )
    assert int8_sentence(strict).endswith("; about 1,827 images would show whether it is as good")
    assert images_needed(0.048, 1.5) == 1827  # (1.645 + 1.282)^2 x 0.048 / 0.015^2


@needs_rtx
def test_tensorrts_layout_builds_as_int8_around_fp16(quantised, tmp_path):
    build = {"batch": (1, 1, 32), "backend": "tensorrt_rtx", "sm": ["SM86"]}
    card = build_engine(quantised.files["tensorrt"], tmp_path, precision="int8", **build)
    assert card.file == "model.int8.tensorrt_rtx.engine"
    assert card.precision == "int8"
    assert set(card.layer_dtypes["CONVOLUTION"]) == {"HALF"}
    assert card.layer_dtypes["QUANTIZE"] == {"INT8": card.layer_dtypes["DEQUANTIZE"]["HALF"] - len(quantised.nodes)}


@needs_rtx
def test_an_int8_engine_comes_from_an_int8_file_and_no_other(quantised, tmp_path):
    build = {"batch": (1, 1, 1), "backend": "tensorrt_rtx"}
    with pytest.raises(ExportError, match=r"int8 was asked for, and model\.fp16\.onnx holds no Q/DQ nodes"):
        build_engine(quantised.exported.fp16, tmp_path, precision="int8", **build)
    with pytest.raises(ExportError, match=r"fp16 was asked for, and model\.int8\.tensorrt\.onnx holds INT8 Q/DQ nodes"):
        build_engine(quantised.files["tensorrt"], tmp_path, precision="fp16", **build)


@pytest.fixture(scope="module", autouse=True)
def _without_nncf():
    """Make OpenVINO's file in its own test alone: NNCF takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nncf, "installed", lambda: False)
        yield


@pytest.fixture(scope="module")
def bundle(repvit, _without_nncf, tmp_path_factory):
    """A bundle with INT8 in a margin that so few images can show."""
    folder = tmp_path_factory.mktemp("run") / "bundle"
    notes = []
    manifest = export(repvit, folder, notes, count=192, int8=True, margin=15.0)
    return SimpleNamespace(folder=folder, manifest=manifest, notes=notes)


def export(repvit, folder, notes, *, count, **options):
    generator = np.random.default_rng(4)
    teacher = generator.normal(size=(count, 20)).astype(np.float32)
    run = {"name": "test", "fingerprint": "0" * 16, "objective": "prg", "epochs": 1}
    facts = {"run": run, "recipe": {}, "teacher": {"model": "tiny", "fingerprint": ""}, "student": {"model": "repvit"}}
    keys = tuple(f"{number:032x}" for number in range(count))
    evaluation = EvaluationSet(iter(repvit.pixels[64:][:count]), teacher, teacher, None, "made up", keys)
    classes = [f"thing {number}" for number in range(20)]
    return export_student(
        TrainedStudent(repvit.student, classes, repvit.preprocessing, StudentOrigin.model_validate(facts)),
        ExportImages(
            repvit.pixels[:32],
            [Image.fromarray(pixels) for pixels in repvit.pixels[:2]],
            evaluation,
            lambda: CalibrationSet(64, lambda places: repvit.pixels[places]),
        ),
        folder,
        ExportOptions(**options),
        note=notes.append,
    )


def test_a_bundle_carries_int8_with_its_parity_and_what_was_found(bundle):
    opened = open_bundle(bundle.folder)
    entry = opened.artifacts[1]
    assert (entry.name, entry.file, entry.precision) == ("onnx-int8", "model.int8.onnx", "int8")
    assert entry.parity.images == 32
    found = entry.quantization
    assert (found.kept, found.margin, found.comparison.images, found.calibration_images) == (True, 15.0, 192, 64)
    assert found.comparison.teacher.bounds[0] >= -15
    assert opened.manifest.not_kept == ()
    said = [note for note in bundle.notes if note.startswith("model.int8.onnx: ")]
    assert said == [f"model.int8.onnx: {int8_sentence(found)}"]


def test_openvino_has_a_file_of_its_own_where_nncf_is_installed(repvit, tmp_path, monkeypatch):
    monkeypatch.setattr(nncf, "installed", lambda: True)
    folder = tmp_path / "bundle"
    manifest = export(repvit, folder, [], count=192, int8=True, margin=15.0)
    entry = manifest.artifacts[2]
    assert (entry.name, entry.backend, entry.quantization.kept) == ("onnx-int8-openvino", "openvino", True)
    assert entry.format == "onnx-openvino"
    beside = manifest.artifacts
    runtimes = {one.name: [setup.variant.name for setup in setups(one, folder, beside)] for one in beside}
    assert "openvino" not in {setup.variant.backend for setup in setups(beside[1], folder, beside)}
    assert runtimes["onnx-int8-openvino"] == ["CPU"]
    model = onnx.load(str(folder / entry.file))
    assert (model.ir_version, model.opset_import[0].version) == (9, 20)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 25


@needs_rtx
def test_each_runtime_has_its_file_and_the_engine_is_built_of_tensorrts(bundle, repvit, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_precision, "LEAST_INT8_WEIGHTS", 1)
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    manifest = export(repvit, tmp_path / "bundle", [], count=192, int8=True, margin=15.0, trt=True)
    files = {entry.name: entry.file for entry in manifest.artifacts}
    assert files == {
        "onnx-fp32": "model.onnx",
        "tensorrt_rtx-fp32": "model.fp32.tensorrt_rtx.engine",
        "onnx-int8": "model.int8.onnx",
        "onnx-int8-tensorrt": "model.int8.tensorrt.onnx",
        "tensorrt_rtx-int8": "model.int8.tensorrt_rtx.engine",
    }
    notes = []
    build = {"fp16": False, "int8": True, "batch": (1, 1, 1), "backend": "tensorrt_rtx", "note": notes.append}
    on_device = build_engines(tmp_path / "bundle", **build)
    assert {entry.name: entry.file for entry in on_device.artifacts} == files
    assert [note.split(":")[0] for note in notes] == [name for name in files.values() if name.endswith(".engine")]


@needs_rtx
def test_an_int8_engine_that_would_be_larger_than_fp16s_is_not_kept_and_that_is_said(
    bundle, repvit, tmp_path, monkeypatch
):
    monkeypatch.setattr(tensorrt_precision, "LEAST_INT8_WEIGHTS", 1_000_000)
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    notes = []
    why = (
        "INT8 is not kept: none of its 55 quantised convolutions has 1,000,000 weights, and what tensorrt_rtx builds around "
        "a smaller one takes more than INT8 saves, so FP16's engine is smaller"
    )
    manifest = export(repvit, tmp_path / "bundle", notes, count=192, int8=True, margin=15.0, trt=True)
    assert notes[-1] == f"tensorrt_rtx-int8: {why}"
    assert [one.name for one in manifest.not_kept] == ["tensorrt_rtx-int8"]
    assert int8_notes(open_bundle(tmp_path / "bundle"), []) == [f"tensorrt_rtx-int8: {why}."]
    for asked in (True, False):  # what is not decided anew stays, and what was said of it
        again = export(repvit, tmp_path / "bundle", [], count=192, int8=asked, margin=15.0)
        assert again.not_kept == manifest.not_kept
        assert {entry.name for entry in again.artifacts} == {entry.name for entry in manifest.artifacts}

    def build(batch):
        notes.clear()
        on_device = {"fp16": False, "int8": True, "batch": batch, "backend": "tensorrt_rtx", "note": notes.append}
        assert build_engines(tmp_path / "bundle", **on_device) == open_bundle(tmp_path / "bundle").manifest
        kept = open_bundle(tmp_path / "bundle").manifest.not_kept
        return [path.name for path in (tmp_path / "bundle").glob("*int8*.engine")], [one.name for one in kept]

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_precision, "LEAST_INT8_WEIGHTS", 1)
        assert build((1, 1, 1)) == (["model.int8.tensorrt_rtx.engine"], [])
    assert build((2, 2, 2)) == ([], ["tensorrt_rtx-int8"])
    assert notes[-1] == f"tensorrt_rtx-int8: {why}"


def test_int8_that_is_finished_is_not_made_again(bundle, repvit, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    notes = []
    manifest = export(repvit, tmp_path / "bundle", notes, count=192, int8=True, margin=15.0)
    assert manifest.artifacts == bundle.manifest.artifacts
    assert "model.int8.onnx: finished before, and made from the same; it is kept" in notes
    assert not any("calibrating" in note for note in notes)


def test_openvinos_file_is_made_anew_by_another_nncf(monkeypatch):
    monkeypatch.setattr(nncf, "installed", lambda: True)
    versions = {"nncf": "2.0", "openvino": "2026.1"}
    monkeypatch.setattr("prgkit.export.formats.student_export.metadata.version", versions.__getitem__)
    given = dict.fromkeys(field for field in StudentExport.__dataclass_fields__ if field not in ("artifacts", "ticks"))
    export = StudentExport(**{**given, "options": ExportOptions(), "folder": Path(), "origin": {}, "note": print})
    files = quantise(export, SimpleNamespace(calibration=(), make_all=lambda files: files))
    (file,) = [file for file in files if file.layout == "openvino"]
    before = export.origin_by(file.converters)
    versions["nncf"] = "2.1"
    assert export.origin_by(file.converters) != before


def test_int8_that_is_not_kept_leaves_its_figures_and_no_file(bundle, repvit, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")  # its FP32 file need not be made again
    notes = []
    manifest = export(repvit, tmp_path / "bundle", notes, count=40, int8=True)
    assert [entry.name for entry in manifest.artifacts] == ["onnx-fp32"]
    assert not list((tmp_path / "bundle").glob("*int8*"))
    assert [(one.name, one.kept, one.images) for one in manifest.not_kept] == [("onnx-int8", False, 40)]
    assert not hasattr(manifest.not_kept[0], "made_from"), "to try again costs nothing"
    said = (
        "INT8 is not kept: 40 held-out images cannot show that it is as good as FP32; with the same answers it could be "
        "6.34 points worse, and 2 are allowed; 133 images or more are needed"
    )
    assert f"model.int8.onnx: {said}" in notes
    assert int8_notes(open_bundle(tmp_path / "bundle"), []) == [f"onnx-int8: {said}."]


def test_int8_that_was_not_asked_for_stays_only_within_the_margin_of_now(bundle, repvit, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    notes, kept = [], bundle.manifest.artifacts[1]
    worst = -kept.quantization.comparison.teacher.bounds[0]
    manifest = export(repvit, tmp_path / "bundle", notes, count=192, margin=worst + 0.01)
    assert manifest.artifacts[1] == kept
    assert notes[-1] == "stays in the bundle, not asked for, and of the same student: model.int8.onnx"
    manifest = export(repvit, tmp_path / "bundle", notes, count=192, margin=worst - 0.01)
    assert [entry.name for entry in manifest.artifacts] == ["onnx-fp32"]
    assert not list((tmp_path / "bundle").glob("*int8*"))
    (said,) = [note for note in notes if note.startswith("no longer in the bundle: ")]
    assert said == f"no longer in the bundle: model.int8.onnx: {int8_sentence(manifest.not_kept[0])}"
    assert f"INT8 is not kept: it is not surely as good as FP32: {said.partition('as FP32: ')[2]}" in said
    assert [(one.name, one.kept, one.margin) for one in manifest.not_kept] == [("onnx-int8", False, worst - 0.01)]


def test_an_engine_is_as_good_as_the_int8_file_that_it_is_of(bundle):
    entry = bundle.manifest.artifacts[1]
    source = entry.model_copy(update={"name": "onnx-int8-tensorrt", "format": "onnx-tensorrt"})
    engine = entry.model_copy(update={"name": "tensorrt-int8", "format": "engine", "quantization": None})
    floats = engine.model_copy(update={"name": "tensorrt-fp32", "precision": "fp32"})
    worst = -entry.quantization.comparison.teacher.bounds[0]
    for margin, names in ((worst + 0.01, [None] * 3), (worst - 0.01, [source.name, engine.name, None])):
        found = [refused_by(margin, one, [floats, source, engine]) for one in (source, engine, floats)]
        assert [facts and facts.name for facts in found] == names


@pytest.mark.parametrize(("margin", "faithful"), [(2.0, True), (1.0, False)])
def test_a_report_judges_by_one_margin(bundle, tmp_path, margin, faithful):
    """The same answers on 192 images could be 1.4 points worse; the file was made for 15."""
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    manifest = read_sealed(tmp_path / "bundle/manifest.json")
    write_sealed(tmp_path / "bundle/manifest.json", {**manifest, "recipe": {"export": {"margin": margin}}})
    opened, evaluation = open_bundle(tmp_path / "bundle"), read_evaluation(tmp_path / "bundle")
    *floats, row = rows(int8_ms=[5.0] * 10)
    subject = Subject(opened, evaluation, ticks=[], run_folder=None)
    figures = accuracy(row, evaluation.logits, subject)
    (verdict,) = judge_int8(opened, [*floats, row.model_copy(update=figures)])
    assert (figures["faithful"], verdict.faithful, verdict.margin) == (faithful, faithful, margin)


@needs_rtx
def test_an_engine_of_int8_that_missed_its_floor_is_refused_with_the_figures(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    manifest = read_sealed(tmp_path / "bundle" / "manifest.json")
    manifest["not_kept"] = [{"name": "onnx-int8-tensorrt", "layout": "tensorrt", **too_few(40, 2.0).to_json()}]
    write_sealed(tmp_path / "bundle" / "manifest.json", manifest)
    build = {"fp16": False, "int8": True, "batch": (1, 1, 1), "backend": "tensorrt_rtx", "note": lambda _: None}
    with pytest.raises(
        ExportError, match="INT8 is not kept: 40 held-out images cannot show that it is as good"
    ) as caught:
        build_engines(tmp_path / "bundle", **build)
    assert caught.value.fix == "build without --int8"


def test_int8_that_was_not_kept_is_not_tried_again_before_something_changes(bundle, repvit, tmp_path, monkeypatch):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    tried = []

    def missed(self, file):
        margin = self.export.options.margin
        tried.append(margin)
        (self.export.folder / file.file).touch()
        answers = np.eye(20, dtype=np.float32)[np.zeros(192, int)]
        return Quantization(kept=False, margin=margin, comparison=compare_with_fp32(answers, -answers, answers))

    monkeypatch.setattr(Int8Judge, "judge", missed)
    said = []
    for margin in (3.0, 3.0, 4.0):
        notes = []
        export(repvit, tmp_path / "bundle", notes, count=192, int8=True, margin=margin)
        said.append(next(note for note in notes if note.startswith("model.int8.onnx: ")))
    assert tried == [3.0, 4.0]
    assert said[1] == f"{said[0]} (found before, from the same)"
    assert said[0].startswith("model.int8.onnx: INT8 is not kept: ")
    assert [one.margin for one in open_bundle(tmp_path / "bundle").manifest.not_kept] == [4.0]


def rows(*, int8_ms, lost=0):
    """Rows of a bench in which INT8 loses the teacher's answer on some of 2,000 images, and wins it on none."""
    found = compared(lost=lost, images=2000)
    files = {"fp32": [10.0] * 10, "fp16": [12.0] * 10, "int8": int8_ms}
    return [measured_row(f"onnx-{kind}", times, precision=kind, comparison=found) for kind, times in files.items()]


def measured_row(artifact, times, *, backend="onnxruntime", precision="int8", **figures):
    latency = Latency.model_construct(p50_ms=float(np.median(times)), round_p50_ms=times)
    key = {"artifact": artifact, "backend": backend, "device": "cpu", "precision": precision}
    return Row.model_construct(**key, status="measured", latency=latency, **figures)


@pytest.mark.parametrize(
    ("int8_ms", "lost", "kept", "said"),
    [
        ([5.0] * 10, 10, True, "onnx-int8 is kept on this machine: 0.50 times the latency of onnx-fp32 (0.50–0.50); "),
        (
            [5.0] * 10,
            300,
            False,
            "the same answer as the teacher on 85.00 % of 2,000 images (FP32 100.00 %), at worst -16.",
        ),
        ([10.0, 9.0] * 5, 10, True, "0.95 times the latency of onnx-fp32 (0.91–0.99)"),
        ([10.0] * 9 + [9.0], 10, False, "0.99 times the latency of onnx-fp32 (0.97–1.01)"),
        ([8.0, 9.0, 9.7], 10, False, "0.89 times the latency of onnx-fp32 (0.70–1.13)"),  # three rounds say little
        ([20.0] * 10, 10, False, "onnx-int8 is not kept on this machine: "),
    ],
)
def test_int8_is_kept_only_where_it_is_as_good_and_faster(bundle, int8_ms, lost, kept, said):
    opened = open_bundle(bundle.folder)
    found = judge_int8(opened, rows(int8_ms=int8_ms, lost=lost))
    assert found[0].kept is kept
    assert said in int8_notes(opened, found)[0]
    faithful = [
        refused(judged, measured_row(artifact, [1.0], backend="openvino", faithful=how))
        for artifact in ("onnx-int8", "onnx-int8-openvino")
        for how in (True, False)
        for judged in (found, [])
    ]
    assert faithful == [False, False, True, True] * 2, "slow here may be fast there, but not what is wrong"


def test_what_predict_cannot_run_has_no_say_in_its_choice(bundle):
    opened, measured = open_bundle(bundle.folder), rows(int8_ms=[5.0] * 10)
    worse = compared(lost=1000, images=2000)
    elsewhere = [
        measured_row(row.artifact, [ms] * 10, backend="openvino", precision=row.precision, comparison=worse)
        for row, ms in zip(measured, (0.1, 0.1, 100.0), strict=True)
    ]
    for order in (measured + elsewhere, elsewhere + measured):
        assert judge_int8(opened, order) == judge_int8(opened, measured)
    assert judge_int8(opened, elsewhere) == []


def test_predict_obeys_the_choice_of_this_machine(bundle, tmp_path):
    opened = open_bundle(bundle.folder)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")

    def artifact():
        (answer,) = Model(bundle.folder, bench=tmp_path / "bench").predict(tmp_path / "a.png")
        return answer.artifact

    assert artifact() == "onnx-fp32", "without a choice"
    write_selection(tmp_path / "bench", opened, judge_int8(opened, rows(int8_ms=[5.0] * 10)))
    assert artifact() == "onnx-int8"
    write_selection(tmp_path / "bench", opened, judge_int8(opened, rows(int8_ms=[50.0] * 10)))
    assert artifact() == "onnx-fp32"
    choice = read_sealed(tmp_path / "bench" / "selection.json")
    assert (choice["artifact"], choice["int8"][0]["faithful"], choice["int8"][0]["faster"]) == (
        "onnx-fp32",
        True,
        False,
    )
    write_sealed(tmp_path / "bench" / "selection.json", {**choice, "sha256": "0" * 64})
    assert artifact() == "onnx-fp32", "a choice of other files counts no more"
    write_selection(tmp_path / "bench", opened, [])
    assert not (tmp_path / "bench" / "selection.json").exists()


def test_the_choice_of_this_machine_is_one_for_the_runtime_that_it_was_measured_with(bundle, tmp_path):
    pytest.importorskip("openvino")
    opened = open_bundle(bundle.folder)
    write_selection(tmp_path / "bench", opened, judge_int8(opened, rows(int8_ms=[5.0] * 10)))
    chosen = {}
    for runtime in (None, "onnxruntime", "openvino"):
        with Model(bundle.folder, bench=tmp_path / "bench", runtime=runtime) as model:
            chosen[runtime] = model.artifact.name
    assert chosen == {None: "onnx-int8", "onnxruntime": "onnx-int8", "openvino": "onnx-fp32"}


def test_the_headline_is_never_of_int8_that_was_not_kept():
    fast, slow = (
        measured_row(name, [ms], precision=name[5:], agreement_teacher=90.0)
        for name, ms in (("onnx-int8", 1.0), ("onnx-fp32", 2.0))
    )
    key = {"artifact": "onnx-int8", "backend": "onnxruntime", "device": "cpu"}
    kept, not_kept = ([Int8Verdict.model_construct(**key, kept=kept)] for kept in (True, False))
    assert lead_row([slow, fast], kept) is fast
    assert lead_row([slow, fast], not_kept) is slow
    for faithful in (True, False):
        elsewhere = fast.model_copy(update={"artifact": "tensorrt-int8", "backend": "tensorrt", "faithful": faithful})
        for verdicts in (not_kept, []):
            lead = lead_row([slow, elsewhere], verdicts)
            assert lead is (elsewhere if faithful else slow)


def test_silu_beside_int8_stays_one_pass_in_onnx_runtime(tmp_path):
    layers = [torch.nn.Conv2d(3, 64, 3, 2), torch.nn.Conv2d(64, 64, 1), torch.nn.SiLU(), torch.nn.Conv2d(64, 64, 1)]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)]
    module = OnnxExportModule(
        torch.nn.Sequential(*layers, *head), torch.full((3,), 127.0), torch.full((3,), 50.0)
    ).eval()
    fp32, path, fused = (tmp_path / name for name in ("fp32.onnx", "int8.onnx", "fused.onnx"))
    facts = Preprocessing(image_size=16, crop=1.0, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
    export_onnx(module, fp32, image_size=16, classes=list("abcdefghij"), preprocessing=facts, opset=20)
    nodes, pixels = find_convolutions(fp32), np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    spreads = measure_spreads(fp32, tensors_of(fp32, nodes), pixels)
    Quantizable(fp32, spreads, 0.0, "onnxruntime").write(path, nodes)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(fused)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(fused)).graph.node]
    assert "QuickGelu" in kinds
    assert "Sigmoid" not in kinds


def test_nothing_that_is_held_out_is_learned_from(tmp_path):
    preprocessing = Preprocessing(image_size=16, crop=1.0, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    sets = [f"data.images={tmp_path}", "data.classes=[a, b]", "data.held_out=0.3"]
    recipe = load_recipe("custom", overrides=sets)
    images = read_image_index(recipe.data.image_spec, NullProgress())
    positions = evaluation_positions(images, recipe)
    run = Run(tmp_path / "run")
    learned = calibration_set(run, images, positions[:-1], preprocessing, recipe, lambda: images)
    taken = {pixels.tobytes() for pixels in learned.read(np.arange(learned.images))}
    held = {preprocessing.prepare(images.read(place)).tobytes() for place in hold_out(images.keys, 0.3).tolist()}
    assert (len(taken), len(held)) == (60 - len(positions), len(positions))
    assert not taken & held, "neither those that travel nor the others that selected the student"
    run.folder.mkdir()
    np.save(run.confidence_file, np.linspace(0, 1, learned.images, dtype=np.float32))
    found = SavedAdjustment(
        made_from="these",
        refinement_sha256=None,
        confidence_sha256=sha256(run.confidence_file),
        temperature=1.0,
        log_prior={},
    )
    write_sealed(run.answers_file, found.model_dump())
    recipe = load_recipe("custom", overrides=[*sets, "data.keep.min_confidence=0.5"])
    sure = calibration_set(run, images, positions, preprocessing, recipe, lambda: images)
    half = learned.read(np.arange(learned.images))[(learned.images + 1) // 2 :]
    np.testing.assert_array_equal(sure.read(np.arange(sure.images)), half, "nor those that the teacher is unsure of")
    run.confidence_file.write_bytes(run.confidence_file.read_bytes()[:-1])
    with pytest.raises(TargetsError, match=r"confidence\.npy is missing, or is not what the run wrote"):
        calibration_set(run, images, positions, preprocessing, recipe, lambda: images)
