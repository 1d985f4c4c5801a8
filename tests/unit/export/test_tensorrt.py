"""TensorRT: engines really parsed and built by tensorrt_rtx, which needs no GPU; none is executed here."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
import traceback
from types import SimpleNamespace

import numpy as np
import pytest

from prgkit.cli.values import gpu_generations
from prgkit.errors import BackendError, ExportError
from prgkit.export.bundle.engine_metadata import engine_metadata_path, load_engine_metadata
from prgkit.export.formats import tensorrt_build
from prgkit.export.formats.tensorrt_build import build_engine
from prgkit.export.formats.tensorrt_precision import LEAST_INT8_WEIGHTS, constant, layers_of, leave_small_in_fp16
from prgkit.export.runtimes import gpu
from prgkit.export.runtimes.gpu import Gpu, choose_backend, choose_targets, find_gpu, probe_backend
from prgkit.storage.atomic import sha256

needs_rtx = pytest.mark.skipif(
    not probe_backend("tensorrt_rtx").usable, reason="tensorrt_rtx is not installed: pip install 'prgkit[rtx]'"
)


@pytest.fixture(scope="session")
def engines(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    build = {"backend": "tensorrt_rtx", "batch": (1, 1, 32)}
    cards = {
        "fp32": build_engine(exported.fp32, folder, precision="fp32", **build),
        "fp16": build_engine(exported.fp16, folder, precision="fp16", **build),
    }
    return folder, cards, exported


@needs_rtx
def test_both_precisions_build_for_both_families(engines):
    folder, cards, exported = engines
    for precision, card in cards.items():
        source = exported.fp32 if precision == "fp32" else exported.fp16
        path = folder / f"model.{precision}.tensorrt_rtx.engine"
        assert card.file == path.name
        assert (card.bytes, card.sha256) == (path.stat().st_size, sha256(path))
        assert (card.onnx, card.onnx_sha256) == (source.name, sha256(source))
        assert (card.backend, card.precision, card.batch) == ("tensorrt_rtx", precision, (1, 1, 32))
        assert card.input.to_json() == {"name": "pixels", "dtype": "UINT8", "shape": [-1, 64, 64, 3]}
        assert card.output.to_json() == {"name": "logits", "dtype": "FLOAT", "shape": [-1, 20]}
        assert {"SM80", "SM86", "SM89", "SM120"} <= set(card.compute_capabilities)
        assert card.tf32 is False, "FP32 means FP32"
        assert not card.executed
        assert card.note == "built and never executed here"
    assert cards["fp16"].bytes < 0.7 * cards["fp32"].bytes


@needs_rtx
def test_every_convolution_and_product_has_the_precision_asked_for(engines):
    _, cards, _ = engines
    for precision, dtype in (("fp32", "FLOAT"), ("fp16", "HALF")):
        types = cards[precision].layer_dtypes
        assert set(types["CONVOLUTION"]) == set(types["MATRIX_MULTIPLY"]) == {dtype}
        assert types["CONVOLUTION"][dtype] > 50


@needs_rtx
def test_a_card_comes_back_as_it_was_written(engines):
    folder, cards, _ = engines
    for card in cards.values():
        assert load_engine_metadata(folder / card.file) == card


@needs_rtx
def test_equal_batches_make_a_static_engine(repvit, tmp_path):
    card = build_engine(repvit.fp16, tmp_path, precision="fp16", batch=(4, 4, 4), backend="tensorrt_rtx")
    assert card.input.shape == (4, 64, 64, 3)
    assert card.output.shape == (4, 20)


@needs_rtx
@pytest.mark.parametrize(("asked", "held", "word"), [("fp16", "fp32", "HALF"), ("fp32", "fp16", "FLOAT")])
def test_another_precision_than_the_files_is_refused(repvit, tmp_path, asked, held, word):
    path = getattr(repvit, held)
    with pytest.raises(ExportError) as caught:
        build_engine(path, tmp_path, precision=asked, batch=(1, 1, 1), backend="tensorrt_rtx")
    other = {"HALF": "FLOAT", "FLOAT": "HALF"}[word]
    assert caught.value.what == (
        f"{asked} was asked for, and {path.name} holds convolutions and products as 104 {other}, not {word}"
    )
    assert not list(tmp_path.iterdir()), "nothing is built"


@needs_rtx
@pytest.mark.parametrize("keep", [7, 0.5, 0.999])
def test_a_truncated_onnx_file_is_an_error_in_the_parsers_words(repvit, tmp_path, capfd, keep):
    data = repvit.fp32.read_bytes()
    broken = tmp_path / "model.onnx"
    broken.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(ExportError) as caught:
        build_engine(broken, tmp_path, precision="fp32", batch=(1, 1, 1), backend="tensorrt_rtx")
    assert caught.value.what.startswith("TensorRT's parser refused model.onnx: ")
    assert len(caught.value.what) > len("TensorRT's parser refused model.onnx: ")
    assert caught.value.where == broken
    assert caught.value.fix == "export it again: prgkit export"
    assert tuple(capfd.readouterr()) == ("", ""), "TensorRT's own log is kept, not printed"


@needs_rtx
def test_an_empty_onnx_file_is_an_error(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ExportError, match=r"model\.onnx is empty"):
        build_engine(tmp_path / "model.onnx", tmp_path, precision="fp32", batch=(1, 1, 1), backend="tensorrt_rtx")


@needs_rtx
def test_a_missing_onnx_file_is_an_error(tmp_path):
    with pytest.raises(ExportError, match=r"there is no model\.onnx to build an engine from"):
        build_engine(tmp_path / "model.onnx", tmp_path, precision="fp32", batch=(1, 1, 1), backend="tensorrt_rtx")


@needs_rtx
def test_building_prints_nothing(repvit, tmp_path, capfd):
    build_engine(repvit.fp32, tmp_path, precision="fp32", batch=(1, 1, 1), backend="tensorrt_rtx")
    assert tuple(capfd.readouterr()) == ("", "")


@needs_rtx
def test_gpu_generations_are_chosen_by_name(repvit, tmp_path):
    build = {"precision": "fp16", "batch": (1, 1, 1), "backend": "tensorrt_rtx"}
    card = build_engine(repvit.fp16, tmp_path, sm=["SM86"], **build)
    assert card.compute_capabilities == ("SM86",)
    with pytest.raises(BackendError, match="tensorrt_rtx cannot build for SM87"):
        build_engine(repvit.fp16, tmp_path, sm=["SM86", "SM87"], **build)


@needs_rtx
def test_a_build_that_fails_gives_tensorrts_reason(repvit, tmp_path):
    """Turing has no FP32 matrix product in TensorRT-RTX, so asking for it is a build that must fail."""
    with pytest.raises(ExportError, match=r"tensorrt_rtx could not build an engine: .*SM75"):
        build_engine(
            repvit.fp32,
            tmp_path,
            precision="fp32",
            batch=(1, 1, 1),
            backend="tensorrt_rtx",
            sm=["SM75"],
        )
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize("share", [1, 0.5], ids=["build", "parse"])
def test_a_failure_leaves_no_tensorrt_object_to_the_garbage_collector(repvit, tmp_path, share):
    """Destroyed by a collection inside a later build's log, a builder waits for a lock of that build, for ever."""
    path = tmp_path / "model.onnx"
    path.write_bytes(repvit.fp32.read_bytes()[: int(share * repvit.fp32.stat().st_size)])
    with pytest.raises(ExportError) as caught:
        build_engine(path, tmp_path, precision="fp32", batch=(1, 1, 1), backend="tensorrt_rtx", sm=["SM75"])
    trt = sys.modules["tensorrt_rtx"]
    kept = [value for frame, _ in traceback.walk_tb(caught.value.__traceback__) for value in frame.f_locals.values()]
    kinds = (trt.Builder, trt.INetworkDefinition, trt.OnnxParser, trt.IBuilderConfig, trt.ILogger)
    assert not [value for value in kept if isinstance(value, kinds)]


@needs_rtx
def test_gpu_generations_are_refused_before_anything_is_built(monkeypatch):
    assert choose_targets("tensorrt_rtx", ["SM86"]) == ("SM86",)
    assert "SM75" not in choose_targets("tensorrt_rtx", None)
    with pytest.raises(BackendError, match="tensorrt_rtx cannot build for SM12") as caught:
        choose_targets("tensorrt_rtx", ["SM86", "SM12"])
    assert caught.value.fix.startswith("it knows SM75, SM80, SM86")
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu("some GPU", "SM89"))
    assert choose_targets("tensorrt", None) == choose_targets("tensorrt", ["SM89"]) == ("SM89",)
    with pytest.raises(BackendError, match=r"tensorrt builds for the GPU at hand \(SM89\), not for SM86") as caught:
        choose_targets("tensorrt", ["SM86"])
    assert "--backend tensorrt_rtx" in caught.value.fix


@needs_rtx
def test_80_plus_is_every_generation_from_ampere_on():
    read = [gpu_generations(text) for text in ("80+", "8.0+", "sm86, 8.9")]
    assert read == [("SM80+",), ("SM80+",), ("SM86", "SM89")]
    assert choose_targets("tensorrt_rtx", ["SM80+"]) == choose_targets("tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"tensorrt_rtx cannot build for SM80\+"):
        choose_targets("tensorrt_rtx", ["SM86", "SM80+"])


@needs_rtx
def test_an_int8_engine_is_smaller_than_the_fp16_one(repvit, tmp_path):
    """RepViT-M0.9 at 224 px; with every convolution in INT8 its engine was 1.4 times as large as FP16's."""
    onnx = pytest.importorskip("onnx")
    from prgkit.export.int8.calibration import measure_spreads
    from prgkit.export.int8.qdq import Quantizable, find_convolutions, tensors_of

    nodes = find_convolutions(repvit.fp32)
    spreads = measure_spreads(repvit.fp32, tensors_of(repvit.fp32, nodes), repvit.pixels[:4])
    half, quantised = tmp_path / "model.fp16.onnx", tmp_path / "model.int8.tensorrt.onnx"
    enlarge(repvit.fp16, half, onnx)
    Quantizable(half, spreads, 0, "tensorrt").write(quantised, nodes)
    build = {"backend": "tensorrt_rtx", "batch": (1, 1, 32)}
    fp16 = build_engine(half, tmp_path, precision="fp16", **build)
    int8 = build_engine(quantised, tmp_path, precision="int8", **build)
    assert int8.bytes < fp16.bytes
    assert (fp16.int8_convolutions, int8.int8_convolutions) == (None, (6, 55))
    assert load_engine_metadata(tmp_path / int8.file) == int8


@needs_rtx
def test_a_small_convolution_of_an_int8_network_is_fp16_throughout(repvit, tmp_path):
    onnx = pytest.importorskip("onnx")
    from prgkit.export.int8.calibration import measure_spreads
    from prgkit.export.int8.qdq import Quantizable, find_convolutions, tensors_of

    nodes = find_convolutions(repvit.fp32)
    spreads = measure_spreads(repvit.fp32, tensors_of(repvit.fp32, nodes), repvit.pixels[:4])
    path = tmp_path / "model.onnx"
    Quantizable(repvit.fp16, spreads, 0, "tensorrt").write(path, nodes)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    trt = pytest.importorskip("tensorrt_rtx")
    logger = gpu.quiet_logger(trt)
    builder = trt.Builder(logger)
    network, parser = tensorrt_build.parse(trt, builder, logger, path)
    counts, alive = leave_small_in_fp16(trt, network)
    layers = layers_of(network)
    made_by = {layer.get_output(0).name: layer for layer in layers}
    seen = []
    for layer in layers:
        if layer.type.name == "CONVOLUTION" and layer.name in nodes:
            kinds = [made_by[layer.get_input(place).name].type.name for place in (0, 1)]
            seen.append("DEQUANTIZE" in kinds)
            assert layer.get_input(0).dtype == layer.get_input(1).dtype == trt.float16
            if seen[-1]:
                assert kinds == ["DEQUANTIZE", "DEQUANTIZE"]
                assert np.prod(tuple(layer.get_input(1).shape)) >= LEAST_INT8_WEIGHTS
                continue
            held = constant(trt, made_by[layer.get_input(1).name])
            steps, scales = (stored[f"{layer.name}_weight_{part}"] for part in ("quantised", "scale"))
            np.testing.assert_allclose(held, steps * scales[:, None, None, None].astype(np.float32), rtol=1e-3)
    assert (sum(seen), len(seen)) == counts == (6, 55)
    del parser, alive


@needs_rtx
@pytest.mark.filterwarnings("ignore:Use del obj:DeprecationWarning")  # of tensorrt_rtx, about the stand-in's Builder
def test_tensorrt_keeps_its_timings_and_may_build_for_more_than_one_gpu_model(repvit, tmp_path, monkeypatch):
    """tensorrt_rtx builds here under the name of tensorrt; the settings that it does not have are only recorded."""
    told = as_tensorrt(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build = {"precision": "fp16", "batch": (1, 1, 1), "backend": "tensorrt"}
    card = build_engine(repvit.fp16, tmp_path, **build)
    assert (card.timing_cache, card.hardware_compatibility) == ("new", "NONE")
    assert (card.gpu, card.compute_capabilities, card.driver) == ("some GPU", ("SM89",), "13.0")
    assert card.platform == gpu.this_platform()
    (kept,) = (tmp_path / "cache" / "prgkit").iterdir()
    assert (kept.name, kept.read_bytes()) == ("tensorrt-11.4-some-GPU.timing", b"timings")
    card = build_engine(repvit.fp16, tmp_path, sm=["SM89"], **build)
    assert (card.timing_cache, card.hardware_compatibility) == ("used", "SAME_COMPUTE_CAPABILITY")
    kept.write_bytes(b"of another GPU")
    card = build_engine(repvit.fp16, tmp_path, sm=["SM80+"], **build)
    assert (card.timing_cache, card.hardware_compatibility) == ("new", "AMPERE_PLUS")
    assert card.compute_capabilities == ("SM80+",)
    assert told.caches == [b"", b"timings", b"of another GPU", b""]
    assert told.levels == ["NONE", "SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS"]
    assert kept.read_bytes() == b"timings"


def test_a_level_of_compatibility_that_tensorrt_does_not_have_is_an_error():
    old = SimpleNamespace(__version__="10.0", HardwareCompatibilityLevel=SimpleNamespace(__members__={"NONE": 0}))
    with pytest.raises(BackendError, match=r"tensorrt 10\.0 cannot build for SM89"):
        tensorrt_build.set_targets(old, SimpleNamespace(), "tensorrt", ["SM89"], asked=True)


def test_timings_that_cannot_be_written_cost_no_engine(tmp_path):
    (tmp_path / "file").touch()
    config = SimpleNamespace(get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"))
    tensorrt_build.keep_cache(config, tmp_path / "file" / "cache")
    tensorrt_build.keep_cache(config, tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == b"timings"


@pytest.mark.parametrize("batch", [(0, 1, 1), (2, 1, 4), (1, 4, 2)])
def test_an_impossible_batch_profile_is_refused(tmp_path, batch):
    with pytest.raises(ExportError, match="a batch profile is"):
        tensorrt_build.check_batch(batch)


@needs_rtx
def test_a_truncated_engine_is_refused_with_the_command_that_rebuilds_it(engines, tmp_path):
    path = copied(engines, tmp_path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(ExportError) as caught:
        load_engine_metadata(path)
    assert caught.value.what == f"{path.name} is truncated: {size // 2} of {size} bytes"
    assert caught.value.fix == "build it again: prgkit export --trt --fp16 --backend tensorrt_rtx --batch 1,1,32"


@needs_rtx
def test_an_engine_with_one_changed_byte_is_refused(engines, tmp_path):
    path = copied(engines, tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExportError, match="is not the engine its card describes"):
        load_engine_metadata(path)


@needs_rtx
def test_an_engine_without_a_card_is_not_loaded(engines, tmp_path):
    path = copied(engines, tmp_path)
    engine_metadata_path(path).unlink()
    with pytest.raises(ExportError, match=r"has no card .*: an engine of unknown origin is code, and is not loaded"):
        load_engine_metadata(path)


@needs_rtx
@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": "other/1"}', '{"schema": "prgkit.engine/1"}', '{"schema": "prgkit.engine/2"}']
)
def test_a_damaged_card_is_an_error(engines, tmp_path, text):
    path = copied(engines, tmp_path)
    engine_metadata_path(path).write_text(text)
    with pytest.raises(ExportError) as caught:
        load_engine_metadata(path)
    assert caught.value.fix == "build it again: prgkit export --trt"


def test_without_any_tensorrt_the_error_says_what_each_needs(monkeypatch):
    without(monkeypatch, "tensorrt", "tensorrt_rtx")
    with pytest.raises(BackendError) as caught:
        choose_backend()
    text = str(caught.value)
    assert "no TensorRT can build an engine here" in text
    assert "tensorrt: not installed" in text
    assert "tensorrt_rtx: not installed" in text
    assert "pip install 'prgkit[rtx]'" in text
    assert "--system-site-packages" in text
    assert "pypi.nvidia.com" in text


def test_an_unknown_backend_is_named_with_the_nearest():
    with pytest.raises(BackendError, match=r"unknown backend 'tensorrt_rx'; did you mean 'tensorrt_rtx'\?"):
        choose_backend("tensorrt_rx")


def test_tensorrt_is_preferred_only_where_a_gpu_is(monkeypatch):
    """Stand-ins for the modules: this is about the choice, not about TensorRT."""
    fakes = {"tensorrt": SimpleNamespace(__version__="11.0"), "tensorrt_rtx": SimpleNamespace(__version__="1.7")}
    monkeypatch.setattr(tensorrt_build.importlib, "import_module", fakes.__getitem__)
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    assert choose_backend().name == "tensorrt_rtx"
    with pytest.raises(BackendError, match="tensorrt: installed, but it builds only where an NVIDIA GPU"):
        choose_backend("tensorrt")
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu("some GPU", "SM89"))
    assert choose_backend().name == "tensorrt"
    assert choose_backend("tensorrt_rtx").name == "tensorrt_rtx"


def test_a_placeholder_wheel_that_cannot_be_imported_is_told_from_none(monkeypatch):
    def broken(name):
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(tensorrt_build.importlib, "import_module", broken)
    problem = probe_backend("tensorrt").problem
    assert problem.startswith("cannot be imported (libnvinfer.so.11: cannot open shared object file); pip install")


def test_no_driver_means_no_gpu(monkeypatch):
    def missing(_):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpu() is None


def enlarge(source, path, onnx):
    """Write a file for 224 px, with random weights where a network without training has none but zeros.

    A builder stores equal constants once, so zeros would take no space.
    """
    model, generator = onnx.load(str(source)), np.random.default_rng(0)
    for place in (1, 2):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_value = 224
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.size > 1000 and not values.any():
            filled = generator.normal(0, 0.01, values.shape).astype(values.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(filled, tensor.name))
    onnx.save(model, str(path))


def as_tensorrt(monkeypatch):
    """Put tensorrt_rtx in the place of tensorrt, with a GPU; returns what is asked of what only tensorrt has."""
    rtx = sys.modules["tensorrt_rtx"]
    told = SimpleNamespace(caches=[], levels=[])

    class Config:
        def __init__(self, real):
            self.__dict__["real"] = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def __setattr__(self, name, value):
            if name == "hardware_compatibility_level":
                told.levels.append(value.name)
            else:
                setattr(self.real, name, value)

        def create_timing_cache(self, content):
            told.caches.append(content)
            return SimpleNamespace(content=content)

        def set_timing_cache(self, cache, *, ignore_mismatch):
            assert ignore_mismatch is False
            return cache.content != b"of another GPU"

        def get_timing_cache(self):
            return SimpleNamespace(serialize=lambda: b"timings")

    class Builder(rtx.Builder):
        def create_builder_config(self):
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
            return Config(config)

        def build_serialized_network(self, network, config):
            return super().build_serialized_network(network, config.real)

    module = SimpleNamespace(**{**vars(rtx), "Builder": Builder, "__version__": "11.4"})
    real = tensorrt_build.importlib.import_module
    monkeypatch.setattr(
        tensorrt_build.importlib, "import_module", lambda name: module if name == "tensorrt" else real(name)
    )
    for owner in (gpu, tensorrt_build):
        monkeypatch.setattr(owner, "find_gpu", lambda: Gpu("some GPU", "SM89", "13.0"))
    return told


def test_a_gpu_is_asked_for_its_name_generation_and_driver(monkeypatch):
    """The driver is a stand-in."""

    def put(value):
        return lambda place, *_: setattr(place._obj, "value", value)

    driver = SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDeviceGetCount=put(1),
        cuDeviceGet=put(0),
        cuDeviceGetName=lambda name, size, device: setattr(name, "value", b"some GPU"),
        cuDeviceGetAttribute=lambda place, attribute, device: setattr(place._obj, "value", {75: 12, 76: 0}[attribute]),
        cuDriverGetVersion=lambda place: setattr(place._obj, "value", 13010) or 0,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert find_gpu() == Gpu("some GPU", "SM120", "13.1")


def without(monkeypatch, *names):
    real = tensorrt_build.importlib.import_module

    def import_module(name):
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(tensorrt_build.importlib, "import_module", import_module)


def copied(engines, folder):
    source, cards, _ = engines
    for name in (cards["fp16"].file, cards["fp16"].file + ".json"):
        shutil.copy(source / name, folder / name)
    assert json.loads((folder / name).read_text())["file"] == cards["fp16"].file
    return folder / cards["fp16"].file
