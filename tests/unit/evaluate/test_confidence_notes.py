"""What a report says of confidences: by the labels, with the bundle's temperature and without."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prgkit.evaluate.bench.bench import accuracy
from prgkit.evaluate.bench.metadata import confidence_notes
from prgkit.evaluate.report.schema import Row
from prgkit.export.bundle.manifest import Confidence

# At temperature 1 the student is 90 % sure, at temperature 2 it is 75 %; it is right on 3 of 4.
LOGITS = np.tile(np.array([2 * math.log(3), 0], dtype=np.float32), (4, 1))
FACTS = Confidence(
    temperature=2, fitted_to="teacher", images=60, calibration_error=2, uncalibrated_error=14, right=(0.75,) * 45,
    wrong=(0.75,) * 15, held_out=60, reject_below=1,
)  # fmt: skip


def subject(confidence: Confidence | None, labels: Any) -> Any:
    manifest = SimpleNamespace(confidence=confidence, temperature=confidence.temperature if confidence else 1.0)
    evaluation = SimpleNamespace(logits=LOGITS, teacher_logits=LOGITS, labels=labels)
    return SimpleNamespace(bundle=SimpleNamespace(manifest=manifest), evaluation=evaluation)


def test_the_report_holds_confidence_against_the_labels() -> None:
    row = Row(artifact="onnx-fp32", backend="onnxruntime", device="cpu", file=None, precision="fp32", threads=1)
    labels = np.array([0, 0, 0, 1])
    known = subject(FACTS, labels)
    said = (
        "Confidences: temperature 2, fitted on 60 held-out images; expected calibration error 2.0 points, 14.0 without"
    )
    assert confidence_notes(known.bundle, known.evaluation) == [
        f"{said}; by the labels of the evaluation images 0.0 points, 15.0 without."
    ]
    assert accuracy(row, LOGITS, known)["calibration_error"] == pytest.approx(0, abs=1e-5)
    assert accuracy(row, LOGITS, subject(None, labels))["calibration_error"] == pytest.approx(15)
    unlabelled = subject(FACTS, None)
    assert confidence_notes(unlabelled.bundle, unlabelled.evaluation) == [f"{said}."]
    assert confidence_notes(subject(None, labels).bundle, known.evaluation) == []
