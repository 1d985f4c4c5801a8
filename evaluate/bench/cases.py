"""What a bench measures: a row for everything that could run on this machine, and what a worker opens for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from prgkit.evaluate.bench.worker import Spec
from prgkit.evaluate.report.schema import Row
from prgkit.export.bundle.bundle import NCHW, QDQ, Bundle, describe_artifact
from prgkit.export.bundle.engine_metadata import load_engine_metadata
from prgkit.export.bundle.manifest import VECTORS, Artifact
from prgkit.export.runtimes.base import PROVIDERS, available_providers, why_no_compiling
from prgkit.export.runtimes.tensorrt import why_not_here
from prgkit.storage.run import Run

COMPILED_FROM_S = 30  # seconds an artifact: compiling takes minutes where cores are few, so a short bench leaves it out


def plan(
    bundle: Bundle, run_folder: Path | None, *, gpu: bool, threads: int, seconds: float = 0.0
) -> tuple[list[Row], list[Spec | None]]:
    """Return a row for everything that could run, with what a worker opens, or None and the reason in the row.

    Args:
        bundle: whose artifacts run.
        run_folder: the run it came from, where that is at hand, for PyTorch's rows.
        gpu: whether the machine has an NVIDIA GPU.
        threads: threads of one call on the CPU.
        seconds: the time for each artifact; from `COMPILED_FROM_S` on, PyTorch has a compiled row as well.
    """
    rows: list[Row] = []
    specs: list[Spec | None] = []

    def add(row: Row, spec: Spec | None, reason: str | None = None) -> None:
        rows.append(row.model_copy(update={"reason": reason}))
        specs.append(None if spec is None or reason else named(spec, row))

    here = runtimes(gpu=gpu)
    for artifact in bundle.artifacts:
        path = str(bundle.folder / artifact.file)
        if artifact.format == "engine":
            row = blank(artifact.name, artifact, device="cuda", threads=None)
            add(
                row,
                {"kind": "engine", "path": path},
                why_not_here(load_engine_metadata(bundle.folder / artifact.file)),
            )
            continue
        for runtime in here:
            if suits(runtime["backend"], artifact, bundle):
                device = runtime["device"]
                entry = artifact.model_copy(update={"backend": runtime["backend"]})
                row = blank(artifact.name, entry, device=device, threads=threads if device == "cpu" else None)
                add(row, {**runtime, "path": path, "half": artifact.precision == "fp16"})
    if run_folder is not None and Run(run_folder).weights.exists() and importlib.util.find_spec("torch"):
        weights = Run(run_folder).weights
        kept = describe_artifact(
            run_folder,
            weights.name,
            name="torch",
            format="torch",
            precision="fp32",
            backend="torch",
            executed=True,
            note=None,
            parity=None,
        )
        opened: Spec = {"kind": "torch", "path": str(run_folder)}
        if scoring := bundle.manifest.open_vocabulary:
            opened |= {"class_vectors": str(bundle.folder / VECTORS), "logit_scale": scoring.logit_scale}
        add(blank("torch", kept, device="cpu", threads=threads), opened)
        if seconds >= COMPILED_FROM_S:
            row = blank("torch-compiled", kept, device="cpu", threads=threads)
            add(row, {**opened, "compiled": True}, why_no_compiling())
    return rows, specs


def runtimes(*, gpu: bool) -> list[Spec]:
    """Return what can run ONNX files here: each with its kind, backend and device, and ONNX Runtime's provider."""
    built_in = available_providers()
    here: list[Spec] = [
        {"kind": "onnx", "provider": name, "backend": provider.backend, "device": provider.device}
        for name, provider in PROVIDERS.items()
        if name in built_in and (provider.device == "cpu" or gpu)
    ]
    if importlib.util.find_spec("openvino"):
        here.append({"kind": "openvino", "backend": "openvino", "device": "cpu"})
    return here


def suits(backend: str, artifact: Artifact, bundle: Bundle) -> bool:
    """Return whether a backend runs an ONNX file in the precision that the file has, and from its fastest layout.

    ONNX Runtime's TensorRT provider is left the floats: INT8 is what the bundle's engines are for. OpenVINO would
    compute FP16 in FP32 on the CPU, and of the layouts of INT8 is faster with TensorRT's, where the bundle has it.
    """
    kind = artifact.format, artifact.precision
    if backend == "onnxruntime":
        return kind[0] not in (NCHW, QDQ)
    if backend == "onnxruntime-tensorrt":
        return kind in (("onnx", "fp32"), ("onnx", "fp16"))
    layout = QDQ if any(one.format == QDQ for one in bundle.artifacts) else "onnx"
    return kind in (("onnx", "fp32"), (layout, "int8"))


def blank(name: str, artifact: Artifact, *, device: str, threads: int | None) -> Row:
    """Return a row without a figure yet."""
    return Row(
        artifact=name,
        backend=artifact.backend,
        device=device,
        file=artifact.file,
        precision=artifact.precision,
        threads=threads,
        size_mib=round(artifact.bytes / (1 << 20), 3),
    )


def named(spec: Spec, row: Row) -> Spec:
    """Return a specification that also says whose it is."""
    return {**spec, **{key: getattr(row, key) for key in ("artifact", "backend", "device", "threads")}}
