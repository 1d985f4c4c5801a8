"""Bundles pushed to and pulled from a stand-in for the Hugging Face Hub, as a user would: what travels, and what not."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from prgkit.config.recipe import validate
from tests.conftest import CLASSES, PrgkitCommand
from tests.hub import TOKEN, Hub

pytest.importorskip("huggingface_hub")
SECRETS = ("secret-folder", "IMG_0001", "IMG_0002", "IMG_0003")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with Hub() as stand_in:
        # The library reads its environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
        address = f"{stand_in.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in
        stand_in.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of a student that looks at mean colours; its manifest names what is nobody's business."""
    from prgkit.data.preprocessing import Preprocessing
    from prgkit.export.bundle.bundle import Pixels, describe_artifact, write_evaluation, write_golden
    from prgkit.export.bundle.checksums import checksums
    from prgkit.export.bundle.manifest import Manifest
    from prgkit.export.readme import write_manifest

    folder = tmp_path_factory.mktemp("made") / "bundle"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    weights = np.random.default_rng(1).normal(size=(3, 20)).astype(np.float32)

    def student(batch: Pixels) -> Any:
        return batch.astype(np.float32).mean(axis=(1, 2)) @ weights

    write_golden(folder, [Image.fromarray(one) for one in pixels], pixels, student(pixels))
    teacher = np.roll(student(pixels), 1, axis=1)  # of another opinion on every image
    teacher[:4] = student(pixels)[:4]
    write_evaluation(
        folder,
        pixels,
        teacher_logits=teacher,
        teacher_uniform_logits=teacher,
        labels=student(pixels).argmax(axis=1),
        keys=[f"{number:032x}" for number in range(16)],
        student=student,
    )
    files = {"fp32": "model.onnx", "int8": "model.int8.onnx"}  # the one called INT8 is the same student
    for name in files.values():
        save_onnx(weights, folder / name)
    facts = {"format": "onnx", "backend": "onnxruntime", "executed": True, "note": None, "parity": None}
    artifacts = [describe_artifact(folder, file, name=f"onnx-{precision}", precision=precision, **facts).to_json()
                 for precision, file in files.items()]  # fmt: skip
    manifest = {**secretive(), "artifacts": artifacts,
                "preprocessing": Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3).to_dict(),
                "checksums": checksums(folder)}  # fmt: skip
    write_manifest(folder, Manifest.model_validate(manifest))
    (folder / "ticks.csv").write_text("secret-folder")
    return folder


def save_onnx(weights: Any, path: Path) -> None:
    """Write the student: the mean of each channel times weights [3, 20]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 20])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def secretive() -> dict[str, Any]:
    """Return the rest of a manifest, in which every path and name of an image is a secret."""
    secret = "/home/me/secret-folder"
    # fmt: off
    flat = {"mean": 0.5, "histogram": [0, 9]}
    even = {"counts": [9], "uniform": 9.0, "largest": {"class": CLASSES[0], "count": 9},
            "smallest": {"class": CLASSES[0], "count": 9}, "unmatched": [], "effective_classes": 1.0}
    quality = {"near_duplicates": {"compared": 9, "images": 2, "pairs": [["IMG_0001.jpg", "IMG_0002.jpg", 1.0]]},
               "outliers": {"count": 1, "floor": 0.1, "lowest": [["IMG_0003.jpg", 0.0]]}, "images": 9, "close_calls": 0,
               "confidence": flat, "margin": flat, "balance": even, "confused": [],
               "templates": [{"template": "a {}", "agreement": 100.0}]}
    # fmt: on
    return {
        "prgkit": "0.1.0",
        "created": "2026-11-29",
        "run": {
            "name": "secret-folder",
            "fingerprint": "0" * 16,
            "objective": "prg",
            "epochs": 3,
            "images": 1234,
            "quality": quality,
        },
        "recipe": {
            "data": {
                "images": f"{secret}/photos",
                "evaluation": f"{secret}/test",
                "evaluation_labels": f"{secret}/l.csv",
                "classes": list(CLASSES),
                "prompts": ["a {}"],
            },
            "teacher": {
                "model": f"local-dir:{secret}/clip",
                "weights": None,
                "context": f"{secret}/context.safetensors",
            },
            "student": {"model": "mean", "initial": f"{secret}/general"},
            "objective": {"name": "prg"},
        },
        "teacher": {"model": f"local-dir:{secret}/clip", "fingerprint": "1" * 16},
        "student": {"model": "mean", "initial": f"{secret}/general", "parameters": 60, "image_size": 32},
        "classes": list(CLASSES),
        "input": {"name": "pixels", "dtype": "uint8", "layout": "NHWC", "shape": ["batch", 32, 32, 3]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", 20]},
        "evaluation": {"images": 16, "labelled": True, "source": f"{secret}/test"},
    }  # fmt: skip


def test_a_bundle_travels_without_what_is_private_and_runs_where_it_comes_to(
    hub: Hub, bundle: Path, tmp_path: Path, prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = prgkit(f"push me/things --license apache-2.0 --private --run {bundle}")
    assert pushed.code == 0, pushed.err
    assert pushed.out == f"{hub.address}/me/things is published\n"
    files = hub.branches["me/things", "main"]
    assert sorted(files) == [".gitattributes", "README.md", "manifest.json", "model.int8.onnx", "model.onnx"]
    assert hub.private["me/things"]
    told = files["README.md"].decode() + files["manifest.json"].decode()
    assert [secret for secret in SECRETS if secret in told] == []
    card(files["README.md"].decode(), hub)
    validate(json.loads(files["manifest.json"])["recipe"], where="published")  # as relabel reads it

    monkeypatch.chdir(tmp_path)
    pulled = prgkit("pull me/things bench --seconds 1 --batches 1 --threads 1 --json")
    assert pulled.code == 0, pulled.err
    bench = pulled.json["bench"]
    assert bench["rows"][0]["latency"]["p50_ms"] > 0
    assert {(row["artifact"], row["top1"]) for row in bench["rows"]} == {("onnx-fp32", None), ("onnx-int8", None)}
    assert bench["int8"] == []  # it cannot be judged
    assert "published without its images" in bench["notes"][0]
    html = next((tmp_path / "things").rglob("report.html")).read_text()
    assert "measured on no images, since none came with the bundle" in html
    golden = str(bundle / "golden" / "00.png")
    answers = [prgkit(f"predict {golden} --run {place} --json").json["predict"] for place in ("things", bundle)]
    assert answers[0] == answers[1]

    import prgkit as package

    model = package.load(package.pull("me/things", tmp_path / "again").folder)
    assert model.predict(golden)[0].label == answers[0][0]["class"]
    assert (tmp_path / "things" / "bench").exists()
    assert prgkit("pull me/things").code == 0  # again, in its place
    assert list((tmp_path / "things" / "bench").iterdir())  # what was measured stays


def card(text: str, hub: Hub) -> None:
    """Assert what the card says: the student is right on all 16 images, and of its teacher's opinion on four."""
    assert hub.cards == [text]
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["library_name"], facts["metrics"]) == ("apache-2.0", "prgkit", ["accuracy"])
    assert "datasets" not in facts
    (result,) = facts["model-index"][0]["results"]
    assert result["dataset"] == {"name": "16 images, not published", "type": "private"}
    assert [metric["type"] for metric in result["metrics"]] == ["accuracy", "agreement"]
    assert "1,234 images of the publisher, none of which had a label" in body
    assert "- The weights of the teacher local-dir:clip: unknown: check." in body
    assert "| Accuracy (top-1) | 100.0 % (80.6 to 100.0 %) |" in body
    assert "| Same answer as the teacher | 25.0 % (10.2 to 49.5 %) |" in body
    assert "on 16 labelled images that it did not learn from" in body


def test_images_travel_where_that_is_asked_for(hub: Hub, bundle: Path, tmp_path: Path, prgkit: PrgkitCommand) -> None:
    from prgkit.export.bundle.checksums import require_unchanged

    assert prgkit(f"push me/all --with-images --revision v1 --run {bundle}").code == 0
    assert {"evaluation/images.zip", "evaluation/labels.npy", "golden/00.png"} <= hub.branches["me/all", "v1"].keys()
    assert hub.branches["me/all", "main"].keys() == {".gitattributes"}
    hub.branches["me/all", "v1"]["old.onnx"] = b"of an earlier push"
    assert prgkit(f"push me/all --with-images --revision v1 --run {bundle}").code == 0
    assert "old.onnx" not in hub.branches["me/all", "v1"]
    out = tmp_path / "here"
    assert prgkit(f"pull me/all --revision v1 --out {out}").code == 0
    report = prgkit(f"bench --run {out} --seconds 1 --batches 1 --threads 1 --json").json["bench"]
    assert report["evaluation"]["images"] == 16
    assert report["rows"][0]["agreement_fp32"] == 100
    hub.branches["me/all", "v1"]["evaluation/labels.npy"] += b"!"
    changed = prgkit(f"pull me/all --revision v1 --out {out}")
    assert changed.code == 1
    assert "evaluation/labels.npy is damaged: its content is not what was exported" in changed.err
    require_unchanged(out, "evaluation")  # the one before it is whole


def test_what_is_wrong_is_said(
    hub: Hub, bundle: Path, tmp_path: Path, prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(line: str) -> str:
        done = prgkit(line)
        assert done.code == 1
        return done.err

    out = tmp_path / "out"
    assert "there is no such model repository, or it is not for this token" in said(f"pull me/none --out {out}")
    hub.private["me/bert"], hub.branches["me/bert", "main"] = False, {"config.json": b"{}", "README.md": b""}
    assert "this repository is no prgkit bundle: it has no manifest.json" in said(f"pull me/bert --out {out}")
    held = "this repository holds something that is not a prgkit bundle: config.json"
    assert held in said(f"push me/bert --run {bundle}")
    hub.branches["me/bert", "main"]["manifest.json"] = json.dumps({"name": "a web page"}).encode()
    assert "this repository holds something that is not a prgkit bundle" in said(f"push me/bert --run {bundle}")
    assert hub.branches["me/bert", "main"].keys() == {"config.json", "README.md", "manifest.json"}
    assert prgkit(f"push me/open --run {bundle}").code == 0
    assert "this repository is public" in said(f"push me/open --private --run {bundle}")
    assert "has no such revision" in said(f"pull me/open --revision v9 --out {out}")
    assert "write OWNER/NAME" in said(f"push me/a/b --run {bundle}")
    facts = json.loads(hub.branches["me/open", "main"]["manifest.json"])
    hub.branches["me/open", "main"]["manifest.json"] = json.dumps(with_engine(facts)).encode()
    assert "this bundle holds engines, which are executable code" in said(f"pull me/open --out {out}")
    assert not out.exists()
    hub.branches["me/bert", "main"]["manifest.json"] = b"not JSON"
    assert "this repository holds something that is not a prgkit bundle" in said(f"push me/bert --run {bundle}")
    app = tmp_path / "app"
    app.mkdir()
    (app / "manifest.json").write_text('{"name": "app"}')
    assert "the folder holds something that is not a bundle" in said(f"pull me/open --out {app}")
    assert [path.name for path in app.iterdir()] == ["manifest.json"]
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "the Hub refuses" in said(f"push me/new --run {bundle}")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no token to write to the Hub with\n  fix: hf auth login" in said(f"push me/new --run {bundle}")


@pytest.mark.parametrize("line", ["pull me/open --out .", "pull me/open --out ..", "pull me/"])
def test_the_folder_one_stands_in_is_not_pulled_into(line: str, empty_folder: Path, prgkit: PrgkitCommand) -> None:
    done = prgkit(line)
    assert done.code == 1
    assert done.err.startswith("Error: pull puts another folder in the place of the one that you stand in\n")
    assert not list(empty_folder.iterdir())


def with_engine(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with an engine in it, sealed."""
    from prgkit.storage.atomic import fingerprint

    content = {key: value for key, value in facts.items() if key != "digest"}
    engine = {**facts["artifacts"][0], "name": "trt", "file": "model.engine", "format": "engine"}
    content["artifacts"] = [*facts["artifacts"], engine]
    return {**content, "digest": fingerprint(content)}


def test_without_a_network(prgkit: PrgkitCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, logging

    logging.set_verbosity_error()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its attempts
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", nobody)
        address = f"{nobody}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        done = prgkit(f"pull me/things --out {tmp_path / 'out'}")
    assert done.code == 1
    assert done.err.startswith("Error: the Hub cannot be reached: ")
    assert not (tmp_path / "out").exists()
