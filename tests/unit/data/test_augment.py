"""Views: a function of (seed, image, view) alone, the same crop for teacher and student, in order from any worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prgkit.config.sections import Views
from prgkit.data.augment import Batch, MultiViewDataset, View, make_dataloader, render, seeded_view
from prgkit.data.cache import DecodedImageCache
from prgkit.data.index import ImageIndex, index_images
from prgkit.data.preprocessing import Preprocessing
from prgkit.data.sources import open_images
from prgkit.workers import available_cores, core_limit, default_workers

PAGE = Views(count=3, crop_scale=(0.3, 0.8), seed=5)
PREPROCESSING = Preprocessing(24, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
SIZES = [(1, 1), (1, 1000), (1000, 1), (1000, 3), (3, 1000), (2, 2), (640, 480), (33, 77), (4000, 4000)]


def keys(count: int) -> list[str]:
    return [f"{number * 2654435761 % 2**32:032x}" for number in range(count)]


def photo(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Smooth shapes: what a crop cuts out of them can be compared at several sizes."""
    grid = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        photo(40 + number, 60 - number, seed=number).save(folder / f"{number}.png")
    return index_images(open_images(str(folder)), workers=1)


def test_a_view_is_a_function_of_seed_image_and_number() -> None:
    view = seeded_view("ab", 1, 640, 480, PAGE)
    assert seeded_view("ab", 1, 640, 480, PAGE) == view
    assert seeded_view("ab", 1, 640, 480, PAGE.model_copy(update={"count": 9})) == view
    others = [
        seeded_view("ab", 2, 640, 480, PAGE),
        seeded_view("ac", 1, 640, 480, PAGE),
        seeded_view("ab", 1, 640, 480, PAGE.model_copy(update={"seed": 6})),
    ]
    assert len({view.left, *(other.left for other in others)}) == 4


def test_crops_have_the_students_shape_on_average() -> None:
    def shapes(aspect: float | None) -> np.ndarray:
        page = Views(crop_scale=(0.1, 0.2), aspect=aspect)  # small ones: none is cut at the image's edge
        drawn = [seeded_view(key, 1, 3000, 3000, page) for key in keys(200)]
        return np.array([(view.right - view.left) / (view.bottom - view.top) for view in drawn])

    np.testing.assert_allclose(shapes(0.5), 0.5 * shapes(None))
    assert (shapes(0.5) > 0.5 * 0.749).all()
    assert (shapes(0.5) < 0.5 * 1.334).all()
    assert "aspect" not in Views().model_dump(exclude_none=True)  # a store of square crops keeps its name


def test_a_view_that_is_not_square_is_a_part_of_the_picture() -> None:
    picture = np.asarray(photo(300, 400))
    whole = render(picture, View(0, 0, 1, 1, False), (40, 30), "bicubic")
    assert whole.shape == (40, 30, 3)
    reference = np.asarray(Image.fromarray(picture).resize((30, 40), Image.Resampling.BICUBIC))
    assert np.abs(whole.astype(int) - reference).max() <= 1


def test_a_view_never_changes() -> None:
    """Stored targets are worth nothing if a later version draws other crops."""
    view = seeded_view("00" * 16, 1, 640, 480, Views())
    assert (view.left, view.top, view.right, view.bottom) == pytest.approx(
        (0.15869470162673396, 0.0, 0.9588876765326511, 1.0), abs=1e-12
    )
    assert view.flip is False


def test_a_crop_by_hand() -> None:
    """At crop_scale [s, s] the area is s; the ratio stays in [3/4, 4/3], in pixels."""
    page = Views(crop_scale=(0.25, 0.25))
    ratios = []
    for key in keys(300):
        view = seeded_view(key, 1, 800, 600, page)
        width, height = (view.right - view.left) * 800, (view.bottom - view.top) * 600
        assert width * height == pytest.approx(0.25 * 800 * 600)
        ratios.append(width / height)
    assert 3 / 4 <= min(ratios) < 0.77
    assert 1.3 < max(ratios) <= 4 / 3 + 1e-9
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_boxes_stay_inside(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (10, 200, 30)) if width < 4000 else None
    for key in keys(100):
        view = seeded_view(key, 2, width, height, PAGE)
        assert 0 <= view.left < view.right <= 1 + 1e-12
        assert 0 <= view.top < view.bottom <= 1 + 1e-12
        if image is not None and width * height < 100_000:
            pixels = render(np.asarray(image), view, 8, "bicubic")
            assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]


def test_area_shares_are_uniform_in_crop_scale() -> None:
    boxes = [seeded_view(key, 1, 500, 500, PAGE) for key in keys(2000)]
    shares = np.sort([(box.right - box.left) * (box.bottom - box.top) for box in boxes])
    assert shares[0] >= 0.3 - 1e-9
    assert shares[-1] <= 0.8 + 1e-9
    expected = np.linspace(0.3, 0.8, len(shares))
    # An area that would leave the image is cut to it: above 3/4 some sides are.
    assert np.abs(shares - expected)[expected < 0.7].max() < 0.02  # Kolmogorov's bound at 1 % is 0.018
    assert np.mean([(box.left + box.right) / 2 for box in boxes]) == pytest.approx(0.5, abs=0.01)


def test_flips_are_half_or_none() -> None:
    off = PAGE.model_copy(update={"flip": False})
    flips = [seeded_view(key, 1, 64, 64, PAGE).flip for key in keys(1000)]
    assert 440 < sum(flips) < 560
    assert not any(seeded_view(key, 1, 64, 64, off).flip for key in keys(1000))
    assert replace(seeded_view(keys(9)[8], 1, 64, 64, PAGE), flip=False) == seeded_view(keys(9)[8], 1, 64, 64, off)


def test_rendering_by_hand() -> None:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    cut = render(pixels, View(0.25, 0.5, 0.75, 1.0, flip=False), 4, "bilinear")
    np.testing.assert_array_equal(cut, pixels[4:8, 2:6])
    mirrored = render(pixels, View(0.25, 0.5, 0.75, 1.0, flip=True), 4, "bilinear")
    np.testing.assert_array_equal(mirrored, pixels[4:8, 2:6][:, ::-1])


def test_teacher_and_student_see_the_same_crop() -> None:
    image = np.asarray(photo(300, 220))
    for number in range(1, 9):
        view = seeded_view("0f" * 16, number, 300, 220, PAGE)
        large, small = render(image, view, 128, "bicubic"), render(image, view, 32, "bilinear")
        downscaled = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(downscaled - small).mean() < 1
        other = render(image, seeded_view("0f" * 16, number + 1, 300, 220, PAGE), 32, "bilinear")
        assert np.abs(downscaled - other).mean() > 5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_is_resized_as_pillow_does(interpolation: str) -> None:
    image = photo(97, 61, seed=3)
    view = View(0.1, 0.2, 0.8, 0.9, flip=False)
    resample = Image.Resampling[interpolation.upper()]
    for size in (16, 160):
        expected = np.asarray(image.crop((10, 12, 78, 55)).resize((size, size), resample)).astype(int)
        for flip in (False, True):
            cut = render(np.asarray(image), replace(view, flip=flip), size, interpolation).astype(int)
            assert np.abs((cut[:, ::-1] if flip else cut) - expected).max() <= 1


def test_view_0_is_the_prepared_image(photos: ImageIndex) -> None:
    batch = rendered(MultiViewDataset(photos, PREPROCESSING, PAGE), (3, [0, 2]))
    assert (batch.pixels.shape, batch.positions.tolist(), batch.views.tolist()) == ((1, 2, 24, 24, 3), [3], [[0, 2]])
    image = photos.read(3)
    np.testing.assert_array_equal(batch.pixels[0, 0], PREPROCESSING.prepare(image))
    view = seeded_view(photos.keys[3], 2, *image.size, PAGE)
    np.testing.assert_array_equal(batch.pixels[0, 1], render(np.asarray(image), view, 24, "bilinear"))


def rendered(dataset: MultiViewDataset, *items: tuple[int, Sequence[int]]) -> Batch:
    return dataset.batch(items)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_large_picture_is_cut_from_a_reduced_one_and_view_0_from_the_whole(tmp_path: Path, suffix: str) -> None:
    """A JPEG of 24 megapixels is not decoded whole for a crop of 224 pixels."""
    (tmp_path / "in").mkdir()
    photo(1300, 2100).save(tmp_path / "in" / f"large.{suffix}")
    found = index_images(open_images(str(tmp_path / "in")), workers=1)
    assert found.read(0).size == (1300, 2100)
    enough = found.read_reduced(0)
    assert enough.shape == (1050, 650, 3)
    batch = rendered(MultiViewDataset(found, PREPROCESSING, PAGE), (0, [0, 1]))
    np.testing.assert_array_equal(batch.pixels[0, 0], PREPROCESSING.prepare(found.read(0)))
    view = seeded_view(found.keys[0], 1, 650, 1050, PAGE)
    np.testing.assert_array_equal(batch.pixels[0, 1], render(enough, view, 24, "bilinear"))
    whole = render(np.asarray(found.read(0)), view, 24, "bilinear").astype(int)
    assert np.abs(whole - batch.pixels[0, 1].numpy()).mean() < 1


def test_kept_pictures_change_no_pixel(photos: ImageIndex, tmp_path: Path) -> None:
    photo(1100, 1060).save(tmp_path / "large.jpg")
    for name in ("small", "large"):
        source = photos.source if name == "small" else open_images(str(tmp_path))
        kept = index_images(source, workers=2, cache=DecodedImageCache(tmp_path / f"pictures-{name}"))
        again = index_images(source, workers=2, cache=DecodedImageCache(tmp_path / f"pictures-{name}"), known=())
        bare = index_images(source, workers=2)
        items = [(position, [0, 1, 3]) for position in range(len(bare))]
        expected = rendered(MultiViewDataset(bare, PREPROCESSING, PAGE), *items).pixels
        for found in (kept, again):
            assert found.cache is not None
            assert len(found.cache) == len(bare)
            assert torch.equal(rendered(MultiViewDataset(found, PREPROCESSING, PAGE), *items).pixels, expected)


PLAN: list[list[tuple[int, Sequence[int]]]] = [
    [(7, [1, 2]), (0, [1, 2]), (3, [0, 3])],
    [(2, [3, 1]), (7, [1, 2])],
    [(11, [0, 1])],
]


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    names = ("pixels", "positions", "views")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in names)


def test_workers_change_nothing(photos: ImageIndex) -> None:
    rendered = MultiViewDataset(photos, PREPROCESSING, PAGE)
    alone = list(make_dataloader(rendered, PLAN, workers=0))
    assert [batch.positions.tolist() for batch in alone] == [[7, 0, 3], [2, 7], [11]]
    assert [batch.views.tolist() for batch in alone] == [[[1, 2], [1, 2], [0, 3]], [[3, 1], [1, 2]], [[0, 1]]]
    assert torch.equal(alone[0].pixels[0], alone[1].pixels[1])
    assert same(alone, list(make_dataloader(rendered, PLAN, workers=2)))


class Slow(MultiViewDataset):
    """The first image takes its time."""

    def render_into(self, into: Any, position: int, numbers: Sequence[int]) -> None:
        if position == 7:
            time.sleep(0.5)
        super().render_into(into, position, numbers)


def test_workers_do_not_wait_for_threads_that_a_fork_has_not(tmp_path: Path) -> None:
    photo(1200, 900).save(tmp_path / "a.png")
    program = f"""
import torch
from prgkit.config.sections import Views
from prgkit.data.augment import MultiViewDataset, make_dataloader
from prgkit.data.index import index_images
from prgkit.data.preprocessing import Preprocessing
from prgkit.data.sources import open_images
torch.set_num_threads(2)
torch.rand(4_000_000).exp_()  # OpenMP's threads are there from now on
index = index_images(open_images({str(tmp_path)!r}), workers=1)
preprocessing = Preprocessing(224, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
for batch in make_dataloader(MultiViewDataset(index, preprocessing, Views()), [[(0, [1, 2, 3])]], workers=1):
    print(tuple(batch.pixels.shape))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "(1, 3, 224, 224, 3)\n", done.stderr


def test_a_slow_worker_does_not_reorder(photos: ImageIndex) -> None:
    slow, quick = Slow(photos, PREPROCESSING, PAGE), MultiViewDataset(photos, PREPROCESSING, PAGE)
    assert same(list(make_dataloader(slow, PLAN, workers=2)), list(make_dataloader(quick, PLAN, workers=0)))


def test_an_endless_plan_is_read_as_it_is_used(photos: ImageIndex) -> None:
    taken = []

    def plan() -> Any:
        for number in range(10**9):
            taken.append(number)
            yield [(number % 12, [1])]

    loaded = make_dataloader(MultiViewDataset(photos, PREPROCESSING, PAGE), plan(), workers=0)
    assert [next(loaded).positions.item() for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= 4


def test_the_default_leaves_half_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 1), (9, 4), (64, 8)):
        monkeypatch.setattr("prgkit.workers.available_cores", lambda cores=cores: cores)
        assert default_workers() == expected


def test_the_cores_are_those_that_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for quotas, expected in (([], 16), ([3], 3), ([40, 5], 5)):
        monkeypatch.setattr("prgkit.workers.quotas", lambda quotas=quotas: [99, *quotas])
        assert available_cores() == expected


def test_it_is_said_what_leaves_no_more_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    for quota, there, why in (
        (2, 8, "by its container's quota"),
        (9, 8, "by its CPU affinity: taskset, Slurm or a container"),
        (9, 4, "all that there are"),
    ):
        monkeypatch.setattr("prgkit.workers.quotas", lambda quota=quota: [quota])
        monkeypatch.setattr(os, "cpu_count", lambda there=there: there)
        assert core_limit() == why


def test_a_gone_file_is_named(tmp_path: Path) -> None:
    for number in range(3):
        photo(30, 30, seed=number).save(tmp_path / f"{number}.png")
    found = index_images(open_images(str(tmp_path)), workers=1)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(Exception, match=r"\d\.png"):
        list(make_dataloader(MultiViewDataset(found, PREPROCESSING, PAGE), [[(0, [1])]], workers=0))
