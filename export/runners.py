"""One way to run a student on pixels, whatever runs it: PyTorch, ONNX Runtime or TensorRT."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BackendError
from prgkit.export.card import EngineCard, load_card
from prgkit.export.tensorrt import find_gpu, quiet_logger

INSTALL_CUDA = "pip install cuda-python (on a Jetson with JetPack 6: pip install 'cuda-python<13')"


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


class OnnxRunner:
    """Runs an ONNX file with ONNX Runtime."""

    backend = "onnxruntime"
    max_batch: int | None = None

    def __init__(
        self,
        path: Path,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        *,
        name: str | None = None,
        spin: bool = True,
    ) -> None:
        """Open ``path``.

        Args:
            path: the ONNX file.
            provider: an ONNX Runtime execution provider; it runs there or not at all.
            threads: threads inside one operator; None leaves the choice to ONNX Runtime.
            name: what reports call it; the file's name by default.
            spin: let threads wait busily inside a run, which is faster; they always stop when the run ends.

        Raises:
            BackendError: the provider is not there, or the file is damaged.
        """
        ort = importlib.import_module("onnxruntime")
        if provider not in ort.get_available_providers():
            raise BackendError(
                f"ONNX Runtime has no {provider} here; it has {', '.join(ort.get_available_providers())}",
                fix="for CUDA: pip uninstall onnxruntime && pip install onnxruntime-gpu",
            )
        if not path.exists():
            raise BackendError(f"there is no {path.name}", where=path.parent, fix="export it again: prgkit export")
        options = ort.SessionOptions()
        options.log_severity_level = 4  # its errors are raised as well: printing them would say everything twice
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # an idle session takes no core from others
        # Its convolutions round to TF32's 10 bits unless told otherwise, and would still be called FP32.
        settings = {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {}
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:  # its exception types share no base but Exception
            raise BackendError(
                f"ONNX Runtime cannot open {path.name}: {one_line(error)}",
                where=path,
                fix="export it again: prgkit export",
            ) from error
        if self._session.get_providers()[0] != provider:  # it falls back to the CPU with a warning
            raise BackendError(
                f"ONNX Runtime fell back from {provider} to {self._session.get_providers()[0]}",
                fix="check CUDA and cuDNN: prgkit doctor",
            )
        self.name = name or path.name
        self.device = (
            "cpu" if provider == "CPUExecutionProvider" else provider.removesuffix("ExecutionProvider").lower()
        )
        self._input = self._session.get_inputs()[0].name

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        try:
            return cast(NDArray[np.float32], self._session.run(None, {self._input: pixels})[0])
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot run {self.name}: {one_line(error)}") from error

    def close(self) -> None:
        """Release the session and its threads."""
        self._session = None


class TensorRTRunner:
    """Runs a TensorRT engine through cuda-python: pinned host buffers, one stream, synchronised before it returns.

    Written from the documented Python API of TensorRT 10, 11 and RTX 1.x. No machine this was developed on has a GPU
    that could execute it, so it was never executed there: the first run on a device is checked by the golden images.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        """Open an engine of ours.

        Raises:
            ExportError: the engine has no card, or is not the one its card describes.
            BackendError: no GPU, no cuda-python, or another GPU or TensorRT than the engine was built for.
        """
        card = load_card(path)
        require_match(card, path)
        trt = importlib.import_module(card.backend)
        self._cudart = import_cudart()
        self.name, self.backend, self.device = name or path.name, card.backend, "cuda"
        self.min_batch: int = card.batch[0]
        self.max_batch: int | None = card.batch[2]
        self._input, self._output = card.input["name"], card.output["name"]
        self._pixel_shape = tuple(card.input["shape"][1:])  # (S, S, 3)
        self._classes = int(card.output["shape"][1])
        self._logger = quiet_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendError(
                f"{card.backend} cannot load {path.name}: {self._logger.reason()}",
                where=path,
                fix="prgkit export --trt",
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"{path.name} does not fit on this GPU: {self._logger.reason()}", where=path)
        self._pinned: list[int] = []
        self._device_buffers: list[int] = []
        self._stream = self._cuda("cudaStreamCreate")
        most = card.batch[2]
        self._pixels = self._pinned_array((most, *self._pixel_shape), ctypes.c_uint8)
        self._logits = self._pinned_array((most, self._classes), ctypes.c_float)
        self._bind(self._input, self._pixels.nbytes)
        self._bind(self._output, self._logits.nbytes)

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]; more than ``max_batch`` run in several executions."""
        step = len(self._pixels)
        return np.concatenate([self._execute(pixels[start : start + step]) for start in range(0, len(pixels), step)])

    def close(self) -> None:
        """Free the stream, the buffers and the engine."""
        if self._context is None:
            return
        self._cuda("cudaStreamSynchronize", self._stream)
        self._pixels = self._logits = np.empty(0)  # views of the memory that is freed next
        for pointer in self._pinned:
            self._cuda("cudaFreeHost", pointer)
        for pointer in self._device_buffers:
            self._cuda("cudaFree", pointer)
        self._cuda("cudaStreamDestroy", self._stream)
        self._context = self._engine = self._runtime = None

    def _execute(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(pixels)
        rows = max(count, self.min_batch)  # a static engine takes its own batch only: what is left over is ignored
        self._pixels[:count] = pixels
        shape = (rows, *self._pixel_shape)
        if not self._context.set_input_shape(self._input, shape):
            raise BackendError(f"{self.name} refuses input of shape {shape}: {self._logger.reason()}")
        kinds = self._cudart.cudaMemcpyKind
        bytes_in, bytes_out = self._pixels[:rows].nbytes, self._logits[:rows].nbytes
        pinned_in, pinned_out = self._pinned
        device_in, device_out = self._device_buffers
        self._cuda("cudaMemcpyAsync", device_in, pinned_in, bytes_in, kinds.cudaMemcpyHostToDevice, self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError(f"{self.name} failed to execute: {self._logger.reason()}")
        self._cuda("cudaMemcpyAsync", pinned_out, device_out, bytes_out, kinds.cudaMemcpyDeviceToHost, self._stream)
        self._cuda("cudaStreamSynchronize", self._stream)
        return np.array(self._logits[:count], dtype=np.float32)  # a copy: the buffer is used again

    def _pinned_array(self, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        size = int(np.prod(shape))
        pointer = int(self._cuda("cudaMallocHost", size * ctypes.sizeof(kind)))
        self._pinned.append(pointer)
        return np.ctypeslib.as_array((kind * size).from_address(pointer)).reshape(shape)

    def _bind(self, tensor: str, size_bytes: int) -> None:
        pointer = int(self._cuda("cudaMalloc", size_bytes))
        self._device_buffers.append(pointer)
        if not self._context.set_tensor_address(tensor, pointer):
            raise BackendError(f"{self.name} has no tensor {tensor}: {self._logger.reason()}")

    def _cuda(self, function: str, *arguments: Any) -> Any:
        """Call the CUDA runtime and return its one result; its status is an error or nothing."""
        status, *results = getattr(self._cudart, function)(*arguments)
        if int(status) != 0:
            raise BackendError(f"CUDA: {function} failed with {status.name}", where=self.name)
        return results[0] if results else None


def open_runner(
    folder: Path, artifact: dict[str, Any], *, threads: int | None = None, provider: str = "CPUExecutionProvider"
) -> Runner:
    """Open one artifact of a bundle's manifest.

    Raises:
        BackendError: it cannot run on this machine; says what is missing.
        ExportError: it is an engine that is damaged or not ours.
    """
    path = folder / artifact["file"]
    if artifact["format"] == "onnx":
        return OnnxRunner(path, provider, threads, name=artifact["name"])
    if artifact["format"] == "engine":
        return TensorRTRunner(path, name=artifact["name"])
    raise BackendError(f"artifact {artifact['name']} has unknown format {artifact['format']!r}", where=folder)


def why_no_engine_runs(backend: str) -> str | None:
    """Return what this machine lacks to run any engine of a backend, or None where it lacks nothing."""
    if find_gpu() is None:
        return "it needs an NVIDIA GPU and its driver"
    try:
        importlib.import_module(backend)
        import_cudart()
    except BackendError as error:
        return f"{error.what}: {error.fix}"
    except Exception as error:  # a placeholder wheel, a missing library: each raises its own kind
        return f"{backend} cannot be imported ({one_line(error)})"
    return None


def why_not_here(card: EngineCard) -> str | None:
    """Return why an engine cannot run on this machine, or None where it can."""
    gpu = find_gpu()
    if gpu is None:
        return why_no_engine_runs(card.backend)
    if gpu.capability not in card.compute_capabilities:
        return f"it was built for {', '.join(card.compute_capabilities)}, and this GPU ({gpu.name}) is {gpu.capability}"
    if card.backend == "tensorrt" and card.gpu != gpu.name:
        return f"it was built on {card.gpu}, and this GPU is {gpu.name}"
    if reason := why_no_engine_runs(card.backend):
        return reason
    version = str(importlib.import_module(card.backend).__version__)
    if version != card.backend_version:
        return f"it was built by {card.backend} {card.backend_version}, and {version} is installed"
    return None


def require_match(card: EngineCard, path: Path) -> None:
    """Refuse an engine that is not for this GPU and this TensorRT."""
    if reason := why_not_here(card):
        raise BackendError(
            f"{path.name} cannot run here: {reason}",
            where=path,
            fix="run it on a machine with an NVIDIA GPU and cuda-python"
            if find_gpu() is None
            else "prgkit export --trt",
        )


def import_cudart() -> Any:
    """Import the CUDA runtime's Python bindings."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError("cuda-python is not installed", fix=INSTALL_CUDA) from error


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
