"""A few labels beside the teacher, mixed images, heads that vote or share class vectors: what a run learns and keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prgkit.config.recipe import Recipe, validate
from prgkit.config.sections import StudentConfig
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.errors import ImagesError, RecipeError
from prgkit.outputs import TeacherOutput
from prgkit.progress import NullProgress
from prgkit.storage.atomic import read_sealed
from prgkit.storage.run import Run
from prgkit.student.heads import ClassVectors, DualHead
from prgkit.student.model import build_student, load_student, reparameterised
from prgkit.training.batches import mixup
from prgkit.training.distill import distill
from prgkit.training.few_shot import best_mixing
from prgkit.training.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 48 pictures that nobody has labelled, 24 that have labels, and the targets of both."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "unlabelled").mkdir()
    pictures, labels = load_digits("train")
    for number in range(48):
        pictures[number].save(folder / "unlabelled" / f"{number}.png")
    for number in range(48, 72):
        for name, label in (("few", labels[number]), ("wrong", (labels[number] + 1) % 10)):
            (folder / name / CLASSES[label]).mkdir(parents=True, exist_ok=True)
            pictures[number].save(folder / name / CLASSES[label] / f"{number}.png")
    return folder


class Told(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def recipe_for(folder: Path, objective: Any, labelled: str | None = None, **training: Any) -> Recipe:
    raw = {
        "data": {
            "images": str(folder / "unlabelled"),
            "labelled": str(folder / labelled) if labelled else None,
            "classes": list(CLASSES),
            "prompts": ["the digit {}", "a {}"],
            "held_out": 0.2,
        },
        "teacher": {"model": "demo:digits", "batch_size": 16},
        "views": {"count": 2, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": objective,
        "training": {"epochs": 2, "batch_size": 16, "workers": 0, "precision": "fp32", **training},
    }
    return validate(raw, where="test").resolved()


def trained(folder: Path, name: str, *given: Any, **training: Any) -> Run:
    return distill(recipe_for(folder, *given, **training), folder / name, folder / "targets", NullProgress())


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_two_heads_vote_by_hand() -> None:
    heads = DualHead(3, 2)
    heads.alpha.fill_(0.25)
    heads.beta.fill_(2.0)
    first, second = torch.tensor([[0.9, 0.1]]).log(), 2 * torch.tensor([[0.2, 0.8]]).log()  # beta takes the 2 away
    expected = torch.tensor([[0.25 * 0.9 + 0.75 * 0.2, 0.25 * 0.1 + 0.75 * 0.8]])
    torch.testing.assert_close(heads.mix(first, second).exp(), expected)
    rounded = heads.half().mix(torch.tensor([[40.0, -40.0]]).half(), torch.tensor([[80.0, -80.0]]).half())
    assert rounded.isfinite().all()  # both are sure of the first class: e^-80 is no float16


def test_the_vote_goes_to_the_head_that_the_labels_find_more_probable() -> None:
    labels = np.array([0, 1, 2, 0])
    right, wrong = 5 * np.eye(3, dtype=np.float32)[labels], 5 * np.eye(3, dtype=np.float32)[(labels + 1) % 3]
    assert best_mixing(right, wrong, labels)[0] == pytest.approx(0.95)
    assert best_mixing(wrong, right, labels)[0] == pytest.approx(0.05)
    doubtful = right.copy()
    doubtful[3] = wrong[3]  # right on three of four, and as sure of each
    assert best_mixing(wrong, doubtful, labels)[1] > 1  # less sure is more probable


def test_mixed_images_have_mixed_targets() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    side = TeacherOutput(torch.eye(2), probabilities.log(), torch.tensor([0, 1]), torch.arange(2))
    for step in range(50):
        images, told = mixup(torch.tensor([0, 200]).view(2, 1, 1, 1), side, 1.0, seed=(0, step))
        if images[0] != 0:  # the other image is not the same one
            break
    share = 1 - float(images[0]) / 200  # of itself
    wanted = share * probabilities[0] + (1 - share) * probabilities[1]
    torch.testing.assert_close(told.logits[0].exp(), wanted)
    length = math.hypot(share, 1 - share)
    torch.testing.assert_close(told.features[0], torch.tensor([share / length, (1 - share) / length]))
    assert told.labels.tolist() == told.logits.argmax(dim=1).tolist()
    again, _ = mixup(torch.tensor([0, 200]).view(2, 1, 1, 1), side, 1.0, seed=(0, step))
    assert torch.equal(images, again)  # a function of the step, so that a run can go on


def test_a_few_labels_teach_one_head_and_choose_the_vote(folder: Path) -> None:
    dho = {"name": "dho"}
    run, other = trained(folder, "dho", dho, "few"), trained(folder, "wrong-labels", dho, "wrong")
    weights, misled = load_file(run.weights), load_file(other.weights)
    assert not torch.equal(weights["second.head.weight"], torch.zeros_like(weights["second.head.weight"]))
    assert not torch.equal(weights["model.classifier.weight"], misled["model.classifier.weight"])
    student = load_student(run)
    assert student.second is not None
    assert 0.05 <= float(student.second.alpha) <= 0.95
    with torch.no_grad():
        answer = student(pixels())
        torch.testing.assert_close(student.inference_model()(pixels()), answer.logits)
        torch.testing.assert_close(answer.logits, student.second.mix(*answer.heads))
    torch.testing.assert_close(answer.logits.exp().sum(dim=1), torch.ones(4))
    assert run.metrics()[-1]["ce"] > 0
    with pytest.raises(RecipeError, match=r"data\.labelled: name a few labelled images"):
        recipe_for(folder, dho)


@pytest.mark.parametrize("name", ["promptkd", "clipkd"])
def test_a_student_without_a_head_scores_by_class_vectors(folder: Path, name: str) -> None:
    run = trained(folder, name, {"name": name})
    student = load_student(run)
    assert student.scorer is not None
    assert student.scorer.vectors.shape == (10, run.teacher_facts.width)
    torch.testing.assert_close(student.scorer.vectors.norm(dim=1), torch.ones(10))
    with torch.no_grad():
        answer = student(pixels())
        torch.testing.assert_close(student.inference_model()(pixels()), answer.logits)
        student.use_class_vectors(student.scorer.vectors[:3], float(student.scorer.scale))  # the classes are changed
        torch.testing.assert_close(student(pixels()).logits, answer.logits[:, :3])
    records = run.metrics()
    assert records[-1]["kl"] < records[0]["kl"]


@pytest.mark.parametrize("model", ["repvit_m0_9", "shvit_s1"])  # both fuse their heads: one has no layer to ask then
def test_two_heads_vote_alike_when_the_network_is_fused(model: str) -> None:
    student = build_student(StudentConfig(model=model, image_size=64), classes=4, teacher_width=8)
    student.add_second_head()
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    deployed = student.inference_model()
    with torch.no_grad():
        before = deployed(images)
        deployed.model = reparameterised(deployed.model)
        torch.testing.assert_close(deployed(images), before, atol=1e-4, rtol=1e-4)


def test_class_vectors_score_by_hand_and_never_in_bfloat16() -> None:
    scorer = ClassVectors(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), 10.0)
    torch.testing.assert_close(scorer(torch.tensor([[0.0, 5.0]])), torch.tensor([[0.0, 8.0]]))
    features = torch.tensor([[0.3, 0.7]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer(features), ClassVectors(scorer.vectors, 10.0)(features))
        rounded = scorer(features)
    assert torch.equal(rounded, scorer(features))


@pytest.mark.parametrize(
    ("objective", "targets", "said"),
    [
        ([{"name": "promptkd"}, {"name": "dho"}], {}, "dho needs a class head"),
        ({"name": "clipkd"}, {"debias": 1.0}, "of the corrections only refine: inmap gives such scores"),
        ({"name": "promptkd"}, {"refine": "stata"}, "of the corrections only refine: inmap gives such scores"),
    ],
)
def test_what_cannot_stand_together_is_said_at_once(folder: Path, objective: Any, targets: Any, said: str) -> None:
    raw = recipe_for(folder, {"name": "prg"}, "few").model_dump(mode="json")
    with pytest.raises(RecipeError, match=said):
        validate({**raw, "objective": objective, "targets": targets}, where="test")


def test_images_that_choose_the_vote_teach_no_one_and_those_that_teach_choose_nothing(folder: Path) -> None:
    recipe = recipe_for(folder, {"name": "dho"}, "few")
    everything = recipe.data.model_copy(update={"images": str(folder)})  # the labelled ones are among them, too
    told = Told()
    dataset = prepare(recipe.model_copy(update={"data": everything}), folder / "targets", told)
    learned, held_out, images = len(dataset.train_indices), len(dataset.val_indices), len(dataset.image_index)
    assert images - learned - held_out > 0
    assert told.notes[-1] == (
        f"learning from {learned} of {images} images: {held_out} held out, none dropped, "
        f"{images - learned - held_out} left to the labelled ones"
    )
    assert dataset.labelled is not None
    own = dataset.labelled.dataset
    names = [
        {part.image_index.keys[position] for position in positions}
        for part, positions in (
            (dataset, dataset.train_indices),
            (dataset, dataset.val_indices),
            (own, own.val_indices),
        )
    ]
    assert names[0]
    assert names[1]
    assert not names[0] & names[2]
    assert not names[1] & set(own.image_index.keys)


def test_too_few_labels_are_refused_before_the_teacher_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "three").mkdir()
    for path in sorted((folder / "few").rglob("*.png"))[:3]:
        target = folder / "three" / path.relative_to(folder / "few")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.setattr("prgkit.training.prepare.embed_images", lambda *_: pytest.fail("the teacher is asked"))
    with pytest.raises(ImagesError) as caught:
        prepare(recipe_for(folder, {"name": "dho"}, "three"), folder / "targets", NullProgress())
    assert str(caught.value) == (
        f"3 labelled images are too few to learn from\n  where: {folder / 'three'}\n"
        "  fix: label at least four, better some of each class, or drop data.labelled"
    )


def test_an_objective_begins_alike_whatever_was_probed_before(folder: Path) -> None:
    """A run that probed its precision, and one killed after the probe and gone on, learn beside the student the same."""
    probed = trained(folder, "probed", {"name": "crd"}, precision="auto", epochs=1)
    card = read_sealed(probed.card_file)
    chosen = card["precision"]["chosen"]
    told = trained(folder, "told", {"name": "crd"}, precision=chosen, epochs=1)
    assert probed.metrics()[0]["loss"] == told.metrics()[0]["loss"]


@pytest.mark.parametrize("name", ["crd", "ofa"])
def test_what_an_objective_learns_beside_the_student_stays_at_home(folder: Path, name: str) -> None:
    run = trained(folder, name, {"name": name}, mixup=0.2, epochs=6)
    assert not [key for key in load_file(run.weights) if not key.startswith(("model.", "projector."))]
    records = run.metrics()
    assert records[-1]["loss"] < records[0]["loss"]
