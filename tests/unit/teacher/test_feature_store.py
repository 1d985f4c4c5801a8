"""The target store: the teacher sees each view once, whatever is renamed, added, killed or damaged."""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from prgkit import demo
from prgkit.config.recipe import Recipe, validate
from prgkit.data.augment import MultiViewDataset
from prgkit.data.index import index_images
from prgkit.data.sources import open_images
from prgkit.demo.digits import load_digits
from prgkit.errors import DiskFullError, PrgkitError, TeacherError
from prgkit.progress import NullProgress
from prgkit.storage.locks import locked
from prgkit.teacher import feature_store as storing
from prgkit.teacher.clip import Teacher, load_teacher
from prgkit.teacher.feature_files import BlockJournal
from prgkit.teacher.feature_store import FeatureStore, embed
from prgkit.training import prepare as preparing
from prgkit.training.prepare import prepare

IMAGES = 40


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(load_digits("train")[0][:IMAGES]):
        image.save(folder / f"{number:03}.png")
    return folder


def recipe_for(photos: Path, **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "data": {
            "images": str(photos),
            "classes": ["zero", "one", "two"],
            "prompts": ["the digit {}"],
            "held_out": 0.1,
        },
        "teacher": {"model": "demo:digits", "batch_size": 8},
        "views": {"count": 2},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"workers": 0},
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value}
    return validate(raw, where="test").resolved()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the views and the prompts that the teacher is shown, and how often it is loaded."""
    counted = {"loaded": 0, "views": 0, "prompts": 0}
    embed_images, embed_prompts = Teacher.embed_images, Teacher.embed_prompts

    def count_load(*arguments: Any) -> Teacher:
        counted["loaded"] += 1
        return load_teacher(*arguments)

    def count_images(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        counted["views"] += len(pixels) if len(pixels) > 1 else 0  # one black image at loading tells the width
        return embed_images(self, pixels)

    def count_prompts(self: Teacher, prompts: Any) -> torch.Tensor:
        counted["prompts"] += sum(len(row) for row in prompts)
        return embed_prompts(self, prompts)

    monkeypatch.setattr("prgkit.teacher.clip.load_teacher", count_load)
    monkeypatch.setattr(Teacher, "embed_images", count_images)
    monkeypatch.setattr(Teacher, "embed_prompts", count_prompts)
    return counted


def see(recipe: Recipe, root: Path) -> preparing.DistillationDataset:
    return prepare(recipe, root, NullProgress())


def features(dataset: preparing.DistillationDataset, view: int, positions: np.ndarray) -> torch.Tensor:
    return dataset.store.features(dataset.rows[positions], np.full(len(positions), view))


def test_a_name_that_is_not_read_to_its_end_is_said_every_time(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: dict[str, int]
) -> None:
    class Told(NullProgress):
        def note(self, text: str) -> None:
            print(text)

    recipe = recipe_for(photos, data={"classes": ["zero", "very " * 80 + "one"]})
    for _ in range(2):
        prepare(recipe, tmp_path / "targets", Told())
        assert "a class name is longer than the" in capsys.readouterr().out
    assert calls["loaded"] == 1
    recipe = recipe_for(photos, data={"classes": ["zero", "very " * 80 + "one", "very " * 80 + "two"]})
    with pytest.raises(TeacherError, match="as one and the same: it reads"):
        see(recipe, tmp_path / "targets")


def test_a_teacher_of_random_weights_is_doubted_aloud(photos: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Told(NullProgress):
        def note(self, text: str) -> None:
            said.append(text)

    folder = shutil.copytree(Path(demo.__file__).with_name("teacher"), tmp_path / "teacher")
    torch.manual_seed(0)
    untrained = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in untrained.items()}, folder / "open_clip_model.safetensors")
    prepare(recipe_for(photos, teacher={"model": f"local-dir:{folder}"}), tmp_path / "targets", Told())
    assert any(line.startswith("the teacher's answers look like chance: ") for line in said)
    said.clear()
    prepare(recipe_for(photos), tmp_path / "targets", Told())
    assert not any("chance" in line for line in said)


def test_what_was_seen_for_labels_is_not_asked_for_again(photos: Path, tmp_path: Path, calls: dict[str, int]) -> None:
    recipe = recipe_for(photos)
    fresh = see(recipe, tmp_path / "fresh")
    crops = -(-2 * len(fresh.train_indices) // 8) * 8  # the last batch is filled up
    calls["views"] = 0
    preparing.prepare_answers(recipe, tmp_path / "targets", NullProgress())
    assert calls["views"] == IMAGES
    dataset = see(recipe, tmp_path / "targets")
    assert calls["views"] == IMAGES + crops
    everything = np.arange(IMAGES)
    assert torch.equal(features(dataset, 0, everything), features(fresh, 0, everything))
    for view in (1, 2):
        assert torch.equal(*(features(one, view, fresh.train_indices) for one in (dataset, fresh)))
    reopened = FeatureStore(dataset.store.stores[0].folder, recipe.teacher[0])
    assert reopened.damaged == []
    preparing.prepare_answers(recipe, tmp_path / "targets", NullProgress())
    assert calls["views"] == IMAGES + crops


def test_a_stored_feature_is_what_the_teacher_says_of_that_view(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_for(photos)
    dataset = see(recipe, tmp_path / "targets")
    teacher = load_teacher(recipe.teacher[0], torch.device("cpu"))
    rendered = MultiViewDataset(dataset.image_index, teacher.preprocessing, recipe.views)
    positions = dataset.train_indices[:8]
    for view in range(3):
        pixels = rendered.batch([(int(position), [view]) for position in positions]).pixels[:, 0]
        torch.testing.assert_close(features(dataset, view, positions), teacher.embed_images(pixels), atol=5e-4, rtol=0)
    assert not torch.equal(features(dataset, 1, positions), features(dataset, 2, positions))


def test_class_means_are_those_of_the_learned_images_by_the_teachers_own_answers(photos: Path, tmp_path: Path) -> None:
    dataset = see(recipe_for(photos), tmp_path / "targets")
    seen = features(dataset, 0, dataset.train_indices)
    labels = dataset.classifier.logits(seen).argmax(dim=1)
    means = dataset.class_means()
    for label in range(len(means)):
        mine = seen[labels == label]
        expected = mine.mean(dim=0) if len(mine) else torch.zeros_like(means[label])
        torch.testing.assert_close(means[label], expected)


def test_the_teacher_sees_each_view_once(photos: Path, tmp_path: Path, calls: dict[str, int]) -> None:
    root = tmp_path / "targets"
    dataset = see(recipe_for(photos), root)
    # Batches are of 8, and the last one is padded; the held-out images have one view.
    learned, held_out = len(dataset.train_indices), len(dataset.val_indices)
    assert calls == {"loaded": 1, "views": 8 * (-(-3 * learned // 8) + -(-held_out // 8)), "prompts": 3}

    calls.update(loaded=0, views=0, prompts=0)
    see(recipe_for(photos, objective={"name": "kd"}, student={"model": "test_resnet"}, training={"epochs": 3}), root)
    assert calls == {"loaded": 0, "views": 0, "prompts": 0}
    adjust_and_filter = recipe_for(
        photos, data={"keep": {"min_confidence": 0.4, "weighted": True}}, targets={"debias": 1.0}
    )
    assert len(see(adjust_and_filter, root).train_indices) < learned
    assert calls == {"loaded": 0, "views": 0, "prompts": 0}
    see(recipe_for(photos, data={"classes": ["a cat", "a dog"], "prompts": ["a {}", "the {}"]}), root)
    assert calls == {"loaded": 1, "views": 0, "prompts": 4}


def test_names_and_places_change_nothing_and_new_images_are_all_that_is_seen(
    photos: Path, tmp_path: Path, calls: dict[str, int]
) -> None:
    root = tmp_path / "targets"
    before = see(recipe_for(photos), root)
    (photos / "cats").mkdir()
    for number in range(0, IMAGES, 2):
        (photos / f"{number:03}.png").rename(photos / "cats" / f"renamed-{number}.png")
    calls.update(loaded=0, views=0)
    after = see(recipe_for(photos), root)
    assert calls["views"] == calls["loaded"] == 0
    assert after.image_index.keys == before.image_index.keys
    assert np.array_equal(after.val_indices, before.val_indices)

    for number, image in enumerate(load_digits("test")[0][:6]):
        image.save(photos / f"new-{number}.png")
    grown = see(recipe_for(photos), root)
    new = [position for position, key in enumerate(grown.image_index.keys) if key not in set(before.image_index.keys)]
    assert len(new) == 6
    assert 0 < calls["views"] <= 8 * 6
    old = np.array([position for position in grown.train_indices if position not in new])
    same = np.array([before.image_index.keys.index(grown.image_index.keys[position]) for position in old])
    assert torch.equal(features(grown, 1, old), features(before, 1, same))


def test_what_was_not_journalled_is_seen_again_and_ends_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    monkeypatch.setattr(storing, "BLOCK_IMAGES", 8)
    recipe = recipe_for(photos)
    whole = see(recipe, tmp_path / "whole")
    all_views = calls["views"]
    folder = tmp_path / "cut" / whole.store.folder.name
    shutil.copytree(whole.store.folder, folder)
    first, second, third = records(folder)[:3]
    (folder / "index.bin").write_bytes(first + second + third[:30])  # torn in the third record
    calls["views"] = 0
    resumed = see(recipe, tmp_path / "cut")
    assert (
        see(recipe, tmp_path / "cut").store.damaged == []
    )  # what was appended in place of the torn record can be read
    assert 0 < calls["views"] < all_views
    for view in range(3):
        assert torch.equal(features(resumed, view, resumed.train_indices), features(whole, view, whole.train_indices))
    assert (folder / "view-001.f16").read_bytes() == (whole.store.folder / "view-001.f16").read_bytes()


def test_a_flipped_byte_is_named_and_its_block_alone_is_seen_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    monkeypatch.setattr(storing, "BLOCK_IMAGES", 8)
    recipe = recipe_for(photos)
    whole = see(recipe, tmp_path)
    before = features(whole, 1, whole.train_indices).clone()
    path = whole.store.folder / "view-001.f16"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # in the last row
    path.write_bytes(content)
    damaged = FeatureStore(whole.store.folder, recipe.teacher[0]).damaged
    assert len(damaged) == 1
    assert damaged[0].startswith("view-001.f16, rows ")
    calls["views"] = 0
    mended = see(recipe, tmp_path)
    assert 0 < calls["views"] <= 8 * 4  # at most eight images, two to a batch
    assert FeatureStore(whole.store.folder, recipe.teacher[0]).damaged == []
    assert torch.equal(features(mended, 1, mended.train_indices), before)


class Noting(NullProgress):
    def __init__(self, when_told: Callable[[], None] = lambda: None) -> None:
        self.notes: list[str] = []
        self.when_told = when_told

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.when_told()


def test_a_store_in_use_is_waited_for(photos: Path, tmp_path: Path, calls: dict[str, int]) -> None:
    """The lock is this process's own, so what lets it go has to be another thread."""
    dataset = see(recipe_for(photos), tmp_path)
    new = load_digits("test")[0][:3]
    for number, image in enumerate(new):
        image.save(photos / f"new-{number}.png")
    told, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(dataset.store.folder, "target store"):
            done.set()
            told.wait(20)

    threading.Thread(target=hold).start()
    done.wait(20)
    progress = Noting(told.set)
    grown = prepare(recipe_for(photos), tmp_path, progress)
    assert progress.notes[0] == (
        f"another process ({os.getpid()}) is working on this target store; "
        f"waiting until it has done its part ({dataset.store.folder})"
    )
    assert (
        len(grown.train_indices) + len(grown.val_indices) == len(dataset.train_indices) + len(dataset.val_indices) + 3
    )


def test_a_second_process_sees_what_the_first_has_stored(photos: Path, tmp_path: Path, calls: dict[str, int]) -> None:
    recipe = recipe_for(photos)
    first = see(recipe, tmp_path)
    for number, image in enumerate(load_digits("test")[0][:4]):
        image.save(photos / f"new-{number}.png")
    second = FeatureStore(first.store.folder, recipe.teacher[0])
    see(recipe, tmp_path)  # the first process stores the new images while the second is about to
    seen = calls["views"]
    images = index_images(open_images(str(photos)), workers=1)
    views = np.full(len(images), 3)
    views[preparing.hold_out(images.keys, 0.1)] = 1
    embed(
        second.stores,
        images,
        views=views,
        recipe=recipe,
        teacher=lambda _: pytest.fail("asked again"),
        progress=NullProgress(),
    )
    assert calls["views"] == seen


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["a flipped byte", "a torn end"])
def test_damaged_prompts_are_named_and_read_by_the_teacher_again(
    photos: Path, tmp_path: Path, calls: dict[str, int], damage: str
) -> None:
    whole = see(recipe_for(photos), tmp_path)
    (path,) = whole.store.folder.glob("prompts-*.npy")
    before = path.read_bytes()
    if damage == "a flipped byte":
        flip(path, len(before) - 7)  # in a number: numpy alone would not see it
    else:
        path.write_bytes(before[:-7])
    calls.update(views=0, prompts=0)
    progress = Noting()
    prepare(recipe_for(photos), tmp_path, progress)
    assert progress.notes[0] == f"damaged in {whole.store.folder}: {path.name}; what was in it is embedded again"
    assert (calls["views"], calls["prompts"]) == (0, 3)
    assert path.read_bytes() == before
    assert [found.name for found in whole.store.folder.glob("prompts-*")] == [path.name]


def records(folder: Path) -> list[bytes]:
    return [block.packed() for block in BlockJournal(folder / "index.bin").new_blocks()]


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("place", [3, 25, 40, 70])  # in the mark, the row, the number of views, a key
def test_a_damaged_record_is_named_and_its_block_alone_is_seen_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: dict[str, int], number: int, place: int
) -> None:
    monkeypatch.setattr(storing, "BLOCK_IMAGES", 8)
    recipe = recipe_for(photos)
    whole = see(recipe, tmp_path)
    before = [features(whole, view, whole.train_indices) for view in range(3)]
    index, view = whole.store.folder / "index.bin", whole.store.folder / "view-000.f16"
    size, row_bytes = index.stat().st_size, view.stat().st_size
    sizes = [len(record) for record in records(whole.store.folder)]
    start = sum(sizes[:number])
    flip(index, start + place)
    lost = (
        f"damaged in {whole.store.folder}: index.bin, bytes {start:,} to {start + sizes[number]:,}; "
        "what was in it is embedded again"
    )
    calls["views"] = 0
    progress = Noting()
    mended = prepare(recipe, tmp_path, progress)
    assert progress.notes[0] == lost
    assert 0 < calls["views"] <= 8 * 4  # at most eight images, two to a batch
    for one in range(3):
        assert torch.equal(features(mended, one, mended.train_indices), before[one])
    again = Noting()
    prepare(recipe, tmp_path, again)
    assert again.notes == [note for note in progress.notes if note != lost and "loading" not in note]
    assert index.stat().st_size == size + sizes[number]  # what other processes have read stays where it was
    assert view.stat().st_size <= 2 * row_bytes


def test_a_damaged_card_is_named_and_comes_back_with_what_the_teacher_has_seen(
    photos: Path, tmp_path: Path, calls: dict[str, int]
) -> None:
    whole = see(recipe_for(photos), tmp_path)
    card = whole.store.folder / "card.json"
    before = card.read_bytes()
    card.write_bytes(re.sub(rb'"logit_scale": \d', b'"logit_scale": 7', before))  # the form stays right
    with pytest.raises(PrgkitError, match=r"card\.json is damaged: its content is not what was written") as caught:
        see(recipe_for(photos), tmp_path)
    assert caught.value.fix == "delete it, and the same command writes it again; what the teacher has seen is kept"
    card.unlink()
    calls["views"] = 0
    see(recipe_for(photos), tmp_path)
    assert (calls["views"], card.read_bytes()) == (0, before)


def test_a_full_disk_is_told_before_the_work(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(DiskFullError, match=r"the target store needs 1\d\.\d KiB, and 1000 B are free"):
        see(recipe_for(photos), tmp_path / "targets")


@pytest.mark.parametrize("torn", ["a block", "a record"])
def test_a_disk_that_fills_up_at_a_block_loses_that_block_alone(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: dict[str, int], torn: str
) -> None:
    monkeypatch.setattr(storing, "BLOCK_IMAGES", 8)
    recipe = recipe_for(photos)
    whole = see(recipe, tmp_path / "whole").store.folder
    all_views = calls["views"]
    flushes = 0

    def full(_file: int) -> None:
        nonlocal flushes
        flushes += 1
        # The card; the names; a view and a line of the held-out images; then three views and a line a block: in the second of these.
        if flushes == (10 if torn == "a block" else 12):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr("prgkit.data.cache.CacheWriter.add", lambda *_: None)  # pictures would be flushed, too
        with pytest.raises(DiskFullError, match=r"no disk space left for (view-001\.f16|index\.bin)") as caught:
            see(recipe, tmp_path / "cut")
    assert caught.value.fix == "free some space and run the same command again: finished work is kept"
    calls["views"] = 0
    see(recipe, tmp_path / "cut")
    assert 0 < calls["views"] < all_views
    cut = tmp_path / "cut" / whole.name
    assert {path.name: path.read_bytes() for path in cut.glob("*.*")} == {
        path.name: path.read_bytes() for path in whole.glob("*.*")
    }
