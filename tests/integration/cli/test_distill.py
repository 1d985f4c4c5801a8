"""What stands before the training: dry runs, an adapted teacher, several processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TINY_RECIPE, CliResult, PrgkitCommand, raising, write_photos


def test_pictures_that_are_nearly_black_are_told_of_before_training(prgkit: PrgkitCommand, project_copy: Path) -> None:
    grain = np.random.default_rng(0)
    Path("black").mkdir()
    for number in range(8):
        values = grain.integers(0, 16, (32, 32, 3), dtype=np.uint8)
        values[0, 0] = 255  # a hot pixel
        Image.fromarray(values).save(f"black/{number}.png")
    result = prgkit("targets tiny.yaml --set data.images=black")
    assert "black is nearly black: 999 of 1,000 values are at most 15 of 255." in result.err


def test_images_and_classes_need_no_recipe(
    prgkit: PrgkitCommand, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    write_photos(empty_folder / "my photos")
    (empty_folder / "names.txt").write_text("one\ntwo\n")
    tiny = ["teacher={model: 'demo:digits'}", "student={model: test_efficientnet, image_size: 32}"]
    sets = [word for value in tiny for word in ("--set", value)]
    result = prgkit(
        "distill", "--images", "my photos/", "--classes", "names.txt", *sets, "--dry-run", "export", "bench"
    )
    assert result.code == 0
    assert result.err == "probing demo:digits and test_efficientnet for some seconds\nthen export\nthen bench\n"
    estimate = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert estimate["run"] == "runs/my-photos"
    assert estimate["images"] == "24 in my photos/, 24 new to the teacher"
    assert estimate["evaluation"] == "none"
    assert estimate["classes"] == "2, 7 templates"
    assert estimate["teacher"].startswith("demo:digits, 9 views an image, about ")
    assert estimate["student"].startswith("test_efficientnet at 32 px, 30 epochs, about ")
    assert estimate["disk"].startswith("27.0 KiB of targets, up to 4.5 KiB of decoded pictures, ")
    assert result.out.rstrip().endswith(" free")
    assert sorted(path.name for path in empty_folder.iterdir()) == ["my photos", "names.txt"]  # nothing was written
    sets += ["--set", "data.keep.weighted=true"]  # how many images that leaves is not known yet
    document = prgkit("distill", "--images", "my photos/", "--classes", "names.txt", *sets, "--dry-run", "--json").json
    assert document["distill"]["images"] == document["distill"]["images_missing"] == 24
    assert document["distill"]["summary"]["student"].startswith("test_efficientnet at 32 px, 30 epochs, at most ")


@pytest.mark.parametrize("option", ["", "--dry-run"])
def test_an_export_that_the_student_will_not_allow_is_refused_before_the_training(
    prgkit: PrgkitCommand, project_copy: Path, option: str
) -> None:
    for asked in ("--open-vocabulary", "--embedding"):
        result = prgkit(f"distill tiny.yaml --run new --set objective.name=kd {option} export {asked}")
        assert result.code == 1
        assert result.err == (
            "Error: kd does not draw the student's features to the teacher's, so class vectors cannot score them\n"
            f"  fix: distil with one of prg, nd, promptkd, clipkd, or export without {asked}\n"
        )
        assert not Path("new").exists()


@pytest.mark.parametrize("option", ["", "--dry-run"])
def test_a_rehearsal_refuses_what_the_work_would_refuse(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    (project_copy / "mine").mkdir()
    (project_copy / "mine/thesis.tex").touch()
    for line, message in (
        ("distill tiny.yaml --set training.epochs=3", "this run was made from another recipe; it differs in training"),
        ("distill tiny.yaml --run mine", "the folder is not empty and holds no run\n"),
        ("distill tiny.yaml --run new --set data.evaluation=labelled", "1 of 1 labels match no class: 'tow' (did you"),
    ):
        if "labelled" in line:
            write_photos(project_copy / "labelled/tow", 2)
        result = prgkit(f"{line} {option}")
        assert result.code == 1
        assert f"Error: {message}" in result.err
    usage = type(shutil.disk_usage(project_copy))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 1024, 1024))
    result = prgkit(f"distill tiny.yaml --run newer --targets elsewhere {option}")
    assert result.code == 1
    assert re.search(r"Error: the target store needs \d+\.\d KiB, and 1\.0 KiB are free\n", result.err)


def test_a_rehearsal_counts_the_evaluation_images_for_the_teacher_too(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    write_photos(project_copy / "judged/two", 30)  # 24 of them are those of photos/
    line = "distill tiny.yaml --run new --set data.evaluation=judged --dry-run --json"
    found = prgkit(line).json["distill"]
    assert (found["images"], found["images_missing"]) == (24, 0)
    assert (found["evaluation_images"], found["evaluation_missing"]) == (30, 6)
    assert found["targets_bytes"] == 6 * 64 * 2
    assert found["summary"]["evaluation"] == "30 in judged, 6 new to the teacher"


def test_a_distillation_after_adapt_teacher_uses_its_context(
    prgkit: PrgkitCommand, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def distil(recipe: Any, *_: Any) -> None:
        asked.append(recipe)
        raise SystemExit

    for grey, name in enumerate(("one", "two", "three")):
        (empty_folder / "labelled" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 80 * grey).save(empty_folder / "labelled" / name / "1.png")
    (empty_folder / "tiny.yaml").write_text(TINY_RECIPE)
    monkeypatch.setattr("prgkit.teacher.prompt_tuning.EPOCHS", 1)
    monkeypatch.setattr("prgkit.training.distill.distill", distil)
    line = "adapt-teacher tiny.yaml --shots 1 --set data.labelled=labelled --out 'here/a #1.safetensors'"
    result = prgkit(line)
    assert result.out.startswith("here/a #1.safetensors: the teacher names ")
    assert result.out.endswith("to use it: --set teacher.context='here/a #1.safetensors'\n")
    assert prgkit(line, "--json").json["adapt-teacher"]["learned"]["images"] == 3
    prgkit(line, "distill")
    (empty_folder / "here" / "a #1.safetensors").unlink()
    monkeypatch.setenv("RANK", "1")
    prgkit(line, "distill")
    assert [recipe.teacher[0].context for recipe in asked] == ["here/a #1.safetensors"] * 2
    assert not (empty_folder / "here" / "a #1.safetensors").exists()  # it has one writer


def test_only_the_first_of_several_processes_asks_the_teacher(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def distil(recipe: Any, *_: Any) -> None:
        asked.append(recipe)
        raise SystemExit  # as every process but the first ends

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("prgkit.training.prepare.prepare", raising(AssertionError("a second writer")))
    monkeypatch.setattr("prgkit.training.distill.distill", distil)
    assert prgkit("targets tiny.yaml --set views.count=2") == CliResult(0, "", "")
    assert prgkit("targets tiny.yaml --set views.count=2 distill") == CliResult(0, "", "")
    assert prgkit("audit tiny.yaml --set views.count=2 --run x distill") == CliResult(0, "", "")
    assert asked[0].views.count == 2  # it goes on with the same recipe, and waits for the first there
    monkeypatch.setattr("prgkit.training.dry_run.estimate", raising(AssertionError("a second probe")))
    assert prgkit("distill tiny.yaml --dry-run") == CliResult(0, "", "")


def test_a_run_starts_another_and_what_leaves_says_so(prgkit: PrgkitCommand, project_copy: Path) -> None:
    """Distilled on three classes, then on two of them."""
    result = prgkit(
        "distill tiny.yaml --run runs/task --set student.initial=runs/tiny --set data.classes=[one,two] export bench --seconds 0.1 --batches 1"
    )
    assert result.code == 0
    told = "the student of the run tiny, which demo:digits taught 3 classes (one, two, three) on 24 images"
    assert f"the student begins with {told}\n" in result.err
    assert f"The student began with {told}.\n" in Path("runs/task/bundle/README.md").read_text()
    (report,) = Path("runs/task/bench").glob("*/report.html")
    assert f"begun with {told}) and measured on" in report.read_text()
    shutil.rmtree("runs/tiny")
    assert (
        prgkit(
            "distill tiny.yaml --run runs/task --set student.initial=runs/tiny --set data.classes=[one,two] export"
        ).code
        == 0
    )
