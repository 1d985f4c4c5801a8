"""Objectives and students against each other: the same targets, paired differences, and no label in any choice."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from timm import create_model

from prgkit import demo
from prgkit.config.recipe import Recipe, validate
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.errors import CameApartError, ImagesError, RecipeError, RunError
from prgkit.evaluate.compare import trials as comparing
from prgkit.evaluate.compare.aggregate import aggregate, comparison_document, difference, spread
from prgkit.evaluate.compare.schema import Difference, FailedTrial, ObjectiveComparison, Spread, TrialResult
from prgkit.evaluate.compare.trials import LADDER, EvalSplit, Plan, Trial, common, compare, trials_of
from prgkit.evaluate.report.html import page
from prgkit.evaluate.report.markdown import markdown
from prgkit.progress import NullProgress
from prgkit.storage.atomic import sha256
from prgkit.storage.locks import locked
from prgkit.storage.run import Run
from prgkit.storage.tensors import save_tensors


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "unlabelled").mkdir()
    for number, image in enumerate(load_digits("train")[0][:64]):
        image.save(folder / "unlabelled" / f"{number:03}.png")
    for number, (image, label) in enumerate(zip(*load_digits("test"), strict=True)):
        if number < 40:
            for name, told in (("right", label), ("planted", (label + 1) % 10)):
                place = folder / name / CLASSES[told]
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{number}.png")
    return folder


def recipe_for(pictures: Path, evaluation: str | None = "right", **objective: Any) -> Recipe:
    raw = {
        "data": {
            "images": str(pictures / "unlabelled"),
            "evaluation": str(pictures / evaluation) if evaluation else None,
            "classes": list(CLASSES),
            "prompts": ["the digit {}", "a {}"],
            "held_out": 0.2,
        },
        "teacher": {"model": "demo:digits", "batch_size": 16},
        "views": {"count": 1, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg", **objective},
        "training": {"epochs": 2, "batch_size": 16, "workers": 0, "precision": "fp32", "seed": 5},
    }
    return validate(raw, where="test").resolved()


def planned(recipe: Recipe, **given: Any) -> list[Trial]:
    return trials_of(recipe, Plan(**{"objectives": [], "students": [], "seeds": 1, **given}))


def result(label: str, seed: int, right: list[bool], *, teacher: float = 80.0, **changes: Any) -> TrialResult:
    """Return a finished trial whose answers are right where ``right`` says so."""
    facts = {
        "label": label,
        "fingerprint": "f",
        "training_images": "t",
        "student": "small",
        "objective": [{"name": label}],
        "seed": seed,
        "top1": 100 * sum(right) / len(right),
        "agreement_teacher": 50.0,
        "selected": {"epoch": 1, "agreement": 60.0, "held_out_kl": 0.5},
        "images_per_s": 1.0,
        "answers": [int(one) for one in right],
        "labels": [1] * len(right),
        "teacher": {"model": "t", "top1": teacher, "top1_uniform_prompts": teacher},
        "images": 1000,
        "epochs": 5,
        "image_size": 32,
        "evaluation": {"source": "s", "images": len(right), "digest": "d"},
    }
    return TrialResult(**{**facts, **changes})


def text_of(comparison: ObjectiveComparison) -> str:
    return markdown(comparison_document(comparison))


def html_of(comparison: ObjectiveComparison) -> str:
    return page(comparison_document(comparison))


def test_rows_keep_the_recipes_own_parameters_and_seeds_count_on(pictures: Path) -> None:
    recipe = recipe_for(pictures, edge_weight=7.0, prompt_weighting="mean")
    trials = planned(recipe, objectives=["kd", "prg"], students=["a", "b"], seeds=2)
    assert [(trial.recipe.student.model, trial.label, trial.recipe.training.seed) for trial in trials[:4]] == [
        ("a", "kd", 5),
        ("a", "kd", 6),
        ("a", "prg", 5),
        ("a", "prg", 6),
    ]
    assert [trial.recipe.student.model for trial in trials[4:]] == ["b"] * 4
    assert {trial.recipe.objective[0].prompt_weighting for trial in trials} == {"mean"}
    assert trials[2].recipe.objective[0].edge_weight == 7.0
    assert len({trial.folder(Path("out")) for trial in trials}) == 8


def test_the_ladder_takes_one_part_of_prg_away_at_a_time(pictures: Path) -> None:
    rungs = planned(recipe_for(pictures), ladder=True)
    assert [trial.label for trial in rungs] == list(LADDER)
    weights = [(page.node_weight, page.edge_weight) for trial in rungs[2:] for page in trial.recipe.objective]
    assert weights == [(3.0, 0.0), (0.0, 1.0), (3.0, 1.0)]


def test_a_sweep_is_every_combination_and_leaves_others_as_they_are(pictures: Path) -> None:
    sweeps = [("node_weight", [0, 3]), ("block", ["raw", "l2"])]
    trials = planned(recipe_for(pictures), objectives=["kd", "prg"], sweeps=sweeps)
    assert [trial.label for trial in trials] == [
        "kd",
        "prg, node_weight 0, block raw",
        "prg, node_weight 0, block l2",
        "prg, node_weight 3, block raw",
        "prg, node_weight 3, block l2",
    ]


def test_the_control_is_marked(pictures: Path) -> None:
    trials = planned(recipe_for(pictures), objectives=["kd", "prg"], random_teacher=True)
    assert [(trial.label, trial.control) for trial in trials] == [
        ("kd", False),
        ("prg", False),
        ("prg, random teacher", True),
    ]
    assert [teacher.weights for trial in trials for teacher in trial.recipe.teacher] == [None, None, "random"]


def test_the_control_reads_no_context_and_two_teachers_that_would_be_one_are_refused(pictures: Path) -> None:
    raw = recipe_for(pictures).model_dump(mode="json")
    raw["teacher"]["context"] = "learned.safetensors"
    taught, control = planned(validate(raw, where="test").resolved(), objectives=["kd"], random_teacher=True)
    assert taught.recipe.teacher[0].context == "learned.safetensors"
    assert [(one.weights, one.context) for one in control.recipe.teacher] == [("random", None)]
    assert control.recipe.templates == ("the digit {}", "a {}")
    raw["teacher"] = [{"model": "RN50", "weights": "openai"}, {"model": "RN50", "weights": "yfcc15m"}]
    with pytest.raises(RecipeError, match="two teachers of one model are the same with random weights"):
        planned(validate(raw, where="test").resolved(), objectives=["kd"], random_teacher=True)
    raw["teacher"][1]["model"] = "RN101"
    assert len(planned(validate(raw, where="test").resolved(), objectives=["kd"], random_teacher=True)) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objectives": ["kdd"]}, "unknown objective 'kdd'; did you mean 'kd'?"),
        ({"sweeps": [("blok", ["raw"])]}, "has a parameter 'blok'; did you mean 'block'?"),
        ({"sweeps": [("block", ["rau"])]}, "objective.block"),
        ({"objectives": []}, "there is no objective to compare"),
        ({"ladder": True, "sweeps": [("node_weight", [1])]}, "the ladder itself sets node_weight"),
    ],
)
def test_what_cannot_be_compared_is_said_before_any_training(pictures: Path, given: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(recipe_for(pictures), **{"objectives": ["prg"], **given})
    assert said in str(caught.value)


def test_aggregation_by_hand() -> None:
    four = {
        ("kd", 0): [True, False, False, False],
        ("kd", 1): [True, True, False, False],
        ("prg", 0): [True, True, False, False],
        ("prg", 1): [True, True, True, True],
    }
    comparison = aggregate([result(label, seed, right) for (label, seed), right in four.items()])
    kd, prg = comparison.rows
    assert (comparison.reference, comparison.seeds, comparison.images) == ("prg", [0, 1], [1000])
    assert kd.top1 == Spread(mean=37.5, deviation=float(np.std([25, 50], ddof=1)), values=[25.0, 50.0])
    assert kd.top1.deviation == pytest.approx(12.5 * math.sqrt(2))
    assert prg.ratio is not None
    assert prg.ratio.values == [62.5, 125.0]
    assert prg.difference is None
    half = 12.706 * 12.5 * math.sqrt(2) / math.sqrt(2)  # the seeds differ by -25 and -50
    assert kd.difference is not None
    assert kd.difference.interval == (pytest.approx(-37.5 - half), pytest.approx(-37.5 + half))
    assert kd.difference == Difference(of="top1", mean=-37.5, interval=kd.difference.interval, over="seeds")
    text = text_of(comparison)
    assert "| small | kd | 37.5 ± 17.7 | 46.9 ± 22.1 | 50.0 ± 0.0 | 60.0 ± 0.0 | -37.5 [-196.3, +121.3] |" in text
    assert "1,000 images, 5 epochs, 32 px, 2 seeds; 4 labelled images; the teacher is right on 80.0 %" in text


def test_one_seed_is_paired_by_image() -> None:
    mine, other = result("kd", 0, [True, False, True, False]), result("prg", 0, [True, True, True, False])
    found = difference([mine], [other])
    assert found is not None
    assert (found.mean, found.over) == (-25.0, "images")
    of_one = difference([result("kd", 0, [True])], [result("prg", 0, [False])])
    assert of_one is not None
    assert (of_one.mean, of_one.interval) == (100.0, None)
    half = 1.96 * 50 / math.sqrt(4)  # 0, -100, 0, 0: their standard deviation is 50
    assert found.interval == (pytest.approx(-25 - half), pytest.approx(-25 + half))
    assert difference([mine], [result("prg", 1, [True] * 4)]) is None  # no seed in common
    assert spread([1.0, None]) is None


def test_what_recipes_have_in_common_is_told_key_by_key() -> None:
    recipes: list[Any] = [{"a": None, "b": {"x": 1, "y": 2}, "t": [1]}, {"b": {"x": 1, "y": 3}, "c": 1, "t": [1]}]
    assert common(recipes) == {"b": {"x": 1}, "t": [1]}
    assert common(recipes[:1]) == recipes[0]


def test_a_comparison_is_made_once_and_goes_on_where_it_was(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = planned(recipe_for(pictures), objectives=["ce", "prg"])
    trained: list[str] = []
    real = comparing.distill

    def counted(recipe: Recipe, *rest: Any) -> Run:
        trained.append(recipe.objective_name)
        if len(trained) == 2:
            raise RecipeError("the power went")
        return real(recipe, *rest)

    monkeypatch.setattr(comparing, "distill", counted)
    with pytest.raises(RecipeError, match="the power went"):
        compare(trials, tmp_path / "out", tmp_path / "targets", NullProgress(), command="prgkit compare")
    found = compare(trials, tmp_path / "out", tmp_path / "targets", NullProgress(), command="prgkit compare")
    assert trained == ["ce", "prg", "prg"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found.model_dump(mode="json")
    shared = trials[0].recipe.model_dump(mode="json")
    assert found.recipe == {**shared, "objective": {"weight": 1.0, "prompt_weighting": "max"}}
    alone = json.loads(trials[0].file(tmp_path / "out").read_text())
    assert (alone["schema"], alone["seed"], len(alone["answers"])) == (
        "prgkit.trial/2",
        5,
        alone["evaluation"]["images"],
    )
    html = html_of(found)
    assert "<script" not in html
    assert "paired by image" in html

    moved = next((pictures / "right").rglob("*.png"))
    place = pictures / "right" / CLASSES[(CLASSES.index(moved.parent.name) + 1) % 10] / moved.name
    place.parent.mkdir(exist_ok=True)
    moved.rename(place)  # a label is put right: the finished trials are judged again, and none is trained
    again = compare(trials, tmp_path / "out", tmp_path / "targets", NullProgress(), command="prgkit compare")
    assert again.evaluation[0].digest != found.evaluation[0].digest
    assert all(row.difference is None or row.difference.over == "images" for row in again.rows)
    place.rename(moved)

    planted = planned(recipe_for(pictures, "planted"), objectives=["ce"])
    other = compare(planted, tmp_path / "planted", tmp_path / "targets", NullProgress(), command="prgkit compare")
    runs = [Run(trials[0].folder(tmp_path / name)) for name in ("out", "planted")]
    assert sha256(runs[0].weights) == sha256(runs[1].weights)
    assert runs[0].card.best == runs[1].card.best is not None
    assert (other.teacher[0].top1 or 0) < (found.teacher[0].top1 or 0)  # the labels were read, when all was chosen


def test_a_trial_that_comes_apart_is_left_out_and_one_of_other_images_is_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = planned(recipe_for(pictures, None), objectives=["ce", "kd"])
    real = comparing.distill

    def breaking(recipe: Recipe, *rest: Any) -> Run:
        if recipe.objective_name == "ce":
            raise CameApartError("the loss is not finite")
        return real(recipe, *rest)

    monkeypatch.setattr(comparing, "distill", breaking)
    found = compare(trials, tmp_path / "out", tmp_path / "targets", NullProgress(), command="prgkit compare")
    assert [row.label for row in found.rows] == ["kd"]
    assert found.failed == [FailedTrial(trial="test_efficientnet, ce, seed 5", reason="the loss is not finite")]
    assert "Left out: test_efficientnet, ce, seed 5 (the loss is not finite)." in text_of(found)
    assert (found.labelled, found.rows[0].top1) == (False, None)
    written = (tmp_path / "out" / "compare.json").read_bytes()
    monkeypatch.setattr(comparing, "distill", real)
    with locked(trials[0].folder(tmp_path / "out"), "run"), pytest.raises(RunError, match="another process"):
        compare(trials, tmp_path / "out", tmp_path / "targets", NullProgress(), command="prgkit compare")
    monkeypatch.setattr(comparing, "distill", breaking)
    assert (tmp_path / "out" / "compare.json").read_bytes() == written
    extra = pictures / "unlabelled" / "more.png"
    load_digits("train")[0][99].save(extra)
    with pytest.raises(RunError, match="the images have changed since this trial was trained"):
        compare(trials, tmp_path / "out", tmp_path / "targets", NullProgress(), command="prgkit compare")
    extra.unlink()


def test_a_trial_of_another_teacher_or_of_other_first_weights_is_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Path(shutil.copytree(Path(demo.__file__).with_name("teacher"), tmp_path / "teacher"))
    first = tmp_path / "first.safetensors"
    save_model(create_model("test_efficientnet"), str(first))
    raw = recipe_for(pictures).model_dump(mode="json")
    raw["teacher"]["model"], raw["student"]["initial"] = f"local-dir:{teacher}", str(first)
    trials = planned(validate(raw, where="test").resolved(), objectives=["ce"])
    arguments = (trials, tmp_path / "out", tmp_path / "targets", NullProgress())
    before = compare(*arguments, command="prgkit")
    monkeypatch.setattr(comparing, "distill", None)  # from here on nothing is trained
    for path, said in (
        (teacher / "open_clip_model.safetensors", "the teacher has changed since this trial was trained"),
        (first, "what student.initial holds has changed since this trial was trained"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole + b" ")
        with pytest.raises(RunError, match=said) as caught:
            compare(*arguments, command="prgkit")
        assert caught.value.where == trials[0].folder(tmp_path / "out")
        path.write_bytes(whole)
        assert compare(*arguments, command="prgkit") == before
    written = json.loads(trials[0].file(tmp_path / "out").read_text())
    older = {key: value for key, value in written.items() if key not in ("teacher_files", "initial_sha256", "control")}
    trials[0].file(tmp_path / "out").write_text(json.dumps(older))
    first.write_bytes(b"")
    assert compare(*arguments, command="prgkit") == before  # one of before knows neither, and stays


def test_novel_classes_are_asked_for_by_name_and_taught_to_no_one(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe_for(pictures)
    trials = planned(whole, objectives=["kd", "prg"], base_to_novel=True)
    assert {trial.recipe.classes for trial in trials} == {CLASSES[:5]}
    assert {trial.recipe.data.evaluation for trial in trials} == {None}
    found = compare(trials, tmp_path / "out", tmp_path / "targets", NullProgress(), command="prgkit", whole=whole)
    kd, prg = found.rows
    assert found.novel is not None
    assert found.evaluation[0].images + found.novel.images == 40
    assert (kd.novel, kd.harmonic) == (None, None)  # it has no features in the teacher's space
    assert prg.top1
    assert prg.novel
    base, novel = prg.top1.mean, prg.novel.mean
    assert (prg.harmonic.mean if prg.harmonic else 0) == pytest.approx(
        2 * base * novel / (base + novel) if novel else 0
    )
    assert "5 classes" in text_of(found)
    assert "| student | objective | top-1 % |" in text_of(found)
    assert "novel top-1 %" in text_of(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"classes": list(CLASSES[:3])}}, "four classes or more"),
        ({"data": {"evaluation": None}}, "labelled images to judge by"),
        ({"targets": {"debias": 1.0}}, "the prior of the base classes"),
    ],
)
def test_what_has_no_two_halves_is_refused(pictures: Path, change: dict[str, Any], said: str) -> None:
    raw = recipe_for(pictures).model_dump(mode="json")
    for section, values in change.items():
        raw[section] |= values
    recipe = validate(raw, where="test").resolved()
    with pytest.raises(RecipeError, match=said):
        planned(recipe, objectives=["prg"], base_to_novel=True)


def test_a_half_without_images_is_said_before_any_training(pictures: Path, tmp_path: Path) -> None:
    for name in CLASSES[:5]:
        for path in (pictures / "right" / name).glob("*.png"):
            (tmp_path / "base" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "base" / name / path.name).write_bytes(path.read_bytes())
    raw = recipe_for(pictures).model_dump(mode="json")
    raw["data"]["evaluation"] = str(tmp_path / "base")
    whole = validate(raw, where="test").resolved()
    trials = planned(whole, objectives=["prg"], base_to_novel=True)
    with pytest.raises(ImagesError, match="all evaluation images are of the first half of the classes"):
        compare(trials, tmp_path / "out", tmp_path / "targets", NullProgress(), command="prgkit", whole=whole)


def test_a_context_that_knows_the_novel_classes_is_refused(pictures: Path, tmp_path: Path) -> None:
    raw = recipe_for(pictures).model_dump(mode="json")
    raw["teacher"]["context"] = str(tmp_path / "learned.safetensors")
    recipe = validate(raw, where="test").resolved()
    for classes in (CLASSES[:5], CLASSES):
        save_tensors(tmp_path / "learned.safetensors", {"vectors": torch.zeros(1, 1)}, {"classes": list(classes)})
        if classes == CLASSES:
            with pytest.raises(RecipeError, match="has seen labels of novel classes: eight, five, nine"):
                planned(recipe, objectives=["prg"], base_to_novel=True)
        else:
            assert planned(recipe, objectives=["prg"], base_to_novel=True)


def test_images_whose_labels_are_learned_judge_nothing(pictures: Path, tmp_path: Path) -> None:
    targets, recipe = tmp_path / "targets", recipe_for(pictures, None)
    before = EvalSplit.of(recipe, targets, NullProgress())
    images = before.images
    judged = [images.source.path(index) for index in images.indices[before.positions].tolist()]
    for path, name in zip(judged[:2], CLASSES, strict=False):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "labelled" / name)
    raw = recipe.model_dump(mode="json")
    raw["data"]["labelled"], raw["objective"] = str(tmp_path / "labelled"), {"name": "dho"}
    after = EvalSplit.of(validate(raw, where="test").resolved(), targets, NullProgress())
    assert after.positions.tolist() == before.positions.tolist()[2:]
    assert after.digest != before.digest


def test_two_sweeps_are_drawn_as_a_heat_map() -> None:
    configs = [{"name": "prg", "node_weight": n, "edge_weight": e, "block": "raw"} for n in (0, 3) for e in (0, 1)]
    trials = [
        result(f"prg, {config}", 0, [True] * place + [False] * (4 - place), objective=[config])
        for place, config in enumerate(configs)
    ]
    html = html_of(aggregate(trials))
    assert "small: node_weight × edge_weight" in html
    assert "edge_weight 1, node_weight 3: 75.0" in html

    wrong = [False] * 4  # what a student of a random teacher says
    control = result(f"{trials[-1].label}, random teacher", 0, wrong, objective=[configs[-1]], control=True)
    found = aggregate([*trials, control])
    assert "edge_weight 1, node_weight 3: 75.0" in html_of(found)
    assert found.reference == trials[-1].label
    assert [row.difference and row.difference.mean for row in found.rows] == [-75.0, -50.0, -25.0, None, -75.0]
