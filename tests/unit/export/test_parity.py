"""Parity: figures computed by hand, and every way two runners can disagree."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prgkit.errors import ParityError
from prgkit.export.runtimes.parity import compare, require_agreement, run_batches


class Fixed:
    """A runner that looks its answer up by the first pixel."""

    backend, device, max_batch = "none", "none", None

    def __init__(self, name, table):
        self.name, self.table, self.batches = name, np.asarray(table, np.float32), []

    def run(self, pixels):
        self.batches.append(len(pixels))
        return self.table[pixels[:, 0, 0, 0]]

    def close(self):
        pass


def numbered(count):
    pixels = np.zeros((count, 2, 2, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return pixels


def test_figures_computed_by_hand():
    reference = np.array([[math.log(3), 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]], np.float32)
    other = np.array([[0.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]], np.float32)
    parity = compare(reference, other)
    assert parity.images == 4
    assert parity.max_abs_difference == pytest.approx(math.log(3))
    assert parity.tolerance == pytest.approx(2e-4)  # 1e-4 of the largest reference logit, 2
    assert parity.top1_agreement == 75.0
    # image 0: KL((3/4, 1/4) || (1/2, 1/2)); image 2: KL((s, 1-s) || (1-s, s)) = (2s - 1) ln(s / (1-s)), ln(...) = 1
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    third = 2 / (1 + math.exp(-1)) - 1
    assert parity.kl == pytest.approx((first + third) / 4, rel=1e-6)


def test_small_logits_keep_an_absolute_tolerance():
    assert compare(np.full((1, 2), 0.01), np.zeros((1, 2))).tolerance == 1e-4


def test_adding_a_constant_to_an_image_leaves_kl_and_top1():
    logits = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    parity = compare(logits, logits + 100)
    assert parity.top1_agreement == 100.0
    assert parity.kl == pytest.approx(0, abs=1e-6)


def test_agreement_within_the_tolerance_passes():
    table = np.eye(4, dtype=np.float32)
    parity = require_agreement(table, table + 9e-5, precision="fp32", names=("a", "b"))
    assert parity.top1_agreement == 100.0


def test_fp32_breach_gives_every_figure():
    table = np.eye(4, dtype=np.float32)
    with pytest.raises(ParityError) as caught:
        require_agreement(table, table + 2e-4, precision="fp32", names=("torch", "onnx-fp32"))
    assert "onnx-fp32 (fp32) does not agree with torch on 4 images" in caught.value.what
    assert "max abs difference 0.0002 (allowed 0.0001), top-1 agreement 100.00 %" in caught.value.what


def test_fp32_refuses_one_flipped_image_that_is_within_the_tolerance():
    reference = np.array([[0.0, 1e-6]], np.float32)
    with pytest.raises(ParityError, match=r"top-1 agreement 0\.00 % \(at least 100 %\)"):
        require_agreement(reference, reference[:, ::-1], precision="fp32", names=("a", "b"))


def test_fp16_is_judged_by_top1_alone():
    reference = np.tile(np.array([[0.0, 1.0]], np.float32), (200, 1))
    other = reference + 0.25
    other[:2] = other[:2, ::-1]
    parity = require_agreement(reference, other, precision="fp16", names=("a", "b"))
    assert parity.tolerance is None
    assert parity.top1_agreement == 99.0
    other[2] = other[2, ::-1]
    with pytest.raises(ParityError, match=r"top-1 agreement 98\.50 % \(at least 99 %\)"):
        require_agreement(reference, other, precision="fp16", names=("a", "b"))


def test_logits_that_are_not_finite_are_named():
    bad = np.zeros((3, 2), np.float32)
    bad[1, 0] = np.nan
    with pytest.raises(ParityError, match="b gives logits that are not finite on 1 of 3 images"):
        require_agreement(np.zeros((3, 2), np.float32), bad, precision="fp16", names=("a", "b"))


def test_another_number_of_classes_is_named():
    with pytest.raises(ParityError, match=r"a gives logits of shape \(3, 2\), b of shape \(3, 4\)"):
        require_agreement(np.zeros((3, 2)), np.zeros((3, 4)), precision="fp32", names=("a", "b"))


def test_images_run_in_batches_and_come_back_in_order():
    runner = Fixed("a", np.arange(70, dtype=np.float32)[:, None])
    assert run_batches(runner, numbered(70))[:, 0].tolist() == list(range(70))
    assert runner.batches == [32, 32, 6]
