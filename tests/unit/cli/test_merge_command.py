"""`bench --merge` compares reports, and needs no run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import PrgkitCommand


def test_reports_are_merged_into_a_comparison_without_a_run(prgkit: PrgkitCommand, empty_folder: Path) -> None:
    row = {
        **{"artifact": "onnx-fp32", "backend": "onnxruntime", "device": "cpu", "precision": "fp32", "threads": 2},
        **{"status": "measured", "reason": None, "file": "model.onnx", "size_mib": 18.4, "throughput": []},
        **{"top1": None, "agreement_teacher": 79.4, "agreement_fp32": 100.0},
        "latency": {
            **{"batch": 1, "stage": "io", "samples": 100, "rounds": 1, "steady": True, "round_p50_ms": [2.0]},
            **{
                "p50_ms": 2.0,
                "p50_interval_ms": [1.9, 2.1],
                "p90_ms": 2.0,
                "p95_ms": 2.0,
                "p99_ms": None,
                "max_ms": 2.0,
            },
        },
    }
    for name in ("a", "b"):
        report = {
            **{"schema": "prgkit.report/3", "prgkit": "0.1.0", "command": "prgkit bench"},
            "created": "2026-01-02T03:04:05+00:00",
            "machine": {
                **{"cpu": f"CPU {name}", "cores": 2, "usable_cores": 2, "versions": {}, "os": "Debian"},
                **{"kernel": "6.1", "architecture": "x86_64", "virtual": False, "python": "3.11.7"},
            },
            "run": {
                **{"name": "tiny", "student": "repvit_m0_9", "teacher": "ViT-S-16", "objective": "prg"},
                **{"classes": 100, "epochs": 12},
            },
            "evaluation": {"images": 20, "labelled": False, "source": "", "digest": "d"},
            "teacher": {"top1": None, "top5": None, "top1_uniform_prompts": None},
            "student": {"top1": None, "top5": None, "agreement": 79.4},
            "accuracy_ratio": None,
            "rows": [row],
        }
        (empty_folder / f"{name}.json").write_text(json.dumps(report))
    result = prgkit("bench", "--merge", "a.json", "b.json")
    assert (result.code, result.err) == (0, "")
    assert "\n".join(line.rstrip() for line in result.out.splitlines()) == MERGED
    assert sorted(path.name for path in (empty_folder / "comparison").iterdir()) == [
        "comparison.html", "comparison.json", "comparison.md"
    ]  # fmt: skip
    assert prgkit("bench a.json b.json --merge --out there --json").json["bench"]["reports"][1]["file"] == "b.json"
    assert (empty_folder / "there/comparison.md").is_file()
    assert prgkit("bench --merge a.json c.json").err == (
        "Error: there is no c.json\n  where: .\n  fix: name the report.json that prgkit bench wrote, or measure again: prgkit bench\n"
    )


MERGED = """\
RepViT-M0.9 in 2 benches: fastest is onnx-fp32 at 2.00 ms on CPU a, 2 cores

 device          artifact   p50 ms  images/s  = teacher   MiB
 ────────────────────────────────────────────────────────────
 CPU a, 2 cores  onnx-fp32    2.00         –     79.4 %  18.4
 CPU b, 2 cores  onnx-fp32    2.00         –     79.4 %  18.4

comparison: comparison/comparison.html"""
