"""What a bench measures: which runtime runs which file, every row with a key of its own, and openvino for real."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.cases import plan
from prgkit.evaluate.bench.latency import LatencyPlan
from prgkit.evaluate.bench.workers import BenchContext, artifact_name
from prgkit.evaluate.report import formatting
from prgkit.export.bundle.manifest import NCHW, QDQ, Artifact
from prgkit.export.runtimes import pytorch
from prgkit.export.runtimes.pytorch import COMPILED_FROM_S
from prgkit.storage.run import Run

FILES = [("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), (QDQ, "int8"), (NCHW, "fp32")]
EVERY_PROVIDER = [
    "TensorrtExecutionProvider",
    "CUDAExecutionProvider",
    "OpenVINOExecutionProvider",
    "CPUExecutionProvider",
]
FP32, FP16, INT8, SYMMETRIC = ("onnx-fp32", "onnx-fp16", "onnx-int8", f"{QDQ}-int8")


def bundle(files: list[tuple[str, str]] = FILES, folder: Path = Path()) -> Any:
    artifacts = [
        Artifact(
            **{"name": f"{kind}-{precision}", "file": f"{kind}.{precision}.onnx", "format": kind},
            **{"precision": precision, "backend": "onnxruntime", "bytes": 1 << 20, "sha256": ""},
            **{"executed": True, "note": None, "parity": None},
        )
        for kind, precision in files
    ]
    return SimpleNamespace(folder=folder, artifacts=artifacts, manifest=SimpleNamespace(open_vocabulary=None))


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = [*EVERY_PROVIDER, "AzureExecutionProvider"]
    monkeypatch.setattr("prgkit.export.runtimes.onnxruntime.available_providers", lambda: providers)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("everything")
def test_each_runtime_runs_what_it_computes_as_it_stands() -> None:
    rows, specs = plan(bundle(), None, gpu=True, threads=2)
    ran: dict[Any, list[str]] = {}
    for row, spec in zip(rows, specs, strict=True):
        assert spec is not None
        assert {**spec.key, "threads": spec.threads} == {
            key: getattr(row, key) for key in ("artifact", "backend", "device", "threads")
        }
        assert row.threads == (2 if row.device == "cpu" else None)
        assert spec.setup.artifact.precision == row.precision
        ran.setdefault((row.backend, row.device), []).append(row.artifact)
    assert ran == {
        ("onnxruntime", "cpu"): [FP32, FP16, INT8],
        ("onnxruntime", "cuda"): [FP32, FP16, INT8],
        ("onnxruntime-tensorrt", "cuda"): [FP32, FP16],
        ("onnxruntime-openvino", "cpu"): [FP32, SYMMETRIC],
        ("openvino", "cpu"): [FP32, SYMMETRIC],
    }
    for key in (formatting.row_key, formatting.row_name):
        assert len({key(row) for row in rows}) == len(rows)
    assert [artifact_name(spec) for spec in specs if spec] == [formatting.row_name(row) for row in rows]
    assert [formatting.row_name(row) for row in rows if row.artifact == FP32] == [
        *("onnx-fp32", "onnx-fp32 (cuda)", "onnx-fp32 (TensorRT EP, cuda)"),
        *("onnx-fp32 (OpenVINO EP)", "onnx-fp32 (OpenVINO)"),
    ]


@pytest.mark.usefixtures("everything")
def test_without_a_gpu_or_tensorrts_layout_the_rest_runs() -> None:
    rows, _ = plan(bundle(FILES[:3]), None, gpu=False, threads=1)
    assert [row.artifact for row in rows if row.backend == "openvino"] == [FP32, INT8]
    assert {row.device for row in rows} == {"cpu"}


@pytest.mark.usefixtures("everything")
def test_pytorch_is_compiled_only_in_a_long_bench_and_with_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path).weights.write_bytes(b"weights")

    def compiled(seconds: float, missing: str | None) -> list[tuple[str, Any]]:
        monkeypatch.setattr(pytorch, "why_no_compiling", lambda: missing)
        rows, specs = plan(bundle([]), tmp_path, gpu=False, threads=1, seconds=seconds)
        assert (rows[0].artifact, rows[0].reason) == ("torch", None)
        return [
            (row.reason, spec and spec.setup.variant.name == "compiled")
            for row, spec in zip(rows[1:], specs[1:], strict=True)
        ]

    assert compiled(COMPILED_FROM_S - 1, None) == []
    assert compiled(COMPILED_FROM_S, None) == [(None, True)]
    assert compiled(COMPILED_FROM_S, "needs a C++ compiler") == [("needs a C++ compiler", None)]


def test_openvino_has_a_row_of_its_own_and_its_own_samples(repvit: Any) -> None:
    pytest.importorskip("openvino", reason="pip install 'prgkit[openvino]'")
    one = bundle([("onnx", "fp32")], repvit.fp32.parent)
    one.artifacts[0] = one.artifacts[0].model_copy(update={"file": repvit.fp32.name})
    rows, specs = plan(one, None, gpu=False, threads=1)
    opened = [spec for spec in specs if spec]
    measuring = LatencyPlan(rounds=3, batches=[3], predict=[repvit.pixels[:4]])
    session = latency.measure(opened, measuring, BenchContext(repvit.pixels[:8], seconds=0.2))
    assert [formatting.row_name(row) for row in rows] == ["onnx-fp32", "onnx-fp32 (OpenVINO)"]
    for found in session.measured:
        assert (found.failed, found.unmeasured, list(found.batches_ns)) == (None, {}, [3])
    ours, theirs = (found.logits for found in session.measured)
    assert ours is not None
    assert theirs is not None
    assert abs(ours - theirs).max() < 1e-3
