"""The teacher's answers put right, on data where the truth is known since it was made."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prgkit.config.prior import class_shares
from prgkit.config.recipe import Recipe, validate
from prgkit.config.sections import TargetsConfig
from prgkit.data.ticks import Tick
from prgkit.demo.digits import load_digits
from prgkit.errors import PrgkitError, RunError, TargetsError
from prgkit.progress import NullProgress
from prgkit.storage.run import Run, start_run
from prgkit.teacher.answers import teacher_answers
from prgkit.teacher.zero_shot import (
    SavedAdjustment,
    ZeroShotClassifier,
    classifier_of,
    fit_adjustment,
    fit_log_prior,
    fit_temperature,
    mean_entropy,
    no_adjustment,
)
from prgkit.training.corrections import compare_corrections
from prgkit.training.dataset import DistillationDataset
from prgkit.training.prepare import prepare

CLASSES = 10
BIAS = torch.linspace(-2, 2, CLASSES)  # what the simulated teacher adds to its logits


def exact_logits(labels: Tensor, *, signal: float = 2.0) -> Tensor:
    """Log-posteriors, up to a constant, of images drawn as unit Gaussians around ``signal`` times their class's axis.

    Their logits are exact where classes are even: softmax gives the true probabilities.
    """
    noise = torch.randn(len(labels), CLASSES, generator=torch.Generator().manual_seed(0))
    return signal * (signal * torch.nn.functional.one_hot(labels, CLASSES) + noise)


EVEN = torch.arange(6000) % CLASSES


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(dim=1) == labels).float().mean())


def test_a_known_bias_is_found_and_taken_off() -> None:
    exact = exact_logits(EVEN)
    biased = exact + BIAS
    log_prior = fit_log_prior(biased)
    found = log_prior - log_prior.mean()
    assert float((found - BIAS).abs().max()) < 0.1  # 600 images a class
    assert accuracy(biased, EVEN) < accuracy(exact, EVEN) - 8
    assert accuracy(biased - log_prior, EVEN) == pytest.approx(accuracy(exact, EVEN), abs=0.5)
    torch.testing.assert_close((biased - log_prior).softmax(1).mean(0), torch.full((10,), 0.1), atol=2e-5, rtol=0)

    once = biased.softmax(dim=1).mean(dim=0).log()  # one step of it, where images decide something, stops half way
    assert float((once - once.mean() - BIAS).abs().max()) > 0.5
    assert accuracy(biased - once, EVEN) < accuracy(biased - log_prior, EVEN) - 1
    assert float((fit_log_prior(exact) - fit_log_prior(exact).mean()).abs().max()) < 0.1  # nothing to find


def test_where_images_say_nothing_the_prior_is_the_mean_answer() -> None:
    prior = torch.tensor([0.7, 0.2, 0.1])
    torch.testing.assert_close(fit_log_prior((prior.log() + 5).repeat(100, 1)).exp(), prior)


def test_truly_uneven_classes_are_harmed() -> None:
    uneven = torch.cat([torch.zeros(4000, dtype=torch.long), EVEN[:1000]])
    logits = exact_logits(uneven) + torch.bincount(uneven, minlength=CLASSES).log()
    assert accuracy(logits - fit_log_prior(logits), uneven) < accuracy(logits, uneven) - 10


def test_a_class_that_nobody_matched_explodes_nothing() -> None:
    exact = exact_logits(torch.arange(6000) % 9)  # no image of the last class
    teacher = exact + BIAS
    teacher[:, 9] = -80
    log_prior = fit_log_prior(teacher)
    assert float(log_prior[9]) == pytest.approx(-math.log(6000))
    assert int((teacher - log_prior).argmax(dim=1).max()) == 8
    found = log_prior[:9] - log_prior[:9].mean()
    assert float((found - (BIAS[:9] - BIAS[:9].mean())).abs().max()) < 0.1  # the others are corrected as ever
    one_odd_image = teacher.clone()
    one_odd_image[0, 9] = 80
    assert ((one_odd_image - fit_log_prior(one_odd_image)).argmax(dim=1) == 9).sum() == 1


def test_a_class_that_never_comes_leaves_the_others_corrected_as_without_it() -> None:
    labels = EVEN % 2 + 1  # no image of the first
    teacher = exact_logits(labels)[:, :3] + torch.tensor([0.0, 3.0, 0.0])
    shares = class_shares({"none": 0, "one": 1, "two": 1}, ("none", "one", "two"))
    alone, beside = fit_log_prior(teacher[:, 1:]), fit_log_prior(teacher, torch.tensor(shares))
    assert float(beside[1] - beside[2]) == pytest.approx(float(alone[0] - alone[1]), abs=0.01)
    answers = teacher - beside
    torch.testing.assert_close(answers.softmax(1).mean(0), torch.tensor([0, 0.5, 0.5]), atol=1e-3, rtol=0)
    assert accuracy(answers, labels) > accuracy(teacher, labels) + 3


def test_a_class_that_is_known_to_be_rare_gets_its_share() -> None:
    labels = (torch.arange(300) < 3).long()
    even = exact_logits(labels)[:, :2]  # as if both came alike,
    teacher = even + torch.tensor([0.0, 4.0])  # and the rare one is named readily
    assert float(teacher.softmax(1).mean(0)[1]) > 0.3
    for rare in (0.05, 0.01):
        answers = teacher - fit_log_prior(teacher, torch.tensor([1 - rare, rare]))
        assert float(answers.softmax(1).mean(0)[1]) == pytest.approx(rare, rel=0.01)
    assert accuracy(answers, labels) > 98
    torch.testing.assert_close(fit_log_prior(teacher, torch.tensor([0.5, 0.5])), fit_log_prior(teacher))


def test_the_temperature_of_true_probabilities_is_found() -> None:
    exact = exact_logits(EVEN)
    truth = mean_entropy(exact, 1.0) / math.log(CLASSES)
    assert 0.2 < truth < 0.8
    for scale in (0.25, 1.0, 3.0):  # a teacher that doubts too much, one that is right, one too sure of itself
        assert fit_temperature(scale * exact, truth) == pytest.approx(scale, rel=1e-4)
    for share in (0.02, 0.5, 0.98):
        probabilities = (exact / fit_temperature(exact, share)).double().softmax(dim=1)
        entropy = -(probabilities * probabilities.log()).sum(dim=1).mean() / math.log(CLASSES)
        assert float(entropy) == pytest.approx(share, abs=1e-4)


def test_a_temperature_that_cannot_be_is_told() -> None:
    with pytest.raises(TargetsError, match=r"no temperature gives .* a mean entropy of 0\.3 ln C: their classes tie"):
        fit_temperature(torch.zeros(5, 4), 0.3)


def test_a_correction_is_half_way_at_half_strength_and_survives_its_file() -> None:
    logits = exact_logits(EVEN) + BIAS
    whole = fit_adjustment(logits, TargetsConfig(debias=1.0))
    half = fit_adjustment(logits, TargetsConfig(debias=0.5, entropy=0.3))
    torch.testing.assert_close(half.log_prior, whole.log_prior / 2, atol=1e-6, rtol=0)
    assert whole.temperature == 1.0
    assert mean_entropy(half.apply(logits), 1.0) == pytest.approx(0.3 * math.log(CLASSES), rel=1e-4)
    names = [f"class {number}" for number in range(CLASSES)]
    saved = SavedAdjustment(
        made_from="",
        refinement_sha256=None,
        confidence_sha256=None,
        temperature=half.temperature,
        log_prior=half.named(names),
    )
    again = SavedAdjustment.model_validate_json(saved.model_dump_json()).adjustment(names)
    assert torch.equal(again.apply(logits), half.apply(logits))
    assert not again.is_none
    assert no_adjustment(CLASSES).is_none
    assert torch.equal(no_adjustment(CLASSES).apply(logits), logits)


# In a run.


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(load_digits("train")[0][:60]):
        image.save(folder / f"{number:03}.png")
    return folder


def recipe_for(photos: Path, *, keep: dict[str, Any] | None = None, **targets: Any) -> Recipe:
    raw = {
        "data": {"images": str(photos), "classes": "digits", "prompts": "digits", "held_out": 0.1, "keep": keep or {}},
        "teacher": {"model": "demo:digits", "batch_size": 16},
        "views": {"count": 1},
        "targets": targets,
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"workers": 0},
    }
    return validate(raw, where="test").resolved()


class Notes(NullProgress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def learn(photos: Path, folder: Path, notes: Notes | None = None, **page: Any) -> tuple[Run, DistillationDataset]:
    recipe = recipe_for(photos, **page)
    run = start_run(folder / "run", recipe)
    return run, prepare(recipe, photos.parent / "targets", notes or Notes(), run)


@pytest.mark.parametrize("refine", ["inmap", "stata"])
def test_the_teacher_by_itself_is_not_refined(photos: Path, tmp_path: Path, refine: str) -> None:
    run, dataset = learn(photos, tmp_path, refine=refine)
    run.update_card(teacher=dataset.store.facts())
    corrected, by_itself, *_ = teacher_answers(run, run.recipe, dataset.image_index, np.arange(20), NullProgress())
    features = dataset.store.features(dataset.rows[:20], np.zeros(20, dtype=int))
    assert np.array_equal(corrected, dataset.classifier.logits(features).numpy())
    plain = replace(dataset.classifier, prompt_weighting="mean").raw_logits(features).numpy()
    np.testing.assert_allclose(by_itself, plain, rtol=1e-5)
    assert np.abs(corrected - by_itself).max() > 0.1


def test_everyone_is_given_the_same_corrected_answers(photos: Path, tmp_path: Path) -> None:
    notes = Notes()
    run, dataset = learn(photos, tmp_path, notes, debias=1.0, entropy=0.2)
    positions = np.arange(20)
    side = dataset.teacher_output(positions, np.zeros(20, dtype=int), torch.device("cpu"))
    plain: ZeroShotClassifier = replace(dataset.classifier, adjustment=no_adjustment(10))
    said = plain.logits(side.features)
    facts = json.loads(run.answers_file.read_text())
    log_prior = torch.tensor(list(facts["log_prior"].values()), dtype=torch.float32)
    assert torch.equal(side.logits, (said - log_prior) / facts["temperature"])
    assert torch.equal(side.labels, side.logits.argmax(dim=1))

    run.update_card(teacher=dataset.store.facts())
    weighted, uniform, *_ = teacher_answers(run, run.recipe, dataset.image_index, positions, NullProgress())
    torch.testing.assert_close(torch.from_numpy(weighted), side.logits)
    by_itself = replace(plain, prompt_weighting="mean").logits(side.features)
    torch.testing.assert_close(torch.from_numpy(uniform), by_itself)

    found = json.loads(run.quality_file.read_text())
    every = dataset.store.features(dataset.rows, np.zeros(60, dtype=int))
    before, after = plain.logits(every).argmax(dim=1), dataset.classifier.logits(every).argmax(dim=1)
    changed = int((before != after).sum())
    assert 0 < changed < 30
    assert found["correction"]["changed"] == changed
    assert found["balance"]["counts"] == torch.bincount(after, minlength=10).tolist()
    varied = found["correction"]["effective_classes"]
    assert varied["after"] == found["balance"]["effective_classes"]
    assert notes.told[-1].startswith("learning from ")
    rows = {row["name"]: row for row in found["corrections"]}
    table = notes.told[
        notes.told.index("corrections of these answers (targets in the recipe), none of which needs a label:") + 1 :
    ]
    headings = [
        "changed",
        "a class holds",
        "even classes",
        "two views",
        *(f"as {name}" for name in rows if name != "none"),
    ]
    assert re.split("  +", table[0].strip()) == headings
    assert [line.split("  ")[1] for line in table[1:6]] == ["none", "debias", "inmap", "stata", "this recipe (used)"]
    assert rows["none"]["changed"] == 0
    assert rows["this recipe"]["agreement"]["debias"] == 100  # a temperature changes no answer
    assert all(sum(row["mass"]) == pytest.approx(1, abs=1e-4) for row in rows.values())
    assert max(rows["debias"]["mass"]) < max(rows["none"]["mass"])
    assert rows["none"]["ticked"] is None
    assert (
        f"  correction  debias 1.0 changed {changed} of 60 pseudo-labels, as varied as {varied['after']:.1f} even "
        f"classes, before {varied['before']:.1f}; temperature {facts['temperature']:.3g}"
    ) in notes.told


def test_ticks_judge_every_correction_with_what_they_leave_open(photos: Path, tmp_path: Path) -> None:
    run, dataset = learn(photos, tmp_path, debias=1.0)
    answers = dataset.classifier.logits(dataset.store.features(dataset.rows, np.zeros(60, dtype=int))).argmax(dim=1)
    keys, names = dataset.image_index.keys, run.recipe.classes
    named = [names[label] for label in answers.tolist()]
    other = "one" if named[2] == "zero" else "zero"
    ticks = [
        Tick(1, "a", keys[0], named[0], "90", right=True),
        Tick(2, "b", keys[1], named[1], "90", right=False),  # nobody said what it is
        Tick(3, "c", keys[2], other, "90", right=False, named=named[2]),  # of another teacher; its class is known
        Tick(4, "d", keys[3], "one" if named[3] == "zero" else "zero", "90", right=False),  # this answer may be right
    ]
    rows = {row.name: row for row in compare_corrections(dataset, run.recipe, ticks)}
    assert rows["debias"].used
    assert rows["debias"].ticked == (2, 3, 4)


def test_fewer_images_than_classes_are_not_corrected(photos: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.iterdir())[:6]:
        shutil.copy(path, few)
    notes = Notes()
    run, dataset = learn(few, tmp_path, notes, refine="inmap", prior="even")
    assert "images are too few to correct the answers to 10 classes by" in "".join(notes.told)
    assert dataset.classifier.refinement is None
    assert not run.refinement_file.exists()
    assert classifier_of(run, run.recipe, dataset.classifier.prompts, dataset.classifier.logit_scale).refinement is None


def test_a_lost_or_damaged_correction_is_never_guessed(photos: Path, tmp_path: Path) -> None:
    run, dataset = learn(photos, tmp_path, debias=1.0, refine="stata")
    given = (run, run.recipe, dataset.classifier.prompts, dataset.classifier.logit_scale)
    assert torch.equal(classifier_of(*given).adjustment.log_prior, dataset.classifier.adjustment.log_prior)
    content, refinement = run.answers_file.read_text(), run.refinement_file.read_bytes()
    run.refinement_file.write_bytes(refinement[:-1] + b"!")
    with pytest.raises(RunError, match=r"refinement\.safetensors is missing, or not what"):
        classifier_of(*given)
    run.answers_file.write_text(content.replace('"zero": -', '"zero": '))
    with pytest.raises(PrgkitError, match=r"answers\.json is damaged"):
        classifier_of(*given)
    run.answers_file.unlink()
    with pytest.raises(RunError, match="the correction that this run learned with is lost"):
        classifier_of(*given)
    plain, _ = learn(photos, tmp_path / "plain")
    assert not plain.answers_file.exists()
    assert classifier_of(plain, plain.recipe, *given[2:]).adjustment.is_none


def test_the_images_that_are_kept_are_counted_and_told(photos: Path, tmp_path: Path) -> None:
    notes = Notes()
    run, every = learn(photos, tmp_path / "all", notes)
    held_out = len(every.val_indices)
    assert notes.told[-1] == f"learning from {60 - held_out} of 60 images: {held_out} held out, none dropped"
    assert run.card.learned is not None
    assert run.card.learned.model_dump() == {
        "images": 60 - held_out, "held_out": held_out, "dropped": 0, "an_epoch": 60 - held_out
    }  # fmt: skip
    assert not run.confidence_file.exists()

    side = every.teacher_output(every.train_indices, np.zeros(len(every.train_indices), dtype=int), torch.device("cpu"))
    confidence = side.logits.softmax(dim=1).amax(dim=1).numpy()
    threshold = round(float(np.median(confidence)), 3)
    run, some = learn(photos, tmp_path / "some", notes, keep={"min_confidence": threshold})
    assert np.array_equal(some.train_indices, every.train_indices[confidence >= threshold])
    assert np.array_equal(some.val_indices, every.val_indices)
    dropped = len(every.train_indices) - len(some.train_indices)
    assert dropped > 10
    assert notes.told[-1] == (
        f"learning from {len(some.train_indices)} of 60 images: {held_out} held out, {dropped} below a confidence of "
        f"{threshold}"
    )
    assert getattr(run.card.learned, "dropped", None) == dropped

    _, weighted = learn(photos, tmp_path / "weighted", notes, keep={"weighted": True})
    assert weighted.sample_weights is not None
    np.testing.assert_allclose(weighted.sample_weights, confidence, atol=1e-6)
    an_epoch = int(confidence.sum())
    assert weighted.images_an_epoch == an_epoch
    assert notes.told[-1].endswith(f"held out, none dropped; weighted by confidence, {an_epoch} an epoch")
    prints = {dataset.fingerprint() for dataset in (every, some, weighted)}
    assert len(prints | {learn(photos, tmp_path / "debias", debias=0.5)[1].fingerprint()}) == 4

    with pytest.raises(
        TargetsError, match=r"no image is left to learn from: the teacher's confidence is at most 0\.\d"
    ):
        learn(photos, tmp_path / "none", keep={"min_confidence": 0.999}, entropy=0.9)
