"""The README that travels in a bundle: what it is, and ten lines that run it with onnxruntime alone."""

from __future__ import annotations

from typing import Any


def readme(manifest: dict[str, Any]) -> str:
    """Return the bundle's README: what it is, and ten lines that run it with onnxruntime alone."""
    facts = manifest["preprocessing"]
    size = facts["image_size"]
    resize = f"image = image.resize(({size}, {size}), Image.Resampling.{facts['interpolation'].upper()})"
    if not facts.get("squash"):
        resize = (
            f"short, S = int({size} / {facts['crop']}), {size}\n"
            "width, height = (int(short * side / min(image.size)) for side in image.size)\n"
            f"image = image.resize((width, height), Image.Resampling.{facts['interpolation'].upper()})\n"
            "left, top = round((width - S) / 2), round((height - S) / 2)\n"
            "image = image.crop((left, top, left + S, top + S))"
        )
    rows = "\n".join(
        f"| {entry['file']} | {entry['precision']} | {entry['backend']} | {whether_executed(entry)} |"
        for entry in manifest["artifacts"]
    )
    classes = len(manifest["classes"])
    return f"""# {manifest["student"]["model"]}, {classes} classes, {size} px

Made by prgkit from the teacher {manifest["teacher"]["model"]}. Input `pixels` [batch, {size}, {size}, 3] uint8 RGB,
output `logits` [batch, {classes}] float32. Mean and standard deviation are applied inside; class names are in the file.

```python
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps
session = onnxruntime.InferenceSession("model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
{resize}
logits = session.run(None, {{"pixels": np.asarray(image)[None]}})[0]
print(classes[logits[0].argmax()])
```

| file | precision | runs with | executed where it was made |
|---|---|---|---|
{rows}

`golden/` holds source pictures, prepared inputs and expected logits; `evaluation/` held-out images with the teacher's
and the student's logits. `prgkit bench` in this folder checks the first and measures on the second;
`prgkit export --trt` builds engines for the GPU at hand.
"""


def whether_executed(entry: dict[str, Any]) -> str:
    """Say of an artifact whether it ran on the machine that made it."""
    return "yes" if entry["executed"] else str(entry["note"] or "never executed here")
