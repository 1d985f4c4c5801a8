"""ONNX Runtime, with each of its execution providers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import BackendError, one_line
from prgkit.export.bundle.manifest import EXPORT_AGAIN, MATRIX, NCHW, ONNX, QDQ, Artifact
from prgkit.export.runtimes.base import Runtime, Setup, Variant, Versions, read_class_vectors
from prgkit.export.runtimes.gpu import find_gpu
from prgkit.export.runtimes.openvino import runs_in_openvino

GPU_BUILD = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
REINSTALL = "pip install --force-reinstall onnxruntime"
OPENVINO_BUILD = "pip uninstall -y onnxruntime && pip install onnxruntime-openvino"
VARIANTS = (
    Variant("CPUExecutionProvider", "onnxruntime", "cpu", REINSTALL, side_by_side=True),
    Variant("CUDAExecutionProvider", "onnxruntime", "cuda", GPU_BUILD),
    Variant("TensorrtExecutionProvider", "onnxruntime-tensorrt", "cuda", f"{GPU_BUILD}, and TensorRT's libraries"),
    Variant("OpenVINOExecutionProvider", "onnxruntime-openvino", "cpu", OPENVINO_BUILD),
)
PROVIDERS = {variant.name: variant for variant in VARIANTS}


def open_onnx(setup: Setup) -> OnnxRunner:
    """Open an ONNX file with an execution provider."""
    half, name = setup.artifact.precision == "fp16", setup.artifact.name
    return OnnxRunner(setup.path, setup.variant.name, setup.threads, name=name, half=half)


def provider_runs(variant: Variant, artifact: Artifact, beside: Sequence[Artifact]) -> bool:
    """Tell what a provider runs: TensorRT's is left the floats, INT8 is what the bundle's engines are for."""
    if variant.backend == "onnxruntime-openvino":
        return runs_in_openvino(variant, artifact, beside)
    if variant.backend == "onnxruntime-tensorrt" and artifact.precision == "int8":
        return False
    return artifact.format == ONNX


def why_no_provider(variant: Variant, built_in: Sequence[str], *, gpu: bool) -> str | None:
    """Return what is missing for an execution provider, or None; whether it starts is another matter."""
    if variant.device == "cuda" and not gpu:
        return "needs an NVIDIA GPU and its driver"
    return None if variant.name in built_in else variant.install


def why_not_here(setup: Setup, gpu: bool) -> str | None:
    """Return what is missing for a file's provider."""
    return why_no_provider(setup.variant, available_providers(), gpu=gpu)


def examine(versions: Versions) -> Sequence[tuple[str, str | None]]:
    """Return a line a provider: each runs where it is built in, the GPU's where there is one."""
    try:
        built_in = available_providers()
    except Exception as error:  # a missing library or a half-removed package: each raises its own kind
        return [("onnxruntime", f"{error}; {REINSTALL}")]
    gpu = find_gpu() is not None
    return [(f"onnxruntime {short_name(variant)}", why_no_provider(variant, built_in, gpu=gpu)) for variant in VARIANTS]


def short_name(variant: Variant) -> str:
    """Return a provider's name for people."""
    return variant.name.removesuffix("ExecutionProvider").replace("Tensorrt", "TensorRT")


def available_providers() -> list[str]:
    """Return the execution providers that this ONNX Runtime was built with; whether they start is another matter."""
    providers: list[str] = importlib.import_module("onnxruntime").get_available_providers()
    return providers


class OnnxRunner:
    """Runs an ONNX file with ONNX Runtime."""

    max_batch: int | None = None

    def __init__(
        self,
        path: Path,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        *,
        name: str | None = None,
        spin: bool = True,
        half: bool = False,
    ) -> None:
        """Open ``path``.

        Args:
            path: the ONNX file.
            provider: an ONNX Runtime execution provider; it runs there or not at all.
            threads: threads inside one operator; None leaves the choice to the runtime.
            name: what reports call it; the file's name by default.
            spin: let threads wait busily inside a run, which is faster; they always stop when the run ends.
            half: the file is FP16, which TensorRT has to be told.

        Raises:
            BackendError: the provider is not there, or the file is damaged.
        """
        ort = importlib.import_module("onnxruntime")
        if provider not in PROVIDERS or provider not in ort.get_available_providers():
            raise BackendError(
                f"ONNX Runtime has no {provider} here; it has {', '.join(ort.get_available_providers())}",
                fix=PROVIDERS[provider].install if provider in PROVIDERS else f"it can be {', '.join(PROVIDERS)}",
            )
        if not path.exists():
            raise BackendError(f"there is no {path.name}", where=path.parent, fix=EXPORT_AGAIN)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # its errors are raised as well: printing them would say everything twice
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        # An idle session takes no core from others.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if provider in ("TensorrtExecutionProvider", "OpenVINOExecutionProvider"):  # what they refuse, no other runs
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [(provider, provider_settings(provider, threads, half=half))]
        try:
            # Left to itself, it goes on with another provider where this one fails, at a run as well.
            self._session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        except Exception as error:  # its exception types share no base but Exception
            raise BackendError(
                f"ONNX Runtime cannot open {path.name}: {one_line(error)}", where=path, fix=EXPORT_AGAIN
            ) from error
        if self._session.get_providers()[0] != provider:  # where its libraries are missing, there is a warning only
            raise BackendError(
                f"ONNX Runtime fell back from {provider} to {self._session.get_providers()[0]}",
                fix="check the libraries that it needs, such as CUDA and cuDNN: prgkit doctor",
            )
        self.name = name or path.name
        self.backend, self.device = PROVIDERS[provider].backend, PROVIDERS[provider].device
        self._input, *others = (given.name for given in self._session.get_inputs())
        self._others = {name: read_class_vectors(path) for name in others if name == MATRIX}

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        return self.outputs(pixels)[0]

    def outputs(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Return all that the file answers to pixels [batch, S, S, 3], the logits first."""
        try:
            return cast(list[NDArray[np.float32]], self._session.run(None, {self._input: pixels, **self._others}))
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot run {self.name}: {one_line(error)}") from error

    def close(self) -> None:
        """Release the session and its threads."""
        self._session = None


def provider_settings(provider: str, threads: int | None, *, half: bool) -> dict[str, str]:
    """Return what keeps a provider to the precision of its file, and to ``threads``."""
    if provider == "CUDAExecutionProvider":
        # Its convolutions round to TF32's 10 bits unless told otherwise, and would still be called FP32.
        return {"use_tf32": "0"}
    if provider == "TensorrtExecutionProvider":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # the same there, where no setting says so
        return {"trt_fp16_enable": "1" if half else "0"}
    if provider == "OpenVINOExecutionProvider":
        return {"device_type": "CPU", "precision": "FP32"} | ({"num_of_threads": str(threads)} if threads else {})
    return {}


ONNXRUNTIME = Runtime(
    name="onnxruntime",
    formats=(ONNX, QDQ),
    variants=VARIANTS,
    libraries=("onnxruntime",),
    open=open_onnx,
    examine=examine,
    runs=provider_runs,
    why_not_here=why_not_here,
)


class NormalisingRunner:
    """Runs a file that takes normalised floats on the pixels that every other runner takes."""

    backend = "onnxruntime"
    max_batch: int | None = None

    def __init__(self, path: Path, preprocessing: Preprocessing) -> None:
        self._inner = OnnxRunner(path, name=NCHW, spin=False)
        self._preprocessing = preprocessing
        self.name, self.device = NCHW, self._inner.device

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        images: Any = normalised(pixels, self._preprocessing)  # an OnnxRunner hands on what its file takes
        return self._inner.run(images)

    def close(self) -> None:
        """Release the session."""
        self._inner.close()


def normalised(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return pixels [n, S, S, 3] as the file takes them: [n, 3, S, S], normalised channel by channel."""
    mean, std = (np.array(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))  # [3]
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std  # [n, S, S, 3]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
