"""What this machine has and can run, what each missing backend needs, and which installed packages clash."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

from prgkit.evaluate import system
from prgkit.export.runtimes.base import PROVIDERS, available_providers, why_no_compiling
from prgkit.export.runtimes.gpu import available_backends, find_gpu
from prgkit.export.runtimes.tensorrt import why_no_engine_runs

PACKAGES = (
    *(
        "prgkit",
        "numpy",
        "pillow",
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-openvino",
        "openvino",
        "torch",
        "torchvision",
        "timm",
        "open_clip_torch",
    ),
    *("accelerate", "safetensors", "onnx", "onnxscript", "tensorrt", "tensorrt_rtx", "cuda-python", "cuda-bindings"),
)


def examine() -> dict[str, Any]:
    """Return versions, machine facts, backends (each with whether it runs here and why not) and clashes."""
    versions = {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
    machine = system.describe()
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "none found"
    return {
        "versions": versions,
        "machine": {
            "cpu": f"{machine.cpu}, {machine.usable_cores} cores",
            "memory": f"{machine.memory_gib} GiB",
            "gpu": gpus,
            "system": f"{machine.os}, {machine.architecture}",
        },
        "backends": [
            *onnxruntime_backends(),
            openvino_backend(versions),
            *torch_backends(versions),
            *tensorrt_backends(),
        ],
        "clashes": clashes(versions),
    }


def version_of(package: str) -> str | None:
    """Return an installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def onnxruntime_backends() -> list[dict[str, Any]]:
    """Return ONNX Runtime's execution providers: each runs where it is built in, the GPU's where there is one."""
    try:
        built_in = available_providers()
    except Exception as error:  # a missing library or a half-removed package: each raises its own kind
        return [backend("onnxruntime", f"{error}; pip install --force-reinstall onnxruntime")]
    no_gpu = None if find_gpu() else "needs an NVIDIA GPU and its driver"
    rows = []
    for name, provider in PROVIDERS.items():
        needs = (no_gpu if provider.device == "cuda" else None) or (None if name in built_in else provider.install)
        short = name.removesuffix("ExecutionProvider").replace("Tensorrt", "TensorRT")
        rows.append(backend(f"onnxruntime {short}", needs))
    return rows


def openvino_backend(versions: dict[str, str | None]) -> dict[str, Any]:
    """Return whether OpenVINO itself runs here."""
    if versions["openvino"] is None:
        return backend("openvino CPU", "pip install 'prgkit[openvino]'")
    try:
        devices = importlib.import_module("openvino").Core().available_devices
    except Exception as error:  # a missing library or a half-removed package: each raises its own kind
        return backend("openvino CPU", f"{error}; pip install --force-reinstall openvino")
    return backend("openvino CPU", None if "CPU" in devices else "it has no code for this processor")


def torch_backends(versions: dict[str, str | None]) -> list[dict[str, Any]]:
    """Return whether torch runs, and on a GPU; asked in a process of its own, since a broken torch can take it down."""
    if versions["torch"] is None:
        return [backend("torch (distill, export)", "pip install 'prgkit[distill]'")]
    code = "import torch, torchvision; print(torch.cuda.is_available())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["it does not start"])[-1]
        return [backend("torch (distill, export)", f"{reason}; reinstall torch and torchvision together")]
    cuda = asked.stdout.strip() == "True"
    return [
        backend("torch CPU (distill, export)", None),
        backend("torch compiled, CPU (bench)", why_no_compiling()),
        backend("torch CUDA", None if cuda else "needs an NVIDIA GPU and a driver that this torch build supports"),
    ]


def tensorrt_backends() -> list[dict[str, Any]]:
    """Return whether TensorRT and TensorRT for RTX can build engines here, and whether they can run them."""
    rows = []
    for name, state in available_backends().items():
        rows.append(backend(f"{name}: build engines", state.problem))
        rows.append(
            backend(f"{name}: run engines", state.problem if state.version is None else why_no_engine_runs(name))
        )
    return rows


def backend(name: str, problem: str | None) -> dict[str, Any]:
    """Return one backend's row: whether it runs here, and if not, why and what to do."""
    return {"name": name, "runs": problem is None, "detail": problem or ""}


def clashes(versions: dict[str, str | None]) -> list[str]:
    """Return the known ways in which installed packages stand in each other's way."""
    found = []
    builds = {"onnxruntime-gpu": "the GPU", "onnxruntime-openvino": "OpenVINO"}
    for name in (name for name in builds if versions["onnxruntime"] and versions[name]):
        found.append(
            f"onnxruntime is installed over {name}: one overwrites the other's files, and {builds[name]} is lost in "
            f"silence. pip uninstall -y onnxruntime {name} && pip install {name}"
        )
    if versions["torch"] and versions["torchvision"] is None:
        found.append("torch is installed without torchvision, which timm and open_clip import. pip install torchvision")
    return found
