"""The thread sweep and the scopes: measured side by side, told in tables, and left out where there is nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from prgkit.data.index import Preprocessing
from prgkit.evaluate.bench.latency import Measured
from prgkit.evaluate.bench.stages import described, golden_pictures, scope_block
from prgkit.evaluate.bench.thread_sweep import thread_sweep
from prgkit.evaluate.report.sections import (
    scope_about,
    scope_header,
    scope_lines,
    sweep_header,
    sweep_lines,
    sweep_said,
)
from prgkit.export.bundle.bundle import write_golden

SQUARE = Preprocessing(16, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)


def swept(**medians: dict[int, float]) -> dict[str, Any]:
    rows = [
        {
            **{"artifact": name, "backend": "onnxruntime", "device": "cpu", "failed": {}},
            "latency": {str(count): {"p50_ms": p50_ms} for count, p50_ms in found.items()},
        }
        for name, found in medians.items()
    ]
    return {"threads": {"counts": [1, 2, 4], "rows": rows}}


def test_a_sweep_tells_each_median_and_the_gain_over_the_fewest_threads() -> None:
    report = swept(fp32={1: 8.0, 2: 4.0, 4: 10.0}, int8={1: 2.0, 4: 1.0})
    assert sweep_header(report) == ["p50 ms", "1 thread", "2 threads", "4 threads"]
    assert sweep_lines(report) == [
        ["fp32", "8.00", "4.00 (2.00×)", "10.0 (0.80×)"], ["int8", "2.00", "failed", "1.00 (2.00×)"]
    ]  # fmt: skip
    assert sweep_said(report)[0] == "fp32, p50 ms: 1 thread 8.00, 2 threads 4.00 (2.00×), 4 threads 10.0 (0.80×)."
    assert sweep_lines({}) == sweep_said({}) == sweep_lines({"threads": None}) == []


def test_without_counts_or_anything_on_the_cpu_nothing_is_swept() -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    specs = [{"device": "cuda", "takes_threads": False}, {"device": "cpu", "takes_threads": False}]
    said: list[str] = []
    assert thread_sweep(specs, images, [1, 2], seconds=1, note=said.append) == (None, [])
    assert thread_sweep([{"takes_threads": True, "device": "cpu"}], images, [], seconds=1, note=said.append) == (
        None,
        [],
    )
    assert said == []


def test_scopes_run_on_the_golden_pictures_as_files(tmp_path: Path) -> None:
    bundle: Any = SimpleNamespace(folder=tmp_path, preprocessing=SQUARE)
    assert golden_pictures(bundle) is None
    sources = [Image.new("RGB", size) for size in ((40, 30), (20, 20))]
    write_golden(tmp_path, sources, np.stack([SQUARE.prepare(one) for one in sources]), np.zeros((2, 3), np.float32))
    pictures = golden_pictures(bundle)
    assert pictures is not None
    assert pictures.files == [(tmp_path / "golden" / name).read_bytes() for name in ("00.png", "01.png")]
    assert described(pictures) == {"pictures": 2, "smallest": [20, 20], "largest": [40, 30]}
    assert "on the bundle's 2 golden pictures (20×20 to 40×30 px)" in scope_about(
        {"rows": [], "scopes": described(pictures)}
    )
    (tmp_path / "golden" / "01.png").write_bytes(b"no picture")
    assert golden_pictures(bundle) is None


def test_a_row_tells_its_scopes_as_far_as_they_were_measured() -> None:
    one = Measured(
        {}, scopes_ns={"io": [[1_000_000]], "pipeline": [[2_000_000, 2_000_000], [2_000_000]], "end_to_end": []}
    )
    block = scope_block(one)
    assert (block["pipeline"]["p50_ms"], block["pipeline"]["scope"], block["pipeline"]["samples"]) == (
        2.0,
        "pipeline",
        3,
    )
    row = {"artifact": "onnx-fp32", "device": "cpu", "status": "measured", "latency": {"p50_ms": 1.0}, "scopes": block}
    report = {"rows": [row, {**row, "scopes": {}}]}
    assert scope_header(report) == ["p50 ms", "io", "pipeline", "end-to-end"]
    assert scope_lines(report) == [["onnx-fp32", "1.00", "2.00", "–"]]
    engine = {**row, "artifact": "trt-fp16", "device": "cuda", "scopes": {**block, "compute": {"p50_ms": 0.25}}}
    report["rows"].append(engine)  # where one row has a GPU's own time, all say whether they have
    assert scope_header(report) == ["p50 ms", "compute", "io", "pipeline", "end-to-end"]
    assert scope_lines(report)[0] == ["onnx-fp32", "–", "1.00", "2.00", "–"]
    assert scope_lines(report)[1][1:] == ["0.250", "1.00", "2.00", "–"]
