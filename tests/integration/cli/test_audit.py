"""The annotation sheet from the command line: drawn, ticked, and counted in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PrgkitCommand


def test_ticks_on_the_sheet_become_an_accuracy_in_the_report(prgkit: PrgkitCommand, project_copy: Path) -> None:
    document = prgkit("audit", "-n", "8", "export", "--json").json
    found = document["audit"]
    assert (found["run"], found["images"], found["drawn_from"], found["ticked"]) == ("runs/tiny", 8, 24, 0)
    assert 0 < found["held_out"] < 8
    ticks = project_copy / "runs/tiny/audit/ticks.csv"
    blank = ticks.read_text("utf-8-sig")
    assert (project_copy / "runs/tiny/bundle/audit/ticks.csv").read_text("utf-8-sig") == blank
    # Right on every second one: "number,file,key,teacher,confidence" and then y or n.
    lines = blank.splitlines()
    lines[1:] = [line.removesuffix(",,") + (",n," if number % 2 else ",y,") for number, line in enumerate(lines[1:])]
    ticks.write_text("\n".join(lines))
    result = prgkit("audit")
    assert result.out == (
        "runs/tiny/audit/sheet.html: 8 of 8 ticked; the teacher is right on 50.0 % of them (95 % interval 21.5–78.5 %)\n"
    )
    measured = "--threads 1 --seconds 0.3 --batches 1"
    report = prgkit(f"bench {measured} --json").json["bench"]
    assert report["audit"]["teacher"] == {
        "images": 8, "right": 4, "top1": 50.0, "top1_interval": pytest.approx([21.52, 78.48], abs=0.01)
    }  # fmt: skip
    assert {row["images"] for row in report["audit"]["rows"]} == {found["held_out"]}
    assert {row["artifact"] for row in report["audit"]["rows"]} == {"onnx-fp32", "torch"}
    ticks.write_text("\n".join([*lines[:4], lines[4].replace(",y,", ",ja,").replace(",n,", ",ja,")]))
    result = prgkit(f"bench {measured}")
    assert result.err == (
        "Error: right is 'ja', neither yes nor no\n  where: runs/tiny/audit/ticks.csv, line 5\n"
        "  fix: write y (or yes, x, 1, true, right), n (or no, 0, false, wrong), or nothing\n"
    )


def test_a_fresh_audit_says_what_to_do_next(prgkit: PrgkitCommand, project_copy: Path) -> None:
    assert prgkit("audit").out == (
        "runs/tiny/audit/sheet.html: 24 of 24 images to tick in a browser; put the ticks.csv that it saves in the "
        "place of runs/tiny/audit/ticks.csv, then: prgkit bench\n"
    )
    assert prgkit("distill tiny.yaml audit --json").json["audit"]["run"] == "runs/tiny"


def test_an_audit_stands_between_the_targets_and_the_training(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def distil(recipe: Any, folder: Path, *_: Any) -> None:
        asked.append((recipe.views.count, folder))
        raise SystemExit

    monkeypatch.setattr("prgkit.training.distill.distill", distil)
    assert prgkit("audit tiny.yaml --set views.count=2 --run runs/new distill export").code == 0
    assert prgkit("targets tiny.yaml audit distill").code == 0
    assert asked == [(2, Path("runs/new")), (1, Path("runs/tiny"))]
    assert (project_copy / "runs/new/audit/sheet.html").exists()
