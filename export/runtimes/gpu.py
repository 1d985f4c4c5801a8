"""The GPU of this machine, and the TensorRTs that can build for it or for others."""

from __future__ import annotations

import ctypes
import importlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prgkit.errors import BackendError, nearest

BACKENDS = ("tensorrt", "tensorrt_rtx")  # in the order of preference

AMPERE_PLUS = "SM80+"  # compute capability 8.0 and all above

INSTALL = {
    "tensorrt": "pip install 'prgkit[trt]' (its libraries come from NVIDIA's own index, pypi.nvidia.com, which must be "
    "reachable; on a Jetson use JetPack's: python3 -m venv --system-site-packages)",
    "tensorrt_rtx": "pip install 'prgkit[rtx]'",
}


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU of this machine."""

    name: str
    capability: str  # "SM89"
    driver: str | None = None  # the newest CUDA that its driver runs, as "13.0"


@dataclass(frozen=True)
class Backend:
    """One TensorRT, as it is or is not on this machine."""

    name: str
    version: str | None  # None where it is not installed
    problem: str | None  # why it cannot build here, and what it needs

    @property
    def usable(self) -> bool:
        """Whether it can build an engine here."""
        return self.problem is None


def choose_backend(name: str | None = None) -> Backend:
    """Return the backend asked for, or the best that is usable: tensorrt where a GPU is, else tensorrt_rtx.

    Raises:
        BackendError: there is none; says what each one needs.
    """
    if name is not None and name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}{nearest(name, BACKENDS)}", fix=f"one of: {', '.join(BACKENDS)}")
    candidates = [probe_backend(known) for known in ((name,) if name else BACKENDS)]
    for candidate in candidates:
        if candidate.usable:
            return candidate
    problems = "\n".join(f"  {candidate.name}: {candidate.problem}" for candidate in candidates)
    fixes = "; or ".join(INSTALL[candidate.name] for candidate in reversed(candidates))
    raise BackendError(f"no TensorRT can build an engine here\n{problems}", fix=fixes)


def choose_targets(backend: str, requested: Sequence[str] | None) -> tuple[str, ...]:
    """Return the GPU generations an engine is for, as "SM89", or "SM80+" for that one and all that follow.

    They are those asked for, or all that tensorrt_rtx builds for. tensorrt builds for the GPU at hand, for its
    generation where that is asked for by name, or for "SM80+".

    Raises:
        BackendError: the backend does not build for one of them.
    """
    if backend == "tensorrt":
        gpu = find_gpu()
        own = (gpu.capability,) if gpu else ()
        if requested and tuple(requested) not in (own, (AMPERE_PLUS,)):
            raise BackendError(
                f"tensorrt builds for the GPU at hand ({', '.join(own)}), not for {', '.join(requested)}",
                fix="build on the device itself without --sm, for every GPU from 80 on with --sm 80+, "
                "or for other GPUs with --backend tensorrt_rtx",
            )
        return tuple(requested or own)
    if requested and tuple(requested) == (AMPERE_PLUS,):
        requested = None
    known = generations(backend)
    if unknown := [name for name in requested or () if name not in known]:
        raise BackendError(f"{backend} cannot build for {', '.join(unknown)}", fix=f"it knows {', '.join(known)}")
    # Turing (SM75) must be asked for: TensorRT-RTX 1.7 has no FP32 matrix product for it, and would refuse them all.
    return tuple(requested or (name for name in known if name != "SM75"))


def generations(backend: str) -> list[str]:
    """Return the GPU generations that TensorRT for RTX builds for, as "SM89"."""
    names = importlib.import_module(backend).ComputeCapability.__members__
    return sorted((name for name in names if name not in ("NONE", "CURRENT")), key=lambda name: int(name[2:]))


def this_platform() -> str:
    """Return the operating system and processor that an engine is bound to, as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def find_gpu() -> Gpu | None:
    """Ask the driver itself for its first GPU: no CUDA package is needed for that."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name, version = ctypes.create_string_buffer(256), []
    driver.cuDeviceGetName(name, len(name), device)
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        version.append(str(value.value))
    newest = ctypes.c_int()  # CUDA 13.1 is 13010
    known = driver.cuDriverGetVersion(ctypes.byref(newest)) == 0
    cuda = f"{newest.value // 1000}.{newest.value % 1000 // 10}" if known else None
    return Gpu(name.value.decode(errors="replace"), "SM" + "".join(version), cuda)


def probe_backend(name: str) -> Backend:
    """Import one TensorRT and say whether it can build here."""
    try:
        version = str(importlib.import_module(name).__version__)
    except Exception as error:  # a placeholder wheel, a missing library, a driver too old: each raises its own kind
        why = (
            "not installed"
            if isinstance(error, ModuleNotFoundError) and error.name == name
            else f"cannot be imported ({error})"
        )
        return Backend(name, None, f"{why}; {INSTALL[name]}")
    if name == "tensorrt" and find_gpu() is None:
        return Backend(name, version, "installed, but it builds only where an NVIDIA GPU and its driver are")
    return Backend(name, version, None)


def quiet_logger(trt: Any) -> Any:
    """Return a TensorRT logger that keeps what it is told and prints nothing."""

    class QuietLogger(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Receive one line from TensorRT."""
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message.strip())

        def reason(self) -> str:
            """Return the errors so far, each once."""
            return "; ".join(dict.fromkeys(self.errors)) or "TensorRT gave no reason"

    return QuietLogger()
