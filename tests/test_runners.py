"""Runners: one protocol, and an error that says what is missing; TensorRT's is not executed here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from prgkit.errors import BackendError, ExportError
from prgkit.export import runners
from prgkit.export.card import EngineCard
from prgkit.export.runners import OnnxRunner, TensorRTRunner, TorchRunner, open_runner, require_match, why_not_here
from prgkit.export.tensorrt import Gpu, available_backends, build_engine

CARD = EngineCard(
    schema="prgkit.engine/1",
    file="model.fp16.tensorrt_rtx.engine",
    bytes=1,
    sha256="",
    onnx="model.fp16.onnx",
    onnx_sha256="",
    backend="tensorrt_rtx",
    backend_version="1.7.1.116",
    precision="fp16",
    tf32=False,
    batch=(1, 1, 32),
    compute_capabilities=("SM86", "SM89"),
    gpu=None,
    input={"name": "pixels", "dtype": "UINT8", "shape": [-1, 64, 64, 3]},
    output={"name": "logits", "dtype": "FLOAT", "shape": [-1, 20]},
    layer_dtypes={},
    inspected_dtypes=None,
    build_s=0.5,
    executed=False,
    note=None,
)


def test_torch_and_onnx_runtime_speak_the_same_protocol(repvit):
    torch_runner, onnx_runner = TorchRunner(repvit.student), OnnxRunner(repvit.fp32, threads=1)
    answers = [runner.run(repvit.pixels[:3]) for runner in (torch_runner, onnx_runner)]
    for logits in answers:
        assert (logits.shape, logits.dtype) == ((3, 20), np.float32)
    np.testing.assert_allclose(*answers, atol=1e-3)
    assert (torch_runner.name, torch_runner.backend, torch_runner.device) == ("torch", "torch", "cpu")
    assert (onnx_runner.name, onnx_runner.backend, onnx_runner.device) == ("model.onnx", "onnxruntime", "cpu")
    torch_runner.close()
    onnx_runner.close()


@pytest.mark.parametrize("spin", [True, False])
def test_spinning_changes_no_logit(repvit, spin):
    runner = OnnxRunner(repvit.fp32, threads=1, spin=spin)
    np.testing.assert_array_equal(
        runner.run(repvit.pixels[:2]), OnnxRunner(repvit.fp32, threads=1).run(repvit.pixels[:2])
    )


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_a_truncated_onnx_file_is_a_short_error(repvit, tmp_path, capfd, keep):
    data = repvit.fp32.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(BackendError) as caught:
        OnnxRunner(path)
    assert caught.value.what.startswith("ONNX Runtime cannot open model.onnx: ")
    assert caught.value.fix == "export it again: prgkit export"
    assert len(str(caught.value).splitlines()) == 3
    assert tuple(capfd.readouterr()) == ("", "")


def test_cuda_is_told_not_to_round_fp32_to_tf32(monkeypatch, tmp_path):
    """The session is a stand-in: what is tested is what ONNX Runtime is asked for."""
    import onnxruntime

    opened = []

    class Session:
        def __init__(self, path, options, *, providers):
            opened.append(providers)

        def get_providers(self):
            return ["CUDAExecutionProvider"]

        def get_inputs(self):
            return [SimpleNamespace(name="pixels")]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    (tmp_path / "model.onnx").touch()
    assert OnnxRunner(tmp_path / "model.onnx", "CUDAExecutionProvider").device == "cuda"
    assert opened == [[("CUDAExecutionProvider", {"use_tf32": "0"})]]


def test_a_missing_onnx_file_is_named(tmp_path):
    with pytest.raises(BackendError, match=r"there is no model\.onnx"):
        OnnxRunner(tmp_path / "model.onnx")


def test_a_provider_that_is_not_there_is_refused_and_never_replaced(repvit):
    with pytest.raises(BackendError, match=r"ONNX Runtime has no NoSuchExecutionProvider here; it has .*CPU"):
        OnnxRunner(repvit.fp32, "NoSuchExecutionProvider")


def test_pixels_of_another_size_are_a_short_error(repvit):
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot run model\.onnx: "):
        OnnxRunner(repvit.fp32, threads=1).run(np.zeros((1, 32, 32, 3), np.uint8))


def test_the_manifest_chooses_the_runner(repvit):
    entry = {"name": "onnx-fp32", "file": "model.onnx", "format": "onnx"}
    runner = open_runner(repvit.fp32.parent, entry, threads=1)
    assert (runner.name, runner.backend) == ("onnx-fp32", "onnxruntime")
    with pytest.raises(BackendError, match="unknown format 'tflite'"):
        open_runner(repvit.fp32.parent, {**entry, "format": "tflite"})


def test_an_engine_that_is_not_there_is_named(tmp_path):
    entry = {"name": "tensorrt_rtx-fp16", "file": CARD.file, "format": "engine"}
    with pytest.raises(ExportError, match=r"there is no engine model\.fp16\.tensorrt_rtx\.engine"):
        open_runner(tmp_path, entry)


@pytest.mark.skipif(runners.find_gpu() is not None, reason="there is a GPU")
@pytest.mark.skipif(not available_backends()["tensorrt_rtx"].usable, reason="tensorrt_rtx is not installed")
def test_a_real_engine_without_a_gpu_says_what_it_needs(repvit, tmp_path):
    card = build_engine(repvit.fp16, tmp_path, precision="fp16", batch=(1, 1, 8), backend="tensorrt_rtx")
    with pytest.raises(BackendError) as caught:
        TensorRTRunner(tmp_path / card.file)
    assert caught.value.what == f"{card.file} cannot run here: it needs an NVIDIA GPU and its driver"
    assert caught.value.fix == "run it on a machine with an NVIDIA GPU and cuda-python"


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (replace(CARD, compute_capabilities=("SM80",)), r"built for SM80, and this GPU \(RTX 4090\) is SM89"),
        (replace(CARD, backend="tensorrt", gpu="RTX 4080"), "built on RTX 4080, and this GPU is RTX 4090"),
        (replace(CARD, backend_version="1.6"), "built by tensorrt_rtx 1.6, and 1.7.1.116 is installed"),
    ],
)
def test_a_card_that_does_not_match_the_machine_is_refused(monkeypatch, tmp_path, card, reason):
    """The machine is a stand-in: what is tested is the comparison, which no engine is needed for."""
    on_a_gpu(monkeypatch)
    with pytest.raises(BackendError, match=reason):
        require_match(card, tmp_path / card.file)


def test_a_card_that_matches_is_accepted(monkeypatch):
    on_a_gpu(monkeypatch)
    assert why_not_here(CARD) is None


def test_without_cuda_python_the_error_names_it(monkeypatch):
    on_a_gpu(monkeypatch, missing="cuda.bindings.runtime")
    assert why_not_here(CARD).startswith("cuda-python is not installed: pip install cuda-python")


def on_a_gpu(monkeypatch, *, missing=None):
    class Module:
        __version__ = "1.7.1.116"

    def import_module(name):
        if name == missing:
            raise ImportError(name)
        return Module

    monkeypatch.setattr(runners, "find_gpu", lambda: Gpu("RTX 4090", "SM89"))
    monkeypatch.setattr(runners.importlib, "import_module", import_module)
