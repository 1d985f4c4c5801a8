"""The thread sweep and the latency stages: measured side by side, told in tables, and left out where there is nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from prgkit.data.preprocessing import Preprocessing
from prgkit.evaluate.bench.bench import Subject, with_results
from prgkit.evaluate.bench.latency import Measured, sweep_threads
from prgkit.evaluate.bench.metadata import golden_images, stage_images
from prgkit.evaluate.bench.worker import Spec
from prgkit.evaluate.bench.workers import BenchContext
from prgkit.evaluate.report import latency_sections
from prgkit.evaluate.report.markdown import table_header, table_rows
from prgkit.evaluate.report.schema import Latency, Report, Row, StageImages, ThreadSweep, ThreadSweepRow
from prgkit.export.bundle.bundle import write_golden

SQUARE = Preprocessing(16, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)


def swept(**medians: dict[int, float]) -> Report:
    rows = [
        ThreadSweepRow(
            **{"artifact": name, "backend": "onnxruntime", "device": "cpu"},
            latency={count: Latency.model_construct(p50_ms=p50_ms) for count, p50_ms in found.items()},
        )
        for name, found in medians.items()
    ]
    return Report.model_construct(thread_sweep=ThreadSweep(counts=[1, 2, 4], rows=rows))


def test_a_sweep_tells_each_median_and_the_gain_over_the_fewest_threads() -> None:
    report = swept(fp32={1: 8.0, 2: 4.0, 4: 10.0}, int8={1: 2.0, 4: 1.0})
    section = latency_sections.thread_sweep(report)
    assert section is not None
    assert table_header(section)[0] == ["p50 ms", "1 thread", "2 threads", "4 threads"]
    assert table_rows(section) == [
        ["fp32", "8.00", "4.00 (2.00×)", "10.0 (0.80×)"], ["int8", "2.00", "failed", "1.00 (2.00×)"]
    ]  # fmt: skip
    assert section.summary[0] == "fp32, p50 ms: 1 thread 8.00, 2 threads 4.00 (2.00×), 4 threads 10.0 (0.80×)."
    assert latency_sections.thread_sweep(Report.model_construct()) is None


def test_without_counts_or_anything_on_the_cpu_nothing_is_swept() -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    specs = [Spec("engine", "tensorrt", "cuda"), Spec("torch", "torch", "cpu")]
    said: list[str] = []
    context = BenchContext(images, seconds=1, note=said.append)
    assert sweep_threads(specs, [1, 2], context) == (None, [])
    assert sweep_threads([Spec("onnx", "onnxruntime", "cpu", takes_threads=True)], [], context) == (None, [])
    assert said == []


def test_latency_stages_run_on_the_golden_pictures_as_files(tmp_path: Path) -> None:
    bundle: Any = SimpleNamespace(folder=tmp_path, preprocessing=SQUARE)
    assert golden_images(bundle) is None
    sources = [Image.new("RGB", size) for size in ((40, 30), (20, 20))]
    write_golden(tmp_path, sources, np.stack([SQUARE.prepare(one) for one in sources]), np.zeros((2, 3), np.float32))
    pictures = golden_images(bundle)
    assert pictures is not None
    assert pictures.files == [(tmp_path / "golden" / name).read_bytes() for name in ("00.png", "01.png")]
    described = stage_images(pictures)
    assert described is not None
    assert described.model_dump() == {"images": 2, "smallest": (20, 20), "largest": (40, 30)}
    section = latency_sections.latency_stages(
        Report.model_construct(rows=[staged({"io": latency_of(1.0)})], stage_images=described)
    )
    assert section is not None
    assert "on the bundle's 2 golden pictures (20×20 to 40×30 px)" in section.about
    (tmp_path / "golden" / "01.png").write_bytes(b"no picture")
    assert golden_images(bundle) is None


def test_a_row_tells_its_latency_stages_as_far_as_they_were_measured() -> None:
    one = Measured(
        Spec("onnx-fp32", "onnxruntime", "cpu"),
        stages_ns={"io": [[1_000_000]], "pipeline": [[2_000_000, 2_000_000], [2_000_000]]},
    )
    key: dict[str, Any] = {"artifact": "onnx-fp32", "backend": "onnxruntime", "device": "cpu"}
    row = with_results(Row(**key, file=None, precision="fp32", threads=1), one, Subject.__new__(Subject))
    block = row.latency_stages
    assert (block["pipeline"].p50_ms, block["pipeline"].stage, block["pipeline"].samples) == (
        2.0,
        "pipeline",
        3,
    )
    rows = [staged(block), staged({})]
    images = StageImages(images=2, smallest=(20, 20), largest=(40, 30))

    def shown() -> tuple[list[str], list[list[str]]]:
        section = latency_sections.latency_stages(Report.model_construct(rows=rows, stage_images=images))
        assert section is not None
        return table_header(section)[0], table_rows(section)

    assert shown() == (["p50 ms", "io", "pipeline", "end-to-end"], [["onnx-fp32", "1.00", "2.00", "–"]])
    engine = {"artifact": "trt-fp16", "device": "cuda", "latency_stages": {**block, "compute": latency_of(0.25)}}
    rows.append(rows[0].model_copy(update=engine))  # where one row has a GPU's own time, all say whether they have
    header, lines = shown()
    assert header == ["p50 ms", "compute", "io", "pipeline", "end-to-end"]
    assert lines[0] == ["onnx-fp32", "–", "1.00", "2.00", "–"]
    assert lines[1][1:] == ["0.250", "1.00", "2.00", "–"]


def latency_of(p50_ms: float) -> Latency:
    return Latency.model_construct(p50_ms=p50_ms)


def staged(stages: Any) -> Row:
    key: dict[str, Any] = {"artifact": "onnx-fp32", "backend": "onnxruntime", "device": "cpu"}
    row = Row(**key, file=None, precision="fp32", threads=1, status="measured")
    return row.model_copy(update={"latency_stages": stages})
