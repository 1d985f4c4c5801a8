"""The bench from a bundle to a report, without torch: every figure where it belongs, every failure said."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from prgkit.data.preprocessing import Preprocessing
from prgkit.data.ticks import Tick, write_ticks
from prgkit.errors import BenchError, ExportError, RunError
from prgkit.evaluate.bench.bench import bench
from prgkit.evaluate.bench.metadata import evaluation_images, pseudo_labels, training_records
from prgkit.evaluate.bench.options import BenchOptions
from prgkit.evaluate.report.examples import choose_examples
from prgkit.export.bundle.bundle import (
    Evaluation,
    describe_artifact,
    input_spec,
    output_spec,
    read_evaluation,
    write_evaluation,
    write_golden,
)
from prgkit.export.bundle.engine_metadata import EngineMetadata, write_engine_metadata
from prgkit.export.bundle.manifest import EvaluationFacts, Manifest, RunFacts
from prgkit.export.readme import write_manifest
from prgkit.export.runtimes.onnxruntime import ONNXRUNTIME
from prgkit.export.runtimes.tensorrt import TENSORRT, TENSORRT_RTX
from prgkit.metrics import paired_bound
from prgkit.storage.atomic import sha256, write_sealed
from prgkit.storage.quality import Statistics

onnx = pytest.importorskip("onnx", reason="the model under test is made with the onnx package")

CLASSES = ("red", "green", "<b>blue</b>")
SIDE = 16


def model(path: Path, *, weight: float = 1.0) -> Path:
    """Write an ONNX file that answers with the strongest channel: three classes."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "weight"], ["logits"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "axes"),
        numpy_helper.from_array(np.array(weight, dtype=np.float32), "weight"),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "means", [pixels], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def answers(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)


def card(engine: Path) -> EngineMetadata:
    """Return the card of an engine that was built for a GPU of which there is none."""
    return EngineMetadata(
        file=engine.name,
        bytes=engine.stat().st_size,
        sha256=sha256(engine),
        onnx="model.onnx",
        onnx_sha256="",
        backend="tensorrt_rtx",
        backend_version="0.0",
        precision="fp16",
        tf32=False,
        batch=(1, 1, 1),
        compute_capabilities=("0.0",),
        gpu=None,
        input={"name": "pixels", "dtype": "UINT8", "shape": [1, SIDE, SIDE, 3]},
        output={"name": "logits", "dtype": "FLOAT", "shape": [1, 3]},
        layer_dtypes={},
        inspected_dtypes=None,
        build_s=0.0,
        executed=False,
        note=None,
    )


@pytest.fixture(autouse=True)
def _onnx_runtime_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with the runtime that is everywhere; what else may be installed is told apart in test_cases.py."""
    alone = replace(ONNXRUNTIME, variants=ONNXRUNTIME.variants[:1])
    monkeypatch.setattr("prgkit.export.runtimes.RUNTIMES", [alone, TENSORRT, TENSORRT_RTX])


def make_bundle(folder: Path, *, labelled: bool = True, weight: float = 1.0) -> Path:
    """Write a bundle of 40 images: the student is right on 30 and the teacher on all, and an engine nobody can run."""
    folder.mkdir()
    model(folder / "model.onnx", weight=weight)
    engine = folder / "model.fp16.engine"
    engine.write_bytes(b"an engine for a GPU that does not exist")
    write_engine_metadata(engine, card(engine))
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 100, (40, SIDE, SIDE, 3), dtype=np.uint8)
    strongest = np.arange(40) % 3
    pixels[np.arange(40), :, :, strongest] += 50
    labels = strongest.copy()
    labels[:10] = (labels[:10] + 1) % 3
    teacher = np.full((40, 3), -1, dtype=np.float32)
    teacher[np.arange(40), labels] = 1
    preprocessing = Preprocessing(SIDE, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    write_evaluation(
        folder,
        pixels,
        teacher_logits=teacher,
        teacher_uniform_logits=-teacher,
        labels=labels if labelled else None,
        student=answers,
        keys=[f"{number:032x}" for number in range(40)],
    )
    golden = [preprocessing.prepare(Image.fromarray(image)) for image in pixels[:2]]
    write_golden(folder, [Image.fromarray(image) for image in pixels[:2]], np.stack(golden), answers(np.stack(golden)))
    files = [
        ("onnx-fp32", "model.onnx", "onnx", "fp32", "onnxruntime"),
        ("rtx-fp16", engine.name, "engine", "fp16", "tensorrt_rtx"),
    ]
    artifacts = [
        describe_artifact(
            folder,
            file,
            name=name,
            format=kind,
            precision=precision,
            backend=backend,
            executed=False,
            note=None,
            parity=None,
            export_options=("--trt", "--fp16") if kind == "engine" else (),
        )
        for name, file, kind, precision, backend in files
    ]
    manifest = {
        "prgkit": "0",
        "created": "today",
        "run": {"name": "colours", "fingerprint": "0" * 16, "objective": "prg", "epochs": 3},
        "recipe": {},
        "teacher": {"model": "eye", "weights": "human", "fingerprint": "0" * 16},
        "student": {"model": "repvit_m0_9", "parameters": 1},
        "artifacts": artifacts,
        "evaluation": {"images": 40, "labelled": labelled, "source": "made up"},
        "classes": CLASSES,
        "preprocessing": preprocessing,
        "input": input_spec(preprocessing),
        "output": output_spec(CLASSES),
    }
    write_manifest(folder, Manifest.model_validate(manifest))
    return folder


def measure(bundle: Path, out: Path, **changes: Any) -> dict[str, Any]:
    note, command = changes.pop("note", lambda text: None), changes.pop("command", None)
    options = BenchOptions(**{"threads": 1, "seconds": 0.3, "batches": (1, 4), **changes})
    content: dict[str, Any] = bench(bundle, options, out=out, note=note, command=command).model_dump(mode="json")
    return content


def test_a_bundle_becomes_a_report(tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "bench" / "here"
    report = measure(make_bundle(tmp_path / "bundle"), out, note=said.append, command="prgkit bench --seconds 0.3")
    assert json.loads((out / "report.json").read_text()) == report
    assert report["schema"] == "prgkit.report/3"
    assert report["command"] == "prgkit bench --seconds 0.3"
    assert report["run"] == {
        "name": "colours",
        "student": "repvit_m0_9",
        "teacher": "eye human",
        "uses_labels": False,
        "objective": "prg",
        "classes": 3,
        "epochs": 3,
        "origin": "",
    }
    told = report["evaluation"]
    assert told == {"images": 40, "labelled": True, "source": "made up", "digest": told["digest"]}
    assert report["teacher"] == {"top1": 100.0, "top5": None, "top1_uniform_prompts": 0.0}
    assert report["student"] == {"top1": 75.0, "top5": None, "agreement": 75.0}
    assert report["accuracy_ratio"] == 0.75
    shares = [(one["images"], round(one["student"], 1), one["teacher"]) for one in report["per_class"]["classes"]]
    assert shares == [(13, 76.9, 100), (14, 71.4, 100), (13, 76.9, 100)]  # ten of each are right
    assert report["made_by"] == [
        "prgkit distill runs/colours/recipe.yaml --run runs/colours",
        "prgkit export --fp16 --trt --backend tensorrt_rtx --batch 1,1,1 --run runs/colours",
    ]
    onnx_row, engine_row = report["rows"]
    assert (onnx_row["status"], onnx_row["top1"], onnx_row["agreement_fp32"]) == ("measured", 75.0, 100.0)
    assert onnx_row["lead_bound"] == pytest.approx(paired_bound(0, 10, 40))  # the teacher alone is right on ten
    assert (onnx_row["threads"], onnx_row["backend"], onnx_row["device"]) == (1, "onnxruntime", "cpu")
    assert [entry["batch"] for entry in onnx_row["throughput"]] == [1, 4]
    assert (
        onnx_row["latency"]["p50_interval_ms"][0]
        <= onnx_row["latency"]["p50_ms"]
        <= onnx_row["latency"]["p50_interval_ms"][1]
    )
    assert engine_row["status"] == "not executed"
    assert engine_row["reason"]
    assert engine_row["latency"] is engine_row["top1"] is None
    assert onnx_row.keys() == engine_row.keys()
    assert any(note.startswith("Never executed here: rtx-fp16 (cuda); ") for note in report["notes"])
    assert not any(note.startswith("Golden images") for note in report["notes"])
    raw = json.loads((out / "samples.json").read_text())
    taken = [turn for turn in raw["order"] if turn]  # on a busy machine its time may be up before ten rounds
    assert 3 <= len(taken) <= 10
    assert taken == [[0]] * len(taken)
    assert len(raw["rows"][0]["rounds_ns"]) == len(taken)
    assert sum(map(len, raw["rows"][0]["rounds_ns"])) == onnx_row["latency"]["samples"]
    page = (out / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<b>blue</b>" not in page
    assert said[0] == "opening onnx-fp32"
    assert multiprocessing.active_children() == []


def test_latency_stages_threads_and_frames_stand_beside_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prgkit.evaluate.bench.options.available_cores", lambda: 2)
    out = tmp_path / "out"
    report = measure(
        make_bundle(tmp_path / "bundle"), out, batches=(), sweep_threads=(1, 2), fps=200, soak_minutes=0.01
    )
    row, never_run = report["rows"]
    assert report["stage_images"] == {"images": 2, "smallest": [SIDE, SIDE], "largest": [SIDE, SIDE]}
    assert never_run["latency_stages"] == {}
    assert {stage: found["rounds"] for stage, found in row["latency_stages"].items()} == {
        "io": 5,
        "pipeline": 5,
        "end_to_end": 5,
    }
    assert report["thread_sweep"]["counts"] == [1, 2]
    (swept,) = report["thread_sweep"]["rows"]
    assert (swept["artifact"], sorted(swept["latency"]), swept["failed"]) == ("onnx-fp32", ["1", "2"], {})
    raw = json.loads((out / "samples.json").read_text())
    assert [(one["artifact"], one["threads"]) for one in raw["thread_sweep"]] == [("onnx-fp32", 1), ("onnx-fp32", 2)]
    assert sum(map(len, raw["rows"][0]["stages_ns"]["pipeline"])) == row["latency_stages"]["pipeline"]["samples"]
    (frames,) = report["fixed_rate"]["rows"]
    assert (report["fixed_rate"]["fps"], report["fixed_rate"]["deadline_ms"]) == (200, 5)
    assert (frames["artifact"], frames["failed"]) == ("onnx-fp32", None)
    assert sum(map(len, raw["fixed_rate"][0]["responses_ns"])) == frames["times"]["frames"] > 5
    soak, windows = report["soak"], raw["soak"]["windows"]
    assert (soak["artifact"], soak["minutes"], soak["fps"], soak["failed"]) == ("onnx-fp32", 0.01, 200, None)
    assert (len(windows), sum(window["runs"] for window in windows)) == (soak["windows"], soak["result"]["runs"])
    assert windows[-1]["start_s"] + windows[-1]["seconds"] >= 0.5  # its last frame was answered before the end
    assert report["command"].endswith(" --fps 200 --soak 0.01")
    text = (out / "report.md").read_text()
    assert "| last 0.2 s |" in text
    assert "| frames | p50 ms | p99 ms | slowest ms | run p50 ms | late |\n" in text
    assert "| p50 ms | io | pipeline | end-to-end |\n" in text
    assert "| p50 ms | 1 thread | 2 threads |\n" in text
    page = (out / "report.html").read_text()
    assert "<h2>Threads</h2>" in page
    assert "<h2>Soak</h2>" in page
    assert "golden pictures (16×16 px)" in page


def test_the_run_travels_in_the_manifest_and_the_run_at_hand_goes_first(tmp_path: Path) -> None:
    run = {"name": "colours", "fingerprint": "0" * 16, "objective": "prg", "epochs": 3}
    told = {"training": [{"epoch": 1, "loss": 2.0, "seconds": 3.0}], "quality": quality(images=40)}
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(run=RunFacts(**run, **told)))
    assert training_records(bundle, None) == [{"epoch": 1, "loss": 2.0}]
    assert pseudo_labels(bundle, None) == quality(images=40)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n')
    write_sealed(tmp_path / "quality.json", quality(images=41).model_dump(mode="json"))
    assert training_records(bundle, tmp_path) == [{"epoch": 1, "loss": 1.0}]
    assert pseudo_labels(bundle, tmp_path) == quality(images=41)
    older: Any = SimpleNamespace(manifest=SimpleNamespace(run=RunFacts(**run)))
    assert (training_records(older, None), pseudo_labels(older, None)) == ([], None)
    write_sealed(tmp_path / "quality.json", {"images": 41})
    with pytest.raises(RunError, match=r"quality\.json is damaged: confidence: Field required"):
        pseudo_labels(bundle, tmp_path)


def quality(*, images: int) -> Statistics:
    """Return what is known of the pseudo-labels of so many images, half of them red."""
    balance = {
        "counts": [images // 2, images - images // 2],
        "uniform": images / 2,
        "largest": {"class": "red", "count": images // 2},
        "smallest": {"class": "blue", "count": images - images // 2},
        "unmatched": [],
        "effective_classes": 2.0,
    }
    known: dict[str, Any] = {
        "images": images,
        "confidence": {"mean": 0.9, "histogram": [0] * 19 + [images]},
        "close_calls": 0,
        "balance": balance,
        "confused": [],
        "near_duplicates": {"compared": images, "images": 0, "pairs": []},
        "outliers": {"count": 0, "floor": 0.1, "lowest": []},
        "templates": [],
    }
    return Statistics.model_validate(known)


def test_evaluation_images_are_the_same_where_pictures_and_labels_are() -> None:
    source = EvaluationFacts(images=2, labelled=True, source="made up")
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(evaluation=source, relabelled=None))
    pixels, logits = np.zeros((2, 4, 4, 3), dtype=np.uint8), np.zeros((2, 3), dtype=np.float32)
    one = Evaluation(pixels, logits, logits, logits, np.array([0, 1]), ("a", "b"))
    digest = evaluation_images(one, bundle).digest
    assert evaluation_images(replace(one, pixels=pixels[:, :2, :2], logits=logits + 1), bundle).digest == digest
    others = [replace(one, keys=("a", "c")), replace(one, labels=np.array([0, 2])), replace(one, labels=None)]
    assert len({digest, *(evaluation_images(other, bundle).digest for other in others)}) == 4


def test_without_labels_there_is_fidelity_and_no_accuracy(tmp_path: Path) -> None:
    report = measure(make_bundle(tmp_path / "bundle", labelled=False), tmp_path / "out", batches=())
    assert report["teacher"] == {"top1": None, "top5": None, "top1_uniform_prompts": None}
    assert report["student"] == {"top1": None, "top5": None, "agreement": 75.0}
    assert report["accuracy_ratio"] is None
    assert report["rows"][0]["top1"] is None
    assert report["rows"][0]["throughput"] == []
    assert "gives its teacher's answer on 75.0 % of the images" in (tmp_path / "out" / "report.md").read_text()


def test_ticks_that_lie_in_the_bundle_become_an_accuracy_with_its_interval(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", labelled=False)
    # Teacher and student differ on images 0 to 9. Of 25 ticked images that travel, the teacher is wrong on 0 to 4 and
    # the student on 5 to 9; of 5 that do not, the teacher is wrong on none.
    ticks = []
    for number, image in enumerate([*range(10), *range(20, 35), *range(100, 105)], start=1):
        student, teacher = CLASSES[image % 3], CLASSES[(image % 3 + (image < 10)) % 3]
        named = student if image < 5 else None
        ticks.append(Tick(number, f"{image}.jpg", f"{image:032x}", teacher, "99.0", image >= 5, named))
    write_ticks(bundle / "audit" / "ticks.csv", ticks)
    report = measure(bundle, tmp_path / "out", batches=())
    audit = report["audit"]
    assert (audit["images"], audit["ticked"]) == (30, 30)
    assert (audit["teacher"]["images"], audit["teacher"]["right"]) == (30, 25)
    assert audit["teacher"]["top1_interval"] == pytest.approx([66.436, 92.663], abs=1e-3)
    (row,) = audit["rows"]
    assert (row["artifact"], row["images"], row["right"], row["unknown"]) == ("onnx-fp32", 25, 20, 0)
    assert row["top1_interval"] == pytest.approx([60.869, 91.139], abs=1e-3)
    assert "<h2>Audit</h2>" in (tmp_path / "out" / "report.html").read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| Teacher: eye human | 83.3 % | 66.4–92.7 % | 30 |\n| onnx-fp32 | 80.0 % | 60.9–91.1 % | 25 |" in text
    blank = [replace(tick, right=None, named=None) for tick in ticks]
    write_ticks(bundle / "audit" / "ticks.csv", blank)
    assert measure(bundle, tmp_path / "out", batches=())["audit"] is None
    assert "Audit" not in (tmp_path / "out" / "report.md").read_text()


def test_every_evaluation_image_has_its_key(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert read_evaluation(bundle, limit=2).keys == ("0" * 32, "0" * 31 + "1")
    keys = bundle / "evaluation" / "keys.txt"
    keys.write_text(keys.read_text()[:-40])
    with pytest.raises(ExportError, match="images, keys, logits and labels differ in number"):
        read_evaluation(bundle)
    keys.unlink()
    with pytest.raises(ExportError, match="the evaluation images cannot be read"):
        read_evaluation(bundle)


def test_a_model_that_leaves_the_numbers_is_a_failure(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", weight=float("inf"))
    with pytest.raises(BenchError, match="onnx-fp32: its logits are not finite on 40 of 40 images, first on image 0"):
        measure(bundle, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_model_that_is_not_the_exported_one_is_noted(tmp_path: Path) -> None:
    report = measure(make_bundle(tmp_path / "bundle", weight=2.0), tmp_path / "out", batches=())
    assert any("Golden images: onnx-fp32 differs from the exported logits" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("threads", 0), ("seconds", 0), ("seconds", float("nan")), ("batches", (1, 0)), ("fps", float("nan"))],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_opened(
    tmp_path: Path, option: str, value: Any
) -> None:
    with pytest.raises(BenchError) as caught:
        measure(tmp_path / "nothing here", tmp_path / "out", **{option: value})
    assert f"--{option}" in (caught.value.fix or "")


def test_pictures_are_a_sample_and_the_surest_differences() -> None:
    pixels = np.zeros((100, 4, 4, 3), dtype=np.uint8)
    teacher = np.tile(np.array([[5.0, 0.0]], dtype=np.float32), (100, 1))
    student = teacher.copy()
    student[50:60] = np.stack([np.zeros(10), np.arange(1, 11)], axis=1)  # ten differ, each surer than the one before
    chosen = choose_examples(Evaluation(pixels, teacher, teacher, student, None, ()), student, ["a", "b"])
    sample, differs = ([one for one in chosen if one.group == group] for group in ("sample", "differs"))
    assert len(sample) == 24
    assert 0 < len(differs) <= 10
    assert all((one.teacher, one.student, one.label) == ("a", "b", None) for one in differs)
    sure = [one.student_confidence for one in differs]
    assert sure == sorted(sure, reverse=True)
