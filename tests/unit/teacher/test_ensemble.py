"""Several teachers averaged as one: the mean of their logits, a store each, and how far they differ."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from prgkit.config.recipe import Recipe, save_recipe, validate
from prgkit.data.index import index_images
from prgkit.data.sources import open_images
from prgkit.demo.digits import load_digits
from prgkit.errors import PrgkitError, RecipeError
from prgkit.progress import NullProgress
from prgkit.storage.run import Run, start_run
from prgkit.teacher.answers import teacher_answers
from prgkit.teacher.clip import Teacher
from prgkit.teacher.ensemble import TeacherEnsemble, as_learned, computed_as, teacher_fingerprint
from prgkit.teacher.stores import list_stores
from prgkit.teacher.weights import teacher_identity
from prgkit.teacher.zero_shot import ZeroShotClassifier, log_shares, no_adjustment
from prgkit.training.distill import distill
from prgkit.training.dry_run import estimate
from prgkit.training.prepare import prepare
from prgkit.training.pseudo_labels import pseudo_label_statistics
from prgkit.training.statistics import measure_disagreement, summarise_disagreement

IMAGES = 24
TINY = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "resize_mode": "shortest"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, and a second teacher with random weights beside the demo's."""
    folder = tmp_path_factory.mktemp("joint")
    (folder / "photos").mkdir()
    for number, image in enumerate(load_digits("train")[0][:IMAGES]):
        image.save(folder / "photos" / f"{number:03}.png")
    tiny = folder / "tiny"
    tiny.mkdir()
    (tiny / "open_clip_config.json").write_text(json.dumps(TINY))
    torch.manual_seed(1)
    weights = open_clip.create_model(f"local-dir:{tiny}", load_weights=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tiny / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the views and prompts that each teacher, known by its width, is shown."""
    counted: Counter[str] = Counter()
    embed_images, embed_prompts = Teacher.embed_images, Teacher.embed_prompts

    def count_images(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 1:  # one black image at loading tells the width
            counted[f"views of {self.width}"] += len(pixels)
        return embed_images(self, pixels)

    def count_prompts(self: Teacher, prompts: Any) -> torch.Tensor:
        counted[f"prompts of {self.width}"] += sum(map(len, prompts))
        return embed_prompts(self, prompts)

    monkeypatch.setattr(Teacher, "embed_images", count_images)
    monkeypatch.setattr(Teacher, "embed_prompts", count_prompts)
    return counted


def recipe_for(place: Path, *teachers: dict[str, Any], **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "data": {
            "images": str(place / "photos"),
            "classes": ["zero", "one", "two"],
            "prompts": ["the digit {}", "a {}"],
            "held_out": 0.2,
        },
        "teacher": list(teachers) if len(teachers) > 1 else teachers[0],
        "views": {"count": 1},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"workers": 0, "epochs": 1, "batch_size": 8, "precision": "fp32"},
        **changes,
    }
    return validate(raw, where="test").resolved()


def digits() -> dict[str, Any]:
    return {"model": "demo:digits", "batch_size": 8}


def tiny(place: Path) -> dict[str, Any]:
    return {"model": f"local-dir:{place / 'tiny'}", "batch_size": 8}


# What several teachers are together.


class Stored:
    """A store whose teacher says what it is told to."""

    def __init__(self, features: torch.Tensor, prompts: torch.Tensor, logit_scale: float) -> None:
        self.seen, self.read, self.logit_scale = features, prompts, logit_scale
        self.width = features.shape[1]
        self.card = SimpleNamespace(teacher={"model": f"of width {self.width}"})

    def features(self, rows: np.ndarray, _views: np.ndarray) -> torch.Tensor:
        return self.seen[rows]

    def prompts(self, *_: Any) -> torch.Tensor:
        return self.read

    def rows(self, keys: Any, *, views: int) -> np.ndarray:
        return np.array([int(key) for key in keys])


def test_the_logits_are_the_mean_of_the_teachers_by_hand() -> None:
    first = Stored(torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), 10.0)  # says 10, 0
    second = Stored(torch.tensor([[0.0, 0.6, 0.8]]), torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]), 30.0)  # 18, 24
    joint = TeacherEnsemble([first, second])  # type: ignore[list-item]
    features = joint.features(joint.rows(["0"], views=1), np.zeros(1, dtype=int))
    prompts = joint.prompts((), (), pytest.fail)
    assert (joint.width, joint.logit_scale) == (5, 20.0)
    torch.testing.assert_close(features, torch.tensor([[0.5, 0.0, 0.0, 0.6 * 0.75**0.5, 0.8 * 0.75**0.5]]))
    logits = joint.logit_scale * torch.einsum("bd,mcd->bmc", features, prompts)
    torch.testing.assert_close(logits, torch.tensor([[[14.0, 12.0]]]))


def test_any_teachers_make_unit_vectors_whose_logits_are_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    stores = [Stored(unit(6, width), unit(2, 3, width), scale) for width, scale in ((8, 100.0), (5, 14.3), (16, 60.0))]
    joint = TeacherEnsemble(stores)  # type: ignore[arg-type]
    features = joint.features(joint.rows(list("012345"), views=1), np.zeros(6, dtype=int))
    prompts = joint.prompts((), (), pytest.fail)
    for vectors in (features, prompts):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))
    mine = [one.logit_scale * torch.einsum("bd,mcd->bmc", one.seen, one.read) for one in stores]
    together = joint.logit_scale * torch.einsum("bd,mcd->bmc", features, prompts)
    torch.testing.assert_close(together, torch.stack(mine).mean(dim=0), rtol=1e-5, atol=1e-4)


def test_probabilities_are_averaged_by_hand_and_the_surer_teacher_may_count_more() -> None:
    scale, eye = 2.0, torch.eye(2)[None]
    said = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()  # what the two teachers say of an image
    features = torch.cat([one / scale for one in said])[None]  # the prompts are the axes
    joint = torch.cat([eye, eye], dim=2) / 2  # the logits of each are 2 * 2 / 2 times a feature
    plain = ZeroShotClassifier(joint, scale, "mean", no_adjustment(2))
    torch.testing.assert_close(plain.raw_logits(features).softmax(dim=1), torch.tensor([[0.75, 0.25]]))
    even = replace(plain, average="probabilities", widths=(2, 2))
    torch.testing.assert_close(even.each_teacher(features)[:, 0], said)
    torch.testing.assert_close(even.raw_logits(features).exp(), torch.tensor([[0.7, 0.3]]))
    sure = torch.tensor([[[50.0, 0.0]], [[0.0, 0.0]]])  # certain, and at even odds: entropies 0 and ln 2
    shares = log_shares(sure, "confidence").exp()[:, 0]
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(shares @ sure[:, 0].softmax(dim=1), torch.tensor([5 / 6, 1 / 6]))
    torch.testing.assert_close(
        log_shares(said[:, None].flip(2).repeat(2, 1, 1)[::2], "confidence").exp(), torch.full((2, 1), 0.5)
    )


# A run of several.


def test_each_teacher_has_a_store_of_its_own_that_other_runs_share(
    place: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    alone = prepare(recipe_for(place, digits()), tmp_path, NullProgress())
    width = alone.store.width
    assert set(calls) == {f"views of {width}", f"prompts of {width}"}
    calls.clear()
    both = prepare(recipe_for(place, digits(), tiny(place)), tmp_path, NullProgress())
    assert set(calls) == {"views of 12", "prompts of 12"}
    calls.clear()
    again = prepare(recipe_for(place, tiny(place)), tmp_path, NullProgress())
    assert not calls
    positions, views = alone.train_indices[:8], np.ones(8, dtype=int)
    per_prompt = [
        one.classifier.per_prompt(one.teacher_output(positions, views, torch.device("cpu")).features)
        for one in (alone, again, both)
    ]
    torch.testing.assert_close(per_prompt[2], (per_prompt[0] + per_prompt[1]) / 2, rtol=1e-5, atol=1e-4)
    assert isinstance(both.store, TeacherEnsemble)
    features = both.store.features(both.rows[positions], views)
    named = both.classifier.each_teacher(features).argmax(dim=2)
    for mine, one in zip(named, (alone, again), strict=True):
        assert mine.tolist() == one.teacher_output(positions, views, torch.device("cpu")).labels.tolist()
    assert len({one.fingerprint() for one in (alone, again, both)}) == 3


def test_a_student_of_two_teachers_is_trained_judged_and_keeps_both_stores(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(place, digits(), tiny(place))
    progress = Noting()
    run = distill(recipe, Path("runs/two"), Path("targets"), progress)
    card, found = run.teacher_facts, run.quality()
    assert (card.model, card.weights) == ("demo:digits + tiny", None)
    assert sorted(row.runs for row in list_stores(Path("targets")) if row.teacher) == [["runs/two"]] * 2
    assert found is not None
    assert found.teachers is not None
    assert [one.teacher for one in found.teachers.average] == ["demo:digits", "tiny"]
    assert 0 < found.teachers.differ <= 100
    assert any(note.startswith("  teachers    they name different classes on ") for note in progress.notes)

    images = index_images(open_images(recipe.data.images), workers=1)
    monkeypatch.setattr("prgkit.teacher.clip.load_teacher", lambda *_: pytest.fail("nothing is new to a teacher"))
    weighted = teacher_answers(run, recipe, images, np.arange(len(images)), NullProgress()).logits
    dataset = prepare(recipe, Path("targets"), NullProgress())
    said = dataset.teacher_output(np.arange(len(images)), np.zeros(len(images), dtype=int), torch.device("cpu"))
    np.testing.assert_allclose(weighted, said.logits.numpy(), rtol=1e-5, atol=1e-5)


def test_a_run_of_averaged_probabilities_tells_each_teachers_share(place: Path, tmp_path: Path) -> None:
    recipe = recipe_for(place, digits(), tiny(place), targets={"average": "confidence", "debias": 1.0})
    progress = Noting()
    run = distill(recipe, tmp_path / "run", tmp_path / "targets", progress)
    found = run.quality()
    assert found is not None
    assert list(found.teacher_shares) == ["demo:digits", "tiny"]
    assert sum(found.teacher_shares.values()) == pytest.approx(1, abs=1e-3)
    assert any(note.startswith("  shares      demo:digits ") for note in progress.notes)
    images = index_images(open_images(recipe.data.images), workers=1)
    judged = teacher_answers(run, recipe, images, np.arange(len(images)), NullProgress()).logits
    dataset = prepare(recipe, tmp_path / "targets", NullProgress(), run)
    said = dataset.teacher_output(np.arange(len(images)), np.zeros(len(images), dtype=int), torch.device("cpu"))
    np.testing.assert_allclose(judged, said.logits.numpy(), rtol=1e-5, atol=1e-5)
    plain = prepare(recipe_for(place, digits(), tiny(place)), tmp_path / "targets", NullProgress())
    other = plain.teacher_output(np.arange(len(images)), np.zeros(len(images), dtype=int), torch.device("cpu"))
    assert not torch.allclose(other.logits.softmax(dim=1), said.logits.softmax(dim=1), atol=1e-3)
    # How far an image is from every class has nothing to do with how the answers are averaged.
    assert found.outliers == pseudo_label_statistics(plain, recipe_for(place, digits(), tiny(place))).outliers


def test_a_teacher_of_random_weights_is_the_same_each_time_and_knows_nothing(place: Path, tmp_path: Path) -> None:
    untaught = {**digits(), "weights": "random"}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    features = [
        prepare(recipe_for(place, untaught), tmp_path / str(time), NullProgress()).store.features(
            np.arange(IMAGES), np.zeros(IMAGES, dtype=int)
        )
        for time in range(2)
    ]
    assert torch.equal(features[0], features[1])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert recipe_for(place, untaught).teacher_name == "demo:digits random"
    stores = {
        recipe_for(place, one).teacher[0].weights: teacher_identity(recipe_for(place, one).teacher[0])
        for one in (untaught, digits())
    }
    assert stores["random"] != stores[None]


class Noting(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_rehearsal_tells_what_each_teacher_takes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    prepare(recipe_for(place, digits()), tmp_path, NullProgress())
    found = estimate(recipe_for(place, digits(), tiny(place)), tmp_path / "run", tmp_path, NullProgress())
    seen, new = found.teachers
    assert (seen.teacher, seen.views_missing, seen.targets_bytes) == ("demo:digits", 0, 0)
    assert (new.teacher, new.views_missing, new.targets_bytes) == ("tiny", 2 * IMAGES, 2 * IMAGES * 12 * 2)
    assert found.targets_bytes == new.targets_bytes
    assert found.summary["images"].endswith(f"{IMAGES} new to a teacher")
    assert found.summary["teacher"].startswith("demo:digits + tiny, 2 views an image, about ")
    assert "tiny 0 s and 1.1 KiB)" in found.summary["teacher"]


def test_a_run_keeps_to_the_store_that_it_learned_from(place: Path, tmp_path: Path) -> None:
    recipe, run, root = recipe_for(place, {"model": "demo:digits"}), Run(tmp_path / "run"), tmp_path / "targets"
    start_run(run.folder, recipe)
    first = prepare(recipe, root, NullProgress(), run).store
    run.metrics_file.touch()  # so it has begun
    larger = recipe_for(place, {"model": "demo:digits", "batch_size": 128})
    second = prepare(larger, root, NullProgress()).store
    assert second.name != first.name
    assert prepare(recipe, root, NullProgress()).store.name == second.name  # of two, a new run takes the larger batch

    assert prepare(recipe, root, NullProgress(), run).store.name == first.name
    images = index_images(open_images(recipe.data.images), workers=1)
    assert len(teacher_answers(run, recipe, images, np.arange(2), NullProgress()).logits) == 2
    assert teacher_fingerprint(as_learned(recipe, run, root), root) == run.teacher_facts.fingerprint
    assert teacher_fingerprint(as_learned(larger, run, root), root) != run.teacher_facts.fingerprint  # as is asked


def test_a_run_of_a_gpu_keeps_its_teacher_where_its_stores_are_gone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run, root = recipe_for(place, {"model": "demo:digits"}), Run(tmp_path / "run"), tmp_path / "targets"
    start_run(run.folder, recipe)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr("prgkit.teacher.clip.teacher_precision", lambda _: "bf16")
        on_a_gpu.setattr("prgkit.teacher.weights.teacher_precision", lambda _: "bf16")
        on_a_gpu.setattr(Teacher, "_fitting_batch_size", lambda _: 256)
        prepare(recipe, root, NullProgress(), run)
    shutil.rmtree(root)
    assert teacher_fingerprint(recipe, root) != run.teacher_facts.fingerprint  # as this device would have it
    learned = as_learned(recipe, run, root)
    assert [(config.precision, config.batch_size) for config in learned.teacher] == [("bf16", 256)]
    assert teacher_fingerprint(learned, root) == run.teacher_facts.fingerprint
    assert computed_as(recipe, root, run.teacher_facts.fingerprint) == learned
    assert computed_as(recipe, root, "of another teacher") == recipe


# What a recipe may say.


def test_one_teacher_in_a_list_is_the_same_recipe_as_its_mapping(place: Path, tmp_path: Path) -> None:
    mapping, listed = recipe_for(place, digits()), recipe_for(place, digits(), teacher=[digits()])
    assert mapping.fingerprint() == listed.fingerprint()
    assert mapping.model_dump(mode="json")["teacher"]["model"] == "demo:digits"
    both = recipe_for(place, digits(), tiny(place))
    save_recipe(both, tmp_path / "recipe.yaml")
    assert Run(tmp_path).recipe == both
    assert both.teacher_name == "demo:digits + tiny"


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ([], "teacher: name at least one"),
        ([{"model": "a"}, {"model": "b"}, {"model": "a", "precision": "bf16"}], "teacher: each teacher of a list may stand there once"),
        ([{"model": "a"}, "b"], "teacher[1]: write a mapping such as {key: value}, not 'b'"),
        ([{"model": "a"}, {"weights": "b"}], "teacher[1].model: missing"),
        ([{"model": "a", "modell": "b"}], "teacher[0].modell: unknown key; did you mean 'model'?"),
        ({"model": "a", "modell": "b"}, "teacher.modell: unknown key; did you mean 'model'?"),
        ([{"model": "a", "node_weight": 1}], "teacher[0].node_weight: unknown key; it belongs in objective.node_weight"),
        ([{"model": "a"}, {"model": "b", "batch_size": "8"}], "teacher[1].batch_size: YAML reads 8 as text; write 8, without quotes"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_list_of_teachers_is_told_where_it_is(place: Path, teacher: Any, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_for(place, digits(), teacher=teacher)
    assert str(caught.value).splitlines()[1].strip() == told


def test_the_same_teacher_under_two_names_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").symlink_to(place / "tiny")
    twice = recipe_for(place, tiny(place), {"model": f"local-dir:{tmp_path / 'copy'}", "batch_size": 4})
    with pytest.raises(PrgkitError, match="two of the recipe's teachers are the same: "):
        prepare(twice, tmp_path / "targets", NullProgress())


# How far they differ.


def test_disagreement_is_counted_by_hand() -> None:
    alone = np.array([[0, 0, 1, 2, 1], [0, 1, 1, 1, 2], [0, 0, 1, 2, 1]])
    found = measure_disagreement(
        alone, np.array([0, 0, 1, 1, 1]), teachers=("a", "b", "c"), classes=("cat", "dog", "owl")
    )
    assert found.model_dump(mode="json", by_alias=True) == {
        "differ": 60.0,
        "average": [
            {"teacher": "a", "agreement": 80.0},
            {"teacher": "b", "agreement": 60.0},
            {"teacher": "c", "agreement": 80.0},
        ],
        "classes": [
            {"class": "dog", "contested": 3, "named": 4},
            {"class": "owl", "contested": 2, "named": 2},
            {"class": "cat", "contested": 1, "named": 2},
        ],
    }
    assert summarise_disagreement(found) == [
        ("teachers", "they name different classes on 60.0 % of the images; with their average agree a on 80.0 %, b on 60.0 %, c on 80.0 %"),
        ("contested", "dog (3 of 4), owl (2 of 2), cat (1 of 2) of the images that a teacher gives to that class"),
    ]  # fmt: skip
    same = measure_disagreement(alone[[0, 2]], alone[0], teachers=("a", "c"), classes=("cat", "dog", "owl"))
    assert (same.differ, same.classes, len(summarise_disagreement(same))) == (0.0, [], 1)
