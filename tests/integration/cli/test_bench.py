"""What `bench` is given, and how it ends when it is worse than its baseline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prgkit.errors import BenchError
from prgkit.evaluate.bench.options import BenchOptions
from prgkit.evaluate.report.schema import Report
from tests.conftest import PrgkitCommand


def test_bench_is_given_the_run_or_the_bundle_alone(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def measure(bundle: Path, options: BenchOptions, **given: Any) -> Report:
        seen.append({"bundle": bundle, **options.model_dump(), **given})
        return Report.model_construct(rows=[])

    monkeypatch.setattr("prgkit.evaluate.bench.bench.bench", measure)
    monkeypatch.setattr("prgkit.evaluate.report.bench_report.report_table", lambda report: "the table")
    result = prgkit("bench", "--threads", "1", "--batches", "4,2", "--seconds", "1")
    assert result.out.startswith("the table\nreport: runs/tiny/bench/")
    shutil.copytree("runs/tiny/bundle", "device")
    monkeypatch.chdir("device")
    assert prgkit("bench").out.startswith("the table\nreport: bench/")
    assert [(call["bundle"], call["run_folder"]) for call in seen] == [
        (Path("runs/tiny/bundle"), Path("runs/tiny")),
        (Path(), None),
    ]
    assert (seen[0]["threads"], seen[0]["batches"], seen[0]["seconds"]) == (1, (4, 2), 1.0)
    assert seen[0]["command"] == "prgkit bench --threads 1 --batches 4,2 --seconds 1"


def test_a_bench_that_is_worse_than_its_baseline_tells_all_and_exits_1(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.evaluate.bench import latency

    really, found = latency.measure, list[latency.Session]()

    def measure(*arguments: Any, **named: Any) -> latency.Session:
        if not found:
            found.append(really(*arguments, **named))
        return found[0]  # every bench finds what the first one measured

    monkeypatch.setattr(latency, "measure", measure)
    shutil.copytree("runs/tiny/bundle", "device")  # without PyTorch's row, which no baseline judges
    measured = ("bench", "--run", "device", "--threads", "1", "--seconds", "0.3", "--batches", "1")
    first = prgkit(*measured, "--out", "first")
    assert (first.code, first.out.splitlines()[-1]) == (0, "report: first/report.html")
    before = json.loads((project_copy / "first/report.json").read_text())
    onnx = before["rows"][0]
    onnx["latency"] |= {
        "p50_ms": 1e6,
        "p50_interval_ms": [1e6, 1e6],
        "round_p50_ms": [1e6],
    }  # however busy this machine is, it was busier
    (project_copy / "base.json").write_text(json.dumps(before))
    assert prgkit(*measured, "--out", "new", "--baseline", "base.json", "--tolerance", "10%").code == 0
    onnx["size_mib"] = 0.01
    (project_copy / "base.json").write_text(json.dumps(before))
    result = prgkit(*measured, "--out", "new", "--baseline", "base.json")
    size = json.loads((project_copy / "new/report.json").read_text())["rows"][0]["size_mib"]
    assert result.code == 1
    assert "Against base.json (run tiny, " in result.out
    assert result.out.splitlines()[-1] == "report: new/report.html"
    assert result.err.endswith(
        "Error: 1 regression against base.json:\n"
        f"  onnx-fp32: size 0.01 MiB → {size:.2f} MiB, {100 * (size / 0.01 - 1):+.1f} %\n"
        "  where: new/report.html\n"
        "  fix: make it good again, or accept it: this report.json is then the next baseline\n"
    )
    assert "## Against the baseline" in (project_copy / "new/report.md").read_text()
    assert "<h2>Against the baseline</h2>" in (project_copy / "new/report.html").read_text()
    again = prgkit(*measured, "--out", "new", "--baseline", "base.json", "--json")
    assert (again.code, again.json["bench"]["baseline"]["regressions"]) == (1, 1)
    assert prgkit(*measured, "--out", "new", "--baseline", "new").err.startswith(
        "Error: the new report would overwrite its baseline, and the next bench would be held against that\n"
        "  where: new/report.json\n"
    )
    monkeypatch.setattr("prgkit.evaluate.bench.options.available_cores", lambda: 2)
    result = prgkit("bench", "--run", "device", "--threads", "2", "--baseline", "base.json", "--out", "new")
    assert result.err.startswith(
        "Error: the baseline was measured with --threads 1, and this would be with --threads 2\n"
    )


@pytest.mark.parametrize("option", ["--threads 4", "--sweep-threads 1,2,4"])
def test_more_threads_than_cores_are_refused_before_anything_runs(
    prgkit: PrgkitCommand, empty_folder: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("prgkit.evaluate.bench.options.available_cores", lambda: 3)
    monkeypatch.setattr("prgkit.evaluate.bench.options.core_limit", lambda: "all that there are")
    name = option.split()[0]
    result = prgkit(f"distill demo bench {option}")
    assert (result.code, result.out, result.err) == (
        *(1, ""),
        f"Error: {name} 4 is more than the 3 cores that this process may use (all that there are): threads that wait "
        f"for each other look tens of times slower\n  fix: give {name} numbers up to 3, or leave it out\n",
    )
    with pytest.raises(BenchError, match="is more than the 3 cores that this process may use"):
        BenchOptions(threads=4).check()
    BenchOptions(threads=3, sweep_threads=(1, 3)).check()
