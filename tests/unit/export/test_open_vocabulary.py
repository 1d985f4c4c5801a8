"""Classes that can change after training: class vectors in the ONNX file or beside it, and `prgkit relabel`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("sklearn")

from onnx import numpy_helper  # noqa: E402

from prgkit.cli.main import main  # noqa: E402
from prgkit.config.prompts import load_classes  # noqa: E402
from prgkit.config.recipe import validate  # noqa: E402
from prgkit.config.sections import StudentConfig  # noqa: E402
from prgkit.data.index import read_image_index  # noqa: E402
from prgkit.demo.digits import CLASSES, load_digits  # noqa: E402
from prgkit.errors import BackendError, ExportError, ImagesError, RecipeError, RunError  # noqa: E402
from prgkit.evaluate.bench.cases import plan  # noqa: E402
from prgkit.evaluate.bench.worker import opener  # noqa: E402
from prgkit.evaluate.predict import Model  # noqa: E402
from prgkit.evaluate.search import Gallery, save_gallery, search  # noqa: E402
from prgkit.export import relabel as relabelling  # noqa: E402
from prgkit.export.bundle.archive import bundle_files, pack  # noqa: E402
from prgkit.export.bundle.bundle import open_bundle, read_evaluation  # noqa: E402
from prgkit.export.bundle.manifest import Manifest  # noqa: E402
from prgkit.export.formats.onnx_export import export_onnx, onnx_export_module, write_fp16  # noqa: E402
from prgkit.export.formats.onnx_graph import rename  # noqa: E402
from prgkit.export.formats.open_vocabulary import make_input, scored, write_classes  # noqa: E402
from prgkit.export.formats.options import ExportOptions  # noqa: E402
from prgkit.export.formats.tensorrt_build import build_engine  # noqa: E402
from prgkit.export.from_run import check_vocabulary, export_run  # noqa: E402
from prgkit.export.int8.calibration import measure_spreads  # noqa: E402
from prgkit.export.int8.qdq import Quantizable, find_convolutions, tensors_of  # noqa: E402
from prgkit.export.model_card import published  # noqa: E402
from prgkit.export.readme import readme, write_manifest  # noqa: E402
from prgkit.export.relabel import relabel, settled_bundle  # noqa: E402
from prgkit.export.runtimes.gpu import probe_backend  # noqa: E402
from prgkit.export.runtimes.onnxruntime import OnnxRunner  # noqa: E402
from prgkit.export.runtimes.openvino import OpenVinoRunner  # noqa: E402
from prgkit.export.runtimes.parity import run_batches  # noqa: E402
from prgkit.export.runtimes.pytorch import TorchRunner  # noqa: E402
from prgkit.progress import NullProgress  # noqa: E402
from prgkit.storage.atomic import read_json, write_sealed  # noqa: E402
from prgkit.storage.locks import locked  # noqa: E402
from prgkit.storage.run import Run  # noqa: E402
from prgkit.student.model import build_student, load_student  # noqa: E402
from prgkit.training.distill import distill  # noqa: E402
from prgkit.training.prepare import hold_out, prepare  # noqa: E402

BASE = Path(__file__).parents[3] / ".venv-base" / "bin" / "python"
LEARNED = CLASSES[:4]
needs_rtx = pytest.mark.skipif(
    not probe_backend("tensorrt_rtx").usable, reason="tensorrt_rtx is not installed: pip install 'prgkit[rtx]'"
)


class Notes(NullProgress):
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def page(objective: str = "prg", **parameters: Any) -> dict[str, Any]:
    return {
        "data": {
            "images": "photos",
            "evaluation": "judged",
            "classes": list(LEARNED),
            "prompts": ["the digit {}", "a {}"],
            "held_out": 0.2,
        },
        "teacher": {"model": "demo:digits", "batch_size": 16},
        "views": {"count": 1, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": objective, **parameters},
        "training": {"epochs": 1, "batch_size": 16, "workers": 0, "precision": "fp32"},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of PRG and its open-vocabulary bundle; tests copy it."""
    folder = tmp_path_factory.mktemp("open")
    pictures, digits = load_digits("train")
    few = [place for place, digit in enumerate(digits) if digit < len(LEARNED)][:56]
    for place in few:
        parent = folder / ("photos" if place < few[32] else f"judged/{CLASSES[digits[place]]}")
        parent.mkdir(parents=True, exist_ok=True)
        pictures[place].save(parent / f"{place:04}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = distill(validate(page(), where="here"), Path("runs/prg"), Path("targets"), NullProgress())
        export_run(
            run, ExportOptions(fp16=True, float_input=True, class_vectors="initializer"), progress=NullProgress()
        )
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Stand in a copy of that folder."""
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return Run(Path("runs/prg"))


def logits_of(bundle: Path, file: str = "model.onnx") -> Any:
    pixels = read_evaluation(bundle).pixels
    return run_batches(OnnxRunner(bundle / file, threads=1), pixels)


def test_the_exported_file_scores_as_the_student_does_by_the_teachers_class_vectors(run: Run) -> None:
    bundle, vectors = open_bundle(run.bundle), np.load(run.bundle / "class_vectors.npy")
    student, scoring = load_student(run), bundle.manifest.open_vocabulary
    student.use_class_vectors(torch.from_numpy(vectors), scoring.logit_scale)
    expected = run_batches(TorchRunner(student.inference_model()), read_evaluation(run.bundle).pixels)
    np.testing.assert_allclose(logits_of(run.bundle), expected, atol=1e-4)
    assert {one.name: one for one in onnx.load(str(run.bundle / "model.onnx")).graph.initializer}.keys() > {
        "class_vectors"
    }
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors.shape == (4, scoring.width)
    assert scoring.class_vectors == "initializer"
    assert scoring.templates == ("the digit {}", "a {}")
    assert scoring.teacher == run.teacher_facts.fingerprint
    assert "class_vectors.npy" in bundle.manifest.checksums
    assert "\n## Other classes\n" in (run.bundle / "README.md").read_text()


def test_the_embedding_is_a_file_of_its_own_that_searches_what_the_teacher_saw(run: Run) -> None:
    options = ExportOptions(embedding=True, class_vectors="initializer")
    manifest = export_run(run, options, progress=NullProgress())
    artifact = next(one for one in manifest.artifacts if one.format == "onnx-embedding")
    assert (artifact.name, artifact.file, artifact.parity) == ("onnx-embedding-fp32", "model.embedding.onnx", None)
    assert artifact.note.startswith("cosine to PyTorch's 1.0000 on average")
    vectors = logits_of(run.bundle, artifact.file)  # [n, D], and no logits
    np.testing.assert_allclose(vectors, np.load(run.bundle / "evaluation" / "features.npy"), atol=1e-5)
    assert "\n## Embedding\n" in (run.bundle / "README.md").read_text()

    dataset = prepare(run.recipe, Path("targets"), NullProgress())
    stored = dataset.store.features(dataset.rows, np.zeros(len(dataset.rows), dtype=int)).numpy()
    names = [f"{place}.png" for place in range(len(stored))]
    save_gallery(Path("gallery.npz"), Gallery(names, stored, dataset.store.facts().fingerprint))
    picture = run.bundle / "golden" / "00.png"
    (answer,) = search(run.bundle, [picture], Path("gallery.npz"), top_k=3, note=print)
    embedding = np.load(run.bundle / "golden" / "features.npy")[0]
    best = np.argsort(-(stored @ embedding), kind="stable")[:3]
    assert [name for name, _ in answer.nearest] == [names[place] for place in best]
    assert answer.nearest[0][1] == pytest.approx(float(stored[best[0]] @ embedding), abs=2e-3)

    relabel(run.bundle, ["cat", "dog"], run=run, progress=NullProgress())
    np.testing.assert_array_equal(logits_of(run.bundle, artifact.file), vectors)


def test_a_gallery_of_another_teacher_and_a_bundle_without_embedding_are_refused(run: Run) -> None:
    def find() -> list[Any]:
        return list(search(run.bundle, [run.bundle / "golden" / "00.png"], Path("mine.npz"), top_k=1, note=print))

    with pytest.raises(ImagesError, match=r"mine\.npz is no gallery that can be read"):
        find()
    for wrong in (np.ones(3), {"vectors": np.ones(3), "names": ["a"], "teacher": "b"}):
        with open("mine.npz", "wb") as file:
            np.savez(file, **wrong) if isinstance(wrong, dict) else np.save(file, wrong)
        with pytest.raises(ImagesError, match=r"mine\.npz is no gallery that can be read"):
            find()
    save_gallery(Path("mine.npz"), Gallery(["a"], np.ones((1, 4), np.float32), "another"))
    with pytest.raises(ExportError, match="no file that gives an embedding"):
        find()
    export_run(run, ExportOptions(embedding=True, class_vectors="initializer"), progress=NullProgress())
    with pytest.raises(ExportError, match="of another teacher"):
        find()


def test_new_logits_are_one_product_of_what_is_stored(run: Run) -> None:
    vectors, evaluation = np.load(run.bundle / "class_vectors.npy"), run.bundle / "evaluation"
    scale = open_bundle(run.bundle).manifest.open_vocabulary.logit_scale
    np.testing.assert_allclose(
        scored(np.load(evaluation / "features.npy"), vectors, scale), logits_of(run.bundle), atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(np.load(evaluation / "teacher_features.npy"), axis=1), 1, atol=1e-6)


def test_the_same_classes_in_another_order_give_the_same_logits_in_that_order(run: Run) -> None:
    order = [2, 0, 3, 1]
    files = [entry.file for entry in open_bundle(run.bundle).artifacts if entry.format == "onnx"]
    before, logits = read_evaluation(run.bundle), {file: logits_of(run.bundle, file) for file in files}
    (run.bundle / "mine.txt").write_text("left alone")
    (run.bundle / "README.md").write_text("---\nlicense: mit\n---\n# the card that it was published with\n")
    manifest = relabel(run.bundle, [LEARNED[place] for place in order], run=run, progress=NullProgress())
    after = read_evaluation(run.bundle)
    assert files == ["model.onnx", "model.fp16.onnx"]
    for file in files:
        np.testing.assert_array_equal(logits_of(run.bundle, file), logits[file][:, order])
    np.testing.assert_allclose(after.logits, before.logits[:, order], atol=1e-5)
    np.testing.assert_allclose(after.teacher_logits, before.teacher_logits[:, order], atol=1e-5)
    np.testing.assert_allclose(after.teacher_uniform_logits, before.teacher_uniform_logits[:, order], atol=1e-5)
    np.testing.assert_array_equal(np.array(order)[after.labels], before.labels)
    assert open_bundle(run.bundle).manifest == manifest
    assert (run.bundle / "mine.txt").read_text() == "left alone"
    assert (run.bundle / "README.md").read_text() == readme(manifest)  # the card's figures are of the old classes


def test_several_teachers_are_averaged_as_the_run_averages_them(run: Run) -> None:
    teachers = [
        {"model": "demo:digits", "batch_size": 16},
        {"model": "demo:digits", "weights": "random", "batch_size": 16},
    ]
    recipe = validate({**page(), "teacher": teachers, "targets": {"average": "probabilities"}}, where="here")
    two = distill(recipe, Path("runs/two"), Path("targets"), NullProgress())
    export_run(two, ExportOptions(class_vectors="initializer"), progress=NullProgress())
    before = read_evaluation(two.bundle)
    relabel(two.bundle, LEARNED, run=two, progress=NullProgress())
    after = read_evaluation(two.bundle)
    np.testing.assert_allclose(after.teacher_logits, before.teacher_logits, atol=1e-5)
    np.testing.assert_allclose(after.teacher_uniform_logits, before.teacher_uniform_logits, atol=1e-5)


def test_what_was_relabelled_is_not_taken_for_what_was_exported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class MadeAnewError(Exception):
        pass

    def make_anew(*_: Any, **__: Any) -> None:
        raise MadeAnewError

    def export() -> Manifest:
        return export_run(run, ExportOptions(class_vectors="initializer"), progress=NullProgress())

    before = [entry.sha256 for entry in open_bundle(run.bundle).artifacts]
    monkeypatch.setattr("prgkit.export.formats.onnx_export.export_onnx", make_anew)
    assert [entry.sha256 for entry in export().artifacts] == before
    relabel(run.bundle, ["one", "two"], run=run, progress=NullProgress())
    assert not {entry.sha256 for entry in open_bundle(run.bundle).artifacts} & set(before)  # nor by bench's choice
    with pytest.raises(MadeAnewError):
        export()
    assert open_bundle(run.bundle).classes == ("one", "two")


@pytest.mark.parametrize("vectors", ["initializer", None])
def test_an_export_says_that_other_classes_go(run: Run, monkeypatch: pytest.MonkeyPatch, vectors: Any) -> None:
    told: list[list[str]] = []

    def export() -> None:
        progress = Notes()
        export_run(run, ExportOptions(class_vectors=vectors), progress=progress)
        told.append([text for text in progress.told if "classes FILE" in text])

    monkeypatch.setattr("prgkit.export.from_run.export_best", lambda *_: open_bundle(run.bundle).manifest)
    export()
    relabel(run.bundle, ["one", "two"], run=run, progress=NullProgress())
    export()
    relabel(run.bundle, run.recipe.classes, run=run, progress=NullProgress())
    export()
    again = "relabel" if vectors else "export --open-vocabulary relabel"
    said = (
        f"the bundle has had other classes since {datetime.now(timezone.utc).date()}; this export gives it the run's "
        f"again: prgkit {again} --classes FILE gives the others back"
    )
    assert told == [[], [said], []]


def test_a_bundle_is_not_replaced_while_another_process_works_in_it(run: Run) -> None:
    with locked(run.bundle, "bundle"):
        with pytest.raises(RunError, match="is working on this bundle"):
            export_run(run, ExportOptions(class_vectors="initializer"), progress=NullProgress())
        with pytest.raises(RunError, match="is working on this bundle"):
            relabel(run.bundle, ["one", "two"], run=run, progress=NullProgress())


def test_how_faithful_int8_was_with_the_old_classes_is_not_said_of_the_new(run: Run) -> None:
    manifest = read_json(run.bundle / "manifest.json")
    confidence = {"temperature": 2.0, "fitted_to": "teacher", "images": 30, "calibration_error": 1.0,
                  "uncalibrated_error": 1.0, "right": [0.5] * 30, "wrong": [], "held_out": 30, "reject_below": 0.0}  # fmt: skip
    manifest["confidence"] = confidence
    share = {"images": 2, "fp32": 50.0, "file": 50.0, "won": 0, "lost": 0, "bounds": [-1.0, 1.0]}
    found = {"layout": "onnxruntime", "margin": 2.0, "calibration_images": 4, "comparison": {
        "images": 2, "agreement_fp32": 100.0, "teacher": share, "kl_fp32": 0.1, "kl": 0.1, "kl_bound": 0.0}}  # fmt: skip
    manifest["artifacts"][0]["quantization"] = found
    manifest["not_kept"] = [{"name": "int8", "why": "it is slow"}]
    write_sealed(run.bundle / "manifest.json", manifest)
    told = relabel(run.bundle, ["one", "two"], run=run, progress=NullProgress())
    kept = {"layout": "onnxruntime", "margin": 2.0, "calibration_images": 4}
    assert told.artifacts[0].quantization.to_json() == kept
    assert told.not_kept == ()
    assert told.confidence is None
    notes: list[str] = []
    assert Model(run.bundle, note=notes.append).predict(next(Path("photos").iterdir()))
    assert notes == [
        "confidences are not calibrated: prgkit relabel gave other classes, and nothing was measured with those"
    ]


def test_no_image_whose_label_was_learned_is_among_those_that_were_not_learned_from(run: Run) -> None:
    raw = page("dho")
    del raw["data"]["evaluation"]
    images = read_image_index(run.recipe.data.image_spec, NullProgress())
    held_out = hold_out(images.keys, 0.45)
    _, digits = load_digits("train")
    few = held_out[: len(held_out) // 2].tolist()
    for place in few:
        photo = Path("photos") / images.source.name(int(images.indices[place]))
        folder = Path("few", CLASSES[digits[int(photo.stem)]])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder)
    raw["data"] |= {"held_out": 0.45, "labelled": "few"}
    taught = distill(validate(raw, where="here"), Path("runs/dho"), Path("targets"), NullProgress())
    export_run(taught, ExportOptions(), progress=NullProgress())
    keys = (taught.bundle / "evaluation/keys.txt").read_text().split()
    assert sorted(keys) == sorted(images.keys[place] for place in held_out.tolist() if place not in few)


def test_confidences_are_measured_on_images_that_no_label_was_read_of(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prgkit.export.bundle.confidence.LEAST_IMAGES", 2)
    progress = Notes()
    manifest = export_run(run, ExportOptions(class_vectors="initializer"), progress=progress)
    held_out = hold_out(read_image_index(run.recipe.data.image_spec, NullProgress()).keys, 0.2)
    assert manifest.confidence.images == manifest.confidence.held_out == len(held_out)
    assert any(
        text.startswith(f"confidences: temperature {manifest.confidence.temperature:.3g}") for text in progress.told
    )
    assert f"logits / {manifest.confidence.temperature:g}" in (run.bundle / "README.md").read_text()
    asked = ExportOptions(class_vectors="initializer", evaluation_images=2)
    assert export_run(run, asked, progress=progress).confidence == manifest.confidence
    shutil.rmtree("photos")
    assert export_run(run, ExportOptions(class_vectors="initializer"), progress=progress).confidence is None
    assert any(text.startswith("confidences are not calibrated: photos does not exist") for text in progress.told)


def test_the_command_line_relabels(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("new.txt").write_text("eight\n# a remark\nnine\n")
    picture = str(next(Path("judged/two").iterdir()))
    line = ["prgkit", "relabel", "--classes", "new.txt", "export", "--zip", "predict", picture, "--json"]
    monkeypatch.setattr(sys, "argv", [*line[:4], "--run", str(run.folder), *line[4:]])
    main()
    document = json.loads(capsys.readouterr().out)
    assert document["relabel"]["classes"] == ["eight", "nine"]
    assert document["relabel"]["bundle"] == "runs/prg/bundle"
    assert document["export"]["classes"] == ["eight", "nine"]  # what follows does not export the old classes again
    assert document["predict"][0]["class"] in ("eight", "nine")
    monkeypatch.setattr(sys, "argv", ["prgkit", "relabel", "--classes", "new.txt", "--run", "photos"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.splitlines()[:2] == [
        "1 line is a comment, and is left out of the class names: '# a remark'",
        "Error: this is no run folder: it has no recipe.yaml",
    ]


@pytest.mark.parametrize("count", [2, 10])
def test_there_may_be_more_or_fewer_classes(run: Run, count: int) -> None:
    names, progress = CLASSES[::-1][:count], Notes()
    manifest = relabel(run.bundle, names, run=run, progress=progress)
    assert manifest.output.shape == ("batch", count)
    for entry in manifest.artifacts:
        model = onnx.load(str(run.bundle / entry.file))
        assert model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == count
    evaluation = read_evaluation(run.bundle)
    assert evaluation.teacher_logits.shape == evaluation.logits.shape == (len(evaluation.pixels), count)
    np.testing.assert_allclose(logits_of(run.bundle), evaluation.logits, atol=1e-4)
    lost = "the evaluation images have no labels any more: 4 of their classes are not among the new ones"
    assert (lost in progress.told) == (evaluation.labels is None) == (not manifest.evaluation.labelled) == (count == 2)
    (answer,) = Model(run.bundle).predict(run.bundle / "golden/00.png", top_k=count)
    assert {name for name, _ in answer.top} == set(names)
    packed = pack(run.bundle)
    assert packed.exists()


def test_no_image_is_read_and_a_known_name_costs_no_teacher(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    relabel(run.bundle, ["five", "six"], run=run, progress=NullProgress())
    monkeypatch.setattr("prgkit.teacher.clip.load_teacher", lambda *_: pytest.fail("the teacher was asked again"))
    monkeypatch.setattr("prgkit.teacher.clip.Teacher.embed_images", lambda *_: pytest.fail("the teacher saw an image"))
    relabel(run.bundle, LEARNED, run=run, progress=NullProgress())
    relabel(run.bundle, ["five", "six"], run=run, progress=NullProgress())


def test_a_bundle_far_from_its_run_is_relabelled_where_its_teacher_is(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.bundle, tmp_path / "device" / "bundle")
    here = tmp_path / "device" / "bundle"
    assert settled_bundle(here) == (here, None)
    relabel(here, ["eight", "nine"], run=None, progress=NullProgress())
    relabel(run.bundle, ["eight", "nine"], run=run, progress=NullProgress())
    np.testing.assert_array_equal(logits_of(here), logits_of(run.bundle))
    assert [path.name for path in here.parent.iterdir()] == ["bundle"]
    manifest = read_json(here / "manifest.json")
    manifest["teacher"]["fingerprint"] = "0" * 16
    write_sealed(here / "manifest.json", manifest)
    with pytest.raises(
        ExportError, match="the teacher here is not the one that this student learned from: demo:digits"
    ):
        relabel(here, ["one", "two"], run=None, progress=NullProgress())


def test_a_bundle_published_without_images_is_packed_and_relabelled(run: Run, tmp_path: Path) -> None:
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    manifest = published(open_bundle(run.bundle).manifest, "pulled", with_images=False)
    for path in bundle_files(run.bundle, manifest):
        shutil.copy(path, pulled)
    write_manifest(pulled, manifest)
    files = {"README.md", "class_vectors.npy", "manifest.json", "model.fp16.onnx", "model.nchw.onnx", "model.onnx"}
    with zipfile.ZipFile(pack(pulled)) as archive:
        assert set(archive.namelist()) == {f"pulled/{name}" for name in files}
    told = relabel(pulled, LEARNED[:2], run=None, progress=NullProgress())
    pixels = read_evaluation(run.bundle).pixels
    found = run_batches(OnnxRunner(pulled / "model.onnx", threads=1), pixels)
    np.testing.assert_allclose(found, logits_of(run.bundle)[:, :2], atol=1e-4)
    assert [one.executed for one in told.artifacts] == [False] * 3, "there are no golden images to run"
    assert open_bundle(pulled).manifest == told
    pack(pulled)


def test_the_folder_that_one_stands_in_is_not_taken_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.bundle.resolve()
    monkeypatch.chdir(folder)
    with pytest.raises(ExportError) as caught:
        settled_bundle(None)
    assert caught.value.fix == f"cd {folder.parent}, and there: prgkit relabel --classes FILE --run bundle"


def test_fixed_classes_and_lists_that_are_none_are_refused(run: Run, tmp_path: Path) -> None:
    manifest = read_json(run.bundle / "manifest.json")
    del manifest["open_vocabulary"]
    write_sealed(run.bundle / "manifest.json", manifest)
    with pytest.raises(ExportError) as caught:
        relabel(run.bundle, ["one", "two"], run=run, progress=NullProgress())
    assert caught.value.what == "the classes of this bundle are fixed: its network ends in a class head"
    assert caught.value.fix == "export it again where the student was trained: prgkit export --open-vocabulary"
    for text, told in (("one\n", "there is only one class, 'one'"), ("one\nOne\n", "class names repeat: 'One'")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(RecipeError, match=told):
            load_classes(str(tmp_path / "names.txt"))


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"name": "kd"}, "kd does not draw"),
        ({"name": "rkd"}, "rkd does not draw"),
        ({"name": "prg", "node_weight": 0}, "prg does not draw"),
        ([{"name": "ce"}, {"name": "kd"}], "ce \\+ kd does not draw"),
    ],
)
def test_features_that_are_not_the_teachers_are_not_scored(objective: Any, told: str) -> None:
    recipe = validate({**page(), "objective": objective}, where="here")
    with pytest.raises(ExportError, match=told) as caught:
        check_vocabulary(recipe, ExportOptions(class_vectors="initializer"))
    assert caught.value.fix == "distil with one of prg, nd, promptkd, clipkd, or export without --open-vocabulary"
    check_vocabulary(recipe, ExportOptions())


def test_engines_do_not_take_class_vectors_as_an_input() -> None:
    with pytest.raises(ExportError, match="engines hold their class vectors"):
        check_vocabulary(validate(page(), where="here"), ExportOptions(class_vectors="input", trt=True))


def test_openvinos_int8_is_given_other_classes_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    monkeypatch.setattr("prgkit.export.int8.files.too_few", lambda *_: None)
    monkeypatch.setattr("prgkit.export.bundle.manifest.NonInferiority.holds", lambda *_: True)
    export_run(run, options := ExportOptions(int8=True, class_vectors="initializer"), progress=NullProgress())

    def answers(bundle: Path) -> Any:
        file = bundle / "model.int8.openvino.onnx"
        return run_batches(OpenVinoRunner(file, 1), read_evaluation(bundle).pixels)

    before = answers(run.bundle)
    assert before.std() > 0.1
    held = Path("held")
    shutil.copytree(run.bundle, held)
    names = CLASSES[::-1]
    assert names[-4:] == LEARNED[::-1]
    relabel(held, names, run=None, progress=NullProgress())
    np.testing.assert_allclose(answers(held)[:, :-5:-1], before, atol=1e-4)
    assert (answers(held).argmax(axis=1) == logits_of(held).argmax(axis=1)).mean() > 0.7

    export_run(run, replace(options, class_vectors="input"), progress=NullProgress())
    np.testing.assert_allclose(answers(run.bundle), before, atol=1e-4)
    for bundle in (held, run.bundle):
        relabel(bundle, LEARNED[::-1], run=None, progress=NullProgress())
        np.testing.assert_allclose(answers(bundle)[:, ::-1], before, atol=1e-4)


def test_a_file_without_class_vectors_that_can_be_changed_is_refused(run: Run) -> None:
    path = run.bundle / "model.onnx"
    model = onnx.load(str(path))
    for node in model.graph.node:
        rename(node.input, "class_vectors", "quantised")
    next(one for one in model.graph.initializer if one.name == "class_vectors").name = "quantised"
    onnx.save(model, str(path))
    for change in (lambda: make_input(path), lambda: write_classes(path, path, np.eye(4, 16), list("abcd"))):
        with pytest.raises(ExportError, match=r"model\.onnx holds no class vectors that can be changed"):
            change()


def test_class_vectors_as_an_input_give_the_same_answers(run: Run) -> None:
    files = ["model.onnx", "model.fp16.onnx"]
    before = [logits_of(run.bundle, file) for file in files]
    manifest = export_run(
        run, ExportOptions(fp16=True, float_input=True, class_vectors="input"), progress=NullProgress()
    )
    assert manifest.open_vocabulary.class_vectors == "input"
    width = manifest.open_vocabulary.width
    wanted = {"name": "class_vectors", "dtype": "float32", "shape": ["classes", width]}
    assert manifest.open_vocabulary.input.to_json() == wanted
    assert f"`class_vectors` [classes, {width}] float32" in (run.bundle / "README.md").read_text()
    for file, logits, furthest in zip(files, before, (1e-6, 0.05), strict=True):
        np.testing.assert_allclose(logits_of(run.bundle, file), logits, atol=furthest)
    inputs = onnx.load(str(run.bundle / "model.nchw.onnx")).graph.input
    assert [one.name for one in inputs] == ["images", "class_vectors"]
    assert inputs[1].type.tensor_type.shape.dim[0].dim_param == "classes"
    shas = {entry.sha256 for entry in manifest.artifacts}
    manifest = relabel(run.bundle, CLASSES, run=run, progress=NullProgress())
    assert not shas & {entry.sha256 for entry in manifest.artifacts}
    evaluation = read_evaluation(run.bundle)
    np.testing.assert_allclose(logits_of(run.bundle), evaluation.logits, atol=1e-4)
    code = re.search(r"```python\n(.*?)```", (run.bundle / "README.md").read_text(), re.S)
    assert code
    python = str(BASE) if BASE.exists() else sys.executable
    command = [python, "-c", code.group(1), "golden/00.png"]
    printed = subprocess.run(command, cwd=run.bundle, capture_output=True, text=True, check=True)
    (answer,) = Model(run.bundle).predict(run.bundle / "golden/00.png")
    assert printed.stdout.strip() == answer.label
    np.save(run.bundle / "class_vectors.npy", np.load(run.bundle / "class_vectors.npy")[:2])
    with pytest.raises(ExportError, match=r"class_vectors\.npy is damaged"):
        open_bundle(run.bundle)
    (run.bundle / "class_vectors.npy").unlink()
    with pytest.raises(
        BackendError, match=r"model\.onnx takes its class vectors as an input: class_vectors\.npy cannot"
    ):
        OnnxRunner(run.bundle / "model.onnx", threads=1)


@pytest.mark.skipif(not BASE.exists(), reason="no .venv-base: make .venv-base/base.stamp makes it")
def test_the_device_names_new_classes_without_torch(run: Run) -> None:
    relabel(run.bundle, ["seven", "eight"], run=run, progress=NullProgress())
    command = [str(BASE), "-m", "prgkit", "predict", "golden/00.png"]
    done = subprocess.run(command, cwd=run.bundle, capture_output=True, text=True, check=False)
    assert re.match(r"golden/00.png: (seven|eight)  \(", done.stdout), done.stderr


def test_bench_runs_pytorch_with_the_classes_of_the_bundle(run: Run) -> None:
    relabel(run.bundle, CLASSES, run=run, progress=NullProgress())
    _, specs = plan(open_bundle(run.bundle), run.folder, gpu=False, threads=1)
    (spec,) = [one for one in specs if one and one.backend == "torch"]
    pixels = read_evaluation(run.bundle).pixels
    np.testing.assert_allclose(opener(spec)().run(pixels), logits_of(run.bundle), atol=1e-4)


@pytest.mark.parametrize(("place", "survives"), [("write_manifest", LEARNED), ("rename", LEARNED)])
def test_a_kill_leaves_a_whole_bundle(
    run: Run, monkeypatch: pytest.MonkeyPatch, place: str, survives: tuple[str, ...]
) -> None:
    before = logits_of(run.bundle)
    if (child := os.fork()) == 0:

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if place == "rename":  # the second: the bundle has lost its name by then
            rename = Path.rename
            Path.rename = lambda one, to: die() if one.name.startswith(".") else rename(one, to)  # type: ignore[method-assign, assignment, func-returns-value]
        else:
            relabelling.write_manifest = die
        relabel(run.bundle, ["one", "two"], run=run, progress=NullProgress())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert run.bundle.exists() == (place == "write_manifest")
    bundle, _ = settled_bundle(run.folder)
    assert open_bundle(bundle).classes == survives
    np.testing.assert_array_equal(logits_of(bundle), before)
    relabel(bundle, ["one", "two"], run=run, progress=NullProgress())
    assert open_bundle(bundle).classes == ("one", "two")
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(".bundle")]


@pytest.fixture(scope="module")
def reparameterised(repvit: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A RepViT, whose branches are fused at export, with features that are long: their squares leave float16."""
    folder, generator = tmp_path_factory.mktemp("repvit"), torch.Generator().manual_seed(0)
    built = build_student(StudentConfig(model="repvit_m0_9", image_size=64), classes=20, teacher_width=16)
    vectors = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=1)
    built.model = repvit.student.model
    built.use_class_vectors(vectors, 100.0)
    with torch.no_grad():
        built.projector.weight.mul_(3000)
    student, pixels = built.inference_model(), repvit.pixels[:64]
    fp32, fp16 = folder / "model.onnx", folder / "model.fp16.onnx"
    module = onnx_export_module(student, torch.from_numpy(pixels))
    facts = {"classes": [f"thing {number}" for number in range(20)], "preprocessing": repvit.preprocessing}
    export_onnx(module, fp32, image_size=64, opset=20, **facts)
    write_fp16(fp32, fp16)
    features = module.network.projector(
        module.network.model.forward_head(
            module.network.model.forward_features(torch.zeros(1, 3, 64, 64)), pre_logits=True
        )
    )
    assert float(features.detach().square().sum()) > 65504
    return SimpleNamespace(student=student, pixels=pixels, fp32=fp32, fp16=fp16, vectors=vectors.numpy())


def test_a_reparameterised_student_agrees_in_both_precisions(reparameterised: SimpleNamespace) -> None:
    expected = run_batches(TorchRunner(reparameterised.student), reparameterised.pixels)
    for path, furthest in ((reparameterised.fp32, 1e-2), (reparameterised.fp16, 0.3)):
        found = run_batches(OnnxRunner(path, threads=1), reparameterised.pixels)
        np.testing.assert_allclose(found, expected, atol=furthest)
    assert np.abs(expected).max() > 10


def test_lengths_and_scale_stay_in_float32(reparameterised: SimpleNamespace) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(str(reparameterised.fp16)))
    kinds = {one.name: one.type.tensor_type.elem_type for one in (*model.graph.value_info, *model.graph.output)}
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    assert {kinds[name] for name in ("features", "feature_length", "unit_features", "similarities", "logits")} == {
        single
    }
    assert {kinds[name] for name in ("network_output", "unit_features_float16", "similarities_float16")} == {half}


def test_int8_leaves_the_product_in_float(reparameterised: SimpleNamespace, tmp_path: Path) -> None:
    path, nodes = tmp_path / "model.int8.onnx", find_convolutions(reparameterised.fp32)
    spreads = measure_spreads(
        reparameterised.fp32, tensors_of(reparameterised.fp32, nodes), reparameterised.pixels[:16]
    )
    Quantizable(reparameterised.fp32, spreads, 1e-4, "onnxruntime").write(path, nodes)
    graph = onnx.load(str(path)).graph
    (product,) = [node for node in graph.node if "class_vectors" in node.input]
    assert list(product.input) == ["unit_features", "class_vectors"]
    held = {one.name: numpy_helper.to_array(one) for one in graph.initializer}["class_vectors"]
    np.testing.assert_array_equal(held, reparameterised.vectors)
    write_classes(path, path, reparameterised.vectors[:3], ["a", "b", "c"])
    fewer = run_batches(OnnxRunner(path, threads=1), reparameterised.pixels[:8])
    assert fewer.shape == (8, 3)


@needs_rtx
def test_tensorrt_builds_from_the_initializer_in_both_precisions(run: Run) -> None:
    for precision, file, dtype in (("fp32", "model.onnx", "FLOAT"), ("fp16", "model.fp16.onnx", "HALF")):
        card = build_engine(run.bundle / file, run.folder, precision=precision, batch=(1, 1, 4), backend="tensorrt_rtx")
        assert card.layer_dtypes["MATRIX_MULTIPLY"] == {dtype: 2}
        assert card.output.to_json() == {"name": "logits", "dtype": "FLOAT", "shape": [-1, 4]}
    make_input(run.bundle / "model.onnx")
    with pytest.raises(ExportError, match="takes its class vectors as an input, and an engine holds them"):
        build_engine(run.bundle / "model.onnx", run.folder, precision="fp32", batch=(1, 1, 4), backend="tensorrt_rtx")
