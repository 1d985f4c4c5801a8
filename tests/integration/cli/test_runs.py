"""Which run a command works on, and what is refused of one that was made from something else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY_RECIPE, PrgkitCommand


def test_distill_names_the_run_and_says_what_it_learned(prgkit: PrgkitCommand, project_copy: Path) -> None:
    result = prgkit("distill", "tiny.yaml")
    assert result.code == 0
    assert result.err == "runs/tiny is finished already\n"
    assert result.out.startswith("runs/tiny: test_efficientnet agrees with its teacher on ")
    assert "of the held-out images (epoch 1 of 1; 24 images; " in result.out


def test_a_finished_run_goes_on_with_the_chain(prgkit: PrgkitCommand, project_copy: Path) -> None:
    result = prgkit("distill tiny.yaml --run runs/tiny export predict photos/00.png --json")
    assert result.code == 0
    document = result.json
    assert list(document) == ["distill", "export", "predict"]
    assert document["distill"]["run"] == "runs/tiny"
    assert document["export"]["bundle"] == "runs/tiny/bundle"
    assert [artifact["name"] for artifact in document["export"]["artifacts"]] == ["onnx-fp32"]
    assert document["predict"][0]["image"] == "photos/00.png"
    assert document["predict"][0]["class"] in ("one", "two", "three")
    assert "runs/tiny is finished already" in result.err


def test_the_newest_run_is_found_and_distill_alone_goes_on_with_it(prgkit: PrgkitCommand, project_copy: Path) -> None:
    shutil.copytree("runs/tiny", "runs/older")
    (project_copy / "runs/tiny/card.json").touch()
    assert prgkit("distill", "--json").json["distill"]["run"] == "runs/tiny"
    (project_copy / "runs/older/card.json").touch()
    assert prgkit("distill", "--json").json["distill"]["run"] == "runs/older"
    result = prgkit("distill", "--run", "runs/tiny", "--set", "training.epochs=3")
    assert result.code == 1
    assert result.err == (
        "Error: this run was made from another recipe; it differs in training.epochs\n"
        "  where: runs/tiny\n"
        "  fix: start a new run with --run runs/tiny-2, or delete runs/tiny\n"
    )


def test_a_run_from_another_recipe_is_refused_by_the_keys_that_differ(
    prgkit: PrgkitCommand, project_copy: Path
) -> None:
    (project_copy / "tiny.yaml").write_text(
        TINY_RECIPE.replace("{name: ce}", "{name: kd}").replace("count: 1", "count: 2")
    )
    result = prgkit("distill", "tiny.yaml")
    assert result.code == 1
    assert "it differs in objective.alpha, objective.name, objective.temperature, views.count\n" in result.err


def test_what_is_not_learned_from_may_change(prgkit: PrgkitCommand, project_copy: Path) -> None:
    assert prgkit("distill", "tiny.yaml", "--set", "export.batch=[1, 4, 4]").code == 0
    from prgkit.storage.run import Run

    assert Run(Path("runs/tiny")).recipe.export.batch == (1, 4, 4)


def test_a_run_and_its_bundle_can_be_stood_in(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = str(project_copy / "photos/00.png")
    expected = prgkit("predict", picture, "--json").json
    monkeypatch.chdir(project_copy / "runs/tiny")
    assert prgkit("predict", picture, "--json").json == expected
    assert prgkit("distill", "--json").json["distill"]["run"] == str(project_copy / "runs/tiny")
    result = prgkit("export")  # its images are named relative to where the run was started
    assert result.code == 0
    assert result.out.endswith(f"{project_copy}/runs/tiny/bundle is ready to travel\n")
    assert Path.cwd() == project_copy / "runs/tiny"
    monkeypatch.chdir(project_copy / "runs/tiny/bundle")
    assert prgkit("predict", picture, "--json").json == expected
    result = prgkit("export")
    assert result.code == 2
    assert "A bundle is exported already; export --trt builds its engines, export --zip packs it." in result.err
    for option, does in (("--fp16", "halves"), ("--int8", "quantises")):
        result = prgkit(f"export --zip {option}")
        assert (result.code, result.err.splitlines()[-1]) == (
            *(2, f"Error: {option} {does} where the student was trained; in a bundle it is for --trt."),
        )
    for option in ("--open-vocabulary", "--float-input", "--evaluation-images 5"):
        result = prgkit(f"export --zip {option}")
        assert (result.code, result.err.splitlines()[-1]) == (
            *(2, f"Error: {option.split()[0]} is for where the student was trained; this is a bundle."),
        )


def test_what_is_written_lies_where_it_was_typed(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = project_copy.parent / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    run = str(project_copy / "runs/tiny")
    assert prgkit("suggest-labels", "--run", run, "-n", "2", "--out", "mine.csv").code == 0
    assert prgkit("targets", "--run", run, "--gallery", "mine.npz").code == 0
    assert prgkit("targets", "--run", run, "--targets", "seen").code == 0
    assert {path.name for path in other.iterdir()} >= {"mine.csv", "mine.npz", "seen"}
    assert not {"mine.csv", "mine.npz", "seen"} & {path.name for path in project_copy.iterdir()}
    asked = []
    monkeypatch.setattr("prgkit.cli.main.compare_trials", lambda session, recipe, out, *_: asked.append(out) or {})
    monkeypatch.chdir(run)
    assert prgkit("compare", "--out", "mine").code == 0
    assert asked == [project_copy / "runs/tiny/mine"]


def test_a_project_can_be_moved(prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project_copy.parent)
    project_copy.rename("moved")
    assert prgkit("export", "--run", "moved/runs/tiny").code == 0
    result = prgkit("predict", "--run", "moved/runs/tiny/bundle", "moved/photos/00.png")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("moved/photos/00.png: ")


def test_no_run_no_bundle_and_a_stale_bundle(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = project_copy / "runs/tiny/student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    stale = "Error: the bundle is stale: it holds another student than the run\n"
    assert prgkit("bench").err == f"{stale}  where: runs/tiny/bundle\n  fix: prgkit export --run runs/tiny\n"
    assert prgkit("predict", "photos/00.png", "--run", "runs/tiny/bundle").err.startswith(stale)
    shutil.rmtree("runs/tiny/bundle")
    assert prgkit("bench").err == (
        "Error: the run has not been exported yet\n  where: runs/tiny\n  fix: prgkit export --run runs/tiny\n"
    )
    assert prgkit("bench", "--run", "runs/tine").err.startswith(
        "Error: there is no such run folder\n  where: runs/tine"
    )
    assert prgkit("bench", "--run", "photos").err.startswith("Error: this is no run folder: it has no recipe.yaml\n")
    shutil.rmtree("runs")
    assert prgkit("export").err == (
        f"Error: there is no run here\n  where: {project_copy}\n"
        "  fix: prgkit distill demo makes one, or name one with --run FOLDER\n"
    )
    assert prgkit("distill").code == 1


def test_targets_then_distill_are_about_the_same_recipe(prgkit: PrgkitCommand, project_copy: Path) -> None:
    result = prgkit("targets", "tiny.yaml", "--set", "views.count=2", "distill", "--run", "runs/two", "--json")
    assert result.code == 0
    assert result.json["targets"]["images"] == 24
    assert result.json["targets"]["bytes"] > 0
    assert result.json["distill"]["run"] == "runs/two"
    from prgkit.storage.run import Run

    assert Run(Path("runs/two")).recipe.views.count == 2


def test_two_exports_of_one_run_do_not_meet(prgkit: PrgkitCommand, project_copy: Path) -> None:
    from prgkit.storage.locks import locked

    with locked(project_copy / "runs/tiny", "run"):
        result = prgkit("export")
    assert result.code == 1
    message = f"Error: another process ({os.getpid()}) is working on this run\n  where: runs/tiny\n"
    assert result.err.startswith(message)
