"""Latency: the arithmetic by hand, and resident workers that live, refuse and die without taking the others along."""

from __future__ import annotations

import io
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from prgkit.data.preprocessing import Preprocessing
from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.latency import LatencyPlan
from prgkit.evaluate.bench.timing import timed_runs
from prgkit.evaluate.bench.worker import Resident, Spec, Worker, WorkerFailedError, reason
from prgkit.evaluate.bench.workers import BenchContext, rotate
from prgkit.export.bundle.manifest import Artifact
from prgkit.export.runtimes.base import Setup
from prgkit.export.runtimes.onnxruntime import ONNXRUNTIME

onnx = pytest.importorskip("onnx", reason="the models under test are made with the onnx package")


CPU = Spec("m", "onnxruntime", "cpu")


def model(path: Path, *, batch: int | str = "batch", side: int = 8, weight: float = 1.0) -> Path:
    """Write an ONNX file that returns each channel's sum times ``weight``: three classes."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats", "axes"], ["sums"], keepdims=0),
        helper.make_node("Mul", ["sums", "weight"], ["logits"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "axes"),
        numpy_helper.from_array(np.array(weight, dtype=np.float32), "weight"),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [batch, side, side, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])
    graph = helper.make_graph(nodes, "sums", [pixels], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def spec(path: Path) -> dict[str, Any]:
    facts = {"precision": "fp32", "backend": "onnxruntime", "bytes": 0, "sha256": "", "executed": True, "note": None}
    artifact = Artifact(name=path.name, file=path.name, format="onnx", **facts, parity=None)
    setup = Setup(ONNXRUNTIME, ONNXRUNTIME.variants[0], artifact, path.parent)
    return Spec(path.stem, "onnxruntime", "cpu", threads=1, setup=setup)


def images(count: int = 12) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)


def test_percentiles_and_their_units() -> None:
    rounds = [[1_000_000, 2_000_000], [3_000_000, 4_000_000, 5_000_000]]
    found = latency.summarize(rounds, steady=True)
    assert found.samples == 5
    assert found.rounds == 2
    assert found.p50_ms == 3.0
    assert found.p90_ms == pytest.approx(4.6)  # between the fourth and the fifth: 4 + 0.6
    assert found.p95_ms == pytest.approx(4.8)
    assert found.max_ms == 5.0
    assert found.round_p50_ms == [1.5, 4.0]
    assert (found.batch, found.stage, found.steady) == (1, "io", True)


def test_p99_needs_a_thousand_samples() -> None:
    assert latency.summarize([list(range(1, 1000))], steady=True).p99_ms is None
    assert latency.summarize([list(range(1, 1001))], steady=True).p99_ms == pytest.approx(990.01 / 1e6)


def test_no_sample_is_trimmed() -> None:
    found = latency.summarize([[1_000_000] * 99, [500_000_000]], steady=True)
    assert found.max_ms == 500.0
    assert found.samples == 100


def test_the_interval_is_over_rounds_not_samples() -> None:
    # The logarithms of 1, e and e^2 are 0, 1 and 2: 1 ± 4.303 / sqrt(3).
    low, high = latency.median_interval(math.e, [1.0, math.e, math.e**2])
    assert (math.log(low), math.log(high)) == (pytest.approx(1 - 2.4843, abs=1e-4), pytest.approx(1 + 2.4843, abs=1e-4))
    # Samples within a round vary, the rounds are alike: nothing to doubt.
    same = latency.summarize([[1_000_000, 2_000_000, 3_000_000]] * 10, steady=True)
    assert same.p50_interval_ms == pytest.approx((2.0, 2.0))
    # Six rounds of ten are fast: the mean of the logarithms lies above the median of all runs.
    found = latency.summarize([[10_000_000] * 9] * 6 + [[20_000_000] * 9] * 4, steady=True)
    assert (found.p50_ms, found.p50_interval_ms[0]) == (10.0, 10.0)
    assert found.p50_interval_ms[1] == pytest.approx(17.0, abs=0.1)  # ln 10 + 0.2773 + 2.262 * 0.3579 / sqrt(10)


@pytest.mark.parametrize("rounds", [3, 5, 10])
def test_the_interval_holds_the_median_in_nineteen_benches_of_twenty(rounds: int) -> None:
    draws = np.random.default_rng(rounds).lognormal(math.log(8.0), 0.1, (2000, rounds))  # each round has its own median
    bounds = [latency.median_interval(float(np.median(medians)), medians.tolist()) for medians in draws]
    assert np.mean([low <= 8.0 <= high for low, high in bounds]) == pytest.approx(0.95, abs=0.015)


def test_throughput_counts_slow_runs() -> None:
    assert latency.images_per_s(8, [100_000_000, 100_000_000, 600_000_000]) == 30.0


def test_each_round_starts_with_another() -> None:
    assert [rotate([0, 1, 2], turn) for turn in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert rotate([], 3) == []


def test_timed_runs_go_on_for_both_the_time_and_the_count() -> None:
    seen: list[int] = []
    rotation = [np.full((1, 1, 1, 3), value, dtype=np.uint8) for value in range(3)]
    turn, samples = timed_runs(lambda pixels: seen.append(int(pixels[0, 0, 0, 0])), rotation, 0.0, 5, 1)
    assert (len(samples), turn) == (5, 6)
    assert seen == [1, 2, 0, 1, 2]  # it takes up the rotation where it was
    _, samples = timed_runs(lambda pixels: time.sleep(0.01), rotation, 0.05, 1, 0)
    assert 2 <= len(samples) <= 5
    assert all(sample >= 10_000_000 for sample in samples)


def test_a_worker_answers_like_the_model_and_measures_when_told(tmp_path: Path) -> None:
    with Worker(spec(model(tmp_path / "sums.onnx", weight=0.5)), images()) as worker:
        np.testing.assert_allclose(
            worker.predict(images(5)), 0.5 * images(5).sum(axis=(1, 2), dtype=np.float32), rtol=1e-6
        )
        assert len(worker.measure(batch=4, seconds=0, at_least=7)) == 7
        ended = worker.warm_up(batch=1, window_s=0.01, cap_s=0.05)
        assert ended.runs > 0
        assert worker.load_ms > 0
        assert worker.peak_memory_mib() > 0
        ticks = cpu_ticks(worker.process.pid)
        time.sleep(0.3)
        assert cpu_ticks(worker.process.pid) - ticks <= 3  # of 30: an idle worker leaves the cores to the others
    assert not worker.process.is_alive()


def cpu_ticks(pid: int | None) -> int:
    """Return the processor time that a process and its threads have used, in 10 ms."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        pytest.skip("no /proc here")
    return sum(map(int, stat.read_text().rsplit(")", 1)[1].split()[11:13]))


def test_artifacts_take_turns_and_bad_ones_leave_the_others_measured(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    files = [model(tmp_path / "a.onnx"), broken, model(tmp_path / "fixed.onnx", batch=1), model(tmp_path / "b.onnx")]
    rounds_seen: list[int] = []
    notes: list[str] = []
    session = latency.measure(
        [spec(path) for path in files],
        LatencyPlan(rounds=3, batches=(1, 4), predict=[images()[:1], images()[1:2]]),
        BenchContext(images(), seconds=0.4, note=notes.append, before_round=rounds_seen.append),
    )
    a, damaged, fixed, b = session.measured
    assert session.order == [[0, 2, 3], [2, 3, 0], [3, 0, 2]]
    assert rounds_seen == [0, 1, 2]
    assert damaged.failed is not None
    assert "broken.onnx" in damaged.failed
    assert damaged.rounds_ns == []
    for one in (a, fixed, b):
        assert one.failed is None
        assert len(one.rounds_ns) == 3
        assert all(samples for samples in one.rounds_ns)
        assert one.warm_up is not None
        assert one.logits is not None
        assert one.logits.shape == (2, 3)
    assert sorted(a.batches_ns) == [1, 4]
    assert sorted(fixed.batches_ns) == [1]  # a model of batch 1 refuses 4, and that is all it costs
    assert list(fixed.unmeasured) == [4]
    assert "opening a" in notes


def test_an_artifact_that_overstays_has_no_further_turns() -> None:
    one = latency.Measured(CPU, rounds_ns=[[1], [1]], latency_s=100.0)
    assert latency.has_time(one, seconds=10)  # fewer than three rounds say nothing
    one.rounds_ns.append([1])
    assert not latency.has_time(one, seconds=10)
    one.latency_s = 8.0
    assert latency.has_time(one, seconds=10)


def test_a_worker_that_dies_leaves_the_others_measured(tmp_path: Path) -> None:
    specs = [spec(model(tmp_path / "a.onnx")), spec(model(tmp_path / "b.onnx"))]

    def kill_the_first(round_: int) -> None:
        if round_ == 1:
            os.kill(children()[0], signal.SIGKILL)

    session = latency.measure(
        specs, LatencyPlan(rounds=3, batches=(1,)), BenchContext(images(), seconds=0.3, before_round=kill_the_first)
    )
    dead, living = session.measured
    assert dead.failed == "its process was ended by SIGKILL, as when memory runs out"
    assert len(dead.rounds_ns) == 1
    assert living.failed is None
    assert len(living.rounds_ns) == 3
    assert session.order[2] == [1]
    assert children() == []


def test_an_interrupt_leaves_no_worker_behind(tmp_path: Path) -> None:
    def press(round_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latency.measure(
            [spec(model(tmp_path / "a.onnx"))],
            LatencyPlan(rounds=2),
            BenchContext(images(), seconds=0.2, before_round=press),
        )
    assert children() == []


def children() -> list[int]:
    """Return the worker processes of this one, oldest first."""
    import multiprocessing

    return sorted(child.pid for child in multiprocessing.active_children() if child.pid is not None)


def test_a_worker_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with Worker(spec(model(tmp_path / "a.onnx")), images()) as worker:
        worker.patience_s = 0.1
        with pytest.raises(WorkerFailedError, match=r"no answer to measure within 0 s") as caught:
            worker.measure(batch=1, seconds=30)
        assert not caught.value.alive


def test_reasons_fit_on_a_line() -> None:
    assert reason(ValueError("first\nsecond")) == "ValueError: first"
    assert reason(MemoryError()) == "MemoryError"
    assert len(reason(ValueError("x" * 1000))) == 240


def test_energy_is_power_times_the_time_of_an_image() -> None:
    one = latency.Measured(CPU, rounds_ns=[[2_000_000, 3_000_000], [1_000_000]], powers_w=[9.0, 11.0])
    found = latency.energy(one)
    assert found is not None
    assert (found.power_w, found.energy_mj) == (10.0, pytest.approx(20.0))  # 10 W for 2 ms
    assert latency.energy(latency.Measured(CPU, rounds_ns=[[1]])) is None


def test_a_runner_with_a_clock_of_its_own_has_a_stage_more() -> None:
    class Gpu:
        def run(self, pixels: Any) -> Any:
            return np.zeros((len(pixels), 3), dtype=np.float32)

        def compute_ns(self, pixels: Any) -> int:
            return 1000 * len(pixels)

    resident = Resident({})
    resident.images, resident.runner = images(), Gpu()  # type: ignore[assignment]
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    square = Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert resident.take_images([picture.getvalue()], square) == ["compute", "io", "pipeline", "end_to_end"]
    assert set(resident.measure_stage("compute", seconds=0.001, settle_s=0.1)) == {1000}
    assert resident.measure_stage("end_to_end", seconds=0.0, settle_s=0.0)[0] > 1000
