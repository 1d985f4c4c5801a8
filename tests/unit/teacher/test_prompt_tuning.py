"""Adapting the teacher: a context learned on a few labels, of one teacher, and nothing learned from evaluation labels."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageOps

from prgkit.config.recipe import Recipe, validate
from prgkit.data.index import index_images, select_labelled
from prgkit.data.sources import open_images
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.errors import ImagesError, PrgkitError, RecipeError, TeacherError
from prgkit.progress import NullProgress
from prgkit.storage.atomic import sha256
from prgkit.storage.run import differences, start_run
from prgkit.storage.tensors import load_tensors
from prgkit.teacher import prompt_tuning as adapting
from prgkit.teacher.clip import Teacher, load_teacher
from prgkit.teacher.prompt_context import PromptContext, load_context, save_context
from prgkit.teacher.prompt_tuning import Shots, describe_tuning, draw, learn, score, tune_prompt
from prgkit.training.prepare import prepare

SHOTS = 8


class Listener(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def sort_into(folder: Path, split: str, numbers: range) -> Path:
    """Write digits in black on white, which the teacher knows only the other way round, into folders by class."""
    images, labels = load_digits(split)
    for number in numbers:
        place = folder / CLASSES[labels[number]]
        place.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(images[number]).save(place / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sort_into(tmp_path_factory.mktemp("labelled"), "train", range(120))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sort_into(tmp_path_factory.mktemp("judged"), "test", range(60))


def recipe_for(
    labelled: Path | None, *, images: Path | None = None, context: Path | None = None, **data: Any
) -> Recipe:
    raw = {
        "data": {
            "images": str(images or labelled),
            "labelled": str(labelled) if labelled else None,
            "classes": list(CLASSES),
            "prompts": ["{}"],
            **data,
        },
        "teacher": {"model": "demo:digits", "batch_size": 16, "context": str(context) if context else None},
        "views": {"count": 1, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "ce"},
        "training": {"workers": 0},
    }
    return validate(raw, where="test").resolved()


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "EPOCHS", 8)


@pytest.fixture(scope="module")
def adapted(labelled: Path, judged: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("adapted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting, "EPOCHS", 8)
        recipe = recipe_for(labelled, evaluation=str(judged))
        found = tune_prompt(
            recipe, folder / "mine.safetensors", folder / "targets", shots=SHOTS, progress=NullProgress()
        )
    return {**found.model_dump(mode="json"), "report": found, "folder": folder}


def test_a_context_learns_from_labels_and_says_what_it_is_worth(adapted: dict[str, Any]) -> None:
    tensors, facts = load_tensors(Path(adapted["context"]))
    assert tensors["vectors"].shape == (4, 24)
    assert facts["schema"] == "prgkit.context/1"
    assert (facts["words"], facts["teacher_name"], facts["shots"]) == ("a photo of a", "demo:digits", SHOTS)
    assert facts["classes"] == list(CLASSES)
    assert adapted["learned"]["images"] + adapted["held_out"]["images"] == 10 * SHOTS
    assert adapted["held_out"]["images"] == 10 * SHOTS // 4
    for part in ("learned", "held_out"):
        assert adapted[part]["context"]["loss"] < adapted[part]["plain"]["loss"] - 0.1
    assert describe_tuning(adapted["report"]).startswith(
        f"the teacher names {adapted['held_out']['context']['accuracy']:.1f} % of 20 held-out labelled images (loss "
    )


def test_the_context_behind_the_images_is_found() -> None:
    """Let the images be what the teacher reads under a hidden context, with some noise."""
    teacher = load_teacher(recipe_for(None, images=Path()).teacher[0], torch.device("cpu"))
    sentences = teacher.sentences([f"a photo of a {name}." for name in CLASSES], "a photo of a")
    words, generator = teacher.embed_words(sentences), torch.Generator().manual_seed(0)
    hidden = words + 10 * words.square().mean().sqrt() * torch.randn(words.shape, generator=generator)
    read = teacher.embed_sentences(sentences, hidden).repeat(4, 1)  # [40, D]
    images = torch.nn.functional.normalize(read + 0.1 * torch.randn(read.shape, generator=generator), dim=1)
    stored = SimpleNamespace(features=lambda rows, views: images[rows])
    labels = np.tile(np.arange(10), 4)
    shots = Shots(stored, np.arange(40), labels, 1, np.arange(30), np.arange(30, 40))  # type: ignore[arg-type]
    context, found = learn(teacher, CLASSES, shots, seed=0, progress=NullProgress())
    logits = teacher.logit_scale * images[30:] @ teacher.embed_sentences(sentences, words).T
    plain = score(logits, torch.arange(10))
    assert plain is not None
    assert found.held_out.loss < plain.loss - 0.2
    assert found.held_out.accuracy > plain.accuracy
    logits = teacher.logit_scale * images[30:] @ teacher.embed_sentences(sentences, context.vectors).T
    assert score(logits, torch.arange(10)) == found.held_out  # what is returned is that epoch's


def test_the_same_labels_give_the_same_file_wherever_they_lie_and_evaluation_labels_do_not_count(
    adapted: dict[str, Any], labelled: Path, judged: Path, tmp_path: Path
) -> None:
    wrong, names = tmp_path / "wrong", random.Random(0).sample(CLASSES, len(CLASSES))
    for path in judged.rglob("*.png"):
        place = wrong / names[CLASSES.index(path.parent.name)]
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    recipe = recipe_for(labelled, evaluation=str(wrong))
    again = tune_prompt(
        recipe, tmp_path / "again.safetensors", tmp_path / "targets", shots=SHOTS, progress=NullProgress()
    )
    assert sha256(Path(again.context)) == sha256(Path(adapted["context"]))
    moved = Path(shutil.copytree(labelled, tmp_path / "moved"))
    for path in sorted(moved.rglob("*.png")):
        path.rename(path.with_name(f"renamed {path.name}"))
    recipe = recipe_for(moved, evaluation=str(wrong))
    found = tune_prompt(
        recipe, tmp_path / "moved.safetensors", tmp_path / "targets", shots=SHOTS, progress=NullProgress()
    )
    assert load_tensors(Path(found.context))[0]["vectors"].equal(load_tensors(Path(again.context))[0]["vectors"])


def test_a_student_learns_from_the_context_without_a_teacher_pass(
    adapted: dict[str, Any], labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, path = adapted["folder"] / "targets", Path(adapted["context"])
    plain = prepare(recipe_for(labelled), root, NullProgress())
    shown: list[int] = []
    embed_images = Teacher.embed_images

    def count(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        shown.append(len(pixels))
        return embed_images(self, pixels)

    monkeypatch.setattr(Teacher, "embed_images", count)
    recipe = recipe_for(labelled, context=path)
    dataset = prepare(recipe, root, NullProgress())
    assert shown == [1]  # one black image at loading tells the width
    assert dataset.store.stores[0].folder == plain.store.stores[0].folder
    assert dataset.classifier.prompts.shape == (1, len(CLASSES), 64)
    assert dataset.fingerprint() != plain.fingerprint()
    assert dataset.store.facts().context is not None  # the run's card tells it
    assert plain.store.facts().context is None
    assert prepare(recipe, root, NullProgress()).classifier.prompts.equal(dataset.classifier.prompts)
    assert shown == [1]  # what it reads is stored, and read again without it

    images = index_images(open_images(str(labelled)), workers=1)
    features = dataset.store.features(dataset.store.rows(images.keys, views=1), np.zeros(len(images), dtype=int))
    labels = torch.from_numpy(select_labelled(images, CLASSES)[1])
    by_plain, by_context = (score(side.classifier.logits(features), labels) for side in (plain, dataset))
    assert by_plain is not None
    assert by_context is not None
    assert by_context.loss < by_plain.loss - 0.1


def test_another_context_in_the_same_place_is_another_run(
    adapted: dict[str, Any], labelled: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(adapted["context"], tmp_path / "mine.safetensors"))
    recipe = recipe_for(labelled, context=path)
    run = start_run(tmp_path / "run", recipe)
    before, first = recipe.fingerprint(), prepare(recipe, adapted["folder"] / "targets", NullProgress(), run)
    assert differences(run, recipe) == []
    context = load_context(recipe.teacher[0])
    assert context is not None
    save_context(path, PromptContext(context.vectors.flip(1), context.words), recipe.teacher[0], {})
    assert recipe.fingerprint() != before
    assert differences(run, recipe) == ["what teacher.context holds"]
    second = prepare(recipe, adapted["folder"] / "targets", NullProgress())
    assert first.fingerprint() != second.fingerprint()
    assert not first.classifier.prompts.allclose(second.classifier.prompts, atol=1e-3)


def test_shots_are_drawn_by_content_and_seed(labelled: Path) -> None:
    images = index_images(open_images(str(labelled)), workers=1)
    labels = select_labelled(images, CLASSES)[1]

    def drawn(shots: int, seed: int = 0, barred: frozenset[str] = frozenset()) -> list[set[str]]:
        return [{images.keys[place] for place in of} for of in draw(images, labels, shots, barred=barred, seed=seed)]

    few, many = drawn(4), drawn(6)
    assert [len(of) for of in many] == [6] * 10
    assert all(one < more for one, more in zip(few, many, strict=True))
    assert drawn(4, seed=1) != few
    assert Counter(len(of) for of in drawn(10_000)) == Counter(np.bincount(labels).tolist())
    barred = frozenset().union(*few)
    assert not barred & frozenset().union(*drawn(4, barred=barred))


def test_classes_with_few_labels_or_none_are_named(labelled: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(labelled, tmp_path / "few"))
    shutil.rmtree(folder / "nine")
    for path in sorted((folder / "three").iterdir())[2:]:
        path.unlink()
    heard, recipe = Listener(), recipe_for(folder)
    found = tune_prompt(recipe, tmp_path / "few.safetensors", tmp_path / "targets", shots=3, progress=heard)
    assert "1 of 10 classes have fewer than 3 labelled images: three (2)" in heard.notes
    assert "1 of 10 classes have none; the others' context is theirs too: nine" in heard.notes
    assert found.classes == [name for name in CLASSES if name != "nine"]
    assert found.held_out.model_dump() == {"images": 0, "plain": None, "context": None}
    assert found.epoch == found.epochs
    assert "of 26 learned labelled images" in describe_tuning(found)
    with_context = recipe_for(folder, context=tmp_path / "few.safetensors")
    assert prepare(with_context, tmp_path / "targets", NullProgress()).classifier.prompts.shape[1] == 10


def refusal(recipe: Recipe, tmp_path: Path) -> PrgkitError:
    with pytest.raises(PrgkitError) as caught:
        tune_prompt(recipe, tmp_path / "no.safetensors", tmp_path / "targets", shots=2, progress=NullProgress())
    assert not (tmp_path / "no.safetensors").exists()
    return caught.value


def test_what_cannot_be_learned_from_is_refused(labelled: Path, tmp_path: Path) -> None:
    error = refusal(recipe_for(None, images=labelled), tmp_path)
    assert isinstance(error, RecipeError)
    assert error.where == "data.labelled"
    error = refusal(recipe_for(labelled, evaluation=str(labelled)), tmp_path)
    assert isinstance(error, ImagesError)
    assert error.what == "no class has labelled images; those that are evaluation images do not count"
    error = refusal(recipe_for(labelled / "one", images=labelled), tmp_path)
    assert "images have no label" in error.what


def test_labels_may_come_from_a_table(labelled: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    rows = ["file,label"]
    for path in sorted(labelled.rglob("*.png")):
        shutil.copy(path, flat)
        rows.append(f"{path.name},{path.parent.name}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    recipe = recipe_for(flat, labelled_labels=str(tmp_path / "labels.csv"))
    found = tune_prompt(recipe, tmp_path / "table.safetensors", tmp_path / "targets", shots=1, progress=NullProgress())
    assert (found.learned.images, found.classes) == (10, list(CLASSES))


def test_a_context_of_another_teacher_or_a_damaged_one_is_refused(
    adapted: dict[str, Any], labelled: Path, tmp_path: Path
) -> None:
    demo = Path(adapting.__file__).parents[1] / "demo" / "teacher"
    other = Path(shutil.copytree(demo, tmp_path / "other"))
    config = (other / "open_clip_config.json").read_text()
    (other / "open_clip_config.json").write_text(config + " ")

    def error_of(context: Path, **page: Any) -> TeacherError:
        recipe = recipe_for(labelled, context=context)
        with pytest.raises(TeacherError) as caught:
            load_context(recipe.teacher[0].model_copy(update=page))
        return caught.value

    path = Path(adapted["context"])
    error = error_of(path, model=f"local-dir:{other}")
    assert error.what == "mine.safetensors was learned for the teacher demo:digits, not for other"
    assert load_context(recipe_for(labelled, context=path).teacher[0].model_copy(update={"model": f"local-dir:{demo}"}))
    assert error_of(tmp_path / "none.safetensors").what.startswith("there is no learned context")
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert (
        error_of(damaged).what == "damaged.safetensors is no whole learned context: its content is not what was written"
    )
    damaged.write_bytes(content[:100])
    assert error_of(damaged).what.startswith("damaged.safetensors is no whole learned context: ")
    with pytest.raises(TeacherError, match="there is no learned context"):  # before anything is read
        prepare(recipe_for(tmp_path / "nowhere", context=tmp_path / "none"), tmp_path / "targets", NullProgress())
