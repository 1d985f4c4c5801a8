"""From the bytes of an image file, in any format and colour mode, to upright 8-bit RGB."""

from __future__ import annotations

import os
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from prgkit.errors import ImagesError

# Pillow opens these, but something else would have to draw them: Ghostscript, or a handler nobody registers.
REFUSED_FORMATS = frozenset({"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"})
# Photographs that Pillow cannot read; listed as unreadable with a reason, not passed over in silence.
UNDECODABLE_SUFFIXES = frozenset({".heic", ".heif"})

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ImagesError):  # noqa: N818  the name says what it is: one image, not a failure of the run
    """One image that cannot be read; ``reason`` is short and meant for people."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"{name} cannot be read: {reason}")

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        return UnreadableImage, (self.name, self.reason)  # so that it survives the trip out of a worker process


def decode(data: bytes, name: str, *, enough: int | None = None) -> Image.Image:
    """Return the first frame of an image file as upright RGB; transparency lies on white.

    With ``enough``, a picture whose shorter side is twice that or more is reduced by a whole factor to no less than
    it; a JPEG is decoded at that scale in the first place, which is several times faster.

    Raises:
        UnreadableImage: the bytes are no image, are damaged, or are larger than Pillow's limit allows.
    """
    try:
        with Image.open(BytesIO(data), formats=formats_for(name)) as image:
            if enough:
                image.draft(None, (enough, enough))
            return reduced(upright_rgb(image), enough)
    except Exception as error:  # on damaged bytes Pillow's plugins raise nearly anything
        raise UnreadableImage(name, reason_for(error, data)) from error


def reduced(image: Image.Image, enough: int | None) -> Image.Image:
    """Average blocks of pixels into one, so that the shorter side is no less than ``enough`` and less than twice it."""
    factor = min(image.size) // enough if enough else 1
    return image.reduce(factor) if factor > 1 else image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Apply the orientation a camera noted, and convert to RGB."""
    image.load()  # before the orientation is asked for: some formats keep EXIF behind the pixels
    orientation = read_orientation(image)
    rgb = to_rgb(image)
    rgb.info = {}  # an orientation that was applied must not be applied again
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB, scaling deep greys to 8 bits and laying transparency on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return grey_to_8_bits(image).convert("RGB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for Adobe's inverted kind
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Bring 16-bit, 32-bit and floating-point grey to 8 bits by the range its format or its values speak for."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # mode I of these two is 16 bits deep
        values /= 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        values *= 255
    elif low >= 0 and high <= 65535:
        values /= 257 if high > 255 else 1
    else:  # no convention fits: stretch what is there
        values = (values - low) * (255 / (high - low)) if high > low else values * 0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def read_orientation(image: Image.Image) -> int | None:
    """Return the EXIF (or XMP) orientation; a damaged EXIF block does not make a picture unreadable."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the same freedom of exceptions as in decode
        return None
    return value if isinstance(value, int) else None


def formats_for(name: str) -> tuple[str, ...]:
    """Name the formats to try: those with a signature, and the one without that the suffix speaks for (TGA, say).

    Formats without a signature take random bytes for a picture.
    """
    signed, unsigned = known_formats()
    claimed = Image.EXTENSION.get(os.path.splitext(name)[1].lower())
    return (*signed, claimed) if claimed in unsigned else signed


@lru_cache(maxsize=1)
def known_formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """Return Pillow's readable formats: with a signature (the common ones first), and without."""
    Image.init()
    readable = sorted(Image.OPEN.keys() - REFUSED_FORMATS, key=lambda name: (name not in ("JPEG", "PNG"), name))
    signed = tuple(name for name in readable if Image.OPEN[name][1] is not None)
    return signed, frozenset(readable) - frozenset(signed)


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes, with their dots, of the files taken for images."""
    signed, unsigned = known_formats()
    readable = unsigned.union(signed)
    return UNDECODABLE_SUFFIXES.union(suffix for suffix, name in Image.EXTENSION.items() if name in readable)


def reason_for(error: Exception, data: bytes) -> str:
    """Say in a few words why an image could not be decoded."""
    message = (str(error).splitlines() or [""])[0]
    if not data:
        return "the file is empty"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"decompression bomb: more pixels than Pillow's limit ({2 * (Image.MAX_IMAGE_PIXELS or 0):,})"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, UnidentifiedImageError):
        if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"heif", b"mif1", b"msf1"):
            return "HEIC, which Pillow does not read: convert it to JPEG or PNG"
        return "a web page or XML, not an image" if data.lstrip()[:1] == b"<" else "not an image that Pillow knows"
    if "truncated" in message.lower():
        return "truncated"
    return f"damaged: {message[:100]}" if message else f"damaged ({type(error).__name__})"
