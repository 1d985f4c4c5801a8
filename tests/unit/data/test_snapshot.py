"""What a run was made from stays what it is: later pictures are told, and learned from by no run that has begun."""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file, save_file

from prgkit import demo
from prgkit.annotation.audit import audit
from prgkit.config.recipe import Recipe, validate
from prgkit.data.snapshot import load_snapshot
from prgkit.data.ticks import Tick, write_ticks
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.errors import PrgkitError, RunError
from prgkit.export.formats.options import ExportOptions
from prgkit.export.from_run import export_run
from prgkit.interrupt import Interrupted
from prgkit.progress import NullProgress
from prgkit.storage.quality import Statistics
from prgkit.storage.run import Run
from prgkit.training.distill import distill

FEW, ALL = 40, 60
OTHERS = "that this run was not made from, e.g. "


class Heard(NullProgress):
    """Keeps what was said, and stops the training after some images."""

    def __init__(self, stop_after: int = 0) -> None:
        self.said: list[str] = []
        self.left, self.stage = stop_after, ""

    def start(self, stage: str, total: int, unit: str) -> None:
        self.stage = stage

    def advance(self, count: int, facts: str = "") -> None:
        if self.stage == "student" and count and self.left:
            self.left -= count
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    def note(self, text: str) -> None:
        self.said.append(text)

    def about(self, words: str) -> list[str]:
        return [text for text in self.said if words in text]


def quality_of(run: Run) -> Statistics:
    """Return a run's figures of its pseudo-labels, which have to be there."""
    quality = run.quality()
    assert quality is not None
    return quality


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(load_digits("train")[0][:ALL]):
        image.save(folder / f"{number:03}.png")
    return folder


def put(photos: Path, source: Path, count: int) -> Path:
    """Put the first pictures into a folder, a tar or a zip."""
    pictures = sorted(photos.iterdir())[:count]
    if source.suffix == ".tar":
        with tarfile.open(source, "w") as tar:
            for path in pictures:
                tar.add(path, path.name)
    elif source.suffix == ".zip":
        with zipfile.ZipFile(source, "w") as archive:
            for path in pictures:
                archive.write(path, path.name)
    else:
        source.mkdir(exist_ok=True)
        for path in pictures:
            shutil.copy(path, source)
    return source


def recipe_for(images: Path, **changed: Any) -> Recipe:
    page = {
        "data": {"images": str(images), "classes": list(CLASSES), "prompts": ["a {}"], "held_out": 0.2},
        "teacher": {"model": "demo:digits", "batch_size": 8},
        "views": {"count": 1, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "kd"},
        "training": {"epochs": 2, "batch_size": 8, "workers": 0, "precision": "fp32"},
        **changed,
    }
    return validate(page, where="test").resolved()


def test_a_finished_run_says_that_its_teacher_is_another_now(photos: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(Path(demo.__file__).with_name("teacher"), tmp_path / "teacher"))
    recipe = recipe_for(put(photos, tmp_path / "pics", FEW), teacher={"model": f"local-dir:{teacher}", "batch_size": 8})
    arguments, heard = (recipe, tmp_path / "run", tmp_path / "targets"), Heard()
    distill(*arguments, NullProgress())
    weights = load_file(teacher / "open_clip_model.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, teacher / "open_clip_model.safetensors")
    distill(*arguments, heard)
    assert heard.said[-1].startswith(
        "the teacher is not the one that it learned from any more; to learn from this one: "
    )


@pytest.mark.parametrize("name", ["pics", "pics.tar", "pics.zip"])
def test_a_finished_run_says_what_is_new_and_is_judged_on_its_own(photos: Path, tmp_path: Path, name: str) -> None:
    source = put(photos, tmp_path / name, FEW)
    if source.is_dir():
        (source / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nno")  # unreadable from the start
    arguments = (recipe_for(source), tmp_path / "run", tmp_path / "targets")
    run = distill(*arguments, NullProgress())
    same = Heard()
    distill(*arguments, same)
    assert same.said == [f"{run.folder} is finished already"]
    if source.is_dir():  # new dates alone say nothing; another picture of the same name and size does
        for path in source.rglob("*.png"):
            os.utime(path, ns=(1, 1))
        distill(*arguments, same)
        assert same.said[1:] == [f"{run.folder} is finished already"]
        path = min(source.rglob("*.png"))
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        distill(*arguments, same)
        assert f"1 files are new or changed, e.g. {path.relative_to(source)}" in same.said[-1]
        path.write_bytes(content)
    before = export_run(run, ExportOptions(), progress=NullProgress()).evaluation.images

    put(photos, source, ALL)
    again, exporting, auditing = Heard(), Heard(), Heard()
    distill(*arguments, again)
    (told,) = again.about("is not what the run was made from any more")
    assert f"{ALL - FEW} files are new or changed, e.g. " in told
    assert f"to learn from all: prgkit distill {run.folder}/recipe.yaml --run {run.folder}-2 " in told
    assert f"--set student.initial={run.folder}" in told
    manifest = export_run(run, ExportOptions(), progress=exporting)
    assert manifest.evaluation.images == before
    assert f"{source} holds {ALL - FEW} images {OTHERS}" in exporting.about("not made from")[0]
    assert audit(*arguments, count=None, progress=auditing).drawn_from == FEW
    assert len(auditing.about("not made from")) == 1

    anew = distill(arguments[0], tmp_path / "run-2", tmp_path / "targets", NullProgress())
    assert anew.image_facts.used == ALL


@pytest.mark.parametrize("by", ["sheet", "folders"])
def test_a_finished_run_says_which_labels_it_has_not_learned_from(photos: Path, tmp_path: Path, by: str) -> None:
    source, table, folders = put(photos, tmp_path / "pics", FEW), tmp_path / "labels.csv", tmp_path / "labelled"
    names = sorted(path.name for path in source.iterdir())

    def label(labels: dict[str, str]) -> None:
        ticks = enumerate(labels.items(), 1)
        write_ticks(table, [Tick(number, name, "", of, "90", right=True) for number, (name, of) in ticks])
        shutil.rmtree(folders, ignore_errors=True)
        for name, of in labels.items():
            (folders / of.lower()).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, folders / of.lower())

    told = {name: CLASSES[number % 3] for number, name in enumerate(names[:12])}
    label(told)
    labelled = {"labelled": str(source), "labelled_labels": str(table)} if by == "sheet" else {"labelled": str(folders)}
    data = {"images": str(source), "classes": list(CLASSES), "prompts": ["a {}"], "held_out": 0.2, **labelled}
    arguments = (recipe_for(source, data=data, objective={"name": "dho"}), tmp_path / "run", tmp_path / "targets")
    run = distill(*arguments, NullProgress())
    label({name: of.upper() for name, of in told.items()})  # the same labels in another spelling
    same = Heard()
    distill(*arguments, same)
    assert same.said == [f"{run.folder} is finished already"]

    another = {**told, names[0]: CLASSES[5]}
    more = {**told, names[20]: CLASSES[1], names[21]: CLASSES[1]}
    fewer = {name: told[name] for name in names[1:12]}
    for labels, new, gone in ((another, names[:1], 1), (more, names[20:22], 0), (fewer, [], 1)):
        label(labels)
        heard = Heard()
        distill(*arguments, heard)
        (note,) = heard.about("does not hold the labels that it learned from any more")
        first = "".join(new[:1] if by == "sheet" else [f"{labels[name]}/{name}" for name in new[:1]])
        assert (f"{len(new)} labels are new or changed, e.g. {first}" in note) == bool(new)
        assert (f"{gone} that were there are gone or changed" in note) == bool(gone)
        assert note.startswith(str(table if by == "sheet" else folders))
        assert f"to learn from all: prgkit distill {run.folder}/recipe.yaml --run {run.folder}-2 " in note
    table.unlink()
    shutil.rmtree(folders)
    distill(*arguments, heard)
    assert len(heard.about("the labels that it learned from are not there any more")) == 1


def test_a_run_of_before_that_kept_no_labels_says_nothing_of_them(photos: Path, tmp_path: Path) -> None:
    run = distill(
        recipe_for(put(photos, tmp_path / "pics", FEW)), tmp_path / "run", tmp_path / "targets", NullProgress()
    )
    with np.load(run.snapshot_file) as archive:  # as every run had it, and one without labels has it still
        assert set(archive.files) == {"images", "labelled", "files", "dated", "digest"}
    snapshot = load_snapshot(run)
    assert snapshot is not None
    assert snapshot.labels is None


def test_a_stopped_run_goes_on_with_its_own_images_bit_for_bit(photos: Path, tmp_path: Path) -> None:
    source, targets = put(photos, tmp_path / "pics", FEW), tmp_path / "targets"
    whole = distill(recipe_for(source), tmp_path / "whole", targets, NullProgress())
    with pytest.raises(Interrupted):
        distill(recipe_for(source), tmp_path / "run", targets, Heard(stop_after=16))
    put(photos, source, ALL)
    heard = Heard()
    run = distill(recipe_for(source), tmp_path / "run", targets, heard)
    assert len(heard.about(f"{source} holds {ALL - FEW} images {OTHERS}")) == 1
    weights, expected = load_file(run.weights), load_file(whole.weights)
    assert all(np.array_equal(weights[key].numpy(), tensor.numpy()) for key, tensor in expected.items())


def test_gone_images_stop_a_training_and_not_an_export(photos: Path, tmp_path: Path) -> None:
    source = put(photos, tmp_path / "pics", FEW)
    arguments = (recipe_for(source), tmp_path / "run", tmp_path / "targets")
    run = distill(*arguments, NullProgress())
    for path in sorted(source.iterdir())[:5]:
        path.unlink()
    heard = Heard()
    distill(*arguments, heard)
    assert len(heard.about("5 that were there are gone or changed")) == 1
    export_run(run, ExportOptions(), progress=heard)
    assert heard.about(f"5 of the {FEW} images that this run was made from are gone")
    run.weights.unlink()
    with pytest.raises(RunError, match=f"5 of the {FEW} images that this run was made from are gone"):
        distill(*arguments, NullProgress())
    shutil.rmtree(source)
    put(photos, source, FEW)
    assert distill(*arguments, NullProgress()).weights.exists()
    shutil.rmtree(source)
    gone = Heard()
    distill(*arguments, gone)
    assert len(gone.about("the images that it was made from are not there any more")) == 1


def test_a_start_that_was_stopped_before_it_learned_takes_what_is_there(photos: Path, tmp_path: Path) -> None:
    source = put(photos, tmp_path / "pics", FEW)
    arguments = (recipe_for(source), tmp_path / "run", tmp_path / "targets")

    class Stop(NullProgress):
        def start(self, stage: str, total: int, unit: str) -> None:
            if stage == "student":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(*arguments, Stop())
    put(photos, source, ALL)
    run = distill(*arguments, NullProgress())
    assert (run.image_facts.used, quality_of(run).images) == (ALL, ALL)


def test_a_damaged_list_of_images_is_named(photos: Path, tmp_path: Path) -> None:
    source = put(photos, tmp_path / "pics", FEW)
    arguments = (recipe_for(source), tmp_path / "run", tmp_path / "targets")
    run = distill(*arguments, NullProgress())
    content = bytearray(run.snapshot_file.read_bytes())
    run.snapshot_file.rename(tmp_path / "aside.npz")
    run.snapshot_file.mkdir()
    with pytest.raises(IsADirectoryError):  # as one that may not be read: no damage, and nothing to delete
        distill(*arguments, NullProgress())
    run.snapshot_file.rmdir()
    content[300] ^= 1
    run.snapshot_file.write_bytes(content)
    with pytest.raises(RunError, match=r"images\.npz, which says what the run was made from, is damaged"):
        distill(*arguments, NullProgress())
    run.snapshot_file.unlink()
    distill(*arguments, NullProgress())


@pytest.mark.parametrize(
    "wrong",
    [
        {"student": {"model": "test_efficientnet_", "image_size": 32}},
        {"teacher": {"model": "local-dir:nowhere"}},
        {"data": {"images": "nowhere", "classes": list(CLASSES)}},
        {"data": {"images": "broken", "classes": list(CLASSES)}},
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_failed_first_start_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], empty: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    folder = tmp_path / "run"
    if empty:
        folder.mkdir()
    with pytest.raises(PrgkitError):
        distill(recipe_for(photos, **wrong), folder, tmp_path / "targets", NullProgress())
    assert folder.exists() == empty
    if "student" not in wrong:
        with pytest.raises(PrgkitError):
            audit(recipe_for(photos, **wrong), folder, tmp_path / "targets", count=5, progress=NullProgress())
        assert folder.exists() == empty
    assert distill(recipe_for(photos), folder, tmp_path / "targets", NullProgress()).finished


def test_a_run_in_which_nothing_was_done_gives_way_to_another_recipe(photos: Path, tmp_path: Path) -> None:
    class Fail(NullProgress):
        def start(self, stage: str, total: int, unit: str) -> None:
            if stage == "student":
                os.kill(os.getpid(), signal.SIGKILL)

    folder, targets = tmp_path / "run", tmp_path / "targets"
    if (process := os.fork()) == 0:  # told of its images and answers, and killed before it learned anything
        distill(recipe_for(photos, targets={"debias": 0.7}), folder, targets, Fail())
    os.waitpid(process, 0)
    assert Run(folder).answers_file.exists()
    assert Run(folder).quality_file.exists()
    run = distill(recipe_for(photos), folder, targets, NullProgress())
    assert run.finished
    assert not run.answers_file.exists()
    assert quality_of(run).correction is None
    with pytest.raises(RunError, match=r"made from another recipe; it differs in targets\.debias"):
        distill(recipe_for(photos, targets={"debias": 0.7}), folder, targets, NullProgress())


def test_an_audit_keeps_its_recipe_and_a_busy_run_too(photos: Path, tmp_path: Path) -> None:
    other = recipe_for(photos, objective={"name": "ce"})
    audit(recipe_for(photos), tmp_path / "audited", tmp_path / "targets", count=5, progress=NullProgress())
    with pytest.raises(RunError, match="made from another recipe"):
        distill(other, tmp_path / "audited", tmp_path / "targets", NullProgress())

    class Meanwhile(Heard):
        def start(self, stage: str, total: int, unit: str) -> None:
            if stage == "images":
                with pytest.raises(RunError, match="another process"):
                    distill(other, tmp_path / "run", tmp_path / "targets", NullProgress())
                with pytest.raises(RunError, match="another process"):
                    audit(other, tmp_path / "run", tmp_path / "targets", count=5, progress=NullProgress())
                self.said.append("refused")

    class Auditing(Heard):
        def start(self, stage: str, total: int, unit: str) -> None:
            if stage == "images":
                with pytest.raises(RunError, match=r"another process .* is working on this audit"):
                    distill(other, tmp_path / "audits", tmp_path / "targets", NullProgress())
                self.said.append("refused")

    auditing = Auditing()
    audit(recipe_for(photos), tmp_path / "audits", tmp_path / "targets", count=5, progress=auditing)
    assert "refused" in auditing.said
    heard = Meanwhile()
    assert distill(recipe_for(photos), tmp_path / "run", tmp_path / "targets", heard).finished
    assert "refused" in heard.said
