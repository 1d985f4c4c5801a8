"""Give a bundle its TensorRT engines, where it was exported or on the device it was copied to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ExportError, ParityError
from prgkit.export.bundle import describe_artifact, open_bundle, read_evaluation, write_manifest
from prgkit.export.card import card_path, write_card
from prgkit.export.parity import require_agreement, run_batches
from prgkit.export.runners import TensorRTRunner, open_runner, why_not_here
from prgkit.export.tensorrt import build_engine, choose_backend
from prgkit.recipe import validate

PARITY_IMAGES = 256


def build_engines(
    folder: Path,
    *,
    fp16: bool,
    batch: tuple[int, int, int] | None = None,
    backend: str | None = None,
    sm: Sequence[str] | None = None,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Build the engines of a bundle that exists, needing neither torch nor onnx, and return its new manifest.

    ``batch`` is [min, opt, max], by default that of the bundle's recipe; ``sm`` are GPU generations, as "SM86".

    Raises:
        BackendError: no TensorRT is usable here.
        ExportError: the bundle is damaged or holds no ONNX file of that precision, or the build failed.
        ParityError: an engine that can run here disagrees with its ONNX file; it is removed.
    """
    chosen = choose_backend(backend)
    bundle = open_bundle(folder, verify=("onnx",))
    batch = batch or validate(bundle.manifest["recipe"], where=folder).export.batch
    wanted = ("fp32", "fp16") if fp16 else ("fp32",)
    sources = {entry["precision"]: entry for entry in bundle.artifacts if entry["format"] == "onnx"}
    if missing := [precision for precision in wanted if precision not in sources]:
        raise ExportError(
            f"the bundle has no {missing[0]} ONNX file to build from",
            where=folder,
            fix="export it where the student was trained: prgkit export --fp16",
        )
    pixels = read_evaluation(folder, limit=PARITY_IMAGES).pixels
    reference = open_runner(folder, sources["fp32"])
    reference_logits = run_batches(reference, pixels)
    reference.close()
    manifest = dict(bundle.manifest)
    for precision in wanted:
        name = f"{chosen.name}-{precision}"
        manifest["artifacts"] = [entry for entry in manifest["artifacts"] if entry["name"] != name]
        write_manifest(folder, manifest)  # a build that is interrupted leaves no claim about a file that is gone
        engine = make_engine(
            folder,
            sources[precision],
            backend=chosen.name,
            batch=batch,
            sm=sm,
            pixels=pixels,
            reference=sources["fp32"]["name"],
            reference_logits=reference_logits,
            note=note,
        )
        manifest["artifacts"].append(engine)
        write_manifest(folder, manifest)
    return manifest


def make_engine(
    folder: Path,
    source: dict[str, Any],
    *,
    backend: str,
    batch: tuple[int, int, int],
    sm: Sequence[str] | None,
    pixels: NDArray[np.uint8],
    reference: str,
    reference_logits: NDArray[np.float32],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Build one engine from an ONNX artifact and return its manifest entry.

    Where the engine can run here, its logits must agree with ``reference_logits``, those of the runner ``reference``.
    """
    precision = source["precision"]
    card = build_engine(
        folder / source["file"],
        folder,
        precision=precision,
        batch=batch,
        backend=backend,
        sm=sm,
    )
    path, name = folder / card.file, f"{backend}-{precision}"
    reason, parity = why_not_here(card), None
    if reason is None:
        runner = TensorRTRunner(path, name=name)
        try:
            logits = run_batches(runner, pixels)
            parity = require_agreement(reference_logits, logits, precision=precision, names=(reference, name))
        except ParityError:
            for file in (path, card_path(path)):
                file.unlink()
            raise
        finally:
            runner.close()
    never = None if reason is None else f"never executed here: {reason}"
    card = replace(card, executed=reason is None, note=never)
    write_card(path, card)
    targets = ", ".join(card.compute_capabilities)
    note(
        f"{card.file}: {backend} {card.backend_version}, {precision}, batch {list(batch)}, for {targets}, "
        f"built in {card.build_s:.1f} s; {never or f'it agrees with {reference}'}"
    )
    return describe_artifact(
        folder,
        card.file,
        name=name,
        format_="engine",
        precision=precision,
        backend=backend,
        executed=card.executed,
        note=never,
        parity=parity.to_dict() if parity else None,
    )
