"""The gate from hand-made reports: what is a regression, what is noise, and what cannot be compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prgkit.errors import BenchError
from prgkit.evaluate.report import regression
from prgkit.evaluate.report.markdown import table_rows
from prgkit.evaluate.report.regression import (
    Gate,
    against_baseline,
    baseline_headline,
    open_gate,
    regressions,
    require_comparable,
)
from prgkit.evaluate.report.schema import BaselineComparison, Report, read_report
from prgkit.evaluate.report.sections import Section

Content = dict[str, Any]
MACHINE = {
    "cpu": "AMD EPYC",
    "cores": 2,
    "usable_cores": 2,
    "gpus": [],
    "versions": {"onnxruntime": "1.31.1"},
    "clocks_locked": None,
    **dict.fromkeys(("os", "kernel", "architecture", "python"), "x"),
    "virtual": False,
}


def row(artifact: str, p50_ms: float, **changes: Any) -> dict[str, Any]:
    return {
        "artifact": artifact,
        "backend": "onnxruntime",
        "device": "cpu",
        "precision": artifact[5:9],
        "threads": 2,
        "status": "measured",
        "reason": None,
        "size_mib": 20.0,
        "file": f"{artifact}.onnx",
        "latency": latency(p50_ms, (0.98 * p50_ms, 1.02 * p50_ms)),
        "throughput": [],
        "top1": 60.0,
        "agreement_teacher": 80.0,
        "agreement_fp32": 100.0,
        **changes,
    }


def latency(p50_ms: float, interval_ms: tuple[float, float], rounds_ms: list[float] | None = None) -> Content:
    rounds_ms = rounds_ms or [p50_ms]
    return {
        **{"batch": 1, "stage": "io", "samples": 100, "p50_ms": p50_ms, "p50_interval_ms": interval_ms},
        **dict.fromkeys(("p90_ms", "p95_ms", "max_ms"), p50_ms),
        **{"p99_ms": None, "round_p50_ms": rounds_ms, "steady": True, "rounds": len(rounds_ms)},
    }


def against(report: Content, before: Content, tolerance: float = 0.05) -> BaselineComparison:
    gate = Gate(Path("base.json"), Report.model_validate(before), tolerance)
    return regression.against(Report.model_validate(report), gate)


def old() -> Content:
    return {
        "schema": "prgkit.report/3",
        "prgkit": "0.1.0",
        "command": "prgkit bench",
        "created": "2026-01-02T03:04:05+00:00",
        "machine": copy.deepcopy(MACHINE),
        "run": {"name": "cifar100", "student": "repvit_m0_9", "teacher": "ViT-S-16", "objective": "prg"}
        | {"classes": 100, "epochs": 12},
        "evaluation": {"images": 2000, "labelled": True, "source": "test.tar", "digest": "d"},
        "teacher": {"top1": 61.2, "top5": 86.0, "top1_uniform_prompts": 60.8},
        "student": {"top1": 60.0, "top5": 84.0, "agreement": 80.0},
        "accuracy_ratio": 0.98,
        "rows": [row("onnx-fp32", 2.0), row("onnx-int8", 1.0, agreement_fp32=98.5)],
    }


def judged(change: Callable[[Content], Any], *, tolerance: float = 0.05) -> BaselineComparison:
    report = old()
    change(report)
    return against(report, old(), tolerance)


def section_of(found: BaselineComparison) -> Section:
    section = against_baseline(Report.model_construct(baseline=found))
    assert section is not None
    return section


def lines_of(found: BaselineComparison) -> list[list[str]]:
    return table_rows(section_of(found))


def notes_of(found: BaselineComparison) -> list[str]:
    return list(section_of(found).notes)


def worse(found: BaselineComparison) -> list[str]:
    error = regressions(found, path=Path("report.html"))
    assert (error is None) == (found.regressions == 0)
    return [] if error is None else [line.strip() for line in error.what.splitlines()[1:]]


def slower(times: float) -> Callable[[Content], Any]:
    return lambda report: report["rows"].__setitem__(0, row("onnx-fp32", 2.0 * times))


def test_the_same_again_is_no_regression() -> None:
    found = judged(lambda report: None)
    assert worse(found) == []
    assert {line.verdict for line in found.lines} == {"same"}
    assert [line.what for line in found.lines] == ["latency", "size", "top1", "agreement_fp32"] * 2
    assert baseline_headline(found) == "Against base.json (run cifar100, 2026-01-02), tolerance 5 %: no regression."


def test_one_file_on_two_runtimes_is_two_rows() -> None:
    def both(report: Content) -> Content:
        report["rows"].insert(1, row("onnx-fp32", 1.0, backend="openvino"))
        return report

    report = both(old())
    report["rows"][1] = row("onnx-fp32", 1.5, backend="openvino")
    found = against(report, both(old()))
    assert worse(found) == ["onnx-fp32 (OpenVINO): p50 1.00 ms → 1.50 ms, +50.0 % (95 %: 0.980–1.02, now 1.47–1.53)"]
    found = against(old(), both(old()))
    assert worse(found) == ["onnx-fp32 (OpenVINO): not in this bench"]
    assert judged(both).new == ["onnx-fp32 (OpenVINO)"]


def test_a_latency_beyond_the_tolerance_with_intervals_apart_is_a_regression() -> None:
    found = judged(slower(1.1))
    assert worse(found) == ["onnx-fp32: p50 2.00 ms → 2.20 ms, +10.0 % (95 %: 1.96–2.04, now 2.16–2.24)"]
    assert baseline_headline(found).endswith("tolerance 5 %: 1 regression.")
    assert judged(slower(1.1), tolerance=0.1).regressions == 0  # just the tolerance is within it
    assert judged(slower(0.9)).lines[0].verdict == "better"


def test_a_latency_whose_interval_overlaps_is_noise_and_one_within_the_tolerance_is_none() -> None:
    noisy = latency(2.4, (2.03, 2.9))  # 20 % more, but it may as well be 2.03
    found = judged(lambda report: report["rows"][0].update(latency=noisy))
    assert (found.regressions, found.lines[0].verdict) == (0, "noise")
    sure = latency(2.09, (2.08, 2.1))  # surely slower, by 4.5 %
    assert judged(lambda report: report["rows"][0].update(latency=sure)).regressions == 0


def test_of_an_unstable_bench_the_range_of_its_rounds_counts_but_for_the_ends() -> None:
    busy = latency(2.4, (2.35, 2.45), [1.9, *[2.03] * 4, 2.4, *[2.9] * 4, 9.0])
    found = judged(lambda report: report["rows"][0].update(latency=busy))
    assert (found.lines[0].verdict, found.lines[0].now_interval) == ("noise", (2.03, 2.9))
    steady = {**busy, "round_p50_ms": [2.3, 2.4, 2.5]}
    assert judged(lambda report: report["rows"][0].update(latency=steady)).regressions == 1
    slow = {**busy, "round_p50_ms": [2.1, 2.4, 3.0]}
    assert judged(lambda report: report["rows"][0].update(latency=slow)).regressions == 1
    throttled = latency(4.0, (4.0, 4.0), [2.0, *[4.0] * 9])
    assert judged(lambda report: report["rows"][0].update(latency=throttled)).regressions == 1


def test_openvinos_int8_is_one_artifact_whichever_layout_it_ran() -> None:
    def ran(artifact: str) -> Content:
        report = old()
        report["rows"][1] = row(artifact, 1.0, backend="openvino")
        return report

    for layout in ("tensorrt", "openvino"):
        found = against(ran(f"onnx-int8-{layout}"), ran("onnx-int8"))
        assert (worse(found), found.new) == ([], [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": None}, r"report\.json is damaged: \w+"),
        ({"rows": [{}]}, r"report\.json is damaged: \w+"),
        ({"machine": None}, r"report\.json is damaged: \w+"),
        ({"rows": []}, "nothing was measured in the baseline"),
        ({"rows": [row("onnx-fp32", 2.0, status="failed")]}, "nothing was measured in the baseline"),
    ],
)
def test_a_report_without_what_is_to_be_compared_is_no_baseline(tmp_path: Path, change: Content, said: str) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**old(), **change}))
    with pytest.raises(BenchError, match=said):
        open_gate(tmp_path, 0.05, out=tmp_path / "new")


def test_a_size_needs_no_interval() -> None:
    found = judged(lambda report: report["rows"][1].update(size_mib=21.5))
    assert worse(found) == ["onnx-int8: size 20.0 MiB → 21.5 MiB, +7.5 %"]
    assert ["onnx-int8", "size", "20.0 MiB", "21.5 MiB", "+7.5 %", "worse"] in lines_of(found)


def test_a_share_is_worse_below_the_interval_of_the_baseline() -> None:
    # Wilson, 2,000 images: 60 % is 57.8 to 62.1, 98.5 % is 97.9 to 98.9, 100 % is 99.8 to 100.
    assert judged(lambda report: report["rows"][0].update(top1=58.0)).regressions == 0
    found = judged(lambda report: report["rows"][0].update(top1=57.5))
    assert worse(found) == ["onnx-fp32: top-1 60.0 % → 57.5 %, -2.5 points (95 %: 57.8–62.1, now 55.3–59.7)"]
    assert judged(lambda report: report["rows"][1].update(agreement_fp32=98.0)).regressions == 0
    assert judged(lambda report: report["rows"][0].update(agreement_fp32=99.7)).regressions == 1


def test_without_labels_agreement_with_the_teacher_is_compared() -> None:
    def unlabelled(report: Content) -> Content:
        for one in report["rows"]:
            one["top1"] = None
        report["evaluation"]["labelled"] = False
        return report

    report = unlabelled(old())
    report["rows"][0]["agreement_teacher"] = 75.0
    found = against(report, unlabelled(old()))
    assert worse(found) == ["onnx-fp32: = teacher 80.0 % → 75.0 %, -5.0 points (95 %: 78.2–81.7, now 73.1–76.8)"]


def test_an_artifact_that_is_missing_failed_or_could_not_run_is_a_regression() -> None:
    assert worse(judged(lambda report: report["rows"].pop())) == ["onnx-int8: not in this bench"]
    failed = {"status": "failed", "reason": "its process ended"}
    assert worse(judged(lambda report: report["rows"][1].update(failed))) == ["onnx-int8: failed: its process ended"]
    absent = {"status": "not executed", "reason": "it needs a GPU", "latency": None}
    found = judged(lambda report: report["rows"][1].update(absent))
    assert worse(found) == ["onnx-int8: never executed here: it needs a GPU"]
    assert lines_of(found)[-1] == ["onnx-int8", "itself", "measured", "missing", "", "worse"]


def test_what_is_new_is_named_and_pytorch_is_not_judged() -> None:
    report, before = old(), old()
    report["rows"].append(row("onnx-fp16", 3.0))
    before["rows"].append(row("torch", 9.0, backend="torch"))
    before["rows"].append(row("rtx-fp16", 9.0, status="not executed", latency=None))
    report["machine"]["versions"] = {"onnxruntime": "1.32.0"}
    found = against(report, before)
    assert found.regressions == 0
    assert notes_of(found) == ["Not in the baseline: onnx-fp16.", "onnxruntime was 1.31.1 and is 1.32.0."]


def gate_of(content: Content) -> Gate:
    return Gate(Path("base.json"), Report.model_validate(content), 0.05)


def refused(*, machine: Any = None, evaluation: Any = None, threads: int = 2) -> str:
    content = old()
    content["machine"] |= machine or {}
    content["evaluation"] |= evaluation or {}
    new = Report.model_validate(content)
    with pytest.raises(BenchError) as caught:
        require_comparable(gate_of(old()), new.machine, new.evaluation, threads=threads)
    return str(caught.value)


def test_another_machine_other_images_and_other_threads_are_refused() -> None:
    new = Report.model_validate(old())
    require_comparable(gate_of(old()), new.machine, new.evaluation, threads=2)
    assert refused(machine={"usable_cores": 4, "gpus": [{"name": "H200", "driver": "1"}]}) == (
        "the baseline was measured on another machine: AMD EPYC, 2 cores; this is AMD EPYC, 4 cores, H200\n"
        "  where: base.json\n"
        "  fix: keep a baseline for each machine; prgkit bench --merge shows the reports of several side by side"
    )
    assert "other evaluation images (2,000 labelled images each)\n" in refused(evaluation={"digest": "e"})
    assert "(2,000 labelled images, now 50 images without labels)" in refused(
        evaluation={"digest": "e", "images": 50, "labelled": False}
    )
    assert refused(threads=1).startswith(
        "the baseline was measured with --threads 2, and this would be with --threads 1\n"
    )


def test_a_baseline_is_a_report_or_its_folder_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(old()))
    assert open_gate(tmp_path, 0.05, out=tmp_path / "new").report == read_report(path) == Report.model_validate(old())
    with pytest.raises(BenchError, match="the new report would overwrite its baseline"):
        open_gate(path, 0.05, out=tmp_path)
    for text, told in [
        ("{", "report.json is damaged"),
        ("[]", "report.json is not the report of a bench"),
        (json.dumps({**old(), "schema": "prgkit.report/9"}), "has schema 'prgkit.report/9', not 'prgkit.report/3'"),
    ]:
        path.write_text(text)
        with pytest.raises(BenchError, match=told):
            open_gate(path, 0.05, out=tmp_path / "new")
