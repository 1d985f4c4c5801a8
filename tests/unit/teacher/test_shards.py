"""A teacher's pass in shards: the same bits as in one process, and what cannot be joined is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prgkit.config.recipe import Recipe, validate
from prgkit.config.shard import Shard, parse_shard, shard_of_process
from prgkit.data.sources import open_images
from prgkit.demo.digits import load_digits
from prgkit.errors import PrgkitError, TargetsError
from prgkit.progress import NullProgress
from prgkit.storage.atomic import read_sealed, write_sealed
from prgkit.teacher.clip import Teacher
from prgkit.teacher.ensemble import existing_targets
from prgkit.teacher.shards import embed_shard, join_shards
from prgkit.training.prepare import prepare

IMAGES = 40
ALL_VIEWS = 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(load_digits("train")[0][:IMAGES]):
        image.save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prgkit.data.sources.BLOCK_IMAGES", 3)
    monkeypatch.setattr("prgkit.teacher.feature_store.BLOCK_IMAGES", 8)


def recipe_for(photos: Path, **teacher: Any) -> Recipe:
    page = {
        "data": {"images": str(photos), "classes": ["zero", "one"], "prompts": ["the digit {}"], "held_out": 0.1},
        "teacher": {"model": "demo:digits", "batch_size": 8, **teacher},
        "views": {"count": ALL_VIEWS - 1},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"workers": 0},
    }
    return validate(page, where="test").resolved()


def embed_all(recipe: Recipe, root: Path, total: int, *, leave_out: tuple[int, ...] = ()) -> None:
    for number in set(range(total)) - set(leave_out):
        embed_shard(recipe, root, Shard(number, total), NullProgress())


def stored(recipe: Recipe, root: Path) -> dict[tuple[str, int], bytes]:
    """Return every feature by image and view."""
    dataset = prepare(recipe, root, NullProgress())
    (store,) = dataset.store.stores
    assert store.damaged == []
    keys = dataset.image_index.keys
    found = {}
    for key, views in zip(keys, store.stored_views(keys).tolist(), strict=True):
        for view, feature in enumerate(store.stored_features(store.rows([key], views=views), views)):
            found[key, view] = feature.tobytes()
    return found


@pytest.fixture(scope="module")
def expected(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], bytes]:
    return stored(recipe_for(photos), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("total", [1, 2, 5, 30])  # of the last, some have no images
def test_shards_are_the_store_of_one_process_to_the_bit(
    photos: Path, tmp_path: Path, expected: dict[Any, bytes], total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(photos)
    embed_all(recipe, tmp_path, total)
    (joined,) = join_shards(recipe, tmp_path, NullProgress())
    assert (joined.shards, joined.images, joined.duplicates, joined.unreadable) == (total, IMAGES, 0, 0)
    assert list(Path(joined.store).glob("view-*")) == []  # no feature was copied
    monkeypatch.setattr(Teacher, "embed_images", lambda *_: pytest.fail("asked again"))
    assert stored(recipe, tmp_path) == expected
    index = (Path(joined.store) / "index.bin").read_bytes()
    join_shards(recipe, tmp_path, NullProgress())
    assert (Path(joined.store) / "index.bin").read_bytes() == index


def test_copies_in_several_shards_are_found_at_the_join_and_the_unreadable_are_told(
    photos: Path, tmp_path: Path, expected: dict[Any, bytes]
) -> None:
    more = shutil.copytree(photos, tmp_path / "photos")
    for number in (0, 1, 5):
        shutil.copy(more / f"{number:03}.png", more / f"copy-{number}.png")
    (more / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    recipe = recipe_for(more)
    embed_all(recipe, tmp_path, 4)
    (joined,) = join_shards(recipe, tmp_path, NullProgress())
    assert (joined.images, joined.duplicates, joined.unreadable) == (IMAGES, 3, 1)
    assert stored(recipe, tmp_path) == expected


@pytest.mark.parametrize("learned_greys", [0, 1])  # of one shard of three, or of none
def test_evaluation_is_read_in_the_range_of_all_that_is_learned_from(
    photos: Path, tmp_path: Path, learned_greys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = shutil.copytree(photos, tmp_path / "photos")
    for place in [more / "deep.png"][:learned_greys]:
        Image.fromarray(np.array([[0, 4000]], dtype=np.uint16)).save(place)
    for number in range(6):
        (tmp_path / "judged" / "zero").mkdir(parents=True, exist_ok=True)
        deep = np.array([[0, 200 + number]], dtype=np.uint16)
        Image.fromarray(deep).save(tmp_path / "judged" / "zero" / f"{number}.png")
    page = recipe_for(more).model_dump(mode="json")
    page["data"]["evaluation"] = str(tmp_path / "judged")
    recipe = validate(page, where="test")
    embed_all(recipe, tmp_path, 3)
    join_shards(recipe, tmp_path, NullProgress())
    monkeypatch.setattr(Teacher, "embed_images", lambda *_: pytest.fail("asked again"))
    prepare(recipe, tmp_path, NullProgress())


def test_a_shard_that_was_stopped_goes_on(
    photos: Path, tmp_path: Path, expected: dict[Any, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, embed_images, calls = recipe_for(photos), Teacher.embed_images, 0

    def stopping(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        if len(pixels) > 1 and (calls := calls + 1) == 6:
            raise KeyboardInterrupt
        return embed_images(self, pixels)

    monkeypatch.setattr(Teacher, "embed_images", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed_shard(recipe, tmp_path, Shard(0, 2), NullProgress())
    embed_shard(recipe, tmp_path, Shard(1, 2), NullProgress())
    with pytest.raises(TargetsError, match="1 of 2 shards cannot be joined: 0/2 is not finished"):
        join_shards(recipe, tmp_path, NullProgress())
    calls = 100
    embed_shard(recipe, tmp_path, Shard(0, 2), NullProgress())
    assert calls < 100 + 8  # 20 images in 3 views are 8 batches
    join_shards(recipe, tmp_path, NullProgress())
    assert stored(recipe, tmp_path) == expected


def part(recipe: Recipe, root: Path, number: int) -> Path:
    store = existing_targets(recipe, root)
    assert store is not None
    return store.stores[0].folder / "shards" / f"{number:05}-of-00003"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change(folder: Path, key: str, value: Any) -> None:
    write_sealed(folder / "manifest.json", {**read_sealed(folder / "manifest.json"), key: value})


PROBLEMS = {
    "missing": "1/3 is missing",
    "a copy of another": "1/3 holds shard 2/3",
    "a feature": r"1/3 is damaged: view-001\.f16, rows 0 to ",
    "the index": r"1/3 is damaged: index\.bin is not what was written",
    "the manifest": r"1/3 is damaged: manifest\.json is damaged: ",
    "teacher": "1/3 is from another teacher",
    "precision": "1/3 is from another precision: bf16, not fp32",
    "version": r"1/3 is from another version: torch 1\.0, not ",
    "images": "1/3 saw other images than the others in .*: 39, not 40",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_cannot_be_joined_is_named_and_can_be_made_again(
    photos: Path, tmp_path: Path, expected: dict[Any, bytes], problem: str
) -> None:
    recipe = recipe_for(photos)
    embed_all(recipe, tmp_path, 3)
    folder = part(recipe, tmp_path, 1)
    manifest = read_sealed(folder / "manifest.json")
    if problem == "missing":
        shutil.rmtree(folder)
    elif problem == "a copy of another":
        shutil.rmtree(folder)
        shutil.copytree(part(recipe, tmp_path, 2), folder)
    elif problem == "a feature":
        flip(folder / "view-001.f16")
    elif problem == "the index":
        flip(folder / "index.bin")
    elif problem == "the manifest":
        flip(folder / "manifest.json")
    elif problem == "teacher":
        change(folder, "teacher", {**manifest["teacher"], "files": {"a": "b"}})  # type: ignore[dict-item]
    elif problem == "precision":
        change(folder, "teacher", {**manifest["teacher"], "precision": "bf16"})  # type: ignore[dict-item]
    elif problem == "version":
        change(folder, "versions", {**manifest["versions"], "torch": "1.0"})  # type: ignore[dict-item]
    else:
        change(folder, "listed", 39)
    with pytest.raises(TargetsError, match=f"1 of 3 shards cannot be joined: {PROBLEMS[problem]}") as caught:
        join_shards(recipe, tmp_path, NullProgress())
    assert str(caught.value.fix).endswith("embed them again with the same recipe, --shard 1/3")
    if str(caught.value.fix).startswith("delete 00001-of-00003 there; "):
        if problem in ("teacher", "precision", "version"):
            with pytest.raises(TargetsError, match="shard 1/3 was begun from another "):
                embed_shard(recipe, tmp_path, Shard(1, 3), NullProgress())
        shutil.rmtree(folder)
    embed_shard(recipe, tmp_path, Shard(1, 3), NullProgress())
    join_shards(recipe, tmp_path, NullProgress())
    assert stored(recipe, tmp_path) == expected


def test_what_is_joined_is_the_stores_whatever_version_embedded_it(
    photos: Path, tmp_path: Path, expected: dict[Any, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = shutil.copytree(photos, tmp_path / "photos")
    recipe = recipe_for(more)
    embed_all(recipe, tmp_path, 3)
    join_shards(recipe, tmp_path, NullProgress())
    old = {"prgkit": "0", "torch": "1.0", "open_clip_torch": "2.0"}
    for number in range(3):
        change(part(recipe, tmp_path, number), "versions", old)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "embed_images", lambda *_: pytest.fail("asked again"))
        embed_all(recipe, tmp_path, 3)
    assert join_shards(recipe, tmp_path, NullProgress())[0].images == IMAGES
    assert read_sealed(part(recipe, tmp_path, 1) / "manifest.json")["versions"] == old

    shutil.rmtree(part(recipe, tmp_path, 1))  # a new version may embed what is lost
    embed_all(recipe, tmp_path, 3)
    assert join_shards(recipe, tmp_path, NullProgress())[0].images == IMAGES
    assert stored(recipe, tmp_path) == expected

    for number, image in enumerate(load_digits("test")[0][:9]):  # and what is new
        image.save(more / f"new-{number}.png")
    embed_all(recipe, tmp_path, 3)
    assert join_shards(recipe, tmp_path, NullProgress())[0].images == IMAGES + 9
    assert expected.items() <= stored(recipe, tmp_path).items()


def test_of_two_shards_that_saw_different_images_both_are_named(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_for(photos)
    embed_all(recipe, tmp_path, 2)
    store = existing_targets(recipe, tmp_path)
    assert store is not None
    change(store.stores[0].folder / "shards" / "00000-of-00002", "listing", "0" * 16)
    with pytest.raises(
        TargetsError, match=r"2 of 2 shards cannot be joined: 0/2 saw .*; 1/2 saw .*: others by name"
    ) as caught:
        join_shards(recipe, tmp_path, NullProgress())
    assert str(caught.value.fix) == "embed them again with the same recipe, --shard 0/2, 1/2"
    embed_all(recipe, tmp_path, 2)
    assert join_shards(recipe, tmp_path, NullProgress())[0].images == IMAGES


def test_shards_that_were_divided_otherwise_are_left_and_named(photos: Path, tmp_path: Path) -> None:
    recipe, said = recipe_for(photos), []

    class Told(NullProgress):
        def note(self, text: str) -> None:
            said.append(text)

    with pytest.raises(TargetsError, match="there are no shards of demo:digits to join"):
        join_shards(recipe, tmp_path, Told())
    embed_all(recipe, tmp_path, 3, leave_out=(0, 2))
    embed_all(recipe, tmp_path, 2)
    assert [joined.shards for joined in join_shards(recipe, tmp_path, Told())] == [2]
    assert said[-1].startswith("not joined: 3 other shards in ")
    assert said[-1].endswith(": is missing")


def test_a_joined_shard_that_is_damaged_later_is_embedded_again(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_for(photos)
    embed_all(recipe, tmp_path, 3)
    join_shards(recipe, tmp_path, NullProgress())
    before = stored(recipe, tmp_path)
    flip(part(recipe, tmp_path, 2) / "view-000.f16")
    store = existing_targets(recipe, tmp_path)
    assert store is not None
    (place,) = store.stores[0].damaged
    assert place.startswith("shards/00002-of-00003/view-000.f16, rows ")
    assert stored(recipe, tmp_path) == before


def test_a_listing_divides_into_blocks_that_are_all_there_once(photos: Path) -> None:
    source = open_images(str(photos))
    shares = [source.share(Shard(number, 4)).tolist() for number in range(4)]
    assert shares[1][:6] == [3, 4, 5, 15, 16, 17]
    assert sorted(index for share in shares for index in share) == list(range(IMAGES))
    assert np.array_equal(source.share(Shard(0, 1)), np.arange(IMAGES))


SLURM = {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "7"), ("MIN", "1"), ("MAX", "9"), ("STEP", "2"))}
SLURM["SLURM_ARRAY_TASK_COUNT"] = "5"


def test_a_process_finds_its_shard() -> None:
    assert parse_shard("3/8") == Shard(3, 8)
    for wrong, why in (
        ("8/8", "the last of 8 is 7/8"),
        ("3", "neither i/n"),
        ("-1/2", "neither i/n"),
        ("0/0", "from 0"),
    ):
        with pytest.raises(ValueError, match=why):
            parse_shard(wrong)
    assert shard_of_process(SLURM) == Shard(3, 5)
    assert shard_of_process({"RANK": "2", "WORLD_SIZE": "6"}) == Shard(2, 6)
    assert shard_of_process({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}) == Shard(1, 4)
    assert shard_of_process({**SLURM, "RANK": "1", "WORLD_SIZE": "2"}) == Shard(7, 10)
    with pytest.raises(PrgkitError, match="the Slurm array has gaps: 3 tasks from 1 to 9"):
        shard_of_process({**SLURM, "SLURM_ARRAY_TASK_COUNT": "3"})
    with pytest.raises(PrgkitError, match="nothing says which shard this process is"):
        shard_of_process({})


def test_the_manifest_is_json_that_says_what_it_was_made_from(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_for(photos)
    embed_all(recipe, tmp_path, 3, leave_out=(1, 2))
    manifest = json.loads((part(recipe, tmp_path, 0) / "manifest.json").read_text())
    assert manifest["schema"] == "prgkit.shard/1"
    assert (manifest["shard"], manifest["shards"], manifest["images"], manifest["listed"]) == (0, 3, 15, IMAGES)
    assert manifest["finished"] is True
    assert manifest["versions"].keys() == {"prgkit", "torch", "open_clip_torch"}
