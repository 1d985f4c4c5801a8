"""A journal's lines: whole or ignored, numbered, and damaged ones named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from prgkit.errors import RunError
from prgkit.storage.journal import Journal


class Point(BaseModel, strict=True):
    x: int
    y: int = 0


def test_what_is_appended_is_read_back_one_object_a_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", Point)
    assert journal.lines() == []
    journal.append(Point(x=1))
    journal.append(Point(x=2, y=3))
    assert journal.path.read_text() == '{"x": 1, "y": 0}\n{"x": 2, "y": 3}\n'
    assert journal.lines() == [(1, Point(x=1)), (2, Point(x=2, y=3))]


def test_a_torn_last_line_is_ignored_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", Point)
    journal.append(Point(x=1))
    with open(journal.path, "a") as file:
        file.write('{"x": 2')
    assert journal.lines() == [(1, Point(x=1))]
    journal.append(Point(x=3))
    assert journal.lines() == [(1, Point(x=1)), (2, Point(x=3))]


@pytest.mark.parametrize("damage", ["", "[1]", "{", '{"y": 1}', '{"x": "1"}', "\xff"])
def test_a_damaged_line_keeps_its_number(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path / "a.jsonl", Point)
    journal.path.write_text(f'{{"x": 1}}\n{damage}\n{{"x": 3}}\n', encoding="latin-1")
    assert journal.lines() == [(1, Point(x=1)), (2, None), (3, Point(x=3))]
    with pytest.raises(RunError, match=r"line 2 of a\.jsonl is damaged\n.*\n  fix: delete it"):
        journal.records(fix="delete it")
    journal.path.write_text(f'{{"x": 1}}\n{damage}\n', encoding="latin-1")
    assert journal.records(fix="delete it") == [Point(x=1)]  # the last may be what a kill left


def test_new_lines_are_those_of_others(tmp_path: Path) -> None:
    ours, theirs = (Journal(tmp_path / "a.jsonl", Point) for _ in range(2))
    ours.append(Point(x=1))
    assert ours.new_lines() == []
    theirs.append(Point(x=2))
    assert ours.new_lines() == [(2, Point(x=2))]
    assert ours.new_lines() == []


def test_a_journal_is_replaced_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", dict[str, Any])
    journal.append({"a": 1})
    journal.replace([{"b": 2}, {"c": None}])
    assert journal.path.read_text() == '{"b": 2}\n{"c": null}\n'


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_json_does_not_have_is_not_written(tmp_path: Path, number: float) -> None:
    journal = Journal(tmp_path / "a.jsonl", dict[str, Any])
    with pytest.raises(ValueError, match="JSON"):
        journal.append({"a": [number]})
    assert not journal.path.exists()
