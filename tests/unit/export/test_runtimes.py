"""Runners: one protocol, and an error that says what is missing; TensorRT's is not executed here."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from prgkit.errors import BackendError, ExportError
from prgkit.evaluate.bench.worker import Spec, opener, reason
from prgkit.export.bundle.manifest import Artifact
from prgkit.export.runtimes import open_runner
from prgkit.export.runtimes import openvino as openvino_module
from prgkit.export.runtimes.base import Setup
from prgkit.export.runtimes.onnxruntime import ONNXRUNTIME, PROVIDERS, OnnxRunner
from prgkit.export.runtimes.openvino import OPENVINO, OpenVinoRunner
from prgkit.export.runtimes.pytorch import TorchRunner, compiled, why_no_compiling


def artifact(name, file, kind):
    facts = {"precision": "fp32", "backend": "", "bytes": 0, "sha256": "", "executed": True, "note": None}
    return Artifact(name=name, file=file, format=kind, **facts, parity=None)


def setup(runtime, path):
    return Setup(runtime, runtime.variants[0], artifact(path.name, path.name, "onnx"), path.parent)


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
        def __init__(self, path, options, *, providers, enable_fallback):
            opened.append(providers)
            assert not enable_fallback

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


@pytest.mark.parametrize(
    ("provider", "device", "settings"),
    [
        ("TensorrtExecutionProvider", "cuda", {"trt_fp16_enable": "1"}),
        ("OpenVINOExecutionProvider", "cpu", {"device_type": "CPU", "precision": "FP32", "num_of_threads": "2"}),
    ],
)
def test_no_provider_hands_over_to_another(monkeypatch, tmp_path, provider, device, settings):
    """The session is a stand-in for a provider whose libraries are missing: ONNX Runtime then takes the CPU."""
    import onnxruntime

    opened = []

    class Session:
        def __init__(self, path, options, *, providers, enable_fallback):
            opened.append((providers, enable_fallback))
            self.whole = options.get_session_config_entry("session.disable_cpu_ep_fallback")

        def get_providers(self):
            assert self.whole == "1", "a part of the network could run on the CPU"
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(BackendError, match=f"ONNX Runtime fell back from {provider} to CPUExecutionProvider"):
        OnnxRunner(tmp_path / "model.onnx", provider, threads=2, half=True)
    assert opened == [([(provider, settings)], 0)]
    assert PROVIDERS[provider].device == device
    assert (os.environ.pop("NVIDIA_TF32_OVERRIDE", None) == "0") == (device == "cuda")


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason="pip install 'prgkit[openvino]'")


def test_what_opening_needs_is_imported_before_its_time_is_taken(tmp_path, monkeypatch):
    needed = "onnxruntime"
    monkeypatch.delitem(sys.modules, needed)
    path = tmp_path / "none.onnx"
    opening = opener(Spec("m", "onnxruntime", "cpu", threads=1, setup=setup(ONNXRUNTIME, path)))
    assert needed in sys.modules
    with pytest.raises(BackendError, match=r"none\.onnx"):
        opening()


def test_openvino_gives_onnx_runtimes_answer(openvino, exported, monkeypatch):
    monkeypatch.setattr(openvino_module, "SHAPES", 2)
    runner = opener(Spec("m", "openvino", "cpu", threads=1, setup=setup(OPENVINO, exported.fp32)))()
    assert (runner.name, runner.backend, runner.device) == ("model.onnx", "openvino", "cpu")
    reference = OnnxRunner(exported.fp32, threads=1)
    for batch in (1, 3, 2, 3, 1):
        logits = runner.run(exported.pixels[:batch])
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, reference.run(exported.pixels[:batch]), atol=1e-3)
        assert len(runner._requests) <= 2, "every batch size holds the weights once more"
    runner.close()


def test_openvino_computes_fp32_in_fp32(openvino, repvit, monkeypatch):
    """Left to itself, it takes bfloat16 where the processor can: what it does is read from the network it made."""
    runner = OpenVinoRunner(repvit.fp32, threads=1)
    network = runner._requests[1].get_compiled_model()
    kinds = {str(layer.rt_info["runtimePrecision"].value) for layer in network.get_runtime_model().get_ordered_ops()}
    assert "f32" in kinds
    assert not kinds & {"bf16", "f16"}
    monkeypatch.setattr(
        OpenVinoRunner, "_settings", lambda self: {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1}
    )
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendError, match=r"OpenVINO would compute model\.onnx in bf16, not in FP32"):
            OpenVinoRunner(repvit.fp32, threads=1)


def test_openvino_refuses_threads_that_it_would_not_take(openvino, repvit):
    with pytest.raises(BackendError, match=r"OpenVINO takes \d+ threads at most here, not 4096"):
        OpenVinoRunner(repvit.fp32, threads=4096)


@pytest.mark.parametrize("keep", [0, 0.5])
def test_openvinos_errors_are_short(openvino, repvit, tmp_path, keep):
    path = tmp_path / "model.onnx"
    data = repvit.fp32.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BackendError) as caught:
        OpenVinoRunner(path)
    assert caught.value.what.startswith("OpenVINO cannot open model.onnx: ")
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(BackendError, match=r"OpenVINO cannot run model\.onnx: [^\n]*32[^\n]*\Z"):
        OpenVinoRunner(repvit.fp32, threads=1).run(np.zeros((1, 32, 32, 3), np.uint8))


def test_without_openvino_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError) as caught:
        OpenVinoRunner(tmp_path / "model.onnx")
    assert caught.value.fix == "pip install 'prgkit[openvino]'"


def test_a_network_that_does_not_compile_is_a_line(monkeypatch, repvit):
    """A compiler is not waited for: what is tested is what becomes of its failure, and which sizes are compiled."""
    import torch

    sizes = []

    def compile_(module):
        def run(pixels):
            sizes.append(tuple(pixels.shape))
            if len(sizes) == 3:
                raise RuntimeError("CppCompileError: C++ compile error\n\nCommand:\ng++ ...")
            return module(pixels)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    fast = compiled(repvit.student, 64)
    assert sizes == [(1, 64, 64, 3), (2, 64, 64, 3)]
    with pytest.raises(RuntimeError) as caught:
        fast(torch.zeros((1, 64, 64, 3), dtype=torch.uint8))
    assert reason(caught.value) == "RuntimeError: CppCompileError: C++ compile error"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert why_no_compiling() == "needs a C++ compiler: apt install g++"


def test_the_manifest_chooses_the_runner(repvit):
    entry = artifact("onnx-fp32", "model.onnx", "onnx")
    runner = open_runner(repvit.fp32.parent, entry, threads=1)
    assert (runner.name, runner.backend) == ("onnx-fp32", "onnxruntime")
    with pytest.raises(BackendError, match="unknown format 'tflite'"):
        open_runner(repvit.fp32.parent, entry.model_copy(update={"format": "tflite"}))


def test_an_engine_that_is_not_there_is_named(tmp_path):
    entry = artifact("tensorrt_rtx-fp16", "model.fp16.tensorrt_rtx.engine", "engine").model_copy(
        update={"backend": "tensorrt_rtx"}
    )
    with pytest.raises(ExportError, match=r"there is no engine model\.fp16\.tensorrt_rtx\.engine"):
        open_runner(tmp_path, entry)
