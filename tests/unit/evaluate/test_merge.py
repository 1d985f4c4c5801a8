"""Several hand-made reports in one comparison: named apart, complete, well-formed, and with what must be known first."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prgkit.errors import BenchError
from prgkit.evaluate.compare import merge as merging
from prgkit.evaluate.compare.devices import devices_table, latency_groups
from prgkit.evaluate.compare.merge import merge
from prgkit.evaluate.compare.schema import DeviceComparison
from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.plots.charts import Bar, latency_bars
from prgkit.evaluate.report.schema import Report

Content = dict[str, Any]
EVIL = '<script>alert("x")</script>'


def row(artifact: str, p50_ms: float, **changes: Any) -> dict[str, Any]:
    return {
        "artifact": artifact,
        "backend": "onnxruntime",
        "device": "cpu",
        "precision": artifact[-4:],
        "threads": 2,
        "status": "measured",
        "reason": None,
        "size_mib": 18.4,
        "file": f"{artifact}.onnx",
        "latency": {
            **{"batch": 1, "stage": "io", "samples": 100, "p50_ms": p50_ms, "p99_ms": None},
            **dict.fromkeys(("p90_ms", "p95_ms", "max_ms"), p50_ms),
            "p50_interval_ms": [0.98 * p50_ms, 1.02 * p50_ms],
            **{"round_p50_ms": [p50_ms], "steady": True, "rounds": 1},
        },
        "throughput": [{"batch": 1, "images_per_s": 500.0}, {"batch": 32, "images_per_s": 1234.0}],
        "top1": 60.0,
        "top1_interval": [57.9, 62.1],
        "agreement_teacher": 79.4,
        "agreement_teacher_interval": [77.6, 81.1],
        "agreement_fp32": 99.95,
        **changes,
    }


def report(cpu: str = "AMD EPYC", *, run: str = "cifar100", created: str = "2026-01-02T03:04:05+00:00") -> Content:
    return {
        "schema": "prgkit.report/3",
        "prgkit": "0.1.0",
        "command": "prgkit bench",
        "created": created,
        "machine": {
            **{"cpu": cpu, "cores": 2, "usable_cores": 2, "versions": {"onnxruntime": "1.31.1"}, "os": "Debian"},
            **{"kernel": "6.1", "architecture": "x86_64", "virtual": False, "python": "3.11.7"},
        },
        "run": {
            **{"name": run, "student": "repvit_m0_9", "teacher": "ViT-S-16", "objective": "prg"},
            **{"classes": 100, "epochs": 12},
        },
        "evaluation": {"images": 2000, "labelled": True, "source": "test.tar", "digest": "d"},
        "teacher": {"top1": 61.2, "top5": 86.0, "top1_uniform_prompts": 60.8},
        "student": {"top1": 60.0, "top5": 84.0, "agreement": 79.4},
        "accuracy_ratio": 0.98,
        "rows": [row("onnx-fp32", 2.0), row("onnx-int8", 1.0)],
        "notes": [],
    }


def merged(folder: Path, *reports: Content) -> DeviceComparison:
    paths = []
    for number, one in enumerate(reports):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(one))
    return merge(paths, out=folder / "comparison", command="prgkit bench --merge 0.json 1.json")


def names_of(reports: list[Content]) -> list[str]:
    return merging.names_of([Report.model_validate(one) for one in reports])


def cautions(reports: list[Content]) -> list[str]:
    return merging.cautions([Report.model_validate(one) for one in reports])


def board() -> Content:
    """Return the report of a slower machine, on which INT8 failed and an engine never ran."""
    one = report("Cortex-A78")
    one["rows"][0] = row("onnx-fp32", 9.0, top1=None, top1_interval=None)
    one["rows"][1] |= {"status": "failed", "reason": "its process ended", "latency": None, "throughput": []}
    return one


def test_reports_become_one_comparison_in_three_files(tmp_path: Path) -> None:
    found = merged(tmp_path, report(), board())
    out = tmp_path / "comparison"
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.json", "comparison.md"]
    assert DeviceComparison.model_validate_json((out / "comparison.json").read_text()) == found
    assert found.schema_version == "prgkit.comparison/2"
    assert [one.name for one in found.reports] == ["AMD EPYC, 2 cores", "Cortex-A78, 2 cores"]
    assert [(one.report, one.artifact) for one in found.rows] == [
        (0, "onnx-fp32"), (0, "onnx-int8"), (1, "onnx-fp32"), (1, "onnx-int8")
    ]  # fmt: skip
    text = (out / "comparison.md").read_text()
    assert text.startswith(
        "# RepViT-M0.9 in 2 benches: fastest is onnx-int8 at 1.00 ms on AMD EPYC, 2 cores\n\n"
        f"prgkit bench --merge · {found.created[:16].replace('T', ' ')}\n\n"
        "## Every artifact on every device\n\n"
        "| device | artifact | p50 ms | images/s | top-1 | = teacher | MiB |\n"
        "| --- | --- | --: | --: | --: | --: | --: |\n"
        "| AMD EPYC, 2 cores | onnx-fp32 | 2.00 | 1,234 | 60.0 % | 79.4 % | 18.4 |\n"
        "| AMD EPYC, 2 cores | onnx-int8 | 1.00 | 1,234 | 60.0 % | 79.4 % | 18.4 |\n"
        "| Cortex-A78, 2 cores | onnx-fp32 | 9.00 | 1,234 | – | 79.4 % | 18.4 |\n"
        "| Cortex-A78, 2 cores | onnx-int8 | failed: its process ended |  |  |  | 18.4 |\n"
    )


def test_int8_that_a_bench_refused_is_not_the_fastest(tmp_path: Path) -> None:
    one = report()
    shares = {"images": 2000, "fp32": 60.0, "file": 50.0, "won": 0, "lost": 200, "bounds": [-11.2, -8.9]}
    found = {"images": 2000, "agreement_fp32": 80.0, "teacher": shares, "kl_fp32": 0.5, "kl": 0.5, "kl_bound": 0.0}
    one["int8"] = [
        {
            **{"artifact": "onnx-int8", "backend": "onnxruntime", "device": "cpu"},
            **{"kept": False, "faithful": False, "faster": True, "margin": 2.0, "comparison": found},
            **{"against": "onnx-fp32", "ratio": 0.5, "ratio_interval": [0.4, 0.6]},
        }
    ]
    found = merged(tmp_path, one, board())
    assert (
        (tmp_path / "comparison" / "comparison.md")
        .read_text()
        .startswith("# RepViT-M0.9 in 2 benches: fastest is onnx-fp32 at 2.00 ms on AMD EPYC, 2 cores\n")
    )
    assert [row.refused for row in found.rows] == [False, True, False, False]


def test_a_folder_and_the_report_in_it_are_one_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report()))
    with pytest.raises(BenchError, match="a report is given twice"):
        merge([tmp_path, tmp_path / "report.json"], out=tmp_path / "comparison", command="")


def test_the_terminal_names_a_device_once(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(devices_table(merged(tmp_path, report("[red]EPYC[/x]"), board())))
    lines = [line.split() for line in console.export_text().splitlines() if "onnx-" in line]
    assert lines[1:] == [
        ["[red]EPYC[/x],", "2", "cores", "onnx-fp32", "2.00", "1,234", "60.0", "%", "79.4", "%", "18.4"],
        ["onnx-int8", "1.00", "1,234", "60.0", "%", "79.4", "%", "18.4"],
        ["Cortex-A78,", "2", "cores", "onnx-fp32", "9.00", "1,234", "–", "79.4", "%", "18.4"],
        ["onnx-int8", "failed", "18.4"],
    ]


def test_names_tell_reports_apart_by_as_little_as_it_takes() -> None:
    assert names_of([report("A"), report("B")]) == ["A, 2 cores", "B, 2 cores"]
    assert names_of([report("A", run="x"), report("A", run="y"), report("B", run="x")]) == [
        "A, 2 cores, x", "A, 2 cores, y", "B, 2 cores"
    ]  # fmt: skip
    later = report(created="2026-01-03T03:04:05+00:00")
    assert names_of([report(), later]) == ["AMD EPYC, 2 cores, 2026-01-02 03:04", "AMD EPYC, 2 cores, 2026-01-03 03:04"]
    assert names_of([report(), report()]) == ["AMD EPYC, 2 cores, report 1", "AMD EPYC, 2 cores, report 2"]


def test_pytorch_has_no_bars_beside_what_runs_on_a_device(tmp_path: Path) -> None:
    with_torch = report()
    with_torch["rows"].append(row("torch", 99.0, backend="torch"))
    found = merged(tmp_path, with_torch, board())
    assert len(found.rows) == 5
    bars = latency_groups(found)
    assert {name: [bar.latency_ms for bar in group] for name, group in bars.items()} == {
        "onnx-fp32": [2.0, 9.0], "onnx-int8": [1.0]
    }  # fmt: skip


def test_what_makes_figures_incomparable_is_said() -> None:
    assert cautions([report(), board()]) == []
    other = copy.deepcopy(report())
    other["evaluation"]["digest"] = "e"
    other["teacher"]["top1"] = 50.0
    other["rows"][0]["threads"] = 1
    assert cautions([report(), other]) == [
        "Accuracy and agreement were not measured on the same images everywhere.",
        "The teacher is not the same everywhere: agreement is with different answers.",
        "The processors were not measured with the same number of threads; each row says its own.",
    ]


def test_the_page_is_well_formed_needs_nothing_else_and_escapes(tmp_path: Path) -> None:
    evil = board()
    evil["machine"].update(cpu=EVIL, os=EVIL)
    evil["run"].update(name=EVIL, student=EVIL, teacher=EVIL)
    evil["rows"][0]["artifact"] = evil["notes"] = EVIL
    evil["notes"] = [EVIL]
    merged(tmp_path, report(), evil)
    html = (tmp_path / "comparison" / "comparison.html").read_text()
    tags: list[str] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    reader.feed(html)
    assert "script" not in tags
    assert tags.count("svg") == 2
    assert html.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") > 5  # it is shown, as text
    assert html.replace('xmlns="http://www.w3.org/2000/svg"', "").count("http") == 0
    assert "<script" not in (tmp_path / "comparison" / "comparison.md").read_text()


def test_bars_begin_at_zero_and_their_lengths_are_proportions() -> None:
    drawing = latency_bars({"onnx-fp32": [Bar("a", 2.0, (1.9, 2.1), 0), Bar("b" * 99, 8.0, (7.0, 9.0), 1)]})
    widths = [
        float(node.attrib["width"]) for node in ElementTree.fromstring(drawing).iter() if node.tag.endswith("rect")
    ]
    assert widths[1] / widths[0] == pytest.approx(4, rel=0.01)
    assert svg.shortened("abc", 1000) == "abc"
    assert svg.shortened("abcdef, ghi", 50).endswith("…")


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    empty = report()
    for one in empty["rows"]:
        one.update(status="not executed", latency=None, throughput=[])
    with pytest.raises(BenchError, match="nothing was measured in any of these reports"):
        merged(tmp_path, empty, empty)
    path = tmp_path / "0.json"
    with pytest.raises(BenchError, match="a report is given twice"):
        merge([path, path], out=tmp_path, command="")
    with pytest.raises(BenchError, match=r"there is no 9\.json"):
        merge([path, tmp_path / "9.json"], out=tmp_path, command="")
