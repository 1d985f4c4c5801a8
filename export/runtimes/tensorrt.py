"""Run a TensorRT engine without torch, on a GPU that it was built for."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BackendError, one_line
from prgkit.export.bundle.engine_metadata import EngineMetadata, load_engine_metadata, rebuild
from prgkit.export.bundle.manifest import ENGINE, Artifact
from prgkit.export.runtimes.base import Runtime, Setup, Variant, Versions
from prgkit.export.runtimes.gpu import (
    AMPERE_PLUS,
    Gpu,
    find_gpu,
    generations,
    probe_backend,
    quiet_logger,
    this_platform,
)

INSTALL_CUDA = "pip install cuda-python (on a Jetson with JetPack 6: pip install 'cuda-python<13')"


class TensorRTRunner:
    """Runs a TensorRT engine through cuda-python: pinned host buffers, one stream, synchronised before it returns.

    What a batch size needs, copies included, is recorded as a CUDA graph after its first execution and launched from
    then on. tensorrt_rtx records graphs itself: it compiles kernels while it runs, and a graph of ours would keep the
    first ones. Where recording fails, runs are enqueued one by one; ``switches`` says which it is.

    Written from the documented Python API of TensorRT 10, 11 and RTX 1.x. No machine this was developed on has a GPU
    that could execute it, so it was never executed there: the first run on a device is checked by the golden images.
    """

    def __init__(self, path: Path, *, name: str | None = None, cuda_graph: bool = True, spin: bool = True) -> None:
        """Open an engine of ours.

        Args:
            path: the engine, with its card beside it.
            name: what reports call it; the file's name by default.
            cuda_graph: launch recorded graphs, as trtexec 11 does, instead of one kernel after the other.
            spin: wait busily for the GPU, as trtexec 11 does, which is faster; else sleep until it is done.

        Raises:
            ExportError: the engine has no metadata, or is not the one its card describes.
            BackendError: no GPU, no cuda-python, or another GPU or TensorRT than the engine was built for.
        """
        metadata = load_engine_metadata(path)
        require_match(metadata, path)
        trt = importlib.import_module(metadata.backend)
        self._cudart = import_cudart()
        self.name, self.backend, self.device = name or path.name, metadata.backend, "cuda"
        self.min_batch: int = metadata.batch[0]
        self.max_batch: int | None = metadata.batch[2]
        self._input, self._output = metadata.input.name, metadata.output.name
        self._pixel_shape = tuple(map(int, metadata.input.shape[1:]))  # (H, W, 3)
        self._classes = int(metadata.output.shape[1])
        self._pinned: list[int] = []
        self._device_buffers: list[int] = []
        self._graph: Any = None  # of the batch size that the context has
        self._rows = 0  # that batch size
        self._stream: Any = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._logger = quiet_logger(trt)
        try:
            self.switches = {"wait": self._wait("spin" if spin else "block"), "cuda_graph": "off"}
            self._records = cuda_graph and metadata.backend == "tensorrt"
            self._context = self._open(trt, path, cuda_graph=cuda_graph)
            self._stream = self._cuda("cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking)
            most = metadata.batch[2]
            self._pixels = self._pinned_array((most, *self._pixel_shape), ctypes.c_uint8)
            self._logits = self._pinned_array((most, self._classes), ctypes.c_float)
            self._bind(self._input, self._pixels.nbytes)
            self._bind(self._output, self._logits.nbytes)
        except BaseException:
            with contextlib.suppress(BackendError):  # what went wrong first is what counts
                self.close()
            raise

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]; more than ``max_batch`` run in several executions."""
        step = len(self._pixels)
        return np.concatenate([self._execute(pixels[start : start + step]) for start in range(0, len(pixels), step)])

    def compute_ns(self, pixels: NDArray[np.uint8]) -> int:
        """Return the GPU's own time for one execution, by CUDA events: without the copies, and without a graph."""
        self.run(pixels)  # brings the pixels to the device
        events = [self._cuda("cudaEventCreate") for _ in range(2)]
        try:
            self._cuda("cudaEventRecord", events[0], self._stream)
            if not self._context.execute_async_v3(int(self._stream)):
                raise BackendError(f"{self.name} failed to execute: {self._logger.reason()}")
            self._cuda("cudaEventRecord", events[1], self._stream)
            self._cuda("cudaEventSynchronize", events[1])
            elapsed_ms: float = self._cuda("cudaEventElapsedTime", *events)
            return round(1e6 * elapsed_ms)
        finally:
            for event in events:
                self._cuda("cudaEventDestroy", event)

    def close(self) -> None:
        """Free the graphs, the stream, the buffers and the engine."""
        if self._stream is not None:
            self._cuda("cudaStreamSynchronize", self._stream)
        self._pixels = self._logits = np.empty(0)  # views of the memory that is freed next
        self._forget_graph()
        while self._pinned:
            self._cuda("cudaFreeHost", self._pinned.pop())
        while self._device_buffers:
            self._cuda("cudaFree", self._device_buffers.pop())
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._cuda("cudaStreamDestroy", stream)
        self._context = self._engine = self._runtime = None

    def _open(self, trt: Any, path: Path, *, cuda_graph: bool) -> Any:
        """Load the engine and return an execution context."""
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendError(
                f"{self.backend} cannot load {path.name}: {self._logger.reason()}",
                where=path,
                fix=rebuild(load_engine_metadata(path)),
            )
        if cuda_graph and hasattr(trt, "CudaGraphStrategy"):  # TensorRT for RTX from 1.2 on
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
            self.switches["cuda_graph"] = "its own"
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise BackendError(f"{path.name} does not fit on this GPU: {self._logger.reason()}", where=path)
        return context

    def _execute(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(pixels)
        rows = max(count, self.min_batch)  # a static engine takes its own batch only: what is left over is ignored
        self._pixels[:count] = pixels
        self._set_rows(rows)
        if self._graph is not None:
            self._cuda("cudaGraphLaunch", self._graph, self._stream)
            self._cuda("cudaStreamSynchronize", self._stream)
            return np.array(self._logits[:count], dtype=np.float32)  # a copy: the buffer is used again
        self._enqueue(rows)
        self._cuda("cudaStreamSynchronize", self._stream)
        logits = np.array(self._logits[:count], dtype=np.float32)
        if self._records:  # only after an execution of this shape: TensorRT sets itself up for it in the first
            self._record(rows)
        return logits

    def _set_rows(self, rows: int) -> None:
        """Give the context its batch size; a graph that was recorded with another one is no longer its own."""
        if rows == self._rows:
            return
        self._rows = 0  # until the context has taken it
        self._forget_graph()
        shape = (rows, *self._pixel_shape)
        if not self._context.set_input_shape(self._input, shape):
            raise BackendError(f"{self.name} refuses input of shape {shape}: {self._logger.reason()}")
        self._rows = rows

    def _forget_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda("cudaGraphExecDestroy", graph)

    def _enqueue(self, rows: int) -> None:
        """Queue one execution of ``rows`` images on the stream, with the copies to the device and back."""
        kinds = self._cudart.cudaMemcpyKind
        bytes_in, bytes_out = self._pixels[:rows].nbytes, self._logits[:rows].nbytes
        pinned_in, pinned_out = self._pinned
        device_in, device_out = self._device_buffers
        self._cuda("cudaMemcpyAsync", device_in, pinned_in, bytes_in, kinds.cudaMemcpyHostToDevice, self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError(f"{self.name} failed to execute: {self._logger.reason()}")
        self._cuda("cudaMemcpyAsync", pinned_out, device_out, bytes_out, kinds.cudaMemcpyDeviceToHost, self._stream)

    def _record(self, rows: int) -> None:
        """Record what ``rows`` images need as a graph; where that fails, say so and record no more."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._cuda("cudaStreamBeginCapture", self._stream, mode)
            try:
                self._enqueue(rows)
            except BackendError:
                self._cudart.cudaStreamEndCapture(self._stream)  # else the stream stays in capture
                raise
            graph = self._cuda("cudaStreamEndCapture", self._stream)
            try:
                self._graph = self._cuda("cudaGraphInstantiate", graph, 0)
            finally:
                self._cuda("cudaGraphDestroy", graph)
            self.switches["cuda_graph"] = "on"
        except BackendError as error:
            self._cudart.cudaGetLastError()  # else the next launch finds this error, which is not its own
            self._records, self.switches["cuda_graph"] = False, f"off: {error.what}"

    def _wait(self, how: str) -> str:
        """Choose how to wait for the GPU; returns that, or that the process had chosen before."""
        flags = {"spin": self._cudart.cudaDeviceScheduleSpin, "block": self._cudart.cudaDeviceScheduleBlockingSync}
        (status, *_) = self._cudart.cudaSetDeviceFlags(flags[how])
        return how if int(status) == 0 else "chosen before"

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


def why_not_here(metadata: EngineMetadata) -> str | None:
    """Return why an engine cannot run on this machine, or None where it can."""
    gpu = find_gpu()
    if gpu is None:
        return why_no_engine_runs(metadata.backend)
    if metadata.platform not in (None, this_platform()):
        return f"it was built on {metadata.platform}, and this is {this_platform()}"
    if not is_for(metadata, gpu):
        built_for = ", ".join(metadata.compute_capabilities)
        return f"it was built for {built_for}, and this GPU ({gpu.name}) is {gpu.capability}"
    is_for_one_model = metadata.backend == "tensorrt" and metadata.hardware_compatibility in (None, "NONE")
    if is_for_one_model and metadata.gpu != gpu.name:
        return f"it was built on {metadata.gpu}, and this GPU is {gpu.name}"
    if reason := why_no_engine_runs(metadata.backend):
        return reason
    version = str(importlib.import_module(metadata.backend).__version__)
    if version != metadata.backend_version:
        return f"it was built by {metadata.backend} {metadata.backend_version}, and {version} is installed"
    return None


def is_for(metadata: EngineMetadata, gpu: Gpu) -> bool:
    """Tell whether an engine is for a GPU's generation."""
    if metadata.compute_capabilities == (AMPERE_PLUS,):
        return int(gpu.capability.removeprefix("SM")) >= 80
    return gpu.capability in metadata.compute_capabilities


def require_match(metadata: EngineMetadata, path: Path) -> None:
    """Refuse an engine that is not for this GPU and this TensorRT, with the command that rebuilds it."""
    if reason := why_not_here(metadata):
        gpu = find_gpu()
        fix = "run it on a machine with an NVIDIA GPU and cuda-python"
        if gpu is not None and reason == why_no_engine_runs(metadata.backend):
            fix = "prgkit doctor says what is missing"
        elif gpu is not None:
            fix = rebuild(metadata)
            if metadata.backend == "tensorrt_rtx" and not is_for(metadata, gpu):
                able = why_no_engine_runs(metadata.backend) is not None or gpu.capability in generations(
                    metadata.backend
                )
                other = rebuild(metadata.model_copy(update={"backend": "tensorrt"}))
                fix = f"{fix} --sm {gpu.capability.removeprefix('SM')}" if able else other
        raise BackendError(f"{path.name} cannot run here: {reason}", where=path, fix=fix)


def import_cudart() -> Any:
    """Import the CUDA runtime's Python bindings."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError("cuda-python is not installed", fix=INSTALL_CUDA) from error


def open_engine(setup: Setup) -> TensorRTRunner:
    """Open an engine."""
    return TensorRTRunner(setup.path, name=setup.artifact.name)


def runs_own_engines(variant: Variant, artifact: Artifact, beside: Sequence[Artifact]) -> bool:
    """Tell whether an engine is one of that TensorRT's."""
    return artifact.backend == variant.backend


def why_no_engine(setup: Setup, gpu: bool) -> str | None:
    """Return why an engine cannot run on this machine."""
    return why_not_here(load_engine_metadata(setup.path))


def examine(name: str, versions: Versions) -> Sequence[tuple[str, str | None]]:
    """Return whether a TensorRT can build engines here, and whether it can run them."""
    state = probe_backend(name)
    runs = state.problem if state.version is None else why_no_engine_runs(name)
    return [(f"{name}: build engines", state.problem), (f"{name}: run engines", runs)]


TENSORRT, TENSORRT_RTX = (
    Runtime(
        name=name,
        formats=(ENGINE,),
        variants=(Variant("GPU", name, "cuda", always_listed=True, takes_threads=False),),
        libraries=(name,),
        open=open_engine,
        examine=partial(examine, name),
        runs=runs_own_engines,
        why_not_here=why_no_engine,
    )
    for name in ("tensorrt", "tensorrt_rtx")
)
