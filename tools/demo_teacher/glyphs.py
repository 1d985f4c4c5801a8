"""Digits rendered as 8x8 pictures the way scikit-learn's real ones were made, from pen strokes and matplotlib's fonts.

The real pictures began as handwriting on paper forms: cut out, scaled to a 32x32 bitmap (about 20 wide and 32 high),
and the pixels that are on counted in blocks of 4x4, giving 8x8 values from 0 to 16. The hand is replaced here by a
random pen or a distorted font; nothing in this file has seen a real digit.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from strokes import write

Picture = NDArray[np.uint8]  # [8, 8], 0..16

# Never rendered for training: what a checkpoint is chosen on.
HELD_OUT_FONTS = ("cmss10", "cmtt10", "DejaVuSerif-Italic", "STIXGeneralBol", "DejaVuSansMono")
TRAINING_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "STIXGeneral",
    "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmmi10", "cmti10",
)  # fmt: skip
FINE = 3  # drawn at FINE times 32 pixels, then counted down to the bitmap
FONT_SIZE = 72


def render_set(count: int, *, seed: int, held_out: bool = False) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render pictures [count, 8, 8] and their digits [count]; held-out ones use other fonts and looser hands."""
    rng = np.random.default_rng([seed, int(held_out)])
    digits = np.arange(count, dtype=np.int64) % 10
    return np.stack([render(int(digit), rng, held_out=held_out) for digit in digits]), digits


def render(digit: int, rng: np.random.Generator, *, held_out: bool = False) -> Picture:
    """Render one digit: three times in four written with a pen, else printed in a distorted font."""
    if rng.random() < 0.75:
        bitmap = _written(digit, rng, looseness=1.25 if held_out else 1.0)
    else:
        bitmap = _printed(digit, rng, HELD_OUT_FONTS if held_out else TRAINING_FONTS)
    return count_blocks(bitmap)


def count_blocks(bitmap: NDArray[np.bool_]) -> Picture:
    """Count the pixels that are on in each 4x4 block of a 32x32 bitmap: [8, 8], 0..16."""
    return np.asarray(bitmap.reshape(8, 4, 8, 4).sum(axis=(1, 3)), dtype=np.uint8)


def _written(digit: int, rng: np.random.Generator, *, looseness: float) -> NDArray[np.bool_]:
    strokes = write(digit, rng, looseness=looseness)
    everything = np.concatenate(strokes)
    low, high = everything.min(axis=0), everything.max(axis=0)
    natural = (high[0] - low[0]) / max(high[1] - low[1], 1e-6)
    pen = float(np.clip(rng.normal(3.6, 0.9), 1.8, 6.5))  # in pixels of the bitmap
    width, height = _box(natural, rng)
    inner = np.array([max(width - pen, 0.0), height - pen])
    scale = inner / np.maximum(high - low, 1e-6)
    # A bare vertical line has no width worth stretching.
    scale[0] = min(scale[0], 2.2 * scale[1])
    centre = 16.0 + np.array([rng.normal(0.0, 0.7), 0.5 * (32 - height) * rng.uniform(-1, 1)])
    canvas = Image.new("L", (32 * FINE, 32 * FINE))
    draw = ImageDraw.Draw(canvas)
    radius = 0.5 * pen * FINE
    for stroke in strokes:
        points = ((stroke - 0.5 * (low + high)) * scale + centre) * FINE
        draw.line([(float(x), float(y)) for x, y in points], fill=255, width=max(1, round(2 * radius)), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return _scanned(canvas, rng)


def _printed(digit: int, rng: np.random.Generator, fonts: tuple[str, ...]) -> NDArray[np.bool_]:
    glyph = _glyph(fonts[rng.integers(len(fonts))], digit)  # [h, w] bool
    # Heavier, never lighter: a hairline thinned further would fall apart.
    image = Image.fromarray(np.pad(glyph, 24).astype(np.uint8) * 255).filter(
        ImageFilter.MaxFilter(2 * int(rng.integers(0, 4)) + 1)
    )
    mask = _crop(_warped(np.asarray(image) > 127, rng))
    width, height = _box(mask.shape[1] / mask.shape[0], rng)
    fine = (max(FINE, round(width * FINE)), max(FINE, round(height * FINE)))
    fitted = Image.fromarray(mask.astype(np.uint8) * 255).resize(fine, Image.Resampling.BOX)
    canvas = Image.new("L", (32 * FINE, 32 * FINE))
    canvas.paste(fitted, ((32 * FINE - fine[0]) // 2, (32 * FINE - fine[1]) // 2))
    return _scanned(canvas, rng)


def _box(natural: float, rng: np.random.Generator) -> tuple[float, float]:
    """Choose the box a digit is scaled into: nearly always the full height, about 20 of the 32 columns at most."""
    height = 32.0 if rng.random() < 0.85 else rng.uniform(27.0, 32.0)
    widest = float(np.clip(rng.normal(21.0, 2.0), 17.0, 28.0))
    width = natural * height
    if natural > 0.4 and rng.random() < 0.4:
        width = widest  # a form reader that stretches to its box
    return float(np.clip(width, 2.0, widest)), height


def _scanned(canvas: Image.Image, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Turn a fine drawing into a 32x32 bitmap with the ragged edges of a scan."""
    ink = np.asarray(canvas.reduce(FINE), dtype=np.float64) / 255.0  # [32, 32]
    bitmap = ink + rng.normal(0.0, 0.18, ink.shape) * (ink > 0) > rng.uniform(0.35, 0.6)
    if rng.random() < 0.1:  # the pen skips
        y, x = rng.integers(0, 30, 2)
        bitmap[y : y + 2, x : x + 3] = False
    return np.asarray(bitmap, dtype=np.bool_)


def _warped(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Shear, turn and elastically distort a mask by looking up where each pixel came from."""
    height, width = mask.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u, v = (x - width / 2) / height, (y - height / 2) / height
    angle, shear = math.radians(rng.normal(0.0, 6.0)), rng.normal(0.0, 0.15)
    source_u = math.cos(angle) * u + math.sin(angle) * v + shear * v
    source_v = -math.sin(angle) * u + math.cos(angle) * v
    for _ in range(3):
        fu, fv = rng.uniform(-2.0, 2.0, 2)
        wave = np.sin(2 * math.pi * (fu * u + fv * v) + rng.uniform(0, 2 * math.pi))
        source_u, source_v = source_u + rng.normal(0, 0.022) * wave, source_v + rng.normal(0, 0.022) * wave
    column = np.clip(np.rint(source_u * height + width / 2), 0, width - 1).astype(np.intp)
    row = np.clip(np.rint(source_v * height + height / 2), 0, height - 1).astype(np.intp)
    return np.asarray(mask[row, column], dtype=np.bool_)


@functools.cache
def _glyph(font: str, digit: int) -> NDArray[np.bool_]:
    """Rasterise a digit of one of matplotlib's fonts, cropped to its ink."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    image = Image.new("L", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(image).text(
        (FONT_SIZE // 2, FONT_SIZE // 2), str(digit), fill=255, font=ImageFont.truetype(str(path), FONT_SIZE)
    )
    return _crop(np.asarray(image) > 127)


def _crop(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return mask[:0, :0]
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
