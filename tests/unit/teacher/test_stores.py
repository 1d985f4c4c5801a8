"""Stores listed with who uses them, and freed where nobody does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from prgkit.data.snapshot import packed
from prgkit.storage.atomic import write_sealed
from prgkit.storage.locks import locked
from prgkit.storage.run import Run
from prgkit.storage.run_card import SCHEMA
from prgkit.teacher.feature_files import Block
from prgkit.teacher.stores import describe_stores, list_stores, prune

CARD = {"schema": SCHEMA, "prgkit": "0", "created": "", "fingerprint": "", "origin": "../..", "finished": False}
TEACHER = {"model": "ViT-L-14", "weights": "openai", "fingerprint": "", "width": 4, "logit_scale": 100.0}


def make_store(folder: Path, images: int, *, views: int, teacher: str) -> None:
    write_sealed(folder / "card.json", {"teacher_model": teacher, "teacher_weights": "openai"})
    keys = packed([f"{number:032x}" for number in range(images)])
    (folder / "index.bin").write_bytes(Block(0, keys, (bytes(16),) * views).packed())
    (folder / "view-000.f16").write_bytes(bytes(1000 * images))


def make_run(folder: Path, **facts: Any) -> None:
    Run(folder).update_card(**facts)
    Run(folder).recipe_file.touch()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "targets" / "aaaa", 7, views=6, teacher="ViT-L-14")
    make_store(tmp_path / "targets" / "bbbb", 3, views=2, teacher="RN50")
    (tmp_path / "targets" / "pictures").mkdir()
    block = {"offset": 0, "keys": ["0" * 32], "heights": [2], "widths": [2], "digest": "0"}
    (tmp_path / "targets" / "pictures" / "journal.jsonl").write_text(json.dumps(block) + "\n")
    for name in ("first", "second"):
        make_run(Path("runs", name), **CARD, teacher={**TEACHER, "targets": ["targets/aaaa"]})
    make_run(Path("runs/started"), **CARD)
    for path in (tmp_path / "targets" / "bbbb").iterdir():
        os.utime(path, (0, time.time() - 3 * 86_400))
    os.utime(tmp_path / "targets" / "bbbb", (0, time.time() - 3 * 86_400))
    return Path("targets")


def test_stores_are_listed_with_their_runs(root: Path) -> None:
    rows = list_stores(root)
    assert [(Path(row.store).name, row.images, row.views) for row in rows] == [
        ("aaaa", 7, 6), ("bbbb", 3, 2), ("pictures", 1, None),
    ]  # fmt: skip
    lines = describe_stores(rows)
    assert (
        lines["aaaa"] == "ViT-L-14 openai: 7 images, 6 views, 7.2 KiB, written today; used by runs/first, runs/second"
    )
    assert lines["bbbb"].endswith("last written 3 days ago; used by no run")
    assert lines["pictures"] == "1 image, 106 B, written today; decoded pictures, which only save time"


def test_what_no_run_uses_is_freed(root: Path) -> None:
    assert [Path(row.store).name for row in prune(root, rehearse=True)] == ["bbbb"]
    assert (root / "bbbb").exists()
    with locked(root / "bbbb", "target store"):
        assert prune(root, rehearse=False) == []
    assert [Path(row.store).name for row in prune(root, rehearse=False)] == ["bbbb"]
    assert sorted(path.name for path in root.iterdir()) == ["aaaa", "pictures"]
    for name in ("first", "second"):
        write_sealed(Path("runs", name, "card.json"), CARD)
    assert [Path(row.store).name for row in prune(root, rehearse=False)] == ["aaaa", "pictures"]
    assert list_stores(root) == []
    assert list(root.iterdir()) == []


def test_a_comparisons_trial_and_a_linked_run_use_their_stores(root: Path) -> None:
    trial, linked = Path("runs/first-compared/trials/kd"), Path("elsewhere/run")
    make_run(trial, **{**CARD, "origin": "../../../.."}, teacher={**TEACHER, "targets": ["targets/bbbb"]})
    make_store(Path("targets/cccc"), 2, views=2, teacher="RN101")
    make_run(linked, **CARD, teacher={**TEACHER, "targets": ["targets/cccc"]})
    Path("runs/linked").symlink_to(linked.resolve())
    make_store(Path("runs/first/targets/dddd"), 2, views=2, teacher="RN50")  # a card, and no run
    assert {Path(row.store).name: row.runs for row in list_stores(root) if row.teacher} == {
        "aaaa": ["runs/first", "runs/second"], "bbbb": [str(trial)], "cccc": ["runs/linked"],
    }  # fmt: skip
    assert prune(root, rehearse=True) == []


def test_a_damaged_run_keeps_what_it_may_be_using(root: Path) -> None:
    Path("runs/first/card.json").write_text("{")
    with pytest.raises(Exception, match=r"card\.json is damaged"):
        prune(root, rehearse=False)
    assert (root / "bbbb").exists()
