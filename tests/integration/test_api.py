"""prgkit from Python, as a user calls it; what the functions do is the commands' own tests' business."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import prgkit
from prgkit.api import RecipeArguments, choose
from prgkit.config.yaml_io import yaml_text
from prgkit.demo.digits import CLASSES
from prgkit.errors import ImagesError, PrgkitError, RecipeError, StudentError
from tests.conftest import PrgkitCommand

DOCS = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_page_runs_as_it_is_written(project_copy: Path) -> None:
    """In a script without a main guard, whose workers must not run it again; a tiny student in the place of a real one."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    code = code.replace('"demo"', '"tiny.yaml"').replace("repvit_m0_9", "test_efficientnet")
    shutil.rmtree("runs")
    Path("script.py").write_text(code)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    bench, answer = done.stdout.splitlines()
    artifact, p50, top1 = bench.split()
    assert (artifact, top1) == ("onnx-fp32", "None")
    assert 0 < float(p50) < 1000
    assert answer.split()[0] in ("one", "two", "three")


def test_distill_means_the_command_lines_run(request: pytest.FixtureRequest, project_copy: Path) -> None:
    command: PrgkitCommand = request.getfixturevalue("prgkit")
    updates: list[prgkit.Update] = []
    run = prgkit.distill("tiny.yaml", run="runs/tiny", progress=updates.append)  # it is finished
    assert (run.folder, run.card.finished, updates) == (Path("runs/tiny"), True, [])
    settings = {"teacher": {"model": "demo:digits", "batch_size": 8}, "data.prompts": ["a {}"], "data.held_out": 0.2}
    settings |= {"student.image_size": 32, "student.initial": "random", "training.batch_size": 8, "views.count": 1}
    settings["training.learning_rate"] = 5e-5  # which YAML would read as text
    run = prgkit.distill(
        images="photos", classes=("one", "two", "three"), student="test_efficientnet", epochs=1, settings=settings,
        run="runs/mine", progress=updates.append,
    )  # fmt: skip
    assert run.recipe.data.classes == ("one", "two", "three")
    assert run.recipe.training.learning_rate == 5e-5
    assert (updates[-1].stage, updates[-1].done, updates[-1].unit) == ("student", updates[-1].total, "img")
    assert updates[-1].facts.startswith("epoch 1/1  loss ")
    assert command("distill runs/mine/recipe.yaml --run runs/mine").err == "runs/mine is finished already\n"
    rows = prgkit.label("tiny.yaml")
    assert [row.path for row in rows] == [f"photos/{number:02}.png" for number in range(24)]


def test_what_cannot_be_is_refused_in_words(project_copy: Path) -> None:
    with pytest.raises(TypeError, match="give a recipe, or both images and classes"):
        prgkit.distill(images="photos")
    unknown: dict[str, Any] = {"learning_rate": 0.5, "epoch": 3}  # neither may be passed over
    with pytest.raises(TypeError) as caught:
        prgkit.distill("tiny.yaml", run="runs/other", **unknown)
    assert str(caught.value) == (
        "distill() has no argument 'learning_rate', 'epoch'; keys of the recipe go into "
        "settings={'training.learning_rate': ...}; did you mean 'epochs'?"
    )
    unknown = {"objective": ["kd"]}
    with pytest.raises(TypeError, match=r"batch_size': \.\.\.\}; did you mean 'objectives'\?$"):
        prgkit.compare("tiny.yaml", **unknown)
    unknown = {"zzz": 1}
    with pytest.raises(TypeError, match=r"^label\(\) has no argument 'zzz'; keys .*: \.\.\.\}$"):
        prgkit.label("tiny.yaml", **unknown)
    assert not Path("runs/other").exists()
    with pytest.raises(StudentError, match="timm has no model 'repvit_m0_99'"):
        prgkit.distill("tiny.yaml", student="repvit_m0_99", run="runs/other")
    with pytest.raises(prgkit.PrgkitError, match="there is no such run folder"):
        prgkit.load("nowhere")
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        prgkit.distil  # noqa: B018


def test_one_name_is_no_sequence_of_its_letters(project_copy: Path) -> None:
    with pytest.raises(RecipeError, match="unknown objective 'prgg'; did you mean 'prg'"):
        prgkit.compare("tiny.yaml", objectives="prgg")
    with pytest.raises(StudentError, match="timm has no model 'test_efficientnett'"):
        prgkit.compare("tiny.yaml", objectives="kd", students="test_efficientnett")
    with pytest.raises(PrgkitError, match="litertt"):
        prgkit.Run("runs/tiny").export(formats="litertt")


def test_settings_may_be_numpys() -> None:
    settings: dict[str, object] = {
        "training.epochs": np.int64(3),
        "training.learning_rate": np.float32(0.25),
        "views.flip": np.bool_(0),
    }
    settings["targets.debias"], settings["targets.prior"] = (
        np.float64(1),
        dict(zip(CLASSES, np.arange(10) / 45, strict=True)),
    )
    given: RecipeArguments = {"settings": settings, "classes": list(np.array(CLASSES)), "images": Path("photos")}
    recipe, _ = choose(prgkit.distill, None, given)
    assert (recipe.training.epochs, recipe.training.learning_rate, recipe.views.flip) == (3, 0.25, False)
    assert recipe.classes == CLASSES
    assert yaml_text([np.arange(3), np.float64(0.5), Path("a")]) == "[[0, 1, 2], 0.5, a]"
    with pytest.raises(TypeError, match="not object"):
        yaml_text(object())


def test_a_model_names_whatever_a_picture_comes_as(project_copy: Path) -> None:
    path = Path("photos/00.png")
    picture = Image.open(path)
    pixels = np.asarray(picture.convert("RGB"))
    with prgkit.load("runs/tiny") as model:
        (answer,) = model.predict("photos/00.png")
        assert answer.label == answer.top[0][0]
        assert answer.probability == answer.top[0][1] == pytest.approx(max(dict(answer.top).values()))
        assert model.classes == ("one", "two", "three")
        named = {"label": answer.label, "top": answer.top}
        for given in (path, picture, pixels, [path], pixels[None], (one for one in [pixels])):
            (other,) = model.predict(given)
            assert {"label": other.label, "top": other.top} == named
        assert [one.image for one in model.predict([picture, pixels, "photos/0[12].png"])] == [
            "photos/00.png", "1", "photos/01.png", "photos/02.png",
        ]  # fmt: skip
        alone, together = model.predict("photos"), model.predict("photos", batch_size=7)
        assert [one.image for one in together] == [f"photos/{number:02}.png" for number in range(24)]
        for one, other in zip(alone, together, strict=True):
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-5)
        Path("cut.png").write_bytes(path.read_bytes()[:60])
        bad, wrong, good = model.predict(["cut.png", pixels.astype(np.float32), pixels], batch_size=3)
        assert isinstance(bad.error, ImagesError)
        assert str(wrong.error) == (
            "array 1 is no picture: float32 [8, 8, 3]\n  fix: give uint8 [height, width, 3], RGB from 0 to 255"
        )
        assert (good.label, bad.label, good.error) == (answer.label, None, None)
        assert model.predict(path, min_confidence=1.0)[0].label is None
        assert model.predict([]) == []


def test_a_report_is_a_table_for_pandas_users(project_copy: Path) -> None:
    pytest.importorskip("pandas")
    report = prgkit.Bundle("runs/tiny/bundle").bench(seconds=0.1, batches=[1])
    frame = report.to_frame()
    assert list(frame["artifact"]) == [row.artifact for row in report.rows]
    assert frame["latency.p50_ms"][0] == report.rows[0].latency.p50_ms


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import json, sys; import prgkit; prgkit.__version__; dir(prgkit); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert loaded & {"torch", "numpy", "PIL", "onnxruntime", "pydantic", "click", "rich", "yaml"} == set()
