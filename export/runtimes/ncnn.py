"""ncnn on the CPU: a folder with model.ncnn.param and model.ncnn.bin, one image at a time."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import BackendError
from prgkit.export.bundle.manifest import NCNN
from prgkit.export.runtimes.base import Runtime, Setup, Variant, Versions, install_missing
from prgkit.native_output import without_stderr

PARAM, BIN = "model.ncnn.param", "model.ncnn.bin"  # its files: the graph as text, and the weights
INPUT, OUTPUT = "in0", "out0"  # pnnx calls them so
INSTALL = "pip install 'prgkit[ncnn]'"
MAKE_AGAIN = "copy the bundle again, or make it again where the student was trained: prgkit export --ncnn"
ARITHMETIC = "use_fp16_arithmetic"  # sums in FP16: on an Arm processor logits were off by 7 % of the largest
HALF = ("use_fp16_packed", "use_fp16_storage", ARITHMETIC, "use_bf16_packed", "use_bf16_storage")


def open_ncnn(setup: Setup) -> NcnnRunner:
    """Open a folder of ncnn's in the precision of the artifact."""
    half = setup.artifact.precision == "fp16"
    return NcnnRunner(setup.path, setup.threads, half=half, name=setup.artifact.name)


def examine(versions: Versions) -> Sequence[tuple[str, str | None]]:
    """Return whether it runs here."""
    if versions["ncnn"] is None:
        return [("ncnn CPU", INSTALL)]
    try:
        importlib.import_module("ncnn").Net()
    except Exception as error:  # a missing library or a half-removed package: each raises its own kind
        return [("ncnn CPU", f"{error}; pip install --force-reinstall ncnn")]
    return [("ncnn CPU", None)]


NCNN_RUNTIME = Runtime(
    name="ncnn",
    formats=(NCNN,),
    variants=(Variant("CPU", "ncnn", "cpu", side_by_side=True),),
    libraries=("ncnn",),
    open=open_ncnn,
    examine=examine,
    why_not_here=partial(install_missing, modules=("ncnn",), install=INSTALL),
)


class NcnnRunner:
    """Runs ncnn's files: mean and standard deviation are inside, and a batch is run image by image."""

    backend, device = "ncnn", "cpu"
    max_batch: int | None = None

    def __init__(self, path: Path, threads: int | None = None, *, half: bool = False, name: str | None = None) -> None:
        """Open the files in the folder ``path``.

        Args:
            path: the folder.
            threads: threads inside one layer; None leaves the choice to ncnn.
            half: keep values in FP16 where the processor can, and sum in FP32; by default ncnn does all in FP16.
            name: what reports call it; the folder's name by default.

        Raises:
            BackendError: ncnn is not installed, or a file is missing or damaged.
        """
        try:
            self._ncnn = importlib.import_module("ncnn")
        except ImportError as error:
            raise BackendError("ncnn is not installed", fix=INSTALL) from error
        for file in (PARAM, BIN):
            if not (path / file).exists():
                raise BackendError(f"{path.name} has no {file}", where=path, fix=MAKE_AGAIN)
        self.name = name or path.name
        self._net = self._ncnn.Net()
        for option in (ARITHMETIC,) if half else HALF:
            setattr(self._net.opt, option, False)
        if threads is not None:
            self._net.opt.num_threads = threads
        for file, load in ((PARAM, self._net.load_param), (BIN, self._net.load_model)):
            with without_stderr():  # it says there which layer it could not read
                failed = load(str(path / file)) != 0
            if failed:
                raise BackendError(f"ncnn cannot open {file}: it is damaged or truncated", where=path, fix=MAKE_AGAIN)

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        return np.stack([self._run_one(image) for image in np.ascontiguousarray(pixels)])

    def close(self) -> None:
        """Release the network."""
        self._net = None

    def _run_one(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        height, width, _ = image.shape
        given: Any = self._ncnn.Mat.from_pixels(image, self._ncnn.Mat.PixelType.PIXEL_RGB, width, height)
        extractor = self._net.create_extractor()
        refused = extractor.input(INPUT, given)
        failed, logits = extractor.extract(OUTPUT)
        if refused or failed:
            raise BackendError(f"ncnn cannot run {self.name}: it has no {INPUT} or {OUTPUT}", fix=MAKE_AGAIN)
        return np.array(logits, dtype=np.float32)  # a copy: the memory is the extractor's
