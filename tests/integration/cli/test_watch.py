"""A folder that `predict` watches: each picture is answered once it is whole, and again when it is another."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest

from tests.conftest import PrgkitCommand

Script: TypeAlias = Callable[[dict[int, Callable[[], object]]], None]
WATCH = "predict --watch drop --out"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Have something done at given looks into a watched folder, which are half a second apart and take no time."""

    def script(actions: dict[int, Callable[[], object]]) -> None:
        look = 0

        def sleep(_: float) -> None:
            nonlocal look
            look += 1
            if look > max(actions, default=0) + 4:
                raise KeyboardInterrupt
            actions.get(look, lambda: None)()

        monkeypatch.setattr("prgkit.evaluate.live.time", SimpleNamespace(monotonic=lambda: look / 2, sleep=sleep))

    return script


def answers() -> list[Any]:
    return [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]


def test_a_picture_that_is_written_slowly_is_taken_once_it_is_whole(
    prgkit: PrgkitCommand, project_copy: Path, looks: Script
) -> None:
    whole, slow = Path("photos/01.png").read_bytes(), Path("drop/slow.png")
    slow.parent.mkdir()
    slow.write_bytes(whole[:50])
    looks({2: lambda: slow.write_bytes(whole[:60]), 4: lambda: slow.write_bytes(whole)})
    result = prgkit(f"{WATCH} seen.jsonl")
    assert (result.code, result.out) == (0, "seen.jsonl: 1 pictures answered, 0 of them unreadable\n")
    Path("seen.jsonl").unlink()
    slow.write_bytes(whole[:60])
    looks({6: lambda: slow.write_bytes(whole)})  # so slowly that a part of it was taken for the whole
    assert prgkit(f"{WATCH} seen.jsonl").code == 1
    assert ["class" in answer for answer in answers()] == [False, True]


@pytest.mark.parametrize("skew_s", [-1e6, 1e6])  # of the clock of the machine that keeps the folder
def test_a_picture_that_is_written_over_is_answered_anew(
    prgkit: PrgkitCommand, project_copy: Path, looks: Script, skew_s: float
) -> None:
    latest, written_s = Path("drop/latest.png"), time.time() + skew_s
    latest.parent.mkdir()

    def put(number: int) -> None:
        nonlocal written_s
        shutil.copy(f"photos/{number:02}.png", latest)
        written_s += 1
        os.utime(latest, (written_s, written_s))

    alone = [row["top"] for row in prgkit("predict photos/00.png photos/01.png photos/02.png --json").json["predict"]]
    put(0)
    looks({6: lambda: put(1)})
    assert prgkit(f"{WATCH} seen.jsonl").code == 0
    assert [answer["top"] for answer in answers()] == alone[:2]
    looks({})  # what has an answer is not asked again after a restart, until it is another
    assert prgkit(f"{WATCH} seen.jsonl").out.startswith("seen.jsonl: 0 pictures answered")
    looks({6: lambda: put(2)})
    assert prgkit(f"{WATCH} seen.jsonl").code == 0
    assert [answer["top"] for answer in answers()] == alone
    looks({})
    assert prgkit(f"{WATCH} seen").out.startswith("seen: 1 pictures answered")
    before = Path("seen/drop/latest.png.jpg").read_bytes()
    looks({6: lambda: put(0)})
    assert prgkit(f"{WATCH} seen").out.startswith("seen: 1 pictures answered")
    assert Path("seen/drop/latest.png.jpg").read_bytes() != before


def test_a_picture_that_is_written_over_every_second_is_answered(tmp_path: Path, looks: Script) -> None:
    from prgkit.evaluate.live import watched

    latest, taken = tmp_path / "latest.png", []
    looks({look: lambda look=look: latest.write_bytes(bytes(9 - look % 4)) for look in range(2, 40, 2)})  # type: ignore[misc]
    with suppress(KeyboardInterrupt):
        for path in watched(tmp_path):
            taken.append(path)
    assert len(taken) > 15


def test_a_picture_that_is_gone_once_it_is_answered_stops_nothing(
    prgkit: PrgkitCommand, project_copy: Path, looks: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.evaluate.predict import Model

    stream = Model.stream

    def consumed(*given: Any, **how: Any) -> Any:
        for answer in stream(*given, **how):
            if answer.image == "drop/a.png":
                Path(answer.image).unlink()
            yield answer

    Path("drop").mkdir()
    for name in "ab":
        shutil.copy("photos/00.png", f"drop/{name}.png")
    monkeypatch.setattr(Model, "stream", consumed)
    looks({})
    result = prgkit(f"{WATCH} seen")
    assert (result.code, [path.name for path in Path("seen/drop").iterdir()]) == (1, ["b.png.jpg"])
    assert result.err.startswith("drop/a.png does not exist")
    assert result.err.endswith("Error: 1 of 2 pictures have no answer; the others are answered\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_folder_that_goes_away_ends_it_and_leaves_the_answers(
    prgkit: PrgkitCommand, project_copy: Path, looks: Script, as_json: bool
) -> None:
    Path("drop").mkdir()
    shutil.copy("photos/00.png", "drop/a.png")
    looks({6: lambda: shutil.rmtree("drop")})
    result = prgkit(f"{WATCH} seen.jsonl" + (" --json" if as_json else ""))
    assert (result.code, [answer["image"] for answer in answers()]) == (1, ["drop/a.png"])
    assert result.err.endswith(
        "Error: the watched folder can no longer be read: No such file or directory\n  where: drop\n"
        "  fix: bring it back, and give the same command again\n"
    )
    if as_json:
        assert result.json["predict"] == answers()
    else:
        assert result.out == "seen.jsonl: 1 pictures answered, 0 of them unreadable\n"
