"""A run's card: filled in as the run goes on, and refused where another prgkit wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prgkit.config.recipe import Recipe, save_recipe, validate
from prgkit.errors import RunError
from prgkit.storage.atomic import read_sealed, write_sealed
from prgkit.storage.find import find_run, standing_where_it_started
from prgkit.storage.run import Run, start_run
from prgkit.storage.run_card import SCHEMA

BEGUN = {"schema": SCHEMA, "prgkit": "0.1", "created": "now", "fingerprint": "f", "origin": "..", "finished": False}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "a run")
    run.update_card(**BEGUN)
    return run


def test_the_file_holds_what_is_known(run: Run) -> None:
    assert read_sealed(run.card_file) == BEGUN
    run.update_card(finished=True, best={"epoch": 3, "agreement": 61.5, "held_out_kl": 0.25})
    assert read_sealed(run.card_file) == {
        **BEGUN,
        "finished": True,
        "best": {"epoch": 3, "agreement": 61.5, "held_out_kl": 0.25},
    }
    assert run.finished
    assert run.card.best is not None
    assert run.card.best.agreement == 61.5


def test_what_is_not_known_yet_is_said_with_the_command_that_goes_on(run: Run) -> None:
    with pytest.raises(RunError) as caught:
        _ = run.teacher_facts
    assert caught.value.what == "the run was stopped before its images were read"
    assert caught.value.fix == f"go on: prgkit distill '{run.recipe_file}' --run '{run.folder}'"
    assert run.target_stores == []


def test_a_card_of_another_schema_is_refused_by_its_number(run: Run) -> None:
    write_sealed(run.card_file, {**BEGUN, "schema": "prgkit.run/2"})
    with pytest.raises(RunError) as caught:
        _ = run.card
    assert caught.value.what == "card.json has schema 'prgkit.run/2', not 'prgkit.run/3'"
    assert caught.value.fix == f"delete it, then: prgkit distill '{run.recipe_file}' --run '{run.folder}'"


def test_a_card_of_another_form_is_damaged(run: Run) -> None:
    write_sealed(run.card_file, {**BEGUN, "finished": "perhaps"})
    with pytest.raises(RunError, match=r"card\.json is damaged: finished: Input should be a valid boolean"):
        _ = run.card


def recipe_of(**changes: Any) -> Recipe:
    page = {
        "data": {"images": "a", "classes": ["b", "c"]},
        "teacher": {"model": "d"},
        "student": {"model": "e"},
        "objective": {"name": "ce"},
    }
    return validate({**page, **changes}, where="test")


@pytest.mark.parametrize("linked", ["runs", "runs/one"])
def test_a_run_behind_a_link_knows_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: str
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "large" / "disk" / "here"
    (project / linked).parent.mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    (project / linked).symlink_to(elsewhere)
    monkeypatch.chdir(project)
    run = start_run(Path("runs/one"), recipe_of())
    for place, given in ((project, Path("runs/one")), (tmp_path, run.folder.resolve()), (run.folder.resolve(), None)):
        monkeypatch.chdir(place)
        with standing_where_it_started(find_run(given)) as there:
            assert Path.cwd() == project
            assert there.recipe.data.images == "a"
        assert Path.cwd() == place


def test_another_folder_is_named_as_a_shell_takes_it(run: Run) -> None:
    save_recipe(recipe_of(), run.recipe_file)
    run.weights.touch()
    with pytest.raises(RunError) as caught:
        start_run(run.folder, recipe_of(objective={"name": "kd"}))
    assert caught.value.fix == f"start a new run with --run '{run.folder}-2', or delete {run.folder}"
