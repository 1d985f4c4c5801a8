"""How large an INT8 engine of tensorrt_rtx is beside FP16's of the same student: no GPU is needed, and none is asked.

    python benchmarks/engine_size.py --runs runs/ > results/engine_size.json

``runs`` holds runs with a bundle of ``prgkit export --fp16 --int8 --trt``; README.md says what makes them. Its
ONNX files are built anew, with several rules for which convolutions stay in INT8: those of at least so many weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

from prgkit.errors import NotWorthItError
from prgkit.export.bundle.bundle import Bundle, open_bundle
from prgkit.export.bundle.manifest import QDQ
from prgkit.export.formats import tensorrt_precision
from prgkit.export.formats.tensorrt_build import build_engine
from prgkit.export.runtimes.gpu import Backend, choose_backend

BATCHES = ((1, 1, 32), (1, 1, 1))  # a range with the recipe's default, and a fixed size
LEAST = (1, 150_000, tensorrt_precision.LEAST_INT8_WEIGHTS)  # every convolution, what was the rule, and what is


def sizes(bundle: Bundle, backend: Backend, folder: Path) -> list[dict[str, Any]]:
    """Return the bytes of FP16's engine and of INT8's by each rule, for each batch profile."""
    half = next(one for one in bundle.artifacts if one.name == "onnx-fp16")
    quantised = [one for one in bundle.artifacts if one.format == QDQ]
    rows = []
    for batch in BATCHES:
        common: dict[str, Any] = {"batch": batch, "backend": backend.name}
        fp16 = build_engine(bundle.folder / half.file, folder, precision="fp16", **common).bytes
        for source in quantised:
            for least in LEAST:
                row = {"file": source.file, "batch": batch, "least_weights": least, "fp16_bytes": fp16}
                try:
                    with patch.object(tensorrt_precision, "LEAST_INT8_WEIGHTS", least):
                        card = build_engine(bundle.folder / source.file, folder, precision="int8", **common)
                except NotWorthItError as error:
                    rows.append({**row, "int8_bytes": None, "why": error.what})
                    continue
                facts = {"int8_bytes": card.bytes, "ratio": card.bytes / fp16}
                rows.append({**row, "int8_convolutions": card.int8_convolutions, **facts})
    return rows


@click.command(context_settings={"show_default": True})
@click.option("--runs", "folder", type=click.Path(path_type=Path, exists=True), required=True, help="Runs, exported.")
def main(folder: Path) -> None:
    """Print as JSON what every engine weighs."""
    backend = choose_backend("tensorrt_rtx")
    students: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(path for path in folder.iterdir() if (path / "bundle").is_dir()):
        with tempfile.TemporaryDirectory() as work:
            students[run.name] = sizes(open_bundle(run / "bundle"), backend, Path(work))
    rule = tensorrt_precision.LEAST_INT8_WEIGHTS
    print(json.dumps({"tensorrt_rtx": backend.version, "rule": rule, "students": students}, indent=1))


if __name__ == "__main__":
    main()
