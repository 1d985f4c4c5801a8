"""A page in the browser that names a picture, and shows where the student found its answer.

    pip install prgkit gradio
    python examples/gradio_page.py runs/demo/bundle

The heat map is there where the bundle was made with ``prgkit export --explain``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import gradio
from PIL import Image

import prgkit


def page(model: prgkit.Model) -> gradio.Blocks:
    """Return a page that names what a person drops on it."""
    explained = any(artifact.format == "onnx-explain" for artifact in model.bundle.artifacts)
    outputs = [gradio.Label(num_top_classes=3, label="answer")]
    if explained:
        outputs.append(gradio.Image(label="where the student found it"))
    title = f"{model.bundle.manifest.student.model}: {len(model.classes)} classes"
    picture = gradio.Image(type="pil", label="picture")
    return gradio.Interface(namer(model, explained=explained), picture, outputs, title=title, flagging_mode="never")


def namer(model: prgkit.Model, *, explained: bool) -> Callable[[Image.Image | None], object]:
    """Return what turns a picture into what the page shows."""

    def name(picture: Image.Image | None) -> object:
        if picture is None:
            raise gradio.Error("choose a picture first")
        (answer,) = model.predict(picture)
        if answer.error is not None:
            raise gradio.Error(answer.error.what)
        shares = dict(answer.top)
        return (shares, model.heat_map(picture, answer.top[0][0])) if explained else shares

    return name


if __name__ == "__main__":
    with prgkit.load(sys.argv[1]) as opened:
        page(opened).launch()
