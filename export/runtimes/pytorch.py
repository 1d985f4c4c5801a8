"""PyTorch: the student as it was trained, eager or compiled, from the run that it came from."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from prgkit.config.image_size import Size, sides
from prgkit.export.bundle.bundle import describe_artifact
from prgkit.export.bundle.manifest import Artifact
from prgkit.export.runtimes.base import Runtime, Setup, Variant, Versions
from prgkit.storage.reproducible import read_array
from prgkit.storage.run import Run

STUDENT = "student"  # the format of a run's own weights
COMPILED_FROM_S = 30  # seconds an artifact: compiling takes minutes where cores are few, so a short bench leaves it out
NO_TORCH = "torch (distill, export)"


def open_student(setup: Setup) -> TorchRunner:
    """Build the student of a run, give it the best weights, and compile it where the variant says so."""
    import torch

    from prgkit.student.model import load_student

    torch.set_num_threads(setup.threads or torch.get_num_threads())
    student = load_student(Run(setup.folder))
    if setup.class_vectors is not None:
        student.use_class_vectors(torch.from_numpy(read_array(setup.class_vectors)), setup.logit_scale)
    module: Any = student.inference_model()
    if setup.variant == COMPILED:
        module = compiled(module, student.preprocessing.image_size)
    return TorchRunner(module, setup.variant.device)


def students(run_folder: Path) -> Sequence[Artifact]:
    """Return a run's best weights, where there are any and torch is installed."""
    file = Run(run_folder).weights
    if not (file.exists() and importlib.util.find_spec("torch")):
        return []
    facts = {"precision": "fp32", "backend": "torch", "executed": True, "note": None, "parity": None}
    return [describe_artifact(run_folder, file.name, name="torch", format=STUDENT, **facts)]


def why_not_here(setup: Setup, gpu: bool) -> str | None:
    """Return what the compiled variant lacks."""
    return why_no_compiling() if setup.variant == COMPILED else None


def examine(versions: Versions) -> Sequence[tuple[str, str | None]]:
    """Return whether torch runs, and on a GPU; asked in another process, since a broken torch can take it down."""
    if versions["torch"] is None:
        return [(NO_TORCH, "pip install 'prgkit[distill]'")]
    code = "import torch, torchvision; print(torch.cuda.is_available())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["it does not start"])[-1]
        return [(NO_TORCH, f"{reason}; reinstall torch and torchvision together")]
    cuda = answer.stdout.strip() == "True"
    return [
        ("torch CPU (distill, export)", None),
        ("torch compiled, CPU (bench)", why_no_compiling()),
        ("torch CUDA", None if cuda else "needs an NVIDIA GPU and a driver that this torch build supports"),
    ]


EAGER = Variant("eager", "torch", "cpu", takes_threads=False)
COMPILED = EAGER._replace(name="compiled", suffix="-compiled", always_listed=True, least_seconds=COMPILED_FROM_S)
PYTORCH = Runtime(
    name="torch",
    formats=(STUDENT,),
    variants=(EAGER, COMPILED),
    libraries=("torch", "prgkit.student.model"),
    open=open_student,
    examine=examine,
    why_not_here=why_not_here,
    from_run=students,
)


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
