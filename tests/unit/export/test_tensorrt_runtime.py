# ruff: noqa: N802, N815 (the names are CUDA's)
"""The TensorRT runner against a stand-in for the GPU: memory of the host, and a stream that runs at once or is recorded.

It shows what is asked of CUDA and in which order, not that a GPU does it: no machine here has one.
"""

from __future__ import annotations

import ctypes
import enum
from types import SimpleNamespace

import numpy as np
import pytest

try:
    from cuda.bindings import runtime as cudart
except ImportError:
    cudart = None

from prgkit.errors import BackendError
from prgkit.export.bundle.engine_metadata import EngineMetadata, write_engine_metadata
from prgkit.export.bundle.manifest import TensorSpec
from prgkit.export.formats.tensorrt_build import build_engine
from prgkit.export.runtimes import tensorrt
from prgkit.export.runtimes.gpu import Gpu, probe_backend, this_platform
from prgkit.export.runtimes.tensorrt import TensorRTRunner, require_match, why_not_here
from prgkit.storage.atomic import sha256

CARD = EngineMetadata(
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


def replace(card, **changes):
    return card.model_copy(update=changes)


FOR_GENERATION = {
    "backend": "tensorrt",
    "gpu": "RTX 4080",
    "hardware_compatibility": "SAME_COMPUTE_CAPABILITY",
}
SIDE, CLASSES = 4, 3
PLAIN = ["cudaMemcpyAsync", "execute", "cudaMemcpyAsync", "cudaStreamSynchronize"]
RECORDED = [
    "cudaStreamBeginCapture",
    *PLAIN[:3],
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
    "cudaGraphDestroy",
]
LAUNCHED = ["cudaGraphLaunch", "cudaStreamSynchronize"]
FORGOTTEN = ["cudaGraphExecDestroy"]


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorUnknown = 999


class Cudart:
    """The part of cuda.bindings.runtime that the runner calls; what is in ``failing`` fails."""

    cudaStreamNonBlocking, cudaDeviceScheduleSpin, cudaDeviceScheduleBlockingSync = 1, 1, 4
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self):
        self.calls, self.memory, self.graphs, self.recording, self.failing = [], {}, {}, None, set()
        self.stream = False

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            if name in self.failing:
                self.recording = None if name == "cudaStreamEndCapture" else self.recording
                return Status.cudaErrorUnknown, None
            work = getattr(type(self), f"do_{name}", lambda *_: None)
            return Status.cudaSuccess, work(self, *arguments)

        return call

    def queue(self, work):
        self.recording.append(work) if self.recording is not None else work()

    def do_cudaMalloc(self, size):
        memory = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    do_cudaMallocHost = do_cudaMalloc

    def do_cudaFree(self, pointer):
        del self.memory[pointer]  # what is freed twice is an error

    do_cudaFreeHost = do_cudaFree

    def do_cudaStreamCreateWithFlags(self, flags):
        self.stream = True
        return 7

    def do_cudaStreamDestroy(self, stream):
        self.stream = False

    def do_cudaMemcpyAsync(self, to, source, size, kind, stream):
        self.queue(lambda: ctypes.memmove(to, source, size))

    def do_cudaStreamSynchronize(self, stream):
        assert self.recording is None, "waiting for a stream that is being recorded"

    def do_cudaStreamBeginCapture(self, stream, mode):
        self.recording = []

    def do_cudaStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        return graph

    def do_cudaGraphInstantiate(self, graph, flags):
        self.graphs[len(self.graphs)] = graph
        return len(self.graphs) - 1

    def do_cudaGraphLaunch(self, graph, stream):
        for work in self.graphs[graph]:
            work()

    def do_cudaGraphExecDestroy(self, graph):
        del self.graphs[graph]


class Context:
    """An engine whose logits are the mean of each colour."""

    def __init__(self, cudart):
        self.cudart, self.at, self.refuses = cudart, {}, False

    def set_input_shape(self, name, shape):
        self.rows = shape[0]
        return shape[1:] == (SIDE, SIDE, 3)

    def set_tensor_address(self, name, pointer):
        self.at[name] = pointer
        return True

    def execute_async_v3(self, stream):
        rows = self.rows  # a recorded execution keeps the shape of its day

        def work():
            pixels = (ctypes.c_uint8 * (rows * SIDE * SIDE * 3)).from_address(self.at["pixels"])
            logits = (ctypes.c_float * (rows * CLASSES)).from_address(self.at["logits"])
            values = np.ctypeslib.as_array(pixels).reshape(rows, -1, 3).mean(axis=1)
            np.ctypeslib.as_array(logits).reshape(rows, CLASSES)[:] = values

        self.cudart.calls.append("execute")
        if self.refuses and self.cudart.recording is not None:
            return False
        self.cudart.queue(work)
        return True


class Module:
    """A TensorRT; with ``own_graphs`` it is TensorRT for RTX."""

    __version__ = CARD.backend_version

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)

    def __init__(self, cudart, *, own_graphs):
        self.context, self.configs = Context(cudart), []
        if own_graphs:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self)

    def create_runtime_config(self):
        return SimpleNamespace()

    def create_execution_context(self, *configs):
        self.configs += configs
        return self.context


@pytest.fixture(params=["tensorrt"])
def gpu(request, monkeypatch, tmp_path):
    """A machine with a GPU, and an engine for it; ``open`` opens it."""
    backend = request.param
    cudart = Cudart()
    trt = Module(cudart, own_graphs=backend == "tensorrt_rtx")
    modules = {backend: trt, "cuda.bindings.runtime": cudart}
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: Gpu("RTX 4090", "SM89"))
    monkeypatch.setattr(tensorrt.importlib, "import_module", modules.__getitem__)
    path = tmp_path / "model.engine"
    path.write_bytes(b"engine")
    card = replace(CARD, backend=backend, gpu="RTX 4090", file=path.name, bytes=6, sha256=sha256(path), batch=(1, 1, 4))
    card = replace(card, input=TensorSpec(name="pixels", dtype="UINT8", shape=(-1, SIDE, SIDE, 3)))
    write_engine_metadata(path, replace(card, output=TensorSpec(name="logits", dtype="FLOAT", shape=(-1, CLASSES))))
    return SimpleNamespace(cudart=cudart, trt=trt, open=lambda **options: TensorRTRunner(path, **options))


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def check(runner, count, seed=0):
    """Run pictures and compare the logits; returns what that asked of CUDA."""
    calls = runner._cudart.calls
    calls.clear()
    pixels = pictures(count, seed)
    np.testing.assert_allclose(runner.run(pixels), pixels.mean(axis=(1, 2)), rtol=1e-5)
    return list(calls)


def is_freed(cudart):
    return not cudart.memory and not cudart.graphs and not cudart.stream


def test_a_graph_is_recorded_after_the_first_execution_of_a_batch_size_and_holds_until_another_comes(gpu):
    """Another shape changes the context's inner state, and a graph of the one before would compute with that."""
    runner = gpu.open()
    assert runner.switches == {"wait": "spin", "cuda_graph": "off"}
    assert check(runner, 3) == PLAIN + RECORDED
    assert check(runner, 3, seed=1) == LAUNCHED
    assert check(runner, 1, seed=2) == FORGOTTEN + PLAIN + RECORDED
    assert check(runner, 1, seed=3) == LAUNCHED
    assert check(runner, 3, seed=4) == FORGOTTEN + PLAIN + RECORDED
    assert check(runner, 7, seed=5) == (FORGOTTEN + PLAIN + RECORDED) * 2, "4 images, then 3"
    assert runner.switches == {"wait": "spin", "cuda_graph": "on"}
    runner.close()
    assert is_freed(gpu.cudart)
    runner.close()


@pytest.mark.parametrize(
    "broken", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "execute"]
)
def test_what_cannot_be_recorded_is_enqueued_and_says_so(gpu, broken):
    gpu.trt.context.refuses = broken == "execute"
    gpu.cudart.failing = {broken}
    runner = gpu.open()
    assert check(runner, 2)[-1] == "cudaGetLastError", "no later launch may find this error"
    assert gpu.cudart.recording is None
    assert check(runner, 2, seed=1) == check(runner, 1, seed=2) == PLAIN
    why = "failed to execute" if broken == "execute" else f"CUDA: {broken} failed with cudaErrorUnknown"
    assert runner.switches["cuda_graph"].startswith("off: ")
    assert why in runner.switches["cuda_graph"]
    runner.close()
    assert is_freed(gpu.cudart)


def test_graphs_and_busy_waiting_can_be_switched_off(gpu):
    runner = gpu.open(cuda_graph=False, spin=False)
    assert check(runner, 2) == check(runner, 2, seed=1) == PLAIN
    assert runner.switches == {"wait": "block", "cuda_graph": "off"}
    gpu.cudart.failing = {"cudaSetDeviceFlags"}
    assert gpu.open().switches["wait"] == "chosen before"


def test_the_gpus_own_time_is_that_of_the_batch_that_was_asked_for(gpu, monkeypatch):
    monkeypatch.setattr(Cudart, "do_cudaEventElapsedTime", lambda *_: 1e-3 * gpu.trt.context.rows, raising=False)
    runner = gpu.open()
    for count in (3, 1):
        runner.run(pictures(count))
    assert [runner.compute_ns(pictures(count)) for count in (3, 1)] == [3000, 1000]


@pytest.mark.parametrize("gpu", ["tensorrt_rtx"], indirect=True)
def test_tensorrt_for_rtx_records_its_graphs_itself(gpu):
    runner = gpu.open()
    assert [config.cuda_graph_strategy for config in gpu.trt.configs] == ["whole"]
    assert check(runner, 2) == check(runner, 2, seed=1) == PLAIN
    assert runner.switches["cuda_graph"] == "its own"
    assert (gpu.open(cuda_graph=False).switches["cuda_graph"], len(gpu.trt.configs)) == ("off", 1)


@pytest.mark.parametrize("broken", ["cudaStreamCreateWithFlags", "cudaMallocHost", "cudaMalloc"])
def test_an_engine_that_cannot_be_opened_leaves_nothing_behind(gpu, broken):
    gpu.cudart.failing = {broken}
    with pytest.raises(BackendError, match=f"CUDA: {broken} failed with cudaErrorUnknown"):
        gpu.open()
    assert is_freed(gpu.cudart)


@pytest.mark.parametrize("broken", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch"])
def test_a_status_is_an_error(gpu, broken):
    runner = gpu.open()
    runner.run(pictures(2))
    gpu.cudart.failing = {broken}
    with pytest.raises(BackendError, match=f"CUDA: {broken} failed with cudaErrorUnknown"):
        runner.run(pictures(1 if broken == "cudaMemcpyAsync" else 2))


@pytest.mark.skipif(cudart is None, reason="cuda-python is not installed")
def test_cuda_python_has_all_that_the_runner_calls(gpu):
    runner = gpu.open()
    for _ in range(2):
        runner.run(pictures(2))
    runner.close()
    names = {*gpu.cudart.calls, "cudaGetLastError", *(name for name in vars(Cudart) if name.startswith("cuda"))}
    names -= {"execute"}
    assert len(names) > 15
    assert not [name for name in names if not hasattr(cudart, name)]
    assert cudart.cudaMemcpyKind.cudaMemcpyHostToDevice == 1
    assert cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal == 1


def test_tensorrt_for_rtx_has_all_that_the_runner_calls():
    trt = pytest.importorskip("tensorrt_rtx")
    for kind in (trt.IExecutionContext, trt.ICudaEngine, trt.IRuntimeConfig):
        used = {
            trt.IExecutionContext: ("set_input_shape", "set_tensor_address", "execute_async_v3"),
            trt.ICudaEngine: ("create_runtime_config", "create_execution_context"),
            trt.IRuntimeConfig: ("cuda_graph_strategy",),
        }[kind]
        assert not [name for name in used if not hasattr(kind, name)]
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")


@pytest.mark.skipif(tensorrt.find_gpu() is not None, reason="there is a GPU")
@pytest.mark.skipif(not probe_backend("tensorrt_rtx").usable, reason="tensorrt_rtx is not installed")
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
        (replace(CARD, platform="Windows AMD64"), "built on Windows AMD64, and this is "),
        (replace(CARD, backend="tensorrt", hardware_compatibility="NONE", gpu="a"), "built on a, and this GPU is"),
        (replace(CARD, **FOR_GENERATION, compute_capabilities=("SM80",)), "built for SM80, and this GPU"),
    ],
)
def test_a_card_that_does_not_match_the_machine_is_refused(monkeypatch, tmp_path, card, reason):
    """The machine is a stand-in: what is tested is the comparison, which no engine is needed for."""
    on_a_gpu(monkeypatch)
    with pytest.raises(BackendError, match=reason):
        require_match(card, tmp_path / card.file)


@pytest.mark.parametrize(
    "card",
    [
        CARD,
        replace(CARD, **FOR_GENERATION),
        replace(CARD, **FOR_GENERATION, compute_capabilities=("SM80+",)),
        replace(CARD, platform=this_platform()),
    ],
)
def test_a_card_that_matches_is_accepted(monkeypatch, card):
    on_a_gpu(monkeypatch)
    assert why_not_here(card) is None


def test_an_engine_from_ampere_on_is_not_for_turing(monkeypatch):
    on_a_gpu(monkeypatch, gpu=Gpu("RTX 2080", "SM75"))
    card = replace(CARD, **FOR_GENERATION, compute_capabilities=("SM80+",))
    assert why_not_here(card) == "it was built for SM80+, and this GPU (RTX 2080) is SM75"


@pytest.mark.parametrize(
    ("card", "command"),
    [
        (replace(CARD, backend_version="1.6"), "prgkit export --trt --fp16 --backend tensorrt_rtx --batch 1,1,32"),
        (
            replace(CARD, precision="int8", batch=(4, 4, 4), compute_capabilities=("SM80",)),
            "prgkit export --trt --int8 --backend tensorrt_rtx --batch 4,4,4 --sm 89",
        ),
        (
            replace(CARD, precision="fp32", backend="tensorrt", gpu="a"),
            "prgkit export --trt --backend tensorrt --batch 1,1,32",
        ),
    ],
)
def test_the_command_that_rebuilds_an_engine_has_its_options(monkeypatch, tmp_path, card, command):
    on_a_gpu(monkeypatch)
    with pytest.raises(BackendError) as caught:
        require_match(card, tmp_path / card.file)
    assert caught.value.fix == command
    from prgkit.cli.chain import builds_engines
    from prgkit.cli.main import cli

    with cli.commands["export"].make_context("export", command.split()[2:]) as parsed:
        assert builds_engines(parsed.params)
        assert (parsed.params["batch"], parsed.params["backend"]) == (card.batch, card.backend)


def test_a_generation_that_tensorrt_for_rtx_does_not_know_is_left_to_tensorrt(monkeypatch, tmp_path):
    on_a_gpu(monkeypatch, gpu=Gpu("H200", "SM90"))
    with pytest.raises(BackendError) as caught:
        require_match(CARD, tmp_path / CARD.file)
    assert caught.value.fix == "prgkit export --trt --fp16 --backend tensorrt --batch 1,1,32"


def test_what_a_rebuild_would_not_change_is_told_otherwise(monkeypatch, tmp_path):
    on_a_gpu(monkeypatch, missing="cuda.bindings.runtime")
    with pytest.raises(BackendError) as caught:
        require_match(CARD, tmp_path / CARD.file)
    assert caught.value.fix == "prgkit doctor says what is missing"


def test_without_cuda_python_the_error_names_it(monkeypatch):
    on_a_gpu(monkeypatch, missing="cuda.bindings.runtime")
    assert why_not_here(CARD).startswith("cuda-python is not installed: pip install cuda-python")


def on_a_gpu(monkeypatch, *, missing=None, gpu=Gpu("RTX 4090", "SM89")):  # noqa: B008 (it is frozen)
    class Module:
        __version__ = "1.7.1.116"
        ComputeCapability = SimpleNamespace(__members__=dict.fromkeys(("NONE", "SM75", "SM80", "SM89", "CURRENT")))

    def import_module(name):
        if name == missing:
            raise ImportError(name)
        return Module

    monkeypatch.setattr(tensorrt, "find_gpu", lambda: gpu)
    monkeypatch.setattr(tensorrt.importlib, "import_module", import_module)
