"""The bundle's README: its Python resizes as training did, and what it tells other tools fits the bundle."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.data.preprocessing import Preprocessing, load_image
from prgkit.export.bundle.manifest import Manifest, read_manifest
from prgkit.export.formats.snippets import render
from prgkit.export.readme import readme, write_manifest

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("size", [(80, 64), (64, 80), (64, 64), (131, 97), (33, 200)])
@pytest.mark.parametrize(
    "facts",
    [
        Preprocessing(64, 1.0, "bicubic", MEAN, STD),
        Preprocessing(64, 0.875, "bilinear", MEAN, STD),
        Preprocessing(48, 0.95, "nearest", MEAN, STD),
        Preprocessing(64, 0.9, "bicubic", MEAN, STD, squash=True),
    ],
    ids=["whole", "cropped", "nearest", "squashed"],
)
def test_its_lines_resize_as_training_did(size: tuple[int, int], facts: Preprocessing) -> None:
    grain = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    names: dict[str, Any] = {"Image": Image, "image": Image.fromarray(grain)}
    exec(render("resize.py", facts), names)
    np.testing.assert_array_equal(np.asarray(names["image"]), facts.prepare(Image.fromarray(grain)))


def manifest(**other: Any) -> Manifest:
    facts = {
        "prgkit": "0",
        "created": "today",
        "run": {"name": "test", "fingerprint": "0" * 16, "objective": "prg", "epochs": 1},
        "student": {"model": "repvit_m0_9"},
        "teacher": {"model": "ViT-L-14", "fingerprint": "0" * 16},
        "recipe": {"export": {"batch": [1, 4, 8]}},
        "classes": ["a", "b", "c"],
        "preprocessing": Preprocessing(224, 0.95, "bicubic", MEAN, STD),
        "input": {"name": "pixels", "dtype": "uint8", "shape": []},
        "output": {"name": "logits", "dtype": "float32", "shape": []},
        "artifacts": [artifact("model.onnx", "onnx", "fp32", "onnxruntime")],
        "evaluation": {"images": 1, "labelled": False, "source": "made up"},
        **other,
    }
    return Manifest.model_validate(facts)


def artifact(file: str, kind: str, precision: str, backend: str, **other: Any) -> dict[str, Any]:
    facts = {"name": file, "file": file, "format": kind, "precision": precision, "backend": backend, "bytes": 1}
    return {**facts, "sha256": "", "executed": True, "note": None, "parity": None, **other}


def test_the_card_of_a_pulled_bundle_stays(tmp_path: Path) -> None:
    for text, stays in (("---\nlicense: mit\n---\n# a card\n", True), ("# of an older bundle\n", False)):
        (tmp_path / "README.md").write_text(text)
        write_manifest(tmp_path, manifest())
        assert ((tmp_path / "README.md").read_text() == text) == stays
        assert read_manifest(tmp_path).classes == ("a", "b", "c")


def test_its_programs_read_the_manifest_as_it_is_written_on_every_system() -> None:
    kinds = ("litert", "executorch", "ncnn")
    files = [
        artifact("model.onnx", "onnx", "fp32", "onnxruntime"),
        *(artifact(f"m.{kind}", kind, "fp32", kind) for kind in kinds),
    ]
    text = readme(manifest(artifacts=files))
    assert text.count('open("manifest.json", encoding="utf-8")') == text.count('open("manifest.json"') >= 4


def test_images_are_told_of_where_there_are_any() -> None:
    assert "`golden/` holds source pictures" in readme(manifest())
    bare = readme(manifest(evaluation={"images": 0, "labelled": False, "source": "not published"}))
    assert "What else is here" not in bare


def test_it_is_about_this_bundle() -> None:
    text = readme(manifest())
    assert text.startswith("# repvit_m0_9, 3 classes, 224 px\n\nMade by prgkit from the teacher ViT-L-14. ")
    assert (
        "$ trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --noTF32 --minShapes=pixels:1x224x224x3 "
        "--optShapes=pixels:4x224x224x3 --maxShapes=pixels:8x224x224x3\n"
    ) in text
    assert (
        "The ONNX files are of opset 20, which ONNX Runtime 1.17 and newer read; for an older one\nexport again" in text
    )
    assert "The ONNX files are of opset 17, which ONNX Runtime 1.12 and newer" in readme(
        manifest(recipe={"export": {"opset": 17}})
    )
    assert "It reads prepared pixels, 150,528 bytes, from standard input." in text
    assert "const std::array<int64_t, 4> shape{1, 224, 224, 3};" in text
    assert "std::vector<float> logits(3);" in text
    assert "Floats in place of pixels" not in text
    assert text.count("```") == 12


def test_tensorrts_int8_is_not_said_to_have_run_in_tensorrt() -> None:
    other = artifact("model.int8.tensorrt.onnx", "onnx-tensorrt", "int8", "tensorrt", note="its layout")
    text = readme(manifest(artifacts=[other]))
    assert "| model.int8.tensorrt.onnx | int8 | tensorrt | in ONNX Runtime alone: its layout |" in text


def test_it_says_by_what_a_picture_of_no_class_is_known() -> None:
    known = {"temperature": 2.5, "fitted_to": "teacher", "images": 30, "calibration_error": 1, "uncalibrated_error": 2,
             "right": [0.5] * 30, "wrong": [], "held_out": 30, "reject_below": 0.375}  # fmt: skip
    for by, said in (({}, "`energy`"), ({"reject_by": "probability"}, "the largest of them")):
        assert f"Where\n{said} is below 0.375, as for one in twenty" in readme(manifest(confidence={**known, **by}))


def python_of(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_the_python_is_short() -> None:
    assert len(python_of(readme(manifest())).splitlines()) <= 27


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def infrared(rgba: Image.Image) -> bytes:
    """Return a TIFF whose fourth band is none of transparency: ExtraSamples (338, one SHORT) says 0 in place of 2."""
    data = encoded(rgba, "TIFF")
    entry = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    assert data.count(entry) == 1
    return data.replace(entry, struct.pack("<HHIHH", 338, 3, 1, 0, 0))


def zoo() -> dict[str, bytes]:
    """One picture of each kind, with transparent parts, deep values and orientations that show if they are lost."""
    grain = np.random.default_rng(3).integers(0, 256, (40, 72, 4), dtype=np.uint8)
    rgba, rgb = Image.fromarray(grain), Image.fromarray(grain[..., :3])
    palette, grey = rgb.quantize(16), Image.fromarray(grain[..., 0])
    turned = Image.Exif()
    turned[0x0112] = 6
    ramp = np.linspace(0, 1, 72 * 40, dtype=np.float32).reshape(40, 72)
    ink = encoded(rgb.convert("CMYK"), "JPEG", quality=100)
    adobe = ink.index(b"\xff\xee")
    plain_ink = ink[:adobe] + ink[adobe + 2 + int.from_bytes(ink[adobe + 2 : adobe + 4]) :]
    deep = {
        "whole": (ramp * 65535).astype(np.uint16),
        "twelve": (336 + ramp * 3248).astype(np.uint16),
        "thermal": (7000 + ramp * 2500).astype(np.uint16),
        "level": np.full((40, 72), 9000, np.uint16),
    }
    floats = {"one": ramp, "metres": ramp * 10, "below": ramp - 0.5, "dim": ramp / 16, "kelvin": 290 + 20 * ramp}
    holes = np.where(ramp > 0.9, np.nan, ramp * 40).astype(np.float32)
    dead = deep["twelve"].copy()
    dead[3, 5] = 65535
    return {
        "dead.png": encoded(Image.fromarray(dead)),
        "map.tif": encoded(Image.fromarray(np.where(ramp > 0.8, -9999, ramp * 40).astype(np.float32)), "TIFF"),
        "inverted.tif": encoded(Image.fromarray(deep["twelve"]), "TIFF", tiffinfo={262: 0}),
        "clear.png": encoded(Image.fromarray(grain * np.array([1, 1, 1, 0], np.uint8))),
        "nearly-clear.png": encoded(Image.fromarray(np.minimum(grain, np.array([255, 255, 255, 1], np.uint8)))),
        "infrared.tif": infrared(rgba),
        **{f"{name}.png": encoded(Image.fromarray(values)) for name, values in deep.items()},
        **{f"{name}.tif": encoded(Image.fromarray(values), "TIFF") for name, values in floats.items()},
        "holes.tif": encoded(Image.fromarray(holes), "TIFF"),
        "nothing.tif": encoded(Image.fromarray(np.full((40, 72), np.nan, np.float32)), "TIFF"),
        "whole32.tif": encoded(Image.fromarray((ramp * 2**21).astype(np.int32)), "TIFF"),
        "deep.pgm": encoded(Image.fromarray(deep["twelve"]), "PPM"),
        "turned16.png": encoded(Image.fromarray(deep["twelve"]), exif=turned),
        "rgba.png": encoded(rgba),
        "la.png": encoded(rgba.convert("LA")),
        "clear.webp": encoded(rgba, "WEBP", lossless=True),
        "palette.png": encoded(palette),
        "keyed.png": encoded(palette, transparency=3),
        "partly.png": encoded(palette, transparency=bytes(range(0, 160, 10))),
        "keyed-rgb.png": encoded(rgb, transparency=tuple(grain[0, 0, :3].tolist())),
        "keyed.gif": encoded(palette, "GIF", transparency=2),
        "bits.png": encoded(grey.convert("1")),
        "grey.png": encoded(grey),
        "ink.jpg": ink,
        "plain-ink.jpg": plain_ink,
        "ink.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "turned.jpg": encoded(rgb, "JPEG", exif=turned),
        "turned.png": encoded(rgba, exif=turned),
        "turned.webp": encoded(rgba, "WEBP", lossless=True, exif=turned),
        "turned.tif": encoded(rgb, "TIFF", exif=turned),
        "thin.png": encoded(rgb.resize((3, 1200))),
        "flat.png": encoded(rgba.resize((1500, 2))),
        "dot.png": encoded(rgba.resize((1, 1))),
        "bitmap.bmp": encoded(rgb, "BMP"),
    }


@pytest.mark.parametrize(("grey", "squash"), [(None, False), ((0.0, 4095.0), True)])
def test_its_lines_read_every_kind_of_picture_as_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grey: tuple[float, float] | None, squash: bool
) -> None:
    facts = Preprocessing(64, 0.9, "bicubic", MEAN, STD, squash, grey)
    session = SimpleNamespace(
        get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={"classes": '["a", "b"]'}),
        run=lambda outputs, given: [np.array([[0.0, 1.0]])],
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=lambda file: session))
    lines = compile(python_of(readme(manifest(preprocessing=facts))), "README", "exec")
    for name, data in zoo().items():
        (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(sys, "argv", ["name.py", str(tmp_path / name)])
        names: dict[str, Any] = {}
        exec(lines, names)
        ours = facts.prepare(load_image(tmp_path / name, grey=grey))
        np.testing.assert_array_equal(np.asarray(names["image"]), ours, err_msg=name)


def test_where_a_teacher_lay_is_not_told() -> None:
    text = readme(manifest(teacher={"model": "local-dir:/home/someone/teachers/mine", "fingerprint": ""}))
    assert "from the teacher mine." in text
    assert "someone" not in text
