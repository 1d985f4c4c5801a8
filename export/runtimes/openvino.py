"""OpenVINO, without ONNX Runtime, on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BackendError
from prgkit.export.bundle.manifest import EXPORT_AGAIN, ONNX, OPENVINO_QDQ, QDQ, Artifact
from prgkit.export.runtimes.base import Runtime, Setup, Variant, Versions, install_missing, read_class_vectors

INSTALL = "pip install 'prgkit[openvino]'"
SHAPES = 4  # OpenVINO's compiled networks that are kept, each with the weights: one for each batch size


def open_onnx(setup: Setup) -> OpenVinoRunner:
    """Open an ONNX file."""
    return OpenVinoRunner(setup.path, setup.threads, name=setup.artifact.name)


def runs_in_openvino(variant: Variant, artifact: Artifact, beside: Sequence[Artifact]) -> bool:
    """Tell whether OpenVINO computes in a file's precision: FP16 would be FP32 on the CPU.

    Of the layouts of INT8 it is fastest with its own, else with TensorRT's, where the bundle has that ``beside``.
    """
    formats = {other.format for other in beside}
    layout = next(one for one in (OPENVINO_QDQ, QDQ, ONNX) if one in formats or one == ONNX)
    return (artifact.format, artifact.precision) in ((ONNX, "fp32"), (layout, "int8"))


def examine(versions: Versions) -> Sequence[tuple[str, str | None]]:
    """Return whether it runs here."""
    if versions["openvino"] is None:
        return [("openvino CPU", INSTALL)]
    try:
        devices = importlib.import_module("openvino").Core().available_devices
    except Exception as error:  # a missing library or a half-removed package: each raises its own kind
        return [("openvino CPU", f"{error}; pip install --force-reinstall openvino")]
    return [("openvino CPU", None if "CPU" in devices else "it has no code for this processor")]


OPENVINO = Runtime(
    name="openvino",
    formats=(ONNX, OPENVINO_QDQ, QDQ),
    variants=(Variant("CPU", "openvino", "cpu", side_by_side=True),),
    libraries=("openvino",),
    open=open_onnx,
    examine=examine,
    runs=runs_in_openvino,
    why_not_here=partial(install_missing, modules=("openvino",), install=INSTALL),
)


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
            path: the ONNX file, in FP32, or in INT8 of any layout.
            threads: threads of one run; None leaves the choice to OpenVINO.
            name: what reports call it; the file's name by default.

        Raises:
            BackendError: OpenVINO is not installed, the file is damaged, or it would not run as asked.
        """
        try:
            openvino = importlib.import_module("openvino")
        except ImportError as error:
            raise BackendError("OpenVINO is not installed", fix=INSTALL) from error
        if not path.exists():
            raise BackendError(f"there is no {path.name}", where=path.parent, fix=EXPORT_AGAIN)
        self.name, self._threads = name or path.name, threads
        self._requests: dict[int, Any] = {}  # batch size -> an inference request
        self._core = openvino.Core()
        try:
            self._model = self._core.read_model(str(path))
            self._others = {place: read_class_vectors(path) for place in range(1, len(self._model.inputs))}
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
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if self._threads is None:
            return settings
        # By itself it takes one thread of a core, and so fewer than asked for.
        settings |= {"INFERENCE_NUM_THREADS": self._threads, "ENABLE_HYPER_THREADING": True}
        # One thread is not tied to a core: a second file's would be tied to the same.
        return settings | ({"ENABLE_CPU_PINNING": False} if self._threads == 1 else {})

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
