"""The bundle's README: its Python resizes as training did, and what it tells other tools fits the bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.export.readme import readme, resizing
from prgkit.images import Preprocessing

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
    exec(resizing(facts.to_dict()), names)
    np.testing.assert_array_equal(np.asarray(names["image"]), facts.prepare(Image.fromarray(grain)))


def manifest(**other: Any) -> dict[str, Any]:
    return {
        "student": {"model": "repvit_m0_9"},
        "teacher": {"model": "ViT-L-14"},
        "recipe": {"export": {"batch": [1, 4, 8]}},
        "classes": ["a", "b", "c"],
        "preprocessing": Preprocessing(224, 0.95, "bicubic", MEAN, STD).to_dict(),
        "artifacts": [
            {
                **{"file": "model.onnx", "format": "onnx", "precision": "fp32", "backend": "onnxruntime"},
                **{"executed": True, "note": None},
            }
        ],
        **other,
    }


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
    assert text.count("```") == 10


def test_tensorrts_int8_is_not_said_to_have_run_in_tensorrt() -> None:
    other = {"file": "model.int8.tensorrt.onnx", "format": "onnx-tensorrt", "precision": "int8", "backend": "tensorrt"}
    text = readme(manifest(artifacts=[*manifest()["artifacts"], {**other, "executed": True, "note": "its layout"}]))
    assert "| model.int8.tensorrt.onnx | int8 | tensorrt | in ONNX Runtime alone: its layout |" in text


def test_the_python_is_ten_lines() -> None:
    assert len(readme(manifest()).split("```python\n")[1].split("```")[0].splitlines()) == 10


def test_where_a_teacher_lay_is_not_told() -> None:
    text = readme(manifest(teacher={"model": "local-dir:/home/someone/teachers/mine"}))
    assert "from the teacher mine." in text
    assert "someone" not in text
