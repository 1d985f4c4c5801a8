"""Every shipped recipe is rehearsed whole, with a few pictures, the demo's teacher and a small student standing in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="a rehearsal times the teacher and the student")

from prgkit.cli import main
from prgkit.recipe import load_recipe, shipped_recipes

# An image size that the student's family takes, and that is quick on a CPU.
STAND_INS = {"repvit_m0_9": "repvit_m0_9", "repvit_m1_1": "repvit_m0_9", "efficientnet_b1": "test_efficientnet"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures, in folders named by two classes that every recipe below is given."""
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "pictures" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_rehearses(
    name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prgkit.estimate.PROBE_SECONDS", 0.0)
    monkeypatch.setattr("prgkit.devices.PROBE_STEPS", 1)
    page = load_recipe(name, overrides=["data.classes=[cat, dog]"])
    stand_in = STAND_INS[page.student.model]
    overrides = {
        "data.classes": "[cat, dog]",
        "data.evaluation": str(pictures),
        "teacher": "{model: 'demo:digits', batch_size: 4}",
        "student.model": stand_in,
        "student.image_size": "32",
        "student.initial": "random",
    }
    sets = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.setattr(
        sys, "argv", ["prgkit", "distill", name, "--images", str(pictures), *sets, "--dry-run", "--json"]
    )
    main()
    told = json.loads(capsys.readouterr().out)["distill"]
    views = 1 + page.views.count
    assert told["run"] == f"runs/{name}"
    assert (told["images"], told["images_missing"], told["evaluation_images"]) == (12, 12, 12)
    assert told["views"] == views
    assert told["targets_bytes"] == 12 * (views + 1) * 64 * 2  # the evaluation images have one view each
    assert told["run_bytes"] > 10_000
    assert told["student_s"] > 0
    assert f"{stand_in} at 32 px, {page.training.epochs} epochs" in told["told"]["student"]
    assert told["told"]["classes"].startswith("2, ")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "targets").exists()


def test_the_models_that_the_recipes_name_exist() -> None:
    """A rehearsal stands in for them, so that their names are checked here."""
    import open_clip
    import timm

    for name in shipped_recipes():
        page = load_recipe(name, overrides=["data.classes=[cat, dog]"])
        assert timm.is_model(page.student.model), name
        if page.teacher.model != "demo:digits":
            assert page.teacher.weights in open_clip.list_pretrained_tags_by_model(page.teacher.model), name
