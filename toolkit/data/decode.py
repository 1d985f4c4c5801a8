"""From the bytes of an image file, in any format and colour mode, to upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from prgkit.errors import ImagesError

# Pillow opens these, but something else would have to draw them: Ghostscript, or a handler nobody registers.
REFUSED_FORMATS = frozenset({"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"})
# Photographs that Pillow cannot read; listed as unreadable with a reason, not passed over in silence.
UNDECODABLE_SUFFIXES = frozenset({".heic", ".heif", ".hif", ".avif", ".jxl"})
UNDECODABLE_BRANDS = dict.fromkeys((b"heic", b"heix", b"hevc", b"heif", b"mif1", b"msf1"), "HEIC")
UNDECODABLE_BRANDS |= dict.fromkeys((b"avif", b"avis"), "AVIF")  # Pillow reads it where it was built with libavif
JPEG_XL = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")
# TIFF by their first bytes, of which Pillow would read a thumbnail, or the mosaic behind the colour filter.
CAMERA_RAW = frozenset(
    {".dng", ".nef", ".nrw", ".cr2", ".arw", ".sr2", ".srf", ".pef", ".srw", ".raw", ".rwl", ".3fr", ".fff", ".iiq"}
    | {".cr3", ".orf", ".rw2", ".raf", ".erf", ".mef", ".mos", ".kdc", ".dcr", ".x3f"}  # those have bytes of their own
)
# What a file is taken for by its first bytes, whatever it is called: of these no text and no data file has them.
SIGNED = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF", "PSD", "QOI")

GreyRange = tuple[float, float]  # the values of a deep grey that are black and white
SIXTEEN_BITS: GreyRange = (0.0, 65535.0)
LARGEST = 3.4e38
NO_DATA = (-9999.0, -32768.0)  # what maps write where they know nothing, besides NaN and the largest float
DEPTHS = {2.0**bits - 1: bits for bits in (8, 10, 12, 14, 16)}  # the largest value of each that cameras and files have

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


REDUCED_SIDE = 512  # pixels of the shorter side that crops are cut from; it can be up to twice as many


class UnreadableImage(ImagesError):  # noqa: N818  the name says what it is: one image, not a failure of the run
    """One image that cannot be read; ``reason`` is short and meant for people."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"{name} cannot be read: {reason}")

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        return UnreadableImage, (self.name, self.reason)  # so that it survives the trip out of a worker process


def decode(data: bytes, name: str, *, min_side: int | None = None, grey: GreyRange | None = None) -> Image.Image:
    """Return the first frame of an image file as upright RGB; transparency lies on white.

    With ``min_side``, a picture whose shorter side is twice that or more is reduced by a whole factor to no less than
    it; a JPEG is decoded at that scale in the first place, which is several times faster. Of deep greys, ``grey`` is
    black and white: see `grey_range`, which goes by the picture's own values where none is given.

    Raises:
        UnreadableImage: the bytes are no image, are damaged, or are larger than Pillow's limit allows.
    """
    try:
        with Image.open(BytesIO(data), formats=formats_for(name)) as image:
            if min_side:
                image.draft(None, (min_side, min_side))
            return reduced(upright_rgb(image, grey), min_side)
    except Exception as error:  # on damaged bytes Pillow's plugins raise nearly anything
        raise UnreadableImage(name, reason_for(error, data)) from error


def reduced(image: Image.Image, min_side: int | None) -> Image.Image:
    """Average blocks of pixels into one, so that the shorter side is at least ``min_side`` and less than twice it."""
    factor = min(image.size) // min_side if min_side else 1
    return image.reduce(factor) if factor > 1 else image


def upright_rgb(image: Image.Image, grey: GreyRange | None = None) -> Image.Image:
    """Apply the orientation a camera noted, and convert to RGB."""
    image.load()  # before the orientation is asked for: some formats keep EXIF behind the pixels
    orientation = read_orientation(image)
    rgb = to_rgb(image, grey)
    rgb.info = {}  # an orientation that was applied must not be applied again
    # ImageOps.exif_transpose would turn the original, and lose with that the format and the tags that to_rgb reads.
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def to_rgb(image: Image.Image, grey: GreyRange | None = None) -> Image.Image:
    """Convert any of Pillow's modes to RGB, scaling deep greys to 8 bits and laying transparency on white."""
    if is_deep(image):
        return grey_to_8_bits(image, grey).convert("RGB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for Adobe's inverted kind
    if image.has_transparency_data:
        over = image.convert("RGBA")
        if not hides_nothing(image, over):
            over = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
        return over.convert("RGB")
    return image.convert("RGB")


def hides_nothing(image: Image.Image, over: Image.Image) -> bool:
    """Tell whether the alpha of an RGBA ``over`` is none: 0 or 1 throughout, or a TIFF's band of another kind.

    A fourth band may be near infrared: what it is, ExtraSamples says.
    """
    largest = int(np.asarray(over.getchannel("A")).max())
    return largest <= 1 or tags_of(image).get(338, (0,))[0] not in (1, 2)


def tags_of(image: Image.Image) -> Mapping[int, Any]:
    """Return a TIFF's tags; of other formats those of a TIFF with alpha in which 0 is black."""
    return getattr(image, "tag_v2", {262: 1, 338: (2,)})


def is_deep(image: Image.Image) -> bool:
    """Tell whether an image is grey of more than 8 bits: 16, 32 or floating point."""
    return image.mode[0] in "IF"


def is_deep_grey(data: bytes | Image.Image, name: str) -> bool:
    """Tell whether an image, or an image file by its header, is grey of more than 8 bits; an unreadable one is not."""
    if not isinstance(data, bytes):
        return is_deep(data)
    if data.startswith((b"\xff\xd8\xff", b"GIF8", b"RIFF")):  # most files, and never
        return False
    if data.startswith(b"\x89PNG"):
        return data[24:26] == b"\x10\x00"  # 16 bits, grey without transparency
    try:
        with Image.open(BytesIO(data), formats=formats_for(name)) as image:
            return is_deep(image)
    except Exception:  # the same freedom of exceptions as in decode
        return False


def grey_to_8_bits(image: Image.Image, grey: GreyRange | None = None) -> Image.Image:
    """Bring 16-bit, 32-bit or floating-point grey to 8 bits; what is no number becomes black."""
    values = np.asarray(image).astype(np.float32)
    low, high = grey or grey_range(*extremes(values), whole=image.mode != "F")
    if tags_of(image).get(262) == 0:  # WhiteIsZero, which Pillow inverts in 8 bits alone
        low, high = high, low
    values = np.where(is_known(values), values, low)
    scaled = (values - low) * (255 / (high - low or 1))
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def grey_range(low: float, high: float, *, whole: bool) -> GreyRange:
    """Return which values are black and white where the least and the largest are ``low`` and ``high``.

    ``whole`` numbers are as many bits deep as hold the largest: a camera writes 12 bits into a file of 16. Fractions
    go from 0 to 1, or as far as they go. Values that fill a narrow band, or lie below 0, are stretched: a thermal
    camera's 7,000 to 9,500.
    """
    if low < 0 or high / 2 < low < high:
        return low, high
    if not whole:
        return 0.0, 1.0 if 0.25 < high <= 1 else high
    return 0.0, next((most for most in DEPTHS if high <= most), high)


def extremes(values: NDArray[np.float32]) -> tuple[float, float]:
    """Return the least and the largest value that is known, lone ones aside; 0 and 0 where none is.

    Lone are those of one pixel in a thousand that lie further from all others than these from each other: a dead pixel.
    """
    known = values[is_known(values)]
    if not known.size:
        return 0.0, 0.0
    places = [known.size // 1000, known.size - 1 - known.size // 1000]
    low, high = (float(value) for value in np.partition(known, places)[places])
    near = known[np.abs(known - (low + high) / 2) <= 1.5 * (high - low)]
    return float(near.min()), float(near.max())


def is_known(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which values are numbers, and none that stands for an unknown one."""
    known: NDArray[np.bool_] = (np.abs(values) < LARGEST) & ~np.isin(values, NO_DATA)
    return known


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
    claimed = Image.EXTENSION.get(suffix_of(name))
    return (*signed, claimed) if claimed in unsigned else signed


@lru_cache(maxsize=1)
def known_formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """Return Pillow's readable formats: with a signature (the common ones first), and without."""
    Image.init()
    readable = sorted(Image.OPEN.keys() - REFUSED_FORMATS, key=lambda name: (name not in ("JPEG", "PNG"), name))
    signed = tuple(name for name in readable if Image.OPEN[name][1] is not None)
    return signed, frozenset(readable) - frozenset(signed)


def is_picture(head: bytes, name: str) -> bool:
    """Tell by the first bytes of a file whether it is a picture, or a photograph that Pillow cannot read."""
    known_formats()  # loads Pillow's plugins
    if undecodable_kind(head):
        return True
    tests = ((kind, Image.OPEN[kind][1]) for kind in SIGNED if kind in Image.OPEN)
    kind = next((kind for kind, accept in tests if accept is not None and accept(head) is True), None)
    if kind == "BMP":  # two letters would be any text that begins with them
        return head[6:10] == bytes(4)
    return kind is not None and not (kind == "TIFF" and suffix_of(name) in CAMERA_RAW)


def suffix_of(name: str) -> str:
    """Return the lower-case suffix of a path, with its dot."""
    return os.path.splitext(name)[1].lower()


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
        if kind := undecodable_kind(data):
            return f"{kind}, which Pillow does not read: convert it to JPEG or PNG"
        return "a web page or XML, not an image" if data.lstrip()[:1] == b"<" else "not an image that Pillow knows"
    if "truncated" in message.lower():
        return "truncated"
    return f"damaged: {message[:100]}" if message else f"damaged ({type(error).__name__})"


def undecodable_kind(data: bytes) -> str | None:
    """Name the kind of a photograph that Pillow cannot read, by its first bytes."""
    if data.startswith(JPEG_XL):
        return "JPEG XL"
    return UNDECODABLE_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None


def decoded(
    fetched: bytes | Image.Image, name: str, min_side: int | None = None, grey: GreyRange | None = None
) -> Image.Image:
    """Turn what a source hands out into RGB."""
    if isinstance(fetched, bytes):
        return decode(fetched, name, min_side=min_side, grey=grey)
    return reduced(upright_rgb(fetched, grey), min_side)


def content_key(fetched: bytes | Image.Image, grey: GreyRange | None = None, *, deep: bool = False) -> str:
    """Hash the encoded bytes of a file, or the size and pixels of a picture that never had any.

    A ``deep`` grey is another picture where other values are black and white, or, as None says, its own; 16 bits leave
    no trace.
    """
    if isinstance(fetched, bytes):
        read_as = repr(grey).encode() if deep and grey != SIXTEEN_BITS else b""
        return hashlib.blake2b(fetched + read_as, digest_size=16).hexdigest()
    rgb = upright_rgb(fetched, grey)
    return hashlib.blake2b(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes(), digest_size=16).hexdigest()
