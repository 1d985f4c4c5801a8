"""What `export` makes of a run, and what it says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prgkit.export.bundle.manifest import read_manifest
from tests.conftest import CliResult, PrgkitCommand, write_photos


def test_a_student_that_is_not_square_goes_all_the_way(prgkit: PrgkitCommand, project_copy: Path) -> None:
    result = prgkit("distill tiny.yaml --run runs/tall --set student.image_size=[48,32] --json")
    assert result.code == 0, result.err
    result = prgkit("export --run runs/tall --float-input bench --run runs/tall --seconds 0.1 --json")
    assert result.code == 0, result.err
    manifest = result.json["export"]
    assert manifest["input"]["shape"] == ["batch", 48, 32, 3]
    assert (manifest["preprocessing"]["image_size"], manifest["student"]["image_size"]) == ([48, 32], [48, 32])
    assert {row["status"] for row in result.json["bench"]["rows"] if row["artifact"] != "onnx-fp16"} == {"measured"}
    bundle = project_copy / "runs/tall/bundle"
    read = (bundle / "README.md").read_text()
    assert "3 classes, 48x32 px" in read
    assert "optShapes=pixels:1x48x32x3" in read
    assert "{1, 48, 32, 3}" in read
    assert "shape [batch, 3, 48, 32]" in read or "[batch, 3, 48, 32] float32" in read
    picture = sorted((project_copy / "photos").iterdir())[0]
    answer = prgkit(f"predict {picture} --run runs/tall --json").json
    code = read.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code, str(picture)], cwd=bundle, capture_output=True, text=True)
    assert done.stdout.strip() in json.dumps(answer)
    assert done.stdout.strip()


def test_parity_is_checked_on_distinct_images_and_their_number_is_said(
    prgkit: PrgkitCommand, project_copy: Path
) -> None:
    result = prgkit("export", "--json")
    assert (
        result.json["export"]["artifacts"][0]["parity"]["images"] == 24
    )  # the few that travel, and those learned from
    assert "there are 24 images to compare the exports on; 256 would be better\n" in result.err
    assert result.json["export"]["run"]["quality"]["images"] == 24
    write_photos(project_copy / "judged/two", 30)  # 24 of them are those of photos/
    assert prgkit("distill tiny.yaml --run new --set data.evaluation=judged").code == 0
    (project_copy / "judged/two/29.png").unlink()
    manifest = prgkit("export", "--run", "new", "--json").json["export"]
    assert manifest["evaluation"]["images"] == 29
    assert manifest["artifacts"][0]["parity"]["images"] == 29
    shutil.rmtree(project_copy / "judged/two")
    write_photos(project_copy / "judged/two", 2)
    Image.new("RGB", (8, 8), "red").save(project_copy / "judged/two/red.png")
    manifest = prgkit("export", "--run", "new", "--json").json["export"]
    assert manifest["artifacts"][0]["parity"]["images"] == 25  # two are in both folders


def test_golden_images_are_of_moderate_size(project_copy: Path) -> None:
    from prgkit.data.index import index_images
    from prgkit.data.sources import open_images
    from prgkit.export.from_run import golden_pictures

    for number in range(3):
        Image.new("RGB", (1500 + number, 1300)).save(project_copy / f"photos/large{number}.png")
    images = index_images(open_images("photos"), workers=1)
    assert {picture.size for picture in golden_pictures(images, np.arange(len(images)))} == {(8, 8)}
    large = np.array([position for position in range(len(images)) if images.read(position).width > 8])
    assert sorted(picture.size for picture in golden_pictures(images, large)) == [
        (1182, 1024),
        (1182, 1024),
        (1183, 1024),
    ]
    picks = golden_pictures(images, np.array([large[0], *np.setdiff1d(np.arange(9), large)]))
    assert picks[-1].height == 1024  # after those that are as they were


def test_a_bundle_leaves_as_one_file(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.storage.run import Run

    (project_copy / "runs/tiny/bundle/bench").mkdir()
    document = prgkit("export --float-input --evaluation-images 3 --zip --json").json["export"]
    archive = project_copy / document["zip"]
    assert (document["zip"], document["zip_bytes"]) == ("runs/tiny/tiny.zip", archive.stat().st_size)
    assert [artifact["name"] for artifact in document["artifacts"]] == ["onnx-fp32", "onnx-nchw"]
    assert document["evaluation"]["images"] == 3
    assert document["recipe"]["export"]["evaluation_images"] == 3  # as it was used
    assert Run(Path("runs/tiny")).recipe.export.evaluation_images == 2000  # as it was written
    result = prgkit("export", "--zip", "--run", "runs/tiny/bundle")
    assert result.out.splitlines()[-1].startswith("runs/tiny/tiny.zip (")
    assert result.out.endswith("iB) is ready to travel\n")
    assert result.err == "tiny.zip: without bench, which this machine made or you put there\n"
    made = read_manifest(project_copy / "runs/tiny/bundle")
    monkeypatch.setattr("prgkit.export.from_run.export_best", lambda *_: made)
    assert prgkit("export").err == "tiny.zip is still the bundle before this one; --zip packs it again\n"
    shutil.unpack_archive(archive, project_copy)
    predicted = prgkit("predict photos/00.png --json").json
    assert prgkit("predict photos/00.png --run tiny --json").json == predicted


def test_fewer_evaluation_images_than_asked_for_are_said(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(project_copy / "runs/tiny/bundle")
    made = manifest.model_copy(update={"evaluation": manifest.evaluation.model_copy(update={"images": 12})})
    monkeypatch.setattr("prgkit.export.from_run.export_best", lambda *_: made)
    assert prgkit("export --evaluation-images 13").err == ("there are 12 images to evaluate on; 13 were asked for\n")
    assert prgkit("export --evaluation-images 12").err == ""
    assert prgkit("export").err == ""


@pytest.mark.parametrize(
    "line", ["export --fp16 --run ..", "distill --run .. export", "distill ../../../tiny.yaml --run .. export"]
)
def test_the_bundle_that_one_stands_in_is_not_replaced(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    run = project_copy.resolve() / "runs/tiny"
    monkeypatch.chdir(run / "bundle")
    before = (run / "bundle").stat().st_ino
    monkeypatch.setattr("prgkit.export.from_run.export_run", lambda *_, **__: pytest.fail("it went to work"))
    monkeypatch.setattr("prgkit.training.distill.distill", lambda *_, **__: pytest.fail("it went to work"))
    result = prgkit(line)
    assert (result.code, result.out, (run / "bundle").stat().st_ino) == (1, "", before)
    said = result.err[result.err.index("Error: ") :].splitlines()
    assert said[0] == "Error: export puts another folder in the place of the one that you stand in"
    assert said[2] == f"  fix: cd {run} first; there --run is not needed"
    assert (said[1].startswith("  where: "), len(said)) == (True, 3)


@pytest.mark.parametrize("line", ["bench", "predict a.png", "distill demo", "doctor", "recipes", "export", "pull a/b"])
def test_a_folder_that_is_gone_is_told(
    prgkit: PrgkitCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    place = tmp_path / "the bundle"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("PWD", str(place))
    place.rmdir()
    told = f"Error: the folder that you stand in is gone\n  where: {place}\n  fix: "
    assert prgkit(line) == CliResult(1, "", f"{told}cd to one that exists\n")
    place.mkdir()
    assert prgkit(line) == CliResult(1, "", f"{told}cd '{place}' enters the one that has its name now\n")


@pytest.mark.parametrize("command", ["bench", "export", "export --trt", "predict photos/00.png"])
def test_a_packed_bundle_is_not_opened(prgkit: PrgkitCommand, project_copy: Path, command: str) -> None:
    assert prgkit("export --zip --run runs/tiny/bundle").code == 0
    assert prgkit(f"{command} --run runs/tiny/tiny.zip") == CliResult(
        1,
        "",
        "Error: this bundle is still packed\n  where: runs/tiny/tiny.zip\n"
        "  fix: unpack it here, and give its folder: python -m zipfile -e runs/tiny/tiny.zip .\n",
    )
    assert prgkit(f"{command} --run tiny.yaml").err == (
        "Error: this is a file, not a run or a bundle\n  where: tiny.yaml\n  fix: give the folder that holds it\n"
    )


def test_a_bundle_for_a_board_runs_there_by_its_readme(prgkit: PrgkitCommand, project_copy: Path) -> None:
    """ncnn's files in two precisions: exported, measured, asked by the command line and by the README's lines."""
    pytest.importorskip("pnnx")
    pytest.importorskip("openvino")
    result = prgkit("export --fp16 --ncnn bench --seconds 0.1 --threads 1 --json")
    assert result.code == 0, result.err
    artifacts = {artifact["name"]: artifact for artifact in result.json["export"]["artifacts"]}
    assert {name: one["file"] for name, one in artifacts.items() if one["format"] == "ncnn"} == {
        "ncnn-fp32": "model.ncnn",
        "ncnn-fp16": "model.fp16.ncnn",
    }
    rows = {row["artifact"]: row for row in result.json["bench"]["rows"] if row["backend"] == "ncnn"}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rows, "measured")
    assert rows["ncnn-fp32"]["agreement_fp32"] == 100.0
    bundle, picture = project_copy / "runs/tiny/bundle", project_copy / "runs/tiny/bundle/golden/00.input.png"
    answer = prgkit(f"predict {picture} --runtime ncnn --json").json["predict"][0]
    assert answer["artifact"] == "ncnn-fp32"
    programs = [part.split("```")[0] for part in (bundle / "README.md").read_text().split("```python\n")[1:]]
    for library in ("ncnn", "openvino"):
        (code,) = [program for program in programs if f"np, {library}\n" in program]
        done = subprocess.run([sys.executable, "-c", code, str(picture)], cwd=bundle, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (f"{answer['top'][0][0]}\n", ""), library
    assert prgkit("export --zip").code == 0
    assert prgkit("export").code == 0  # of the same student: not asked for, and it stays
    assert (bundle / "model.ncnn/model.ncnn.bin").exists()
    (bundle / "model.ncnn/model.ncnn.bin").unlink()
    broken = prgkit(f"predict {picture} --runtime ncnn")
    assert broken.code != 0
    assert "model.ncnn is truncated" in broken.err
    assert "prgkit export --ncnn" in broken.err
