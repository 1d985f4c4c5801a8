"""A bundle as one file: what is in it, that it is the same each time, and what it opens to elsewhere."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.errors import ExportError
from prgkit.evaluate.predict import Model
from prgkit.export.bundle.archive import left_out, pack
from prgkit.export.bundle.bundle import open_bundle, read_evaluation
from prgkit.export.bundle.checksums import PARTS, require_unchanged
from prgkit.export.runtimes import open_runner
from prgkit.export.runtimes.parity import check_golden
from prgkit.storage.atomic import read_json, write_sealed


def export(repvit: Any, folder: Path) -> list[str]:
    """Export with a float file and return what was noted."""
    from prgkit.export.formats.options import ExportOptions
    from prgkit.export.pipeline import EvaluationSet, ExportImages, StudentOrigin, TrainedStudent, export_student

    notes: list[str] = []
    logits = np.random.default_rng(0).normal(size=(16, 20)).astype(np.float32)
    origin = StudentOrigin.model_validate(
        {
            "run": {"name": "my photos", "fingerprint": "0" * 16, "objective": "prg", "epochs": 1},
            "recipe": {"student": {"model": "repvit_m0_9"}},
            "teacher": {"model": "tiny", "weights": "none", "fingerprint": "1" * 16},
            "student": {"model": "repvit_m0_9", "parameters": 5, "image_size": 64, "initial": "random"},
        }
    )
    classes, golden = [f"thing {number}" for number in range(20)], [Image.fromarray(one) for one in repvit.pixels[:16]]
    keys = tuple(f"{number:032x}" for number in range(16))
    evaluation = EvaluationSet(iter(repvit.pixels[:16]), logits, logits, np.arange(16), "made up", keys)
    export_student(
        TrainedStudent(repvit.student, classes, repvit.preprocessing, origin),
        ExportImages(repvit.pixels[:32], [picture.resize((50, 90)) for picture in golden], evaluation),
        folder,
        ExportOptions(float_input=True),
        note=notes.append,
    )
    return notes


@pytest.fixture(scope="module")
def exported_once(repvit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing") / "bundle"
    export(repvit, folder)
    return folder


@pytest.fixture
def bundle(exported_once: Path, tmp_path: Path) -> Path:
    """A bundle in which a bench was run, something was ticked, and something was put by hand."""
    folder = tmp_path / "run" / "bundle"
    shutil.copytree(exported_once, folder)
    for mine in ("bench/laptop/report.json", "audit/ticks.csv", "golden/mine.png", "notes.txt"):
        (folder / mine).parent.mkdir(parents=True, exist_ok=True)
        (folder / mine).write_text("mine")
    return folder


def test_what_was_packed_verifies_elsewhere(bundle: Path, tmp_path: Path) -> None:
    archive = pack(bundle)
    assert archive == bundle.parent / "my-photos.zip"
    shutil.unpack_archive(archive, tmp_path / "device")
    (unpacked,) = (tmp_path / "device").iterdir()
    assert unpacked.name == "my-photos"
    there = open_bundle(unpacked)
    for part in PARTS:
        require_unchanged(unpacked, part)
    check_golden(there, open_runner(unpacked, there.artifacts[0], threads=1), precision="fp32")
    assert len(read_evaluation(unpacked).pixels) == 16
    before, after = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (bundle, unpacked)
    )
    mine = {"bench/laptop/report.json", "audit/ticks.csv", "golden/mine.png", "notes.txt"}
    assert after == {name: content for name, content in before.items() if name not in mine}
    assert {"manifest.json", "README.md", "model.onnx", "model.nchw.onnx", "golden/00.png"} <= after.keys()
    assert left_out(bundle) == ["audit", "bench", "notes.txt"]


def test_equal_bundles_make_equal_bytes(bundle: Path, tmp_path: Path) -> None:
    first = pack(bundle).read_bytes()
    other = tmp_path / "elsewhere" / "under another name"
    shutil.copytree(bundle, other, copy_function=shutil.copyfile)
    shutil.rmtree(other / "bench")
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert pack(other).read_bytes() == first
    (bundle.parent / ".my-photos.zip.1.part").write_text("a kill left this")
    assert pack(bundle).read_bytes() == first  # over the one that is there
    with zipfile.ZipFile(bundle.parent / "my-photos.zip") as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.namelist() == sorted(archive.namelist())
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "my-photos.zip"]


@pytest.mark.parametrize("file", ["model.nchw.onnx", "evaluation/labels.npy", "golden/03.png"])
def test_a_damaged_bundle_is_not_packed(bundle: Path, file: str) -> None:
    content = (bundle / file).read_bytes()
    (bundle / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ExportError, match=rf"{file} is damaged: its content is not what was exported"):
        pack(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_lost_readme_is_said(bundle: Path) -> None:
    (bundle / "README.md").unlink()
    with pytest.raises(ExportError, match=r"README\.md is missing from the bundle"):
        pack(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["golden/../../secret.txt", "/etc/passwd", "golden/..", "secret.txt", "audit/ticks.csv",
                                  "golden/a/b.png", "golden\\..\\..\\secret.txt", "golden/C:secret.txt"])  # fmt: skip
def test_a_strangers_manifest_takes_nothing_from_outside_its_bundle(bundle: Path, name: str) -> None:
    manifest = read_json(bundle / "manifest.json")
    manifest["checksums"][name] = "0" * 64
    write_sealed(bundle / "manifest.json", manifest)
    with pytest.raises(ExportError) as caught:
        pack(bundle)
    assert caught.value.what == f"manifest.json names a file outside the bundle: {name!r}"
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_file_of_the_users_is_never_replaced(bundle: Path) -> None:
    with zipfile.ZipFile(bundle.parent / "my-photos.zip", "w") as archive:
        archive.writestr("photos/0.jpg", "a photo")
    before = (bundle.parent / "my-photos.zip").read_bytes()
    with pytest.raises(ExportError) as caught:
        pack(bundle)
    assert caught.value.what == "my-photos.zip is there already and is not a packed bundle"
    assert caught.value.fix == "move it away, or rename it"
    assert (bundle.parent / "my-photos.zip").read_bytes() == before


def test_a_runs_name_cannot_lead_out_of_its_folder(bundle: Path) -> None:
    manifest = read_json(bundle / "manifest.json")
    manifest["run"]["name"] = "../../escaped"
    write_sealed(bundle / "manifest.json", manifest)
    archive = pack(bundle)
    assert archive.parent == bundle.parent
    with zipfile.ZipFile(archive) as opened:
        assert {name.split("/")[0] for name in opened.namelist()} == {archive.stem}


def test_the_float_file_is_in_the_manifest_and_in_nobodys_way(bundle: Path) -> None:
    opened = open_bundle(bundle)
    fp32, floats = opened.artifacts
    assert (floats.name, floats.format, floats.precision) == ("onnx-nchw", "onnx-nchw", "fp32")
    assert floats.parity.images == 32
    assert floats.parity.top1_agreement == 100.0
    assert floats.input.to_json() == {
        "name": "images",
        "dtype": "float32",
        "layout": "NCHW",
        "shape": ["batch", 3, 64, 64],
        "values": "(RGB / 255 - mean) / std",
        "mean": list(opened.preprocessing.mean),
        "std": list(opened.preprocessing.std),
    }
    text = (bundle / "README.md").read_text()
    assert "| model.nchw.onnx | fp32 | onnxruntime | yes |" in text
    assert "input `images`\n[batch, 3, 64, 64] float32, NCHW, `(RGB / 255 - mean) / std` with mean" in text
    manifest = read_json(bundle / "manifest.json")
    write_sealed(bundle / "manifest.json", {**manifest, "artifacts": [floats.to_json(), fp32.to_json()]})
    (bundle / floats.file).write_bytes(b"damaged")  # what is not run does not stop what is
    (answer,) = Model(bundle).predict(bundle / "golden" / "00.png")
    assert answer.label.startswith("thing ")
    with pytest.raises(ExportError) as caught:
        open_bundle(bundle)
    assert caught.value.fix == "copy the bundle again, or make the file again: prgkit export --float-input"


def test_it_is_not_measured(bundle: Path) -> None:
    from prgkit.evaluate.bench.bench import plan

    rows, _ = plan(open_bundle(bundle), None, gpu=False, threads=1)
    assert {row.file for row in rows} == {"model.onnx"}


def test_the_next_export_keeps_it(bundle: Path, repvit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_bundle(bundle).artifacts
    monkeypatch.setattr("prgkit.export.formats.onnx_graph.write_nchw", lambda *_: pytest.fail("made again"))
    notes = export(repvit, bundle)
    assert notes[-1] == "model.nchw.onnx: finished before, and made from the same; it is kept"
    assert open_bundle(bundle).artifacts == before
