"""A student that starts from another run's: what it takes over, what its card says of it, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prgkit.config.recipe import Recipe, validate
from prgkit.errors import PrgkitError, RunError, StudentError
from prgkit.storage.run import Run, require_own_folder, start_run
from prgkit.student.model import Student, build_student, load_student, start_student, student_preprocessing
from prgkit.training.checkpoint import save_tensors

WIDTH = 12
PETS = ["cat", "dog", "owl", "hen"]


def recipe_for(classes: list[str] = PETS, objective: str = "kd", **student: Any) -> Recipe:
    raw = {
        "data": {"images": "photos", "classes": classes},
        "teacher": {"model": "demo:digits"},
        "student": {"model": "test_resnet", "image_size": 48, **student},
        "objective": {"name": objective},
    }
    return validate(raw, where="test").resolved()


def built(recipe: Recipe, seed: int = 0) -> Student:
    torch.manual_seed(seed)
    return build_student(recipe.student, classes=len(recipe.classes), teacher_width=WIDTH)


def general_run(folder: Path, recipe: Recipe, *, finished: bool = True) -> tuple[Run, Student]:
    run, student = start_run(folder, recipe), built(recipe, seed=1)
    teacher = {"model": "demo:digits", "weights": None, "fingerprint": "broad", "targets": [], "logit_scale": 1.0}
    images = {"source": "photos", "used": 1200, "duplicates": 0, "unreadable": [], "left_out": "", "grey_range": None}
    facts = student.facts(recipe.student)
    run.update_card(teacher={**teacher, "width": WIDTH}, images=images, student=facts, finished=finished)
    save_tensors(run.weights, student.state_dict(), {"epoch": 3, "agreement": 61.5, "held_out_kl": 0.5})
    return run, student


@pytest.fixture
def general(tmp_path: Path) -> tuple[Run, Student]:
    return general_run(tmp_path / "general", recipe_for(crop=0.9))


def same(one: Student, other: Student, *, part: str = "", but: str = "-") -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine if name.startswith(part) and but not in name)


def test_the_backbone_is_the_run_s_and_the_rest_is_new(general: tuple[Run, Student]) -> None:
    run, earlier = general
    recipe = recipe_for(["one", "two"], initial=str(run.folder))
    student, fresh = built(recipe), built(recipe_for(["one", "two"]))
    assert same(student, earlier, part="model.", but="model.fc.")
    assert not same(fresh, earlier, part="model.", but="model.fc.")
    assert same(student, fresh, part="model.fc.")
    assert same(student, fresh, part="projector.")
    assert student.training
    assert student_preprocessing(recipe.student).crop == 0.9  # as it was trained; timm's own is 0.95
    assert student_preprocessing(recipe_for(initial=str(run.folder), crop=0.8).student).crop == 0.8


def test_pictures_reach_it_as_they_reached_the_run_s_student(tmp_path: Path) -> None:
    """timm's resnet18.tv_in1k is of ImageNet's mean and bilinear; resnet18 alone is resnet18.a1_in1k, and bicubic."""
    run, earlier = general_run(tmp_path / "general", recipe_for(model="resnet18.tv_in1k"))
    student = built(recipe_for(model="resnet18", initial=str(run.folder), image_size=64))
    assert (earlier.preprocessing.interpolation, earlier.preprocessing.image_size) == ("bilinear", 48)
    assert student.preprocessing == replace(earlier.preprocessing, image_size=64)
    started, _ = general_run(tmp_path / "started", recipe_for(model="resnet18", initial=str(run.folder)))
    assert load_student(started).preprocessing == earlier.preprocessing


@pytest.mark.parametrize(
    ("classes", "objective", "teacher", "projector", "head"),
    [
        (PETS, "kd", "broad", True, True),
        (PETS, "kd", "another", False, True),
        (PETS[::-1], "kd", "broad", True, False),  # the same names in another order are other outputs
        (PETS, "promptkd", "broad", True, False),
    ],
)
def test_projector_and_head_come_along_where_they_fit(
    general: tuple[Run, Student], classes: list[str], objective: str, teacher: str, projector: bool, head: bool
) -> None:
    run, earlier = general
    recipe = recipe_for(classes, objective, initial=str(run.folder))
    torch.manual_seed(0)
    facts = run.teacher_facts.model_copy(update={"fingerprint": teacher})
    student = start_student(recipe, facts, (torch.zeros(len(PETS), WIDTH), 1.0))
    assert same(student, earlier, part="projector.") == projector
    assert same(student, earlier, part="model.fc.") == head


def test_the_card_says_what_it_began_with(general: tuple[Run, Student], tmp_path: Path) -> None:
    run, _ = general
    facts = built(recipe_for(initial=str(run.folder))).facts(recipe_for(initial=str(run.folder)).student)
    assert facts.initial_run is not None
    assert (facts.initial_run.name, facts.initial_run.classes) == ("general", tuple(PETS))
    told = "the student of the run general, which demo:digits taught 4 classes (cat, dog, owl, ...) on 1,200 images"
    assert facts.origin == told
    second, _ = general_run(tmp_path / "second", recipe_for(["a", "b"], initial=str(run.folder)), finished=False)
    third = built(recipe_for(initial=str(second.folder))).facts(recipe_for(initial=str(second.folder)).student)
    assert third.origin == (
        "the student of the run second (epoch 3, unfinished), which demo:digits taught 2 classes (a, b) on 1,200 "
        f"images, and which began with {told}"
    )
    assert (
        facts.model_copy(update={"initial": "pretrained", "initial_run": None})
    ).origin == "timm's pretrained weights"
    assert built(recipe_for()).facts(recipe_for().student).origin == ""


def refused(recipe: Recipe) -> PrgkitError:
    with pytest.raises(StudentError) as caught:
        built(recipe)
    return caught.value


def test_what_cannot_start_a_student_is_refused_by_name(general: tuple[Run, Student]) -> None:
    run, _ = general
    given = {"initial": str(run.folder)}
    error = refused(recipe_for(model="test_efficientnet", **given))
    assert (
        error.what
        == "student.initial names a run whose student is a test_resnet, and this one is to be a test_efficientnet"
    )
    assert (error.where, error.fix) == (
        run.folder,
        "set student.model to test_resnet, or start from a run of test_efficientnet",
    )
    run.weights.write_bytes(run.weights.read_bytes()[:-4])
    assert refused(recipe_for(**given)).what.startswith("the student's weights are damaged: ")
    run.weights.unlink()
    assert refused(recipe_for(**given)).what == "the run has no student yet"


def test_a_run_does_not_start_from_itself(tmp_path: Path) -> None:
    recipe = recipe_for(initial=str(tmp_path / "new"))
    with pytest.raises(RunError, match=r"student\.initial names the run itself"):
        require_own_folder(tmp_path / "new", recipe)


@pytest.mark.parametrize("kind", ["run", "file"])
def test_other_weights_behind_the_path_are_another_start(
    general: tuple[Run, Student], tmp_path: Path, kind: str
) -> None:
    run, _ = general
    recipe = recipe_for(initial=str(run.folder if kind == "run" else run.weights))
    task = start_run(tmp_path / "task", recipe)
    task.update_card(student=built(recipe).facts(recipe.student))
    task.append_metrics({"epoch": 1, "loss": 1.0})
    require_own_folder(task.folder, recipe)
    whole = run.weights.read_bytes()
    save_tensors(
        run.weights, built(recipe_for(), seed=9).state_dict(), {"epoch": 3, "agreement": 61.5, "held_out_kl": 0.5}
    )
    with pytest.raises(RunError, match=r"it differs in what student\.initial holds"):
        require_own_folder(task.folder, recipe)
    run.weights.write_bytes(whole)
    require_own_folder(task.folder, recipe)
    run.weights.unlink()  # whoever needs it says that it is missing
    require_own_folder(task.folder, recipe)
