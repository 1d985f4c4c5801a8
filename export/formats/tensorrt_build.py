"""ONNX to a TensorRT engine, with the facts of the build in a file beside it."""

from __future__ import annotations

import importlib
import re
import time
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prgkit.errors import BackendError, DiskFullError, ExportError
from prgkit.export.bundle.engine_metadata import EngineMetadata, write_engine_metadata
from prgkit.export.bundle.manifest import MATRIX, TensorSpec
from prgkit.export.formats.tensorrt_precision import (
    inspect,
    layer_dtypes,
    leave_small_in_fp16,
    refuse_tf32,
    require_precision,
)
from prgkit.export.runtimes.gpu import (
    AMPERE_PLUS,
    Backend,
    Gpu,
    choose_backend,
    choose_targets,
    find_gpu,
    quiet_logger,
    this_platform,
)
from prgkit.storage.atomic import cache_folder, sha256, write_bytes

P = ParamSpec("P")
R = TypeVar("R")


def leaving_nothing(work: Callable[P, R]) -> Callable[P, R]:
    """Let what ``work`` holds die with it, also where it fails.

    A traceback keeps the objects of its frames until the garbage collector finds it. That can be while TensorRT tells
    its logger something during a later build: destroying a builder there waits for a lock of TensorRT's, for ever.
    """

    @wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except BaseException as error:
            cause: BaseException | None = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__ or cause.__context__
            raise

    return wrapped


@leaving_nothing
def build_engine(
    onnx_path: Path,
    folder: Path,
    *,
    precision: str,
    batch: tuple[int, int, int],
    backend: str | None = None,
    sm: Sequence[str] | None = None,
) -> EngineMetadata:
    """Build an engine in ``folder``, and its metadata (the same name with .json).

    The types come from the ONNX file alone and must be of ``precision``. ``batch`` is [min, opt, max]; three equal
    numbers make a static engine.

    Raises:
        BackendError: no usable TensorRT, or it cannot build for those compute capabilities.
        ExportError: the file is damaged or holds another precision, or the build failed; with TensorRT's own words.
        NotWorthItError: of an INT8 file tensorrt_rtx would make a larger engine than of FP16's.
    """
    chosen, gpu = choose_backend(backend), find_gpu()
    trt = importlib.import_module(chosen.name)
    check_batch(batch)
    logger = quiet_logger(trt)
    started = time.perf_counter()
    builder = trt.Builder(logger)
    network, parser = parse(trt, builder, logger, onnx_path)
    types = layer_dtypes(network)
    require_precision(types, precision, onnx_path)
    config, facts = configure(trt, builder, network, chosen.name, batch, sm)
    facts |= {"gpu": gpu.name, "driver": gpu.driver} if gpu else {"gpu": None}
    alive = None
    if precision == "int8" and chosen.name == "tensorrt_rtx":
        facts["int8_convolutions"], alive = leave_small_in_fp16(trt, network)
    plan, facts["timing_cache"] = build_plan(builder, network, config, chosen, gpu)
    del alive
    if plan is None:
        raise ExportError(f"{chosen.name} could not build an engine: {logger.reason()}", where=onnx_path)
    build_s = time.perf_counter() - started
    del parser
    facts |= {"inspected_dtypes": inspect(trt, logger, plan, precision, onnx_path) if gpu else None}
    facts |= {"backend": chosen.name, "backend_version": str(chosen.version), "precision": precision, "batch": batch}
    facts |= {"layer_dtypes": types, "build_s": round(build_s, 3)}
    path = folder / engine_file(onnx_path, precision, chosen.name)
    write_bytes(path, plan)
    metadata = describe_engine(path, onnx_path, network, facts)
    write_engine_metadata(path, metadata)
    return metadata


def describe_engine(path: Path, onnx_path: Path, network: Any, facts: dict[str, Any]) -> EngineMetadata:
    """Return the metadata of an engine that was just built from an ONNX file; ``facts`` are what else is known."""
    return EngineMetadata(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=sha256(path),
        onnx=onnx_path.name,
        onnx_sha256=sha256(onnx_path),
        input=tensor_spec(network.get_input(0)),
        output=tensor_spec(network.get_output(0)),
        executed=False,
        note="built and never executed here",
        platform=this_platform(),
        **facts,
    )


def engine_file(onnx_path: Path, precision: str, backend: str) -> str:
    """Return the name of the engine that is built from an ONNX file, as ``model.int8.tensorrt.engine``."""
    stem, kind = (*onnx_path.name.split("."), "")[:2]
    return f"{stem}.{kind if kind.startswith(precision) else precision}.{backend}.engine"


def configure(
    trt: Any, builder: Any, network: Any, backend: str, batch: tuple[int, int, int], sm: Sequence[str] | None
) -> tuple[Any, dict[str, Any]]:
    """Return how an engine is to be built, and what its metadata says of that."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    tf32, targets = refuse_tf32(trt, config), choose_targets(backend, sm)
    compatibility = set_targets(trt, config, backend, targets, asked=bool(sm))
    set_batch(builder, config, network, batch)
    return config, {"tf32": tf32, "compute_capabilities": targets, "hardware_compatibility": compatibility}


def build_plan(
    builder: Any, network: Any, config: Any, backend: Backend, gpu: Gpu | None
) -> tuple[bytes | None, str | None]:
    """Return a serialised engine, None where it could not be built; and whether its timing cache was used, or new."""
    if backend.name != "tensorrt" or gpu is None:  # TensorRT for RTX times nothing
        serialized = builder.build_serialized_network(network, config)
        return None if serialized is None else bytes(serialized), None
    path = cache_path(str(backend.version), gpu.name)
    known = attach_cache(config, path)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return None, None
    keep_cache(config, path)
    return bytes(serialized), "used" if known else "new"


def check_batch(batch: tuple[int, int, int]) -> None:
    """Refuse a batch profile that no engine can have."""
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise ExportError(f"a batch profile is [min, opt, max] with 1 <= min <= opt <= max, not {list(batch)}")


def parse(trt: Any, builder: Any, logger: Any, onnx_path: Path) -> tuple[Any, Any]:
    """Parse a file into a strongly typed network; the parser is returned because it owns the weights."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where nothing else is left
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    fix = "export it again: prgkit export"
    if not onnx_path.exists():
        raise ExportError(f"there is no {onnx_path.name} to build an engine from", where=onnx_path.parent, fix=fix)
    data = onnx_path.read_bytes()
    if not data:  # the parser takes it for a model without layers
        raise ExportError(f"{onnx_path.name} is empty", where=onnx_path, fix=fix)
    if not parser.parse(data):
        messages = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        reason = "; ".join(dict.fromkeys(messages)) or logger.reason()
        raise ExportError(f"TensorRT's parser refused {onnx_path.name}: {reason}", where=onnx_path, fix=fix)
    if MATRIX in [network.get_input(number).name for number in range(network.num_inputs)]:
        raise ExportError(
            f"{onnx_path.name} takes its class vectors as an input, and an engine holds them",
            where=onnx_path,
            fix="export it where the student was trained: prgkit export --open-vocabulary --trt",
        )
    if (network.num_inputs, network.num_outputs) != (1, 1):
        raise ExportError(
            f"{onnx_path.name} is not an export of ours: one input and one output expected", where=onnx_path, fix=fix
        )
    return network, parser


def set_targets(trt: Any, config: Any, backend: str, targets: Sequence[str], *, asked: bool) -> str | None:
    """Tell a builder the GPU generations that an engine is for; returns tensorrt's level of hardware compatibility.

    Without one, an engine of tensorrt is for the GPU model that it was built on.

    Raises:
        BackendError: this TensorRT has no such level.
    """
    if backend == "tensorrt":
        level = "NONE" if not asked else "AMPERE_PLUS" if targets[0] == AMPERE_PLUS else "SAME_COMPUTE_CAPABILITY"
        levels = trt.HardwareCompatibilityLevel.__members__
        if level not in levels:
            raise BackendError(f"tensorrt {trt.__version__} cannot build for {targets[0]}", fix="build without --sm")
        config.hardware_compatibility_level = levels[level]
        return level
    config.num_compute_capabilities = len(targets)
    for position, name in enumerate(targets):
        config.set_compute_capability(trt.ComputeCapability.__members__[name], position)
    return None


def set_batch(builder: Any, config: Any, network: Any, batch: tuple[int, int, int]) -> None:
    """Fix the batch dimension, or give the range it may take: static engines can be faster."""
    pixels = network.get_input(0)
    rest = tuple(pixels.shape)[1:]
    if batch[0] == batch[2]:
        pixels.shape = (batch[0], *rest)
        return
    profile = builder.create_optimization_profile()
    profile.set_shape(pixels.name, *((size, *rest) for size in batch))
    config.add_optimization_profile(profile)


def tensor_spec(tensor: Any) -> TensorSpec:
    """Return a network tensor's name, type and shape; -1 is the batch."""
    return TensorSpec(name=tensor.name, dtype=tensor.dtype.name, shape=tuple(tensor.shape))


def cache_path(version: str, gpu: str) -> Path:
    """Return the file for a TensorRT version and a GPU, in the user's own cache: a cache in a bundle is a stranger's.

    TensorRT itself keys a cache by its version and the properties of the device, and refuses another's.
    """
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"tensorrt-{version}-{gpu}")
    return cache_folder(f"{name}.timing")


def attach_cache(config: Any, path: Path) -> bool:
    """Give a builder the cache in ``path``, or a new one where there is none that TensorRT accepts; returns which."""
    try:
        known = path.read_bytes()
    except OSError:
        known = b""
    if known and attached(config, known):
        return True
    attached(config, b"")
    return False


def keep_cache(config: Any, path: Path) -> None:
    """Write what a build has measured, whole or not at all; where it cannot be written, only time is lost."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        write_bytes(path, bytes(cache.serialize()))
    except (OSError, DiskFullError):
        return


def attached(config: Any, content: bytes) -> bool:
    """Tell whether TensorRT takes a serialised cache as one of this version and this GPU."""
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False))
