"""The training loop: no label reaches it, and a run that was stopped ends bit for bit like one that was not."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from prgkit import workers
from prgkit.config.recipe import Recipe, validate
from prgkit.data import cache
from prgkit.data.augment import MultiViewDataset
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.errors import CameApartError, DiskFullError, ImagesError, PrgkitError, RunError, StudentError, WorkerError
from prgkit.interrupt import Interrupted
from prgkit.progress import NullProgress
from prgkit.storage.atomic import read_sealed, sha256, write_sealed
from prgkit.storage.run import Run
from prgkit.storage.tensors import load_tensors
from prgkit.student.model import load_student
from prgkit.teacher.feature_files import BlockJournal
from prgkit.training.checkpoint import HeldOutScores
from prgkit.training.distill import distill
from prgkit.training.optimizer import schedule
from prgkit.training.prepare import hold_out

EPOCHS = 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(load_digits("train")[0][:72]):
        image.save(folder / f"{number:03}.png")
    for number, (image, label) in enumerate(zip(*load_digits("test"), strict=True)):
        if number < 20:
            (folder.parent / "labelled" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
            image.save(folder.parent / "labelled" / CLASSES[label] / f"{number}.png")
    return folder


def raw_recipe(images: Path, evaluation: Path | None = None, **training: Any) -> dict[str, Any]:
    return {
        "data": {
            "images": str(images),
            "evaluation": str(evaluation) if evaluation else None,
            "classes": list(CLASSES),
            "prompts": ["the digit {}", "a {}"],
            "held_out": 0.1,
        },
        "teacher": {"model": "demo:digits", "batch_size": 16},
        "views": {"count": 2, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"epochs": EPOCHS, "batch_size": 16, "workers": 0, "precision": "fp32", **training},
    }


def recipe_for(images: Path, evaluation: Path | None = None, **training: Any) -> Recipe:
    return validate(raw_recipe(images, evaluation, **training), where="test").resolved()


def outcome(run: Run) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    records = [{name: value for name, value in record.items() if name != "seconds"} for record in run.metrics()]
    return load_file(run.weights), records


def assert_same(one: Run, other: Run) -> None:
    (weights, metrics), (other_weights, other_metrics) = outcome(one), outcome(other)
    assert metrics == other_metrics
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finished")
    return distill(recipe_for(photos), folder / "run", folder / "targets", NullProgress())


def test_a_run_leaves_what_it_promises(finished: Run, photos: Path) -> None:
    records = finished.metrics()
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["loss"] == pytest.approx(record["supervision"] + record["node"] + record["edge"], rel=1e-5)
    assert records[-1]["loss"] < records[0]["loss"]
    assert finished.finished
    averages = list(itertools.accumulate((record["held_out_kl"] for record in records), lambda a, b: 0.7 * a + 0.3 * b))
    best = min(reversed(records), key=lambda record: averages[int(record["epoch"]) - 1])
    assert finished.card.best is not None
    assert finished.card.best.model_dump() == {name: best[name] for name in ("epoch", "agreement", "held_out_kl")}
    assert finished.image_facts.model_dump() == {
        **{"source": str(photos), "used": 72, "duplicates": 0, "unreadable": ()},
        **{"left_out": "", "grey_range": None},
    }
    student = load_student(finished)
    answer = student(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert answer.logits.shape == (2, 10)
    assert answer.features.shape == (2, finished.teacher_facts.width)


def test_labels_shuffled_or_deleted_leave_training_bit_identical(photos: Path, tmp_path: Path, finished: Run) -> None:
    labelled = photos.parent / "labelled"
    with_labels = distill(recipe_for(photos, labelled), tmp_path / "labels", tmp_path / "targets", NullProgress())
    assert_same(with_labels, finished)  # deleted: `finished` has none at all

    shuffled, names = tmp_path / "shuffled", random.Random(0).sample(CLASSES, len(CLASSES))
    for path in labelled.rglob("*.png"):
        wrong = shuffled / names[CLASSES.index(path.parent.name)]
        wrong.mkdir(parents=True, exist_ok=True)
        (wrong / path.name).write_bytes(path.read_bytes())
    assert_same(
        distill(recipe_for(photos, shuffled), tmp_path / "wrong", tmp_path / "targets", NullProgress()), finished
    )


def test_class_folders_of_the_training_images_leak_nothing(photos: Path, tmp_path: Path, finished: Run) -> None:
    images, labels = load_digits("train")
    for number in range(72):
        folder = tmp_path / "sorted" / CLASSES[labels[number]]
        folder.mkdir(parents=True, exist_ok=True)
        images[number].save(folder / f"{number}.png")
    run = distill(recipe_for(tmp_path / "sorted"), tmp_path / "run", tmp_path / "targets", NullProgress())
    assert_same(run, finished)


class StopAt(NullProgress):
    """Sends this process a signal after some images of the student's training."""

    def __init__(self, images: int, number: int) -> None:
        self.images, self.number, self.stage = images, number, ""

    def start(self, stage: str, total: int, unit: str) -> None:
        self.stage = stage

    def advance(self, count: int, facts: str = "") -> None:
        if self.stage == "student" and count:
            self.images -= count
            if self.images == 0:
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("images", "number"), [(16, signal.SIGTERM), (96, signal.SIGINT)])
def test_a_stopped_run_goes_on_bit_for_bit(
    photos: Path, tmp_path: Path, finished: Run, images: int, number: int
) -> None:
    arguments = (recipe_for(photos), tmp_path / "run", tmp_path / "targets")
    with pytest.raises(Interrupted, match="everything up to here is saved"):
        distill(*arguments, StopAt(images, number))
    assert not Run(tmp_path / "run").finished
    assert_same(distill(*arguments, NullProgress()), finished)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_a_student_drops_at_random_is_the_same_after_a_stop(photos: Path, tmp_path: Path) -> None:
    raw = raw_recipe(photos, epochs=1)
    recipe = validate({**raw, "student": {"model": "ghostnet_050", "image_size": 32}}, where="test").resolved()
    whole = distill(recipe, tmp_path / "whole", tmp_path / "targets", NullProgress())
    assert load_student(whole).model.drop_rate == 0.2
    with pytest.raises(Interrupted):
        distill(recipe, tmp_path / "run", tmp_path / "targets", StopAt(16, signal.SIGTERM))
    assert_same(distill(recipe, tmp_path / "run", tmp_path / "targets", NullProgress()), whole)


def test_what_a_student_began_with_is_not_needed_to_go_on(photos: Path, tmp_path: Path, finished: Run) -> None:
    shutil.copytree(finished.folder, tmp_path / "general")
    raw = raw_recipe(photos, epochs=1)
    student = {**raw["student"], "initial": str(tmp_path / "general")}
    recipe = validate({**raw, "student": student}, where="test").resolved()
    whole = distill(recipe, tmp_path / "whole", tmp_path / "targets", NullProgress())
    with pytest.raises(Interrupted):
        distill(recipe, tmp_path / "run", tmp_path / "targets", StopAt(16, signal.SIGTERM))
    began = Run(tmp_path / "run").student_facts
    assert began.initial_run is not None
    shutil.rmtree(tmp_path / "general")
    gone_on = distill(recipe, tmp_path / "run", tmp_path / "targets", NullProgress())
    assert_same(gone_on, whole)
    assert gone_on.student_facts == began


class KillWorkers(StopAt):
    """Kills the workers after some images of a stage, as the system does when memory runs out."""

    def __init__(self, stage: str, images: int) -> None:
        super().__init__(images, signal.SIGKILL)
        self.killed = stage

    def advance(self, count: int, facts: str = "") -> None:
        self.images -= count if self.stage == self.killed else 0
        if self.stage == self.killed and self.images <= 0:
            for worker in workers._running:
                worker.process.kill()


@pytest.mark.parametrize("images", [16, 48, 112])
def test_a_killed_worker_costs_no_step(photos: Path, tmp_path: Path, finished: Run, images: int) -> None:
    arguments = (recipe_for(photos, workers=1), tmp_path / "run", finished.folder.parent / "targets")
    with pytest.raises(WorkerError, match="a process that decodes images was ended by SIGKILL"):
        distill(*arguments, KillWorkers("student", images))
    _, facts = load_tensors(Run(tmp_path / "run").state)
    assert images <= 16 * facts["step"] <= images + 32  # two batches may have been ready
    assert_same(distill(*arguments, NullProgress()), finished)


def test_a_worker_killed_while_the_epoch_is_judged_costs_no_step(
    photos: Path, tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (recipe_for(photos), tmp_path / "run", finished.folder.parent / "targets")

    def fail(*_: Any, **__: Any) -> None:
        raise RunError("a worker died")

    with monkeypatch.context() as patch:
        patch.setattr("prgkit.training.distill.held_out_scores", fail)
        with pytest.raises(RunError, match="a worker died"):
            distill(*arguments, NullProgress())
    _, facts = load_tensors(Run(tmp_path / "run").state)
    assert (facts["step"], facts["epoch"]) == (4, 0)
    assert_same(distill(*arguments, NullProgress()), finished)


def test_a_worker_killed_while_the_teacher_looks_costs_no_block(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prgkit.teacher.feature_store.BLOCK_IMAGES", 16)
    arguments = (recipe_for(photos, workers=1), tmp_path / "run", tmp_path / "targets")
    with pytest.raises(WorkerError, match="a process that decodes images was ended by SIGKILL"):
        distill(*arguments, KillWorkers("teacher", 32))
    (index,) = tmp_path.glob("targets/*/index.bin")
    assert len(list(BlockJournal(index).new_blocks())) >= 1
    assert distill(*arguments, NullProgress()).finished


def test_a_stop_is_heard_while_a_slow_disk_is_waited_for(
    photos: Path, tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (recipe_for(photos, workers=1), tmp_path / "run", finished.folder.parent / "targets")
    render = MultiViewDataset.fill

    def stick(rendered: MultiViewDataset, items: Any, pixels: Any) -> None:
        if stuck.exists():
            time.sleep(60)
        render(rendered, items, pixels)

    class Stick(StopAt):
        def advance(self, count: int, facts: str = "") -> None:
            if self.stage == "student" and count and not stuck.exists():
                stuck.touch()
                signal.setitimer(signal.ITIMER_REAL, 1)

    stuck, began = tmp_path / "stuck", time.monotonic()
    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with monkeypatch.context() as patch:
        patch.setattr(MultiViewDataset, "fill", stick)
        with pytest.raises(Interrupted, match="everything up to here is saved"):
            distill(*arguments, Stick(0, 0))
    signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - began < 30
    stuck.unlink()
    assert_same(distill(*arguments, NullProgress()), finished)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_then_the_same_command(
    photos: Path, tmp_path: Path, finished: Run, number: int
) -> None:
    page = raw_recipe(photos, checkpoint_minutes=0.0001, workers=1)  # one after nearly every step
    (tmp_path / "recipe.yaml").write_text(json.dumps(page))
    run, root = Run(tmp_path / "run"), finished.folder.parent / "targets"
    command = [sys.executable, "-m", "prgkit", "distill", "recipe.yaml", "--run", "run", "--targets", str(root)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not run.state.exists() and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)
    _, said = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL, said
    else:
        assert process.returncode == 130, said
        assert "everything up to here is saved" in said
        assert "Traceback" not in said
    assert not run.finished, "the run had ended before the signal came"
    assert_same(distill(recipe_for(photos, workers=1), run.folder, root, NullProgress()), finished)


def corrected(photos: Path, refine: str, evaluation: Path | None = None) -> Recipe:
    raw = raw_recipe(photos, evaluation)
    raw["data"]["keep"] = {"min_confidence": 0.55, "weighted": True}
    raw["targets"] = {"refine": refine, "prior": "even", "debias": 0.7, "entropy": 0.3}
    return validate(raw, where="test").resolved()


@pytest.mark.parametrize(
    ("refine", "lost"),
    [("none", "confidence.npy"), ("inmap", "answers.json"), ("stata", "refinement.safetensors"), ("inmap", "")],
)
def test_a_stopped_run_with_corrected_answers_and_chosen_images_goes_on_bit_for_bit(
    photos: Path, tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch, refine: str, lost: str
) -> None:
    root = finished.folder.parent / "targets"
    with monkeypatch.context() as patched:
        patched.setattr(
            "prgkit.training.prepare.teacher_loader", lambda _: lambda _: pytest.fail("the teacher is asked")
        )
        whole = distill(corrected(photos, refine), tmp_path / "whole", root, NullProgress())
    learned = whole.card.learned
    assert learned is not None
    assert 0 < learned.dropped < learned.images
    assert learned.an_epoch < learned.images
    arguments = (
        corrected(photos, refine, photos.parent / "labelled"),
        tmp_path / "run",
        root,
    )  # labels change nothing here, too
    with pytest.raises(Interrupted):
        distill(*arguments, StopAt(32, signal.SIGTERM))
    if lost:  # found again, the same
        (tmp_path / "run" / lost).unlink()
    else:  # what was found before is read, and not found again
        monkeypatch.setattr("prgkit.training.pseudo_labels.fit_classifier", lambda *_: pytest.fail("fitted again"))
        monkeypatch.setattr("prgkit.training.pseudo_labels.teacher_confidence", lambda *_: pytest.fail("asked again"))
    assert_same(distill(*arguments, NullProgress()), whole)


@pytest.mark.parametrize("learns", [{"targets": {"debias": 0.7}}, {"keep": {"min_confidence": 0.5}}])
def test_a_run_whose_answers_changed_under_it_is_refused(
    photos: Path, tmp_path: Path, finished: Run, learns: dict[str, Any]
) -> None:
    raw = raw_recipe(photos)
    raw["data"]["keep"] = learns.get("keep", {})
    raw["targets"] = learns.get("targets", {})
    arguments = (validate(raw, where="test").resolved(), tmp_path / "run", finished.folder.parent / "targets")
    with pytest.raises(Interrupted):
        distill(*arguments, StopAt(16, signal.SIGTERM))
    answers, confidence = Run(tmp_path / "run").answers_file, Run(tmp_path / "run").confidence_file
    known = read_sealed(answers)
    if "keep" in learns:
        np.save(confidence, np.ones_like(np.load(confidence)))
        known["confidence_sha256"] = sha256(confidence)
    else:
        known["log_prior"]["zero"] += 0.5
    write_sealed(answers, known)
    with pytest.raises(RunError, match="the images, the labels that are learned from, or the teacher have changed"):
        distill(*arguments, NullProgress())


def test_images_that_changed_under_a_stopped_run_are_refused(photos: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(photos, tmp_path / "images"))
    arguments = (recipe_for(images), tmp_path / "run", tmp_path / "targets")
    with pytest.raises(Interrupted):
        distill(*arguments, StopAt(32, signal.SIGTERM))
    for path in sorted(images.iterdir())[:30]:
        path.unlink()
    with pytest.raises(RunError, match="30 of the 72 images that this run was made from are gone from") as caught:
        distill(*arguments, NullProgress())
    assert f"prgkit distill {tmp_path}/run/recipe.yaml --run {tmp_path}/run-2" in str(caught.value.fix)


def test_a_deleted_student_of_a_finished_run_comes_back(photos: Path, tmp_path: Path) -> None:
    arguments = (recipe_for(photos, epochs=1), tmp_path / "run", tmp_path / "targets")
    weights = distill(*arguments, NullProgress()).weights
    before = load_file(weights)
    weights.unlink()
    after = load_file(distill(*arguments, NullProgress()).weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_loss_that_is_no_number_stops_at_once(photos: Path, tmp_path: Path) -> None:
    page = raw_recipe(photos, learning_rate=1e30, warmup_epochs=0.0, gradient_clip=None)
    recipe = validate(page, where="test").resolved()
    with pytest.raises(RunError, match=r"training came apart: \w+ is (nan|inf) in step \d+, epoch 1"):
        distill(recipe, tmp_path / "run", tmp_path / "targets", NullProgress())
    assert Run(tmp_path / "run").metrics() == []


def test_an_average_that_is_no_number_is_not_kept(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm in training keeps a loss finite whose average gives no numbers any more."""
    scores = iter([HeldOutScores(50.0, 0.5), HeldOutScores(10.0, math.nan)])
    monkeypatch.setattr("prgkit.training.distill.held_out_scores", lambda *_: next(scores))
    run = Run(tmp_path / "run")
    with pytest.raises(CameApartError) as caught:
        distill(recipe_for(photos), run.folder, tmp_path / "targets", NullProgress())
    assert caught.value.what == "training came apart: the divergence on held-out images is nan after epoch 2"
    assert "edge_weight" not in str(caught.value.fix)  # another objective has none
    assert [load_tensors(file)[1]["epoch"] for file in (run.weights, run.state)] == [1, 1]
    assert [record["epoch"] for record in run.metrics()] == [1]


class Vanish(NullProgress):
    """Deletes the images when the student's training starts."""

    def __init__(self, images: Path) -> None:
        self.images = images

    def start(self, stage: str, total: int, unit: str) -> None:
        if stage == "student":
            shutil.rmtree(self.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_while_training_is_named(
    photos: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_BYTES", 0)
    images = Path(shutil.copytree(photos, tmp_path / "images"))
    with pytest.raises(ImagesError, match=r"\d{3}\.png could be read before and no longer can: "):
        distill(recipe_for(images, workers=workers), tmp_path / "run", tmp_path / "targets", Vanish(images))


def test_kept_pictures_are_all_that_training_needs_and_change_nothing(
    photos: Path, tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Path(shutil.copytree(photos, tmp_path / "images"))
    assert_same(distill(recipe_for(images), tmp_path / "run", tmp_path / "targets", Vanish(images)), finished)
    monkeypatch.setattr(cache, "MOST_BYTES", 0)
    assert_same(distill(recipe_for(photos), tmp_path / "bare", tmp_path / "bare-targets", NullProgress()), finished)


def test_a_damaged_checkpoint_is_named(photos: Path, tmp_path: Path) -> None:
    arguments = (recipe_for(photos), tmp_path / "run", tmp_path / "targets")
    with pytest.raises(Interrupted):
        distill(*arguments, StopAt(16, signal.SIGTERM))
    state = Run(tmp_path / "run").state
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(RunError, match="the checkpoint is damaged"):
        distill(*arguments, NullProgress())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_a_run_is_named_with_what_brings_it_back(photos: Path, tmp_path: Path) -> None:
    arguments = (recipe_for(photos, epochs=1), tmp_path / "run", tmp_path / "targets")
    run = distill(*arguments, NullProgress())
    before = run.weights.read_bytes()
    flip(run.weights, len(before) - 3)  # in a weight: safetensors alone would not see it
    with pytest.raises(StudentError, match="the student's weights are damaged: its content is not what") as caught:
        load_student(run)
    assert caught.value.fix == (
        f"delete it, and prgkit distill {run.folder}/recipe.yaml --run {run.folder} brings a student back "
        "from the run's checkpoint"
    )
    run.weights.unlink()
    assert distill(*arguments, NullProgress()).weights.read_bytes() == before

    card = run.card_file.read_bytes()
    run.card_file.write_bytes(card.replace(b'"used": 72', b'"used": 73'))
    with pytest.raises(PrgkitError, match=r"card\.json is damaged: its content is not what was written") as caught:
        distill(*arguments, NullProgress())
    assert caught.value.fix == f"delete it, then: prgkit distill {run.recipe_file} --run {run.folder}"
    run.card_file.unlink()
    again = distill(*arguments, NullProgress())
    assert (again.image_facts.used, getattr(again.card.best, "epoch", None), again.finished) == (72, 1, True)
    assert again.weights.read_bytes() == before

    run.metrics_file.write_text('{"epoch": 1, "loss\n{"epoch": 2}\n')
    with pytest.raises(RunError, match=r"line 1 of metrics\.jsonl is damaged") as caught:
        run.metrics()
    assert caught.value.fix == "delete that line: one epoch's figures are lost, and nothing else is"


def test_a_run_of_deep_greys_goes_on_without_its_card(photos: Path, tmp_path: Path) -> None:
    images = tmp_path / "deep"
    images.mkdir()
    for path in sorted(photos.iterdir())[:36]:
        deep = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 100
        Image.fromarray(deep).save(images / path.name)
    page, root = recipe_for(images, epochs=1), tmp_path / "targets"
    whole = distill(page, tmp_path / "whole", root, NullProgress())
    assert whole.image_facts.grey_range is not None
    with pytest.raises(Interrupted):
        distill(page, tmp_path / "run", root, StopAt(16, signal.SIGTERM))
    Run(tmp_path / "run").card_file.unlink()
    again = distill(page, tmp_path / "run", root, NullProgress())
    assert again.image_facts == whole.image_facts
    assert_same(again, whole)


def test_a_run_goes_on_in_the_space_that_it_holds_already(
    photos: Path, tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, root = recipe_for(photos), finished.folder.parent / "targets"
    with pytest.raises(Interrupted):
        distill(recipe, tmp_path / "run", root, StopAt(96, signal.SIGINT))
    run = Run(tmp_path / "run")
    held = run.state.stat().st_size + run.weights.stat().st_size
    monkeypatch.setattr("prgkit.training.distill.expected_bytes", lambda *_: 10 * held)
    monkeypatch.setattr("prgkit.storage.atomic.free_bytes", lambda _: 9 * held)
    with pytest.raises(DiskFullError, match="the run needs"):
        distill(recipe, tmp_path / "new", root, NullProgress())
    assert_same(distill(recipe, run.folder, root, NullProgress()), finished)


def test_a_run_of_another_recipe_is_refused(photos: Path, finished: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"another recipe; it differs in training\.learning_rate"):
        distill(recipe_for(photos, learning_rate=0.5), finished.folder, tmp_path, NullProgress())


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "ce"},
        {"name": "kd"},
        [{"name": "nd"}, {"name": "dkd"}],
        [{"name": "ce"}, {"name": "prg", "weight": 0.5}],
    ],
)
def test_every_objective_trains(photos: Path, tmp_path: Path, finished: Run, objective: Any) -> None:
    raw = {**raw_recipe(photos, epochs=1), "objective": objective}
    root = finished.folder.parent / "targets"
    run = distill(validate(raw, where="test").resolved(), tmp_path / "run", root, NullProgress())
    assert run.metrics()[0]["loss"] > 0


def test_the_schedule_by_hand() -> None:
    assert [schedule(step, 10, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(4, 10, 4) == 1.0
    assert schedule(7, 10, 4) == pytest.approx(0.5)
    assert schedule(9, 10, 4) == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 6)))


def test_what_is_held_out_depends_on_content_alone() -> None:
    keys = [f"{number * 2654435761 % 2**32:032x}" for number in range(2000)]
    chosen = {keys[position] for position in hold_out(keys, 0.05)}
    assert 60 < len(chosen) < 140
    assert {keys[::-1][position] for position in hold_out(keys[::-1], 0.05)} == chosen
    assert {key for key in keys[:500] if key in chosen} == {keys[position] for position in hold_out(keys[:500], 0.05)}
    assert len(hold_out([f"{2**32 - 1 - n:032x}" for n in range(5)], 0.01)) == 1  # never none
    assert np.issubdtype(hold_out(keys, 0.05).dtype, np.integer)
