"""What this machine has and can run, what each missing backend needs, and which installed packages clash."""

from __future__ import annotations

import platform
from typing import TypedDict

from prgkit.cli.versions import version_of
from prgkit.evaluate import system
from prgkit.export.runtimes import RUNTIMES

PACKAGES = (
    *("prgkit", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "openvino", "ncnn"),
    *("ai-edge-litert", "litert-torch", "ai-edge-quantizer", "executorch"),
    *("torch", "torchvision", "timm", "open_clip_torch"),
    *("accelerate", "safetensors", "onnx", "onnxscript", "tensorrt", "tensorrt_rtx", "cuda-python", "cuda-bindings"),
    *("pnnx", "coremltools", "onnxruntime-qnn"),
)


class Backend(TypedDict):
    """Something that could run a model, and whether it runs here."""

    name: str
    runs: bool
    detail: str  # what is missing, and how to get it


class Diagnosis(TypedDict):
    """What this machine has, what runs on it, and which packages stand in each other's way."""

    versions: dict[str, str | None]
    machine: dict[str, str]
    backends: list[Backend]
    clashes: list[str]


def examine() -> Diagnosis:
    """Return versions, machine facts, backends (each with whether it runs here and why not) and clashes."""
    versions = {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
    machine = system.describe()
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "none found"
    return {
        "versions": versions,
        "machine": {
            "cpu": f"{machine.cpu}, {machine.usable_cores} cores",
            "memory": "unknown" if machine.memory_gib is None else f"{machine.memory_gib} GiB",
            "gpu": gpus,
            "system": f"{machine.os}, {machine.architecture}",
        },
        "backends": [backend(*line) for runtime in RUNTIMES for line in runtime.examine(versions)],
        "clashes": clashes(versions),
    }


def backend(name: str, problem: str | None) -> Backend:
    """Return one backend's row: whether it runs here, and if not, why and what to do."""
    return {"name": name, "runs": problem is None, "detail": problem or ""}


def clashes(versions: dict[str, str | None]) -> list[str]:
    """Return the known ways in which installed packages stand in each other's way."""
    pairs = []
    builds = {"onnxruntime-gpu": "the GPU", "onnxruntime-openvino": "OpenVINO"}
    for name in (name for name in builds if versions["onnxruntime"] and versions[name]):
        pairs.append(
            f"onnxruntime is installed over {name}: one overwrites the other's files, and {builds[name]} is lost in "
            f"silence. pip uninstall -y onnxruntime {name} && pip install {name}"
        )
    if versions["torch"] and versions["torchvision"] is None:
        pairs.append("torch is installed without torchvision, which timm and open_clip import. pip install torchvision")
    return pairs
