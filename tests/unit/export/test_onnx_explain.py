"""Heat maps: evidence in the last feature map, on a network whose answer is known by construction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ExportError
from prgkit.evaluate.heat_map import overlay
from prgkit.export.formats.onnx_export import OnnxExportModule, export_onnx, with_evidence
from prgkit.export.runtimes.onnxruntime import OnnxRunner

FACTS = Preprocessing(8, 1.0, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class RedOrBlue(nn.Module):
    """Class 0 is as likely as an image is red, class 1 as it is blue; both by blocks of 4 x 4 pixels."""

    def __init__(self, *, linear: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.linear = linear
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
            self.head.bias.copy_(torch.tensor([0.25, -0.5]))

    def forward_features(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4)

    def forward_head(self, maps: Tensor) -> Tensor:
        pooled = maps.mean((2, 3)) if self.linear else maps.amax((2, 3))
        return self.head(pooled)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def module(network: nn.Module) -> OnnxExportModule:
    return OnnxExportModule(network, torch.zeros(3), torch.full((3,), 255.0)).eval()


def pictures() -> np.ndarray:
    """The first is red above and blue below, to three quarters of full brightness; the second is all blue."""
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    pixels[0, :4, :, 0], pixels[0, 4:, :, 2], pixels[1, :, :, 2] = 255, 191, 255
    return pixels


def test_evidence_lies_where_the_class_is(tmp_path: Path) -> None:
    explained = with_evidence(module(RedOrBlue()), pictures())
    path = tmp_path / "model.explain.onnx"
    export_onnx(
        explained, path, image_size=8, classes=["red", "blue"], preprocessing=FACTS, opset=20,
        outputs=("logits", "evidence"),
    )  # fmt: skip
    logits, evidence = OnnxRunner(path, spin=False).outputs(pictures())
    np.testing.assert_allclose(evidence[0, 0], [[1, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(evidence[0, 1], [[0, 0], [191 / 255, 191 / 255]], atol=1e-6)
    np.testing.assert_allclose(evidence[1], [np.zeros((2, 2)), np.ones((2, 2))], atol=1e-6)
    np.testing.assert_allclose(logits, [[0.5 + 0.25, 0.5 * 191 / 255 - 0.5], [0.25, 0.5]], atol=1e-6)


def test_a_head_that_is_not_linear_has_no_heat_maps() -> None:
    with pytest.raises(ExportError, match="its logits are not linear in its pooled last feature map"):
        with_evidence(module(RedOrBlue(linear=False)), pictures())
    with pytest.raises(ExportError, match="its logits are not linear"):
        with_evidence(module(nn.Sequential(nn.Flatten(), nn.Linear(192, 2))), pictures())


def test_an_overlay_is_red_where_the_evidence_is_and_the_picture_elsewhere() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    page = overlay(grey, np.array([[2.0, -1.0], [0.0, -3.0]], np.float32))
    assert page.shape == (224, 224, 3)
    red = page[10, 10].astype(int)
    assert red[0] > 170 and red[1] < 45 and red[2] < 45  # noqa: PT018
    np.testing.assert_array_equal(page[-20:, -20:], 100)
    np.testing.assert_array_equal(overlay(grey, -np.ones((2, 2), np.float32)), 100)
