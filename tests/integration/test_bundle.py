"""The bundle: a whole export of real students, and every way a bundle can be damaged."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
import zipfile
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from prgkit.config.recipe import shipped_recipes
from prgkit.config.yaml_io import parse_yaml
from prgkit.errors import BackendError, DiskFullError, ExportError, ParityError, PrgkitError, RunError
from prgkit.evaluate.predict import Model
from prgkit.export import engines as bundle_engines
from prgkit.export import pipeline
from prgkit.export.bundle import bundle as bundle_module
from prgkit.export.bundle.artifact_cache import building
from prgkit.export.bundle.bundle import open_bundle, read_evaluation, write_evaluation
from prgkit.export.bundle.engine_metadata import load_engine_metadata
from prgkit.export.formats import student_export
from prgkit.export.formats import tensorrt as engines
from prgkit.export.formats.base import Made
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.student_export import CalibrationSet
from prgkit.export.pipeline import EvaluationSet, ExportImages, StudentOrigin, TrainedStudent, export_student
from prgkit.export.runtimes import open_runner
from prgkit.export.runtimes.gpu import probe_backend
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.export.runtimes.parity import check_golden
from prgkit.storage import reproducible
from prgkit.storage.atomic import read_json, write_sealed
from prgkit.storage.locks import locked

needs_rtx = pytest.mark.skipif(
    not probe_backend("tensorrt_rtx").usable, reason="tensorrt_rtx is not installed: pip install 'prgkit[rtx]'"
)

CLASSES = [f"thing {number}" for number in range(20)]
FACTS = {
    "run": {"name": "test", "fingerprint": "0" * 16, "objective": "prg", "epochs": 1},
    "recipe": {"student": {"model": "repvit_m0_9"}},
    "teacher": {"model": "tiny", "weights": "none", "fingerprint": "1" * 16},
    "student": {"model": "repvit_m0_9", "parameters": 5, "image_size": 64, "initial": "random"},
}


def build_engines(folder, *, note, **options):
    return bundle_engines.build_engines(folder, ExportOptions(**options), note=note)


def golden_pictures():
    """Pictures of many shapes, so that resizing and cropping are seen."""
    generator = np.random.default_rng(3)
    sizes = [(80, 64), (64, 80), (64, 64), (131, 97), (40, 30), (33, 200)]
    return [
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(sizes[number % 6], 3)
        for number in range(16)
    ]


def held_out(repvit, count=40, *, labels=True):
    generator = np.random.default_rng(4)
    return EvaluationSet(
        prepared=iter(repvit.pixels[:count]),
        teacher_logits=generator.normal(size=(count, 20)).astype(np.float32),
        teacher_uniform_logits=generator.normal(size=(count, 20)).astype(np.float32),
        labels=generator.integers(0, 20, count) if labels else None,
        source="made up",
        keys=tuple(f"{number:032x}" for number in range(count)),
    )


def export(repvit, folder, *, notes=None, learned=None, **options):
    origin = StudentOrigin.model_validate(FACTS)
    return export_student(
        TrainedStudent(repvit.student, CLASSES, repvit.preprocessing, origin),
        ExportImages(repvit.pixels, golden_pictures(), held_out(repvit), learned),
        folder,
        ExportOptions(**options),
        note=(notes if notes is not None else []).append,
    )


@pytest.fixture(scope="module")
def whole(repvit, tmp_path_factory):
    """A bundle with both precisions and, where tensorrt_rtx is, both engines; tests copy it before they damage it."""
    folder, notes = tmp_path_factory.mktemp("run") / "bundle", []
    manifest = export(repvit, folder, notes=notes, fp16=True, trt=probe_backend("tensorrt_rtx").usable)
    return SimpleNamespace(folder=folder, manifest=manifest, notes=notes)


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_what_was_written_opens_again(whole, repvit):
    bundle = open_bundle(whole.folder)
    assert bundle.manifest == whole.manifest
    assert read_json(whole.folder / "manifest.json")["schema"] == "prgkit.bundle/3"
    assert bundle.classes == tuple(CLASSES)
    assert bundle.preprocessing == repvit.preprocessing
    names = [entry.name for entry in bundle.artifacts]
    assert names[:2] == ["onnx-fp32", "onnx-fp16"]
    assert bundle.manifest.evaluation.to_json() == {"images": 40, "labelled": True, "source": "made up"}
    assert bundle.manifest.input.shape == ("batch", 64, 64, 3)
    fp32, fp16 = bundle.artifacts[:2]
    assert fp32.parity.images == 256
    assert fp32.parity.top1_agreement == 100.0
    assert fp16.parity.top1_agreement >= 99.0
    assert not [path.name for path in whole.folder.rglob("*") if path.name.endswith(".part")]


@needs_rtx
def test_engines_are_in_the_bundle_and_said_to_be_unexecuted(whole):
    entries = [entry for entry in open_bundle(whole.folder).artifacts if entry.format == "engine"]
    assert [entry.name for entry in entries] == ["tensorrt_rtx-fp32", "tensorrt_rtx-fp16"]
    for entry in entries:
        card = load_engine_metadata(whole.folder / entry.file)
        assert entry.sha256 == card.sha256
        if not entry.executed:
            assert entry.note.startswith("never executed here: ")
            assert card.note == entry.note
            assert entry.parity is None
    assert entries[1].bytes < 0.7 * entries[0].bytes
    said = "\n".join(whole.notes)
    assert "model.fp16.tensorrt_rtx.engine: tensorrt_rtx 1." in said


def test_evaluation_comes_back_without_loss(whole, repvit):
    evaluation, given = read_evaluation(whole.folder), held_out(repvit)
    np.testing.assert_array_equal(evaluation.pixels, repvit.pixels[:40])
    np.testing.assert_array_equal(evaluation.teacher_logits, given.teacher_logits)
    np.testing.assert_array_equal(evaluation.teacher_uniform_logits, given.teacher_uniform_logits)
    np.testing.assert_array_equal(evaluation.labels, given.labels)
    here = OnnxRunner(whole.folder / "model.onnx", threads=1).run(repvit.pixels[:40])
    np.testing.assert_allclose(evaluation.logits, here, atol=1e-3)
    assert len(read_evaluation(whole.folder, limit=7).pixels) == 7


def test_without_labels_there_is_no_labels_file(repvit, tmp_path):
    given = held_out(repvit, labels=False)
    arrays = {"teacher_logits": given.teacher_logits, "teacher_uniform_logits": given.teacher_uniform_logits}
    arrays["keys"] = given.keys
    write_evaluation(tmp_path, given.prepared, **arrays, labels=None, student=lambda batch: batch[:, 0, 0].astype("f4"))
    assert not (tmp_path / "evaluation" / "labels.npy").exists()
    assert read_evaluation(tmp_path).labels is None


def test_equal_images_make_equal_bytes(repvit, tmp_path):
    for name in ("a", "b"):
        given = held_out(repvit)
        arrays = {"teacher_logits": given.teacher_logits, "teacher_uniform_logits": given.teacher_uniform_logits}
        arrays["keys"] = given.keys
        write_evaluation(
            tmp_path / name, given.prepared, **arrays, labels=None, student=lambda b: b[:, 0, 0].astype("f4")
        )
    archives = [tmp_path / name / "evaluation" / "images.zip" for name in ("a", "b")]
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.namelist()[:2] == ["00000.png", "00001.png"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_beyond_a_hundred_thousand_images_each_keeps_its_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "member", lambda name: reproducible.member(f"{int(name[:-4]) + 99_998:05}.png"))
    pixels = np.arange(4 * 3, dtype=np.uint8).reshape(4, 1, 1, 3)
    given = dict.fromkeys(("teacher_logits", "teacher_uniform_logits"), np.zeros((4, 3), np.float32))
    given |= {"keys": "abcd", "labels": None}
    write_evaluation(tmp_path, iter(pixels), **given, student=lambda batch: batch[:, 0, 0].astype("f4"))
    found = read_evaluation(tmp_path)
    np.testing.assert_array_equal(found.pixels[:, 0, 0], found.logits)


def test_what_is_damaged_in_a_manifest_is_not_sealed_anew(copy, repvit):
    text = (copy / "manifest.json").read_text()
    assert text.count('"top1_agreement": 100.0') > 0
    (copy / "manifest.json").write_text(text.replace('"top1_agreement": 100.0', '"top1_agreement": 500.0', 1))
    notes = []
    export(repvit, copy, notes=notes)
    assert open_bundle(copy).artifacts[0].parity.top1_agreement == 100.0
    assert not any("finished before" in note for note in notes)


@needs_rtx
def test_what_an_export_is_not_asked_for_stays_where_the_student_is_the_same(repvit, tmp_path, monkeypatch):
    folder, options = tmp_path / "bundle", {"fp16": True, "trt": True, "float_input": True}
    export(repvit, folder, **options)
    before = {entry.name: entry for entry in open_bundle(folder).artifacts}
    assert len(before) == 5
    notes = []
    export(repvit, folder, notes=notes)
    assert {entry.name: entry for entry in open_bundle(folder).artifacts} == before
    stay = "model.fp16.onnx, model.fp32.tensorrt_rtx.engine, model.fp16.tensorrt_rtx.engine, model.nchw.onnx"
    assert notes[-1] == f"stays in the bundle, not asked for, and of the same student: {stay}"
    damaged = folder / "model.fp16.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    notes.clear()
    export(repvit, folder, notes=notes)
    assert notes[-1] == "no longer in the bundle: model.fp16.onnx"
    assert {entry.name for entry in open_bundle(folder).artifacts} == before.keys() - {"onnx-fp16"}
    notes.clear()
    monkeypatch.setattr(pipeline, "origin_of", lambda *_: {"student": "another"})
    export(repvit, folder, notes=notes)
    assert [entry.name for entry in open_bundle(folder).artifacts] == ["onnx-fp32"]
    assert notes[-1].startswith("no longer in the bundle: ")
    assert sorted(path.name for path in folder.glob("model*")) == ["model.onnx"]


def test_golden_images_pass_where_they_were_made(whole):
    bundle = open_bundle(whole.folder)
    for entry in bundle.artifacts[:2]:
        check_golden(bundle, open_runner(whole.folder, entry, threads=1), precision=entry.precision)
    assert len(list((whole.folder / "golden").glob("*.input.png"))) == 16


def without_digests(folder):
    """Open a bundle whose golden files may be changed: that stands for a machine that works in another way."""
    manifest = read_json(folder / "manifest.json")
    del manifest["checksums"]
    write_sealed(folder / "manifest.json", manifest)
    return open_bundle(folder)


def test_a_preprocessing_that_differs_is_named_as_the_stage(copy):
    bundle = without_digests(copy)
    Image.open(copy / "golden" / "05.png").rotate(180).save(copy / "golden" / "05.png")
    with pytest.raises(ParityError, match=r"preprocessing differs .* golden image 05, by up to"):
        check_golden(bundle, open_runner(copy, bundle.artifacts[0], threads=1), precision="fp32")


def test_a_model_that_differs_is_named_as_the_stage(copy):
    bundle = without_digests(copy)
    logits = np.load(copy / "golden" / "logits.npy")
    logits[3, 1] += 5
    np.save(copy / "golden" / "logits.npy", logits)
    with pytest.raises(ParityError, match=r"onnx-fp32 differs .* golden image 03: by 5,? .*so the model stage differs"):
        check_golden(bundle, open_runner(copy, bundle.artifacts[0], threads=1), precision="fp32")


def test_the_readmes_ten_lines_run_and_agree(whole, repvit):
    code = re.search(r"```python\n(.*?)```", (whole.folder / "README.md").read_text(), re.S).group(1)
    expected = np.load(whole.folder / "golden" / "logits.npy")
    for number in (0, 1, 3, 4, 5):
        printed = subprocess.run(
            [sys.executable, "-c", code, f"golden/{number:02}.png"],
            cwd=whole.folder,
            capture_output=True,
            text=True,
            check=True,
        )
        assert printed.stdout.strip() == CLASSES[expected[number].argmax()]


@pytest.mark.parametrize(("file", "fix"), [("model.onnx", "prgkit export"), ("engine", "prgkit export --trt")])
def test_a_truncated_artifact_is_named_with_what_remakes_it(copy, file, fix):
    entries = [entry for entry in open_bundle(copy).artifacts if entry.file.endswith(file)]
    if not entries:
        pytest.skip("no engine without tensorrt_rtx")
    path = copy / entries[0].file
    size = path.stat().st_size
    with open(path, "r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(ExportError) as caught:
        open_bundle(copy)
    assert caught.value.what == f"{path.name} is truncated: {size - 1} of {size} bytes"
    assert caught.value.fix == f"copy the bundle again, or make the file again: {fix}"


def test_a_changed_byte_is_found(copy):
    with open(copy / "model.onnx", "r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)
        stream.seek(1000)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ExportError, match=r"model\.onnx is damaged"):
        open_bundle(copy)


def test_a_missing_artifact_is_named(copy):
    (copy / "model.fp16.onnx").unlink()
    with pytest.raises(ExportError, match=r"model\.fp16\.onnx is missing from the bundle"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is damaged"),
        ("[]", "manifest.json is damaged: it holds no object"),
        ('{"schema": "prgkit.bundle/9"}', "manifest.json has schema 'prgkit.bundle/9', not 'prgkit.bundle/3'"),
        ('{"schema": "prgkit.bundle/1"}', "manifest.json has schema 'prgkit.bundle/1', not 'prgkit.bundle/3'"),
        ('{"schema": "prgkit.bundle/3", "run": {}}', "manifest.json is damaged: prgkit: Field required"),
    ],
)
def test_a_damaged_manifest_is_a_short_error(copy, text, message):
    (copy / "manifest.json").write_text(text)
    if text.endswith("}"):
        write_sealed(copy / "manifest.json", read_json(copy / "manifest.json"))
    with pytest.raises(ExportError) as caught:
        open_bundle(copy)
    assert caught.value.what.startswith(message)
    assert "prgkit export" in caught.value.fix


@pytest.mark.parametrize("file", ["../model.onnx", "/model.onnx", "..", "", "a/b.onnx", "a\\b.onnx", "C:x.onnx"])
def test_a_file_outside_the_bundle_is_refused(copy, file):
    manifest = read_json(copy / "manifest.json")
    manifest["artifacts"][0]["file"] = file
    write_sealed(copy / "manifest.json", manifest)
    with pytest.raises(ExportError) as caught:
        open_bundle(copy)
    assert caught.value.what == f"manifest.json names a file outside the bundle: {file!r}"


@pytest.mark.parametrize("entry", ["model.onnx", {"file": "model.onnx", "format": "onnx"}])
def test_an_artifact_without_its_facts_is_refused(copy, entry):
    manifest = read_json(copy / "manifest.json")
    write_sealed(copy / "manifest.json", {**manifest, "artifacts": [entry]})
    with pytest.raises(ExportError, match=r"manifest\.json is damaged: artifacts\.0\.?"):
        open_bundle(copy)


def test_predict_opens_the_fp32_file_that_the_manifest_names(copy):
    picture = copy / "golden" / "00.png"
    expected = Model(copy).predict(picture, top_k=1)
    manifest = read_json(copy / "manifest.json")
    manifest["artifacts"][0]["file"] = "student.onnx"
    manifest["artifacts"].reverse()
    (copy / "model.onnx").rename(copy / "student.onnx")
    write_sealed(copy / "manifest.json", manifest)
    assert Model(copy).predict(picture, top_k=1) == expected
    manifest["artifacts"].pop()
    write_sealed(copy / "manifest.json", manifest)
    with pytest.raises(ExportError, match="the bundle has no fp32 ONNX file"):
        Model(copy).predict(picture, top_k=1)


def test_a_folder_without_a_bundle_says_so(tmp_path):
    with pytest.raises(ExportError, match="there is no bundle here"):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    "file", ["labels.npy", "logits.npy", "teacher_logits.npy", "teacher_uniform_logits.npy", "images.zip"]
)
def test_a_flipped_byte_in_what_is_measured_against_is_named(copy, file):
    path = copy / "evaluation" / file
    content = bytearray(path.read_bytes())
    content[-9] ^= 1  # in a number, or in the archive's directory: its form stays right
    path.write_bytes(content)
    with pytest.raises(ExportError, match=rf"(evaluation/{file} is damaged|the evaluation images cannot be read)"):
        read_evaluation(copy)


def test_a_flipped_byte_in_the_golden_files_is_not_taken_for_another_machine(copy):
    bundle, path = open_bundle(copy), copy / "golden" / "logits.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    with pytest.raises(ExportError, match=r"golden/logits\.npy is damaged"):
        check_golden(bundle, open_runner(copy, bundle.artifacts[0], threads=1), precision="fp32")
    path.unlink()
    with pytest.raises(ExportError, match=r"golden/logits\.npy is missing from the bundle"):
        check_golden(bundle, open_runner(copy, bundle.artifacts[0], threads=1), precision="fp32")


def test_a_changed_word_in_the_manifest_is_found(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"thing 3"', '"thing 4"'))
    with pytest.raises(ExportError, match=r"manifest\.json is damaged: its content is not what was written"):
        open_bundle(copy)


@needs_rtx
def test_a_changed_word_in_an_engines_card_is_found(copy):
    path = copy / "model.fp32.tensorrt_rtx.engine"
    card = path.with_name(path.name + ".json")
    card.write_text(card.read_text().replace('"SM86"', '"SM87"'))
    with pytest.raises(ExportError, match=r"model\.fp32\.tensorrt_rtx\.engine\.json is damaged"):
        load_engine_metadata(path)


def test_damaged_evaluation_images_are_an_error(copy):
    path = copy / "evaluation" / "images.zip"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ExportError, match="the evaluation images cannot be read"):
        read_evaluation(copy)


def test_a_parity_breach_leaves_the_old_bundle_and_nothing_else(copy, repvit, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(
        student_export, "run_batches", lambda runner, pixels: np.random.default_rng().normal(size=(256, 20))
    )
    with pytest.raises(ParityError):
        export(repvit, copy, opset=21)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_and_its_measurements_stay(copy, repvit):
    (copy / "bench" / "laptop").mkdir(parents=True)
    (copy / "bench" / "laptop" / "report.json").write_text("{}")
    (copy / "audit").mkdir()
    (copy / "audit" / "ticks.csv").write_text("ticked here")
    (copy / "answers.csv").write_text("those of predict --out")
    before = (copy / "manifest.json").stat().st_ino
    export(repvit, copy)
    assert (copy / "manifest.json").stat().st_ino != before
    assert (copy / "bench" / "laptop" / "report.json").exists()
    assert (copy / "audit" / "ticks.csv").read_text() == "ticked here"
    assert (copy / "answers.csv").read_text() == "those of predict --out"
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]
    open_bundle(copy)


def test_what_is_the_same_is_not_made_again(copy, repvit, monkeypatch):
    """What travels with a kept file is its parity, and whatever it was made from has to be the same."""
    manifest, notes = read_json(copy / "manifest.json"), []
    monkeypatch.setattr("prgkit.export.formats.onnx_export.export_onnx", lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(student_export, "write_fp16", lambda *_, **__: pytest.fail("made again"))
    again = export(repvit, copy, fp16=True, trt=len(manifest["artifacts"]) > 2, notes=notes)
    assert [entry.to_json() for entry in again.artifacts] == manifest["artifacts"]
    kept = ": finished before, and made from the same; it is kept"
    assert notes == [f"{entry.file}{kept}" for entry in again.artifacts]
    open_bundle(copy)

    monkeypatch.undo()
    with open(copy / "model.fp16.onnx", "r+b") as stream:
        stream.seek(1000)
        stream.write(b"damaged")
    notes.clear()
    export(repvit, copy, fp16=True, notes=notes)
    assert notes[0] == f"model.onnx{kept}"
    assert notes[1].startswith("model.fp16.onnx: fp16, max abs difference ")
    open_bundle(copy)


@pytest.mark.parametrize("what", ["student", "pixels", "classes", "opset"])
def test_what_an_onnx_file_is_made_from(repvit, what):
    options, names, pixels = ExportOptions(opset=20), CLASSES, repvit.pixels
    before = student_export.origin_of(repvit.student, pixels, names, repvit.preprocessing, options)
    fp16_too = student_export.origin_of(repvit.student, pixels, names, repvit.preprocessing, ExportOptions(fp16=True))
    assert fp16_too == before
    student = deepcopy(repvit.student)
    if what == "student":
        with torch.no_grad():
            next(student.parameters()).mul_(1.0001)
    elif what == "pixels":
        pixels = pixels[::-1].copy()
    elif what == "classes":
        names = CLASSES[::-1]
    else:
        options = ExportOptions(opset=21)
    assert student_export.origin_of(student, pixels, names, repvit.preprocessing, options) != before


@needs_rtx
def test_engines_come_to_a_bundle_without_another_onnx_export(repvit, tmp_path, monkeypatch):
    export(repvit, tmp_path / "bundle")
    monkeypatch.setattr("prgkit.export.formats.onnx_export.export_onnx", lambda *_, **__: pytest.fail("made again"))
    manifest = export(repvit, tmp_path / "bundle", trt=True)
    assert [entry.name for entry in manifest.artifacts] == ["onnx-fp32", "tensorrt_rtx-fp32"]
    monkeypatch.setattr(engines, "build_engine", lambda *_, **__: pytest.fail("built again"))
    build = {"fp16": False, "batch": (1, 1, 32), "backend": "tensorrt_rtx", "note": lambda _: None}
    with pytest.raises(pytest.fail.Exception, match="built again"):  # compared with ONNX here, with PyTorch there
        build_engines(tmp_path / "bundle", **build)
    monkeypatch.undo()
    built = build_engines(tmp_path / "bundle", **build)
    monkeypatch.setattr(engines, "build_engine", lambda *_, **__: pytest.fail("built again"))
    assert build_engines(tmp_path / "bundle", **build) == built
    with pytest.raises(pytest.fail.Exception, match="built again"):
        build_engines(tmp_path / "bundle", **{**build, "batch": (1, 1, 1)})


def test_what_a_killed_export_had_finished_of_another_student_is_neither_used_nor_kept(repvit, tmp_path, monkeypatch):
    def kill(*_, **__):
        raise KeyboardInterrupt

    other = SimpleNamespace(**{**vars(repvit), "student": deepcopy(repvit.student)})
    with torch.no_grad():
        next(other.student.parameters()).mul_(1.0001)
    monkeypatch.setattr(pipeline, "checksums", kill)
    with pytest.raises(KeyboardInterrupt):
        export(other, tmp_path / "bundle", fp16=True)
    monkeypatch.undo()
    assert (tmp_path / ".bundle.new" / "model.fp16.onnx").exists(), "it was finished"
    sources = []

    def quantise(export, judge):
        sources.append(export.fp16_file)
        return Made()

    monkeypatch.setattr("prgkit.export.int8.quantise.quantise", quantise)
    learned = CalibrationSet(16, lambda places: repvit.pixels[places])
    export(repvit, tmp_path / "bundle", learned=lambda: learned, int8=True)
    assert sources[0].parent != tmp_path / ".bundle.new", "TensorRT's INT8 would have been the other student's"
    assert not (tmp_path / "bundle" / "model.fp16.onnx").exists()
    open_bundle(tmp_path / "bundle")


def test_a_folder_that_is_no_bundle_is_never_replaced(repvit, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").touch()
    with pytest.raises(ExportError, match="holds something that is not a bundle"):
        export(repvit, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "thesis.tex").exists()


def test_an_export_killed_between_its_renames_is_repaired(copy):
    copy.rename(copy.with_name(".bundle.old"))
    with pytest.raises(PrgkitError, match="stopped"), building(copy):
        raise PrgkitError("stopped")
    open_bundle(copy)


def test_trt_without_a_tensorrt_fails_before_any_work(repvit, tmp_path, monkeypatch):
    def none(_):
        raise BackendError("no TensorRT can build an engine here")

    monkeypatch.setattr(engines, "choose_backend", none)
    with pytest.raises(BackendError):
        export(repvit, tmp_path / "bundle", trt=True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_any_work(repvit, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**12, free=1000))
    with pytest.raises(DiskFullError, match=r"the bundle needs .* MiB, and 1000 B are free") as caught:
        export(repvit, tmp_path / "bundle")
    assert caught.value.fix == "free some space and export again: finished artifacts are kept"


def test_a_disk_that_fills_up_is_said_with_what_was_needed(repvit, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(DiskFullError, match=r"no disk space left for images\.zip; the bundle needs .* MiB") as caught:
        export(repvit, tmp_path / "bundle")
    assert caught.value.fix == "free some space and export again: finished artifacts are kept"
    assert sorted(path.name for path in (tmp_path / ".bundle.new").iterdir()) == ["finished.jsonl", "model.onnx"]
    monkeypatch.undo()
    notes = []
    export(repvit, tmp_path / "bundle", notes=notes)
    assert notes == ["model.onnx: finished before, and made from the same; it is kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert not (tmp_path / "bundle" / "finished.jsonl").exists()
    open_bundle(tmp_path / "bundle")


@needs_rtx
def test_a_device_builds_engines_from_the_bundle_alone(copy):
    manifest = build_engines(copy, fp16=True, batch=(2, 2, 2), backend="tensorrt_rtx", note=lambda _: None)
    bundle = open_bundle(copy)
    assert bundle.manifest == manifest
    assert sorted(entry.name for entry in bundle.artifacts) == [
        "onnx-fp16",
        "onnx-fp32",
        "tensorrt_rtx-fp16",
        "tensorrt_rtx-fp32",
    ]
    assert load_engine_metadata(copy / "model.fp16.tensorrt_rtx.engine").batch == (2, 2, 2)


@needs_rtx
def test_a_device_may_leave_the_batch_to_the_recipe_and_names_its_gpus(copy, monkeypatch):
    """The runner is a stand-in for a GPU that agrees."""

    class Right(OnnxRunner):
        def __init__(self, path, *, name):
            super().__init__(copy / "model.onnx", threads=1, name=name)

    monkeypatch.setattr(engines, "why_not_here", lambda card: None)
    monkeypatch.setattr(engines, "TensorRTRunner", Right)
    manifest = read_json(copy / "manifest.json")
    page = parse_yaml(shipped_recipes()["demo"].read_text(), where="demo")
    manifest["recipe"] = {**page, "export": {"batch": [1, 2, 4]}}
    write_sealed(copy / "manifest.json", manifest)
    notes = []
    build_engines(copy, fp16=False, backend="tensorrt_rtx", sm=("SM86",), note=notes.append)
    card = load_engine_metadata(copy / "model.fp32.tensorrt_rtx.engine")
    assert (card.batch, card.compute_capabilities) == ((1, 2, 4), ("SM86",))
    assert notes[0].endswith("; it agrees with onnx-fp32")


@needs_rtx
def test_a_damaged_engine_does_not_stop_its_own_rebuilding(copy):
    (copy / "model.fp32.tensorrt_rtx.engine").write_bytes(b"")
    build_engines(copy, fp16=False, batch=(1, 1, 1), backend="tensorrt_rtx", note=lambda _: None)
    open_bundle(copy)


@needs_rtx
def test_an_fp16_engine_needs_an_fp16_file(repvit, tmp_path):
    export(repvit, tmp_path / "bundle")
    with pytest.raises(ExportError, match="the bundle has no fp16 ONNX file to build from"):
        build_engines(tmp_path / "bundle", fp16=True, batch=(1, 1, 1), backend="tensorrt_rtx", note=lambda _: None)


@needs_rtx
def test_an_engine_that_disagrees_does_not_come_into_the_bundle(copy, repvit, monkeypatch):
    """The runner is a stand-in for a GPU that computes something else."""

    class Wrong(OnnxRunner):
        def __init__(self, path, *, name):
            super().__init__(copy / "model.onnx", threads=1, name=name)

        def run(self, pixels):
            return super().run(pixels)[:, ::-1]

    monkeypatch.setattr(engines, "why_not_here", lambda card: None)
    monkeypatch.setattr(engines, "TensorRTRunner", Wrong)
    before = open_bundle(copy).artifacts
    with pytest.raises(ParityError, match=r"tensorrt_rtx-fp32 \(fp32\) does not agree with onnx-fp32 on 40 images"):
        build_engines(copy, fp16=False, batch=(1, 1, 1), backend="tensorrt_rtx", note=lambda _: None)
    assert open_bundle(copy).artifacts == before, "what was built before it stays"
    assert load_engine_metadata(copy / "model.fp32.tensorrt_rtx.engine").batch != (1, 1, 1)
    assert not (copy / ".building").exists()


@needs_rtx
def test_a_build_that_fails_leaves_the_engine_before_it(copy, monkeypatch):
    build = {"fp16": False, "backend": "tensorrt_rtx", "note": lambda _: None}
    build_engines(copy, **build, batch=(1, 1, 2))
    before = open_bundle(copy).artifacts

    def full(path, data):
        raise DiskFullError("no disk space left", where=path)

    monkeypatch.setattr("prgkit.export.formats.tensorrt_build.write_bytes", full)
    with pytest.raises(DiskFullError):
        build_engines(copy, **build, batch=(1, 1, 4))
    assert open_bundle(copy).artifacts == before
    assert load_engine_metadata(copy / "model.fp32.tensorrt_rtx.engine").batch == (1, 1, 2)


@needs_rtx
def test_a_kill_as_an_engine_takes_its_place_leaves_a_bundle_that_opens(copy):
    def kill(text):
        if "built in" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(copy, fp16=False, batch=(1, 1, 4), backend="tensorrt_rtx", note=kill)
    assert "tensorrt_rtx-fp32" not in [entry.name for entry in open_bundle(copy).artifacts]


@needs_rtx
def test_an_engine_of_another_system_is_not_taken_for_this_ones(copy, monkeypatch):
    build = {"fp16": False, "batch": (1, 1, 2), "backend": "tensorrt_rtx", "note": lambda _: None}
    build_engines(copy, **build)
    for module in (engines, sys.modules["prgkit.export.formats.tensorrt_build"]):
        monkeypatch.setattr(module, "this_platform", lambda: "Windows AMD64")
    build_engines(copy, **build)
    assert load_engine_metadata(copy / "model.fp32.tensorrt_rtx.engine").platform == "Windows AMD64"


@needs_rtx
def test_two_processes_do_not_build_in_one_bundle(copy):
    with locked(copy, "bundle"), pytest.raises(RunError, match="is working on this bundle"):
        build_engines(copy, fp16=False, backend="tensorrt_rtx", note=lambda _: None)
