"""The file for other runtimes: floats that are normalised by hand give the answers that pixels give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ParityError
from prgkit.export.bundle.manifest import Artifact
from prgkit.export.formats.onnx_graph import write_nchw
from prgkit.export.formats.onnx_nchw import ONNX_NCHW, float_input
from prgkit.export.runtimes.onnxruntime import normalised


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_a_pixel_is_normalised_as_by_hand() -> None:
    preprocessing = Preprocessing(2, 1.0, "bicubic", (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    pixels = np.zeros((1, 2, 2, 3), np.uint8)
    pixels[0, 0, 1] = 255, 51, 255  # row 0, column 1: red 1.0, green 0.2, blue 1.0
    expected = np.array([[[-1, 1], [-1, -1]], [[-1, -0.2], [-1, -1]], [[0, 0.5], [0, 0]]])
    values = normalised(pixels, preprocessing)
    assert (values.shape, values.dtype, values.flags.c_contiguous) == ((1, 3, 2, 2), np.float32, True)
    np.testing.assert_allclose(values[0], expected, atol=1e-6)


def test_it_answers_as_the_documented_file_does(exported: Any, tmp_path: Path) -> None:
    write_nchw(exported.fp32, tmp_path / "model.nchw.onnx", float_input(exported.preprocessing))
    theirs, ours = session(tmp_path / "model.nchw.onnx"), session(exported.fp32)
    (given,) = theirs.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(float)", [3, 64, 64])
    assert isinstance(given.shape[0], str)  # any batch
    assert [output.name for output in theirs.get_outputs()] == ["logits"]
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for count in (1, 5):
        pixels = exported.pixels[:count]
        by_hand = ((pixels.transpose(0, 3, 1, 2) / 255 - mean) / std).astype(np.float32)
        expected = ours.run(None, {"pixels": pixels})[0]
        tolerance = 1e-4 * np.abs(expected).max()  # it is rounded in another order
        np.testing.assert_allclose(theirs.run(None, {"images": by_hand})[0], expected, atol=tolerance)


def test_the_file_says_what_it_takes_and_what_it_names(exported: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.nchw.onnx"
    write_nchw(exported.fp32, path, float_input(exported.preprocessing))
    described = session(path).get_modelmeta().custom_metadata_map
    assert json.loads(described["classes"])[:2] == ["thing 0", "thing 1"]
    takes = json.loads(described["input"])
    assert (takes["values"], takes["shape"]) == ("(RGB / 255 - mean) / std", ["batch", 3, 64, 64])
    assert takes["mean"] == [0.485, 0.456, 0.406]
    graph = onnx.load(str(path)).graph
    assert not {"Cast", "Transpose"} & {node.op_type for node in graph.node[:4]}
    assert not {"scale", "offset"} & {initializer.name for initializer in graph.initializer}
    assert path.stat().st_size < exported.fp32.stat().st_size + 1000


def test_another_normalisation_does_not_pass(repvit: Any, tmp_path: Path) -> None:
    """Logits are PyTorch's; a file that is given unnormalised pixels must not agree with them."""
    from prgkit.export.bundle.artifact_cache import ArtifactCache
    from prgkit.export.formats.options import ExportOptions
    from prgkit.export.formats.student_export import StudentExport

    def make(folder: Path, preprocessing: Preprocessing) -> Artifact:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(repvit.fp32.read_bytes())
        cache = ArtifactCache(folder, bundle=folder / "none", note=lambda _: None)
        given = (repvit.student, [], preprocessing, ExportOptions(), repvit.pixels[:16], None, folder, folder, cache)
        (artifact,) = ONNX_NCHW.make(StudentExport(*given, origin={}, note=lambda _: None)).artifacts
        return artifact

    parity = make(tmp_path / "right", repvit.preprocessing).parity
    assert parity is not None
    assert parity.top1_agreement == 100.0
    wrong = Preprocessing(64, 1.0, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(ParityError, match=r"onnx-nchw \(fp32\) does not agree with torch on 16 images"):
        make(tmp_path / "wrong", wrong)
