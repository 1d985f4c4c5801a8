"""One way to run a student on pixels, whatever runs it: PyTorch, ONNX Runtime, OpenVINO or TensorRT."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from prgkit.config.image_size import Size, sides
from prgkit.errors import BackendError, ExportError, one_line
from prgkit.export.bundle.manifest import MATRIX, VECTORS, Artifact
from prgkit.export.runtimes.tensorrt import TensorRTRunner
from prgkit.storage.reproducible import read_array

EXPORT_AGAIN = "export it again: prgkit export"
GPU_BUILD = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
SHAPES = 4  # OpenVINO's compiled networks that are kept, each with the weights: one for each batch size


class Provider(NamedTuple):
    """An execution provider of ONNX Runtime: what a report calls it, what it runs on, and how to get it."""

    backend: str
    device: str
    install: str


PROVIDERS = {
    "CPUExecutionProvider": Provider("onnxruntime", "cpu", "pip install --force-reinstall onnxruntime"),
    "CUDAExecutionProvider": Provider("onnxruntime", "cuda", GPU_BUILD),
    "TensorrtExecutionProvider": Provider("onnxruntime-tensorrt", "cuda", f"{GPU_BUILD}, and TensorRT's libraries"),
    "OpenVINOExecutionProvider": Provider(
        "onnxruntime-openvino", "cpu", "pip uninstall -y onnxruntime && pip install onnxruntime-openvino"
    ),
}


def available_providers() -> list[str]:
    """Return the execution providers that this ONNX Runtime was built with; whether they start is another matter."""
    providers: list[str] = importlib.import_module("onnxruntime").get_available_providers()
    return providers


class Runner(Protocol):
    """Something that turns pixels into logits."""

    name: str
    backend: str
    device: str
    max_batch: int | None  # the largest batch of one execution; None where there is no limit

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]; returns when the logits are on the host."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class TorchRunner:
    """Runs a PyTorch module that maps uint8 NHWC pixels to logits."""

    backend = "torch"
    max_batch: int | None = None

    def __init__(self, module: Any, device: str = "cpu", *, name: str = "torch") -> None:
        self.name, self.device = name, str(device)
        self._torch = importlib.import_module("torch")
        self._module = module.eval().to(device)

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        with self._torch.inference_mode():
            logits = self._module(self._torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device))
            return cast(NDArray[np.float32], logits.float().cpu().numpy())  # .cpu() waits for the device

    def close(self) -> None:
        """Let go of the module."""
        self._module = None


def compiled(module: Any, image_size: Size) -> Any:
    """Compile a module of uint8 pixels [batch, S, S, 3] with inductor, for one picture and for any other number.

    It is done anew each time: a cache of an earlier compilation would make the load time a matter of luck.
    """
    torch = importlib.import_module("torch")
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.compile_threads, inductor.force_disable_caches = 1, True  # processes of its own would outlive a worker's
    fast = torch.compile(module.eval())
    with torch.inference_mode():
        for batch in (1, 2):  # the second size makes the batch a variable; then no run waits for a compiler
            fast(torch.zeros((batch, *sides(image_size), 3), dtype=torch.uint8))
    return fast


def why_no_compiling() -> str | None:
    """Return what torch.compile lacks to make code for the CPU, or None where it lacks nothing."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return None if any(name and shutil.which(name) for name in names) else "needs a C++ compiler: apt install g++"


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
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # an idle session takes no core from others
        if provider in ("TensorrtExecutionProvider", "OpenVINOExecutionProvider"):  # what they refuse, no other runs
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        asked = [(provider, provider_settings(provider, threads, half=half))]
        try:
            # Left to itself, it goes on with another provider where this one fails, at a run as well.
            self._session = ort.InferenceSession(str(path), options, providers=asked, enable_fallback=0)
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
        self.backend, self.device, _ = PROVIDERS[provider]
        self._input, *others = (given.name for given in self._session.get_inputs())
        self._others = {name: class_vectors(path) for name in others if name == MATRIX}

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        try:
            return cast(NDArray[np.float32], self._session.run(None, {self._input: pixels, **self._others})[0])
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot run {self.name}: {one_line(error)}") from error

    def close(self) -> None:
        """Release the session and its threads."""
        self._session = None


def class_vectors(path: Path) -> NDArray[np.float32]:
    """Return the class vectors [C, D] that lie beside an ONNX file which takes them as an input.

    Raises:
        BackendError: they do not.
    """
    try:
        return read_array(path.with_name(VECTORS)).astype(np.float32, copy=False)
    except ExportError as error:
        raise BackendError(
            f"{path.name} takes its class vectors as an input: {error.what}", where=path.parent, fix=EXPORT_AGAIN
        ) from error


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


class OpenVinoRunner:
    """Runs an ONNX file with OpenVINO on the CPU: what the file does not hold in INT8, in FP32.

    Left to itself, OpenVINO computes FP32 in bfloat16 where the processor can. A network of a fixed batch size is
    faster than one of any, so each batch size has its own, compiled when it first comes.
    """

    backend, device = "openvino", "cpu"
    max_batch: int | None = None

    def __init__(self, path: Path, threads: int | None = None, *, name: str | None = None) -> None:
        """Open ``path``, ready for one picture.

        Args:
            path: the ONNX file, in FP32, or in INT8 of either layout.
            threads: threads of one run; None leaves the choice to OpenVINO.
            name: what reports call it; the file's name by default.

        Raises:
            BackendError: OpenVINO is not installed, the file is damaged, or it would not run as asked.
        """
        try:
            openvino = importlib.import_module("openvino")
        except ImportError as error:
            raise BackendError("OpenVINO is not installed", fix="pip install 'prgkit[openvino]'") from error
        if not path.exists():
            raise BackendError(f"there is no {path.name}", where=path.parent, fix=EXPORT_AGAIN)
        self.name, self._threads = name or path.name, threads
        self._requests: dict[int, Any] = {}  # batch size -> an inference request
        self._core = openvino.Core()
        try:
            self._model = self._core.read_model(str(path))
            self._others = {place: class_vectors(path) for place in range(1, len(self._model.inputs))}
            self._request(1)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO cannot open {path.name}: {last_line(error)}", where=path, fix=EXPORT_AGAIN
            ) from error

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        try:
            request, given = self._request(len(pixels)), {0: pixels, **self._others}
            return cast(NDArray[np.float32], request.infer(given, share_inputs=True)[0])
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot run {self.name}: {last_line(error)}") from error

    def close(self) -> None:
        """Release the networks and their threads."""
        self._requests, self._model, self._core = {}, None, None

    def _request(self, batch: int) -> Any:
        """Return the inference request for a batch size, compiled where it is new; the oldest makes room."""
        if batch not in self._requests:
            pixels = self._model.inputs[0]
            shapes = {self._model.inputs[place]: list(matrix.shape) for place, matrix in self._others.items()}
            self._model.reshape({pixels: [batch, *list(pixels.partial_shape)[1:]], **shapes})
            network = self._core.compile_model(self._model, "CPU", self._settings())
            self._require_as_asked(network)
            if len(self._requests) == SHAPES:
                self._requests.pop(next(iter(self._requests)))
            self._requests[batch] = network.create_infer_request()
        return self._requests[batch]

    def _settings(self) -> dict[str, Any]:
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if self._threads is None:
            return settings
        # By itself it takes one thread of a core, and so fewer than asked for.
        return settings | {"INFERENCE_NUM_THREADS": self._threads, "ENABLE_HYPER_THREADING": True}

    def _require_as_asked(self, network: Any) -> None:
        precision = network.get_property("INFERENCE_PRECISION_HINT").to_string()
        if precision != "f32":
            raise BackendError(f"OpenVINO would compute {self.name} in {precision}, not in FP32")
        threads = network.get_property("INFERENCE_NUM_THREADS")
        if self._threads not in (None, threads):
            raise BackendError(
                f"OpenVINO takes {threads} threads at most here, not {self._threads}", fix=f"--threads {threads}"
            )


def last_line(error: BaseException) -> str:
    """Return the last line of an error that begins with places in OpenVINO's source: what is wrong stands there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def open_runner(
    folder: Path, artifact: Artifact, *, threads: int | None = None, provider: str = "CPUExecutionProvider"
) -> Runner:
    """Open one artifact of a bundle's manifest.

    Raises:
        BackendError: it cannot run on this machine; says what is missing.
        ExportError: it is an engine that is damaged or not ours.
    """
    path = folder / artifact.file
    if artifact.format == "onnx":
        return OnnxRunner(path, provider, threads, name=artifact.name)
    if artifact.format == "engine":
        return TensorRTRunner(path, name=artifact.name)
    raise BackendError(f"artifact {artifact.name} has unknown format {artifact.format!r}", where=folder)
