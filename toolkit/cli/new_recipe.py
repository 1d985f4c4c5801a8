"""A recipe page for a folder of images: what they are decides its choices, and a comment says why each was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from prgkit.config.prompts import load_classes
from prgkit.data.decode import UnreadableImage
from prgkit.data.sources import ImageSource, open_images
from prgkit.errors import ImagesError, RecipeError

MEASURED = 200  # images whose sizes are looked at, spread over all
SIDES = (32, 64, 96, 128, 160, 192, 224)  # of a student's input, in pixels
SEEN = 1_000_000  # images that a student sees over a training, within the bounds of the epochs
FEW, MANY = 3_000, 200_000  # images
FEW_CLASSES = """\
# Of so few classes the answers say little. objective: {name: lelp} splits each, and may be worth a comparison:
# prgkit compare FILE --objectives prg,lelp
"""
PAGE = Template(
    """\
# Distil CLIP ViT-B/16 into RepViT-M0.9 on $count images of $class_count classes.
#   prgkit distill FILE export bench      (this file; the paths in it are relative to where the command runs)
# The numbers were chosen by what the images are; prgkit recipes --show custom has more keys, with their reasons.
data:
  # $count images. Shorter side: $short; longer side: $long.
  images: $images
  # $class_count names. The teacher reads them: write them as one would caption a photograph.
  classes: $classes
  # What kind of pictures these are: photo, plain, objects, scenes, textures, satellite, ...
  prompts: photo
  # About $selecting images select the epoch that is kept, and are not learned from.
  held_out: $held_out
# ViT-L-14/openai knows more and takes three times as long, once.
teacher: {model: ViT-B-16, weights: openai}
# count: $why_views. Each epoch shows the next view.
# flip: false where left and right differ, as for digits or signs.
views: {count: $views, crop_scale: [0.4, 1.0], flip: true}
# image_size: $why_size.
# initial: pretrained starts from timm's ImageNet weights; random from nothing, and wants more images and epochs.
student: {model: repvit_m0_9, image_size: $size, initial: pretrained}
${few_classes}objective: {name: prg, supervision: soft, node_weight: 3.0, edge_weight: 1.0, block: softmax}
# epochs: of $count images, $epochs show the student $shown. batch_size: $steps steps an epoch.
training: {epochs: $epochs, batch_size: $batch, optimizer: adamw, learning_rate: 0.0005, ema: $ema}
export: {opset: 20, batch: [1, 1, 32]}
"""
)


class Images(NamedTuple):
    """What is known of a source of images: how many, and the shorter and longer sides of some of them."""

    images: int
    short: tuple[int, int, int]  # 5, 50 and 95 % quantiles, in pixels
    long: tuple[int, int, int]


def write_new_recipe(name: str, images: str, classes: str, *, note: Callable[[str], None]) -> tuple[Path, str]:
    """Write NAME.yaml for these images and classes, and return where it is, and its text.

    Raises:
        RecipeError: there is such a file already, or the classes cannot be read.
        ImagesError: there are no images, or none of those that were looked at can be read.
    """
    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if path.exists():
        raise RecipeError("there is such a file already", where=path, fix="give another name, or move it away")
    text = page(images, classes, measure(open_images(images, note=note)), len(load_classes(classes, note=note)))
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileNotFoundError as error:
        raise RecipeError("there is no such folder", where=path.parent, fix="make it first") from error
    return path, text


def measure(source: ImageSource) -> Images:
    """Return how many images there are, and the sizes of some of them."""
    sizes = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(MEASURED, len(source))).astype(int)).tolist():
        try:
            sizes.append(sorted(source.read(index).size))
        except UnreadableImage:
            continue
    if not sizes:
        raise ImagesError("none of the images that were looked at can be read", where=source.spec, fix="view some")
    five, half, most = np.quantile(sizes, (0.05, 0.5, 0.95), axis=0).round().astype(int).tolist()  # [short, long] each
    return Images(len(source), (five[0], half[0], most[0]), (five[1], half[1], most[1]))


def page(images: str, classes: str, seen: Images, class_count: int) -> str:
    """Return the recipe: YAML with a comment on each choice."""
    size = max((side for side in SIDES if side <= seen.short[1]), default=SIDES[0])
    epochs = int(np.clip(SEEN // seen.images, 20, 200))
    held_out = round(float(np.clip(200 / seen.images, 0.05, 0.2)), 2)
    learned = (1 - held_out) * seen.images
    batch = 2 ** int(np.clip(np.log2(learned / 16), 3, 8))  # 16 steps an epoch or more, where that leaves 8 images
    views = 16 if seen.images < FEW else 8 if seen.images < MANY else 4
    if seen.short[1] < SIDES[0]:
        why = f"half of the images are smaller than {size} px, the least that is sensible: they are enlarged"
    else:
        why = f"half of the images have {seen.short[1]} px or more, and "
        why += "more than the teacher's 224 teaches nothing" if size == SIDES[-1] else "larger would only blur them"
    return PAGE.substitute(
        images=json.dumps(images, ensure_ascii=False),
        classes=json.dumps(classes, ensure_ascii=False),
        count=f"{seen.images:,}",
        class_count=class_count,
        short=f"{seen.short[0]} to {seen.short[2]} px (9 in 10 images; the middle one {seen.short[1]})",
        long=f"{seen.long[0]} to {seen.long[2]} px",
        held_out=held_out,
        selecting=f"{round(held_out * seen.images):,}",
        views=views,
        why_views={
            16: "few images, so that many views make them last",
            8: "the usual number",
            4: "so many images that few views are enough, and keep the targets small",
        }[views],
        size=size,
        why_size=why,
        few_classes=FEW_CLASSES if class_count <= 10 else "",
        epochs=epochs,
        shown=f"{learned * epochs:,.0f}",
        batch=batch,
        steps=f"{int(learned // batch):,}",
        ema=0.999 if learned * epochs / batch < 20_000 else 0.9998,
    )
