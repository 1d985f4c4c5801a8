"""`recipes --new`: the choices by hand for images of several kinds, and a page that loads and is rehearsed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prgkit.cli.new_recipe import Images, page
from prgkit.config.recipe import load_recipe
from tests.conftest import PrgkitCommand, write_photos


@pytest.mark.parametrize(
    ("count", "short", "chosen"),
    [
        # 300 images of 100 px: 240 are learned from, of which 15 would be 16 steps an epoch.
        (300, 100, {"size": 96, "epochs": 200, "batch": 8, "views": 16, "held_out": 0.2}),
        (10_000, 480, {"size": 224, "epochs": 100, "batch": 256, "views": 8, "held_out": 0.05}),
        (1_200_000, 160, {"size": 160, "epochs": 20, "batch": 256, "views": 4, "held_out": 0.05}),
        (40, 20, {"size": 32, "epochs": 200, "batch": 8, "views": 16, "held_out": 0.2}),
    ],
)
def test_the_choices_by_hand(count: int, short: int, chosen: dict[str, float], tmp_path: Path) -> None:
    seen = Images(count, (short // 2, short, 2 * short), (short, 2 * short, 4 * short))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "page.yaml").write_text(page("photos", str(tmp_path / "names.txt"), seen, 2))
    recipe = load_recipe(str(tmp_path / "page.yaml"))
    assert chosen == {
        "size": recipe.student.image_size,
        "epochs": recipe.training.epochs,
        "batch": recipe.training.batch_size,
        "views": recipe.views.count,
        "held_out": recipe.data.held_out,
    }
    (tmp_path / "page.yaml").write_text(page("photos/😀 é", str(tmp_path / "names.txt"), seen, 2), encoding="utf-8")
    assert load_recipe(str(tmp_path / "page.yaml")).data.images == "photos/😀 é"
    text = (tmp_path / "page.yaml").read_text()
    assert f"{count:,} images" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "lelp" in text  # two classes are few
    assert "lelp" not in page("photos", "names.txt", seen, 11)


def test_a_page_is_written_loaded_and_rehearsed(prgkit: PrgkitCommand, empty_folder: Path) -> None:
    write_photos(empty_folder / "my photos: 1")
    Image.fromarray(np.zeros((90, 300), np.uint8)).save(empty_folder / "my photos: 1" / "wide.png")
    (empty_folder / "names.txt").write_text("one\ntwo\nthree\n")
    new = ("recipes", "--new", "mine", "--images", "my photos: 1", "--classes", "names.txt")
    written = prgkit(*new)
    assert (written.code, written.err) == (0, "")
    assert written.out.startswith("mine.yaml is written")
    assert "of 25 images of 3 classes" in (empty_folder / "mine.yaml").read_text().replace("on 25", "of 25")
    rehearsed = prgkit("distill mine.yaml --dry-run --set teacher.model=demo:digits --set teacher.weights=null "
                       "--set student.model=test_efficientnet --set student.initial=random")  # fmt: skip
    assert rehearsed.code == 0, rehearsed.err
    assert "25 in my photos: 1" in rehearsed.out
    before = (empty_folder / "mine.yaml").read_text()
    again = prgkit(*new)
    assert again.code == 1
    assert again.err.startswith("Error: there is such a file already\n  where: mine.yaml")
    assert (empty_folder / "mine.yaml").read_text() == before
    assert "give --images and --classes" in prgkit("recipes --new other").err
    nothing = prgkit("recipes --new other --images nowhere --classes names.txt")
    assert nothing.code == 1
    assert not (empty_folder / "other.yaml").exists()
