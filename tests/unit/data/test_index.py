"""Images: every kind of source, colour mode and damage, and the exact words for what a user can get wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from pydantic import TypeAdapter, ValidationError

from prgkit.config.sections import ImageSpec
from prgkit.data import index as image_module
from prgkit.data.archives import expand_braces
from prgkit.data.decode import UnreadableImage, content_key, decode, extremes, grey_range, image_suffixes
from prgkit.data.hub import DatasetSource
from prgkit.data.index import ImageIndex, index_images, nearly_black, of_one_colour, read_image_index, select_labelled
from prgkit.data.preprocessing import Preprocessing, load_image
from prgkit.data.sources import ImageSource, lies_in_files, open_images
from prgkit.errors import ImagesError
from prgkit.progress import NullProgress

PREPROCESSING = TypeAdapter(Preprocessing)
REAL = Path(os.environ.get("PRGKIT_DATA", "not given")) / "cifar100"


def labels_of(images: ImageSource, classes: Sequence[str] = ()) -> list[str | int | None]:
    return images.labels(range(len(images)), classes)


def named_labels(images: ImageSource) -> list[tuple[str, str | int | None]]:
    return [(images.name(i), label) for i, label in enumerate(labels_of(images))]


def noise(seed: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_folder(root: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def error_text(source: str | Path, labels: Path | None = None) -> str:
    with pytest.raises(ImagesError) as raised:
        index_images(open_images(ImageSpec(str(source), labels)), workers=2)
    return str(raised.value)


# --- decoding: each colour mode against the pixels it must become ---


def test_plain_rgb_is_untouched() -> None:
    assert (pixels(decode(encode(noise(1)), "a.png")) == pixels(noise(1))).all()


def test_grey_and_bilevel() -> None:
    grey = Image.fromarray(np.array([[0, 7, 128, 255]], dtype=np.uint8))
    assert pixels(decode(encode(grey), "a.png"))[0, :, 0].tolist() == [0, 7, 128, 255]
    assert pixels(decode(encode(grey.point(lambda v: 255 * (v > 100)).convert("1")), "a.png"))[0, :, 2].tolist() == [
        *(0, 0, 255, 255)
    ]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    deep = Image.fromarray(np.array([[0, 257, 40 * 257 + 100, 128 * 257, 65535]], dtype=np.uint16))
    read = pixels(decode(encode(deep, kind), f"a.{kind.lower()}"))
    assert read[0].tolist() == [[v] * 3 for v in (0, 1, 40, 128, 255)]


def test_big_endian_16_bit_tiff() -> None:
    values = np.array([[0, 300 * 100, 65535]], dtype=">u2")
    deep = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert pixels(decode(encode(deep, "TIFF"), "a.tif"))[0, :, 1].tolist() == [0, 117, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 99.6, 255.0], [0, 100, 255]),
        ([0.0, 25700.0, 65535.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
    ],
)
def test_floating_point_grey(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert pixels(decode(encode(image, "TIFF"), "a.tif"))[0, :, 0].tolist() == expected


def test_32_bit_grey() -> None:
    for values, expected in (([0, 128, 255], [0, 128, 255]), ([0, 2**20, 2**21], [0, 128, 255])):
        image = Image.fromarray(np.array([values], dtype=np.int32))
        assert pixels(decode(encode(image, "TIFF"), "a.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 255, True, (0, 255)),
        (3, 1000, True, (0, 1023)),
        (336, 3584, True, (0, 4095)),  # an industrial camera's 12 bits
        (0, 4096, True, (0, 16383)),
        (120, 60000, True, (0, 65535)),
        (0, 2**21, True, (0, 2**21)),
        (7000, 9500, True, (7000, 9500)),  # a thermal camera
        (9000, 9000, True, (0, 16383)),  # one level is no band
        (-40, 120, True, (-40, 120)),
        (0.0, 1.0, False, (0, 1)),
        (0.1, 0.9, False, (0, 1)),
        (0.0, 0.06, False, (0, 0.06)),  # 12 bits divided by 65,535
        (0.3, 12.5, False, (0, 12.5)),
        (290.0, 310.0, False, (290, 310)),
        (0.0, 0.0, False, (0, 0)),
    ],
)
def test_the_range_of_a_deep_grey(low: float, high: float, whole: bool, expected: tuple[float, float]) -> None:
    assert grey_range(low, high, whole=whole) == expected


@pytest.mark.parametrize(
    ("values", "stray", "count", "expected"),
    [
        ((0, 4000), 65535, 4, (0, 4000)),  # dead pixels in 12 bits: 4 of 4,096 are one in a thousand
        ((0, 4000), 65535, 20, (0, 65535)),  # bright objects, 0.5 %
        ((7000, 9500), 0, 1, (7000, 9500)),
        ((0, 4000), 4100, 1, (0, 4100)),  # not far from the others
        ((0, 40), -9999, 2000, (0, 40)),  # what no satellite saw
        ((0, 40), -3.4028235e38, 2000, (0, 40)),
        ((-300, 40), -32768, 2000, (-300, 40)),
    ],
)
def test_values_that_lie_apart(values: tuple[int, int], stray: float, count: int, expected: tuple[int, int]) -> None:
    picture = np.linspace(*values, 4096, dtype=np.float32)
    picture[1000 : 1000 + count] = stray  # the ends of the ramp stay
    assert extremes(picture.reshape(64, 64)) == expected


def test_no_transparency_is_not_taken_for_it() -> None:
    for alpha in (0, 1):
        clear = Image.new("RGBA", (2, 1), (9, 80, 200, alpha))
        assert pixels(decode(encode(clear), "a.png"))[0].tolist() == [[9, 80, 200]] * 2
    clear.putpixel((0, 0), (9, 80, 200, 2))
    assert pixels(decode(encode(clear), "a.png"))[0].tolist() == [[253, 254, 255], [254, 254, 255]]
    kinds = {2: [254, 254, 255], 0: [9, 80, 200]}  # ExtraSamples: transparency, or a band of something else
    data = encode(clear, "TIFF")
    entry = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    for kind, expected in kinds.items():
        read = pixels(decode(data.replace(entry, struct.pack("<HHIHH", 338, 3, 1, kind, 0)), "a.tif"))
        assert read[0, 1].tolist() == expected


def test_where_white_is_0_deep_greys_are_inverted() -> None:
    inverted = encode(Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)), "TIFF", tiffinfo={262: 0})
    assert pixels(decode(inverted, "a.tif"))[0, :, 0].tolist() == [255, 254, 0]


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    image.putdata([0, 1, 2])
    colours = [[255, 0, 0], [0, 255, 0], [10, 20, 30]]
    assert pixels(decode(encode(image), "a.png"))[0].tolist() == colours
    assert pixels(decode(encode(image, transparency=1), "a.png"))[0].tolist() == [colours[0], [255] * 3, colours[2]]
    partly = encode(image, transparency=bytes([255, 0, 127]))
    assert pixels(decode(partly, "a.png"))[0].tolist() == [colours[0], [255] * 3, [133, 138, 143]]


def test_transparency_lies_on_white() -> None:
    rgba = Image.new("RGBA", (2, 1))
    rgba.putdata([(200, 100, 0, 128), (9, 9, 9, 0)])
    assert pixels(decode(encode(rgba), "a.png"))[0].tolist() == [[227, 177, 127], [255, 255, 255]]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(0, 128), (77, 255)])
    assert pixels(decode(encode(grey), "a.png"))[0].tolist() == [[127] * 3, [77] * 3]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert pixels(decode(encode(keyed, transparency=(1, 2, 3)), "a.png"))[0].tolist() == [[255] * 3, [4, 5, 6]]
    dark = Image.fromarray(np.array([[0, 9]], dtype=np.uint8))
    assert pixels(decode(encode(dark, transparency=0), "a.png"))[0].tolist() == [[255] * 3, [9] * 3]


def test_cmyk() -> None:
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # pure cyan
    for kind, tolerance in (("TIFF", 0), ("JPEG", 2)):
        assert np.abs(pixels(decode(encode(ink, kind), "a")) - [0, 255, 255]).max() <= tolerance


def test_cmyk_jpeg_without_adobe_marker_is_not_inverted() -> None:
    jpeg = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    start = jpeg.index(b"\xff\xee")
    length = struct.unpack(">H", jpeg[start + 2 : start + 4])[0]
    plain = jpeg[:start] + jpeg[start + 2 + length :]
    # Pillow stores ink inverted, as Adobe does. Without the marker what is stored is the ink: no cyan, all of the rest.
    assert np.abs(pixels(decode(plain, "a.jpg")) - [0, 0, 0]).max() <= 2


def test_lab_and_ycbcr() -> None:
    colour = Image.new("RGB", (8, 8), (200, 60, 40))
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(colour, to_lab)
    assert lab is not None
    assert np.abs(pixels(decode(encode(lab, "TIFF"), "a.tif")) - [200, 60, 40]).max() <= 4
    assert np.abs(pixels(decode(encode(colour.convert("YCbCr"), "TIFF"), "a.tif")) - [200, 60, 40]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    upright = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8)))
    stored = {  # how a camera that notes this orientation has stored the upright picture
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    read = decode(encode(stored.convert("RGB"), kind, exif=exif, **options), "a")
    assert read.size == (48, 32)
    assert np.abs(pixels(read)[8::16, 8::16, 0] - np.arange(6).reshape(2, 3) * 40).max() <= 3
    assert "exif" not in read.info
    assert read.getexif().get(0x0112) is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_obstacle() -> None:
    data = encode(noise(1, (16, 16)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffgarbage")
    assert decode(data, "a.jpg").size == (16, 16)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(decode(data, "a"))[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jpg", b"", "the file is empty"),
        ("a.jpg", b"hello, I am text", "not an image that Pillow knows"),
        ("a.jpg", b"<!DOCTYPE html><title>404</title>", "a web page or XML, not an image"),
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(16), "HEIC, which Pillow does not read: convert it to JPEG or PNG"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that Pillow knows"),
        ("a.jpg", encode(noise(1, (64, 64)), "JPEG")[:900], "truncated"),
        ("a.bmp", encode(noise(1, (64, 64)), "BMP")[:5000], "truncated"),
    ],
)
def test_reasons(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage) as raised:
        decode(data, name)
    assert (raised.value.name, raised.value.reason) == (name, reason)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (copy.name, copy.reason, str(copy)) == (name, reason, f"{name} cannot be read: {reason}")


def test_truncated_png_is_refused_at_any_length() -> None:
    whole = encode(noise(1, (64, 64)))
    for length in range(0, len(whole) - 80, 997):
        with pytest.raises(UnreadableImage):
            decode(whole[:length], "a.png")


def test_a_bomb_is_refused_with_its_reason(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    write_folder(tmp_path, {"bomb.png": bomb, "fine.png": encode(noise(1))})
    found = index_images(open_images(str(tmp_path)), workers=1)
    assert [(one.name, one.reason) for one in found.unreadable] == [
        ("bomb.png", "decompression bomb: more pixels than Pillow's limit (178,956,970)")
    ]


def test_random_bytes_are_never_taken_for_a_picture() -> None:
    rng = random.Random(0)
    for _ in range(300):
        with pytest.raises(UnreadableImage):
            decode(rng.randbytes(rng.randrange(1, 2000)), "photo.jpg")


def test_suffixes() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".tga"} <= image_suffixes()
    assert not {".txt", ".cls", ".json", ".mp4", ".mpg", ".h5", ".eps", ".pdf"} & image_suffixes()
    assert decode(encode(noise(2), "TGA"), "a.tga").size == (8, 6)


# --- sources ---

MEMBERS = {
    "cat/b.png": encode(noise(1)),
    "cat/a.png": encode(noise(2)),
    "dog/c.JPG": encode(noise(3), "JPEG"),
    "d.bmp": encode(noise(4), "BMP"),
}


def test_folder(tmp_path: Path) -> None:
    others = {".hidden.png": b"x", ".git/e.png": b"x", "notes.txt": b"x", "cat/labels.csv": b"x"}
    images = open_images(str(write_folder(tmp_path, MEMBERS | others)))
    assert [images.name(i) for i in range(len(images))] == ["cat/a.png", "cat/b.png", "d.bmp", "dog/c.JPG"]
    assert labels_of(images) == ["cat", "cat", None, "dog"]
    assert (pixels(images.read(0)) == pixels(noise(2))).all()
    assert len(images.key(0)) == 32
    assert images.spec == str(tmp_path)


def test_a_path_can_be_opened_whatever_its_accents_are_made_of(tmp_path: Path) -> None:
    decomposed = "cafe\u0301.png"  # as a Mac writes it
    images = open_images(str(write_folder(tmp_path, {decomposed: MEMBERS["cat/a.png"], "odd\x1b.png": b"x"})))
    assert [images.name(index) for index in range(2)] == ["caf\u00e9.png", "odd\\x1b.png"]
    assert images.path(0) == str(tmp_path / decomposed)
    assert Path(images.path(0)).exists()
    assert images.path(1) == str(tmp_path / "odd\\x1b.png")  # nor does what is printed command a terminal
    assert (pixels(load_image(tmp_path / "caf\u00e9.png")) == pixels(images.read(0))).all()


def test_links_in_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", {"a.png": MEMBERS["cat/a.png"]})
    root = write_folder(tmp_path / "root", {"b.png": MEMBERS["cat/b.png"]})
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(root / "pipe.png")
    found = index_images(open_images(str(root)), workers=2)
    assert len(found) == 2
    reasons = [(one.name, one.reason) for one in found.unreadable]
    assert reasons == [("gone.png", "no such file or directory"), ("pipe.png", "not a regular file")]


def test_home_and_variables_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pictures", MEMBERS)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path))
    assert len(open_images("~/pictures")) == len(open_images("$WHERE/pictures")) == 4


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(tmp_path: Path, method: int) -> None:
    others = {"__MACOSX/cat/._a.png": b"x", "readme.txt": b"x"}
    images = open_images(str(write_zip(tmp_path / "a.zip", MEMBERS | others, method)))
    assert [images.name(i) for i in range(len(images))] == ["cat/a.png", "cat/b.png", "d.bmp", "dog/c.JPG"]
    assert labels_of(images) == ["cat", "cat", None, "dog"]
    assert (pixels(images.read(1)) == pixels(noise(1))).all()


def test_hostile_zip(tmp_path: Path) -> None:
    fine = encode(noise(1))
    members = {"../../climbs.png": fine, "/etc/absolute.png": fine, "C:/drive.png": fine, "fine.png": fine}
    path = write_zip(tmp_path / "a.zip", members)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("bzip2.png", fine)
        archive.writestr("large.png", bytes(1000), zipfile.ZIP_DEFLATED)
        archive.writestr("lies.png", bytes(100_000), zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    for name, claimed in ((b"large.png", 3 << 30), (b"lies.png", 10)):
        central = data.rindex(name) - 46
        data[central + 24 : central + 28] = struct.pack("<I", claimed)
    path.write_bytes(data)
    found = index_images(open_images(str(path)), workers=2)
    assert len(found) == 1
    assert {one.name: one.reason for one in found.unreadable} == {
        "../../climbs.png": "its path climbs out of the archive",
        "/etc/absolute.png": "its path climbs out of the archive",
        "C:/drive.png": "its path climbs out of the archive",
        "bzip2.png": "zip compression method 12; pack it again with deflate",
        "large.png": "3.0 GiB, and the limit is 1 GiB",
        "lies.png": "damaged inside the archive (its checksum differs)",
    }
    assert sorted(os.listdir(tmp_path)) == ["a.zip"]


def test_tar_shards_with_cls_labels(tmp_path: Path) -> None:
    pictures = [encode(noise(seed)) for seed in range(4)]
    write_tar(tmp_path / "s-08.tar", {"./000.png": pictures[0], "./000.cls": b"3\n", "1.seg.png": pictures[1]})
    write_tar(tmp_path / "s-09.tar", {"1.cls": b"9", "000.png": pictures[2], "000.cls": b"oak tree", "000.txt": b"no"})
    write_tar(tmp_path / "s-10.tar", {"dir/v2.x.png": pictures[3], "dir/v2.x.cls": b"5", "../up.png": pictures[3]})
    images = open_images(str(tmp_path / "s-{08..10}.tar"))
    assert named_labels(images)[:4] == [
        ("s-08.tar/000.png", "3"),
        ("s-08.tar/1.seg.png", None),
        ("s-09.tar/000.png", "oak tree"),
        ("s-10.tar/dir/v2.x.png", "5"),
    ]
    assert (pixels(images.read(2)) == pixels(noise(2))).all()
    assert [one.name for one in index_images(images, workers=1).unreadable] == ["s-10.tar/../up.png"]
    assert len(open_images(str(tmp_path / "s-08.tar"))) == 2


def test_braces() -> None:
    assert list(expand_braces("a-{008..010}.tar")) == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert list(expand_braces("{a,b}-{0..1}.tar")) == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    assert list(expand_braces("{002..000}")) == ["002", "001", "000"]  # as a shell counts, and pads
    assert list(expand_braces("{10..8}")) == ["10", "9", "8"]
    assert list(expand_braces("{9..010}")) == ["009", "010"]
    assert list(expand_braces("{4..4}")) == ["4"]
    assert next(expand_braces("x-{0..99999999999}.tar")) == "x-0.tar"


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_threads_forks_and_copies_read_the_same(tmp_path: Path, kind: str) -> None:
    members = {f"{seed:03d}.png": encode(noise(seed, (32, 32))) for seed in range(60)}
    write = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[kind]
    path = tmp_path / ("pictures" if kind == "folder" else f"pictures.{kind}")
    images = open_images(str(write(path, members)))
    order = list(range(60)) * 5
    random.Random(0).shuffle(order)

    def reads_right(index: int) -> bool:
        return bool((pixels(images.read(index)) == pixels(noise(index, (32, 32)))).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(reads_right, order))
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0 if all(map(reads_right, order)) else 1)
        children.append(child)
    assert all(map(reads_right, order))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.key(i) for i in range(60)] == [images.key(i) for i in range(60)]


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision").datasets

    class Small(datasets.VisionDataset):  # type: ignore[misc,name-defined]
        classes = ("cat", "dog")

        def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
            print("Files already downloaded")
            assert download
            self.targets = [1, 0] if train else [1]

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return noise(index).convert("L"), self.targets[index]

    monkeypatch.setattr(datasets, "CIFAR10", Small)
    monkeypatch.setenv("PRGKIT_DATA_ROOT", str(tmp_path / "data"))
    images = open_images("torchvision:CIFAR10/train")
    assert named_labels(images) == [
        ("CIFAR10/train[0]", "dog"),
        ("CIFAR10/train[1]", "cat"),
    ]
    assert (pixels(images.read(1)) == pixels(noise(1).convert("L").convert("RGB"))).all()
    assert len(index_images(images, workers=2)) == 2
    assert images.key(0) != images.key(1)
    assert len(open_images("torchvision:CIFAR10/test")) == 1
    both = open_images("torchvision:CIFAR10/test+train")
    assert named_labels(both) == [
        ("CIFAR10/test[0]", "dog"),
        ("CIFAR10/train[0]", "dog"),
        ("CIFAR10/train[1]", "cat"),
    ]
    assert both.key(2) == images.key(1)


def test_a_damaged_file_of_a_dataset_that_opens_without_reading_is_unreadable(tmp_path: Path) -> None:
    class Lazy:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.open(tmp_path / f"{index}.png"), 0

    whole = [encode(noise(seed, (64, 64))) for seed in range(3)]
    write_folder(tmp_path, {"0.png": whole[0], "1.png": whole[1][: len(whole[1]) // 2], "2.png": whole[2]})
    found = index_images(ImageSource("lazy", DatasetSource("Lazy/train", Lazy(), None), None), workers=1)
    assert len(found) == 2
    (cut,) = found.unreadable
    assert (cut.name, "truncated" in cut.reason) == ("Lazy/train[1]", True)


def test_torchvision_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("torchvision").datasets
    monkeypatch.setenv("PRGKIT_DATA_ROOT", str(tmp_path))
    assert error_text("torchvision:CIFAR1000/train").startswith(
        "torchvision has no dataset 'CIFAR1000'; did you mean 'CIFAR100'?"
    )
    assert error_text("torchvision:CIFAR100/trian").startswith("CIFAR100 has no split 'trian'; did you mean 'train'?")
    assert error_text("torchvision:CIFAR100").startswith("torchvision:CIFAR100 names no split")
    assert error_text("torchvision:EuroSAT/train") == (
        "torchvision's EuroSAT has no splits\n  fix: write torchvision:EuroSAT, all of it"
    )
    assert error_text("torchvision:ImageFolder").startswith("torchvision's ImageFolder has no splits\n  fix: give its")

    def refuse(root: Path, train: bool, download: bool) -> None:
        print("Downloading")
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(datasets, "CIFAR100", refuse)
    assert error_text("torchvision:CIFAR100/vla+train").startswith("CIFAR100 has no split 'vla'")
    assert error_text("torchvision:CIFAR100/train") == (
        "torchvision:CIFAR100/train could not be opened: <urlopen error [Errno -2] Name or service not known>\n"
        f"  where: {tmp_path}\n"
        "  fix: check the network, or put the images into a folder and give its path instead"
    )
    assert capsys.readouterr().out == ""  # stdout belongs to the result


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "oak_tree"])})
    table = {"img": [{"bytes": encode(noise(i)), "path": None} for i in range(2)], "label": [1, 0]}
    table["img"].append({"bytes": b"broken", "path": None})
    table["label"].append(0)
    dataset = datasets.Dataset.from_dict(table, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"me/pets test": dataset}[f"{name} {split}"])
    images = open_images("hf:me/pets/test")
    assert named_labels(images) == [
        ("me/pets/test[0]", "oak_tree"),
        ("me/pets/test[1]", "cat"),
    ]
    found = index_images(images, workers=2)
    assert select_labelled(found, ["Cat", "oak tree"])[1].tolist() == [1 - int(index) for index in found.indices]
    assert [one.name for one in found.unreadable] == ["me/pets/test[2]"]
    assert pickle.loads(pickle.dumps(images)).key(0) == images.key(0)
    assert error_text("hf:me/pets").startswith("hf:me/pets names no split\n  fix: write hf:me/pets/train")
    assert error_text("hf:me/pets/dev").startswith("hf:me/pets/dev could not be opened: 'me/pets dev'")


def test_demo_digits() -> None:
    pytest.importorskip("sklearn")
    images = open_images("demo:digits/test")
    assert set(labels_of(images)) == set(range(10))
    assert images.read(0).mode == "RGB"
    assert error_text("demo:digits/tset") == (
        "the digits have no split 'tset'; did you mean 'test'?\n"
        "  where: demo:digits/tset\n  fix: use demo:digits/train or demo:digits/test"
    )


# --- what is a picture, and what is passed over ---

JPEG = encode(noise(9), "JPEG")
ODD_NAMES = dict.fromkeys(("a.mpo", "b.jif", "photo.jpg?w=500", "photo.jpg_large", "bare", "c.dng", "d.hif"), JPEG)
OTHERS = {
    "e.nef": encode(noise(1), "TIFF"),
    "f.NEF": b"II*\0",
    "notes.txt": JPEG,
    "g.mp4": b"\0\0\0\x18ftypisom",
    "h": b"",
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_the_content_decides_what_is_a_picture(tmp_path: Path, kind: str) -> None:
    heic = {"i.bin": b"\0\0\0\x18ftypheic" + bytes(16), "j.jxl": b"\xff\x0a" + bytes(9), "bm.csv2": b"BMW,1\n"}
    write = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[kind]
    path = tmp_path / ("in" if kind == "folder" else f"in.{kind}")
    images = open_images(str(write(path, ODD_NAMES | OTHERS | heic)))
    names = [images.name(i).removeprefix("in.tar/") for i in range(len(images))]
    assert sorted(names) == sorted([*ODD_NAMES, "i.bin", "j.jxl"])
    found = index_images(images, workers=1)
    assert (len(found), found.duplicates) == (1, len(ODD_NAMES) - 1)
    assert sorted(one.reason.split(",")[0] for one in found.unreadable) == ["HEIC", "JPEG XL"]
    assert images.left_out == (
        "passed over 6 files that are no pictures: 2 .nef (camera raw: convert to JPEG), "
        "1 .csv2, 1 .mp4, 1 .txt, 1 without a suffix"
    )


def test_a_folder_of_pictures_says_nothing_and_looks_into_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, MEMBERS | {"cat/a.txt": b"0 1 1 2 2"})
    monkeypatch.setattr("prgkit.data.files.read_head", lambda path: pytest.fail(f"{path} was opened"))
    images = open_images(str(tmp_path))
    assert len(images) == 4
    assert images.left_out == "passed over 1 file that is no picture: 1 .txt"


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_what_systems_keep_beside_pictures_is_left_out(tmp_path: Path, kind: str) -> None:
    theirs = ["@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "cat/@eaDir/b.jpg", "$RECYCLE.BIN/c.png", "__MACOSX/d.png"]
    write = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[kind]
    path = tmp_path / ("in" if kind == "folder" else f"in.{kind}")
    images = open_images(str(write(path, MEMBERS | dict.fromkeys(theirs, JPEG))))
    assert len(images) == len(MEMBERS)
    assert images.left_out == (
        "passed over 4 in folders of thumbnails or of the system's: 2 in @eaDir, 1 in $RECYCLE.BIN, 1 in __MACOSX"
    )


def test_links_in_a_tar(tmp_path: Path) -> None:
    def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.linkname, info.type = target, kind
        return info

    hard = [link("bus/a.png", "./cat/a.png", tarfile.LNKTYPE), link("bus/b.png", "bus/a.png", tarfile.LNKTYPE)]
    soft = [link(f"dog/{n}.png", "../cat/a.png", tarfile.SYMTYPE) for n in range(2)]
    lost = link("dog/9.png", "elsewhere.png", tarfile.LNKTYPE)
    with tarfile.open(write_tar(tmp_path / "in.tar", MEMBERS), "a") as tar:
        for info in [*hard, *soft, lost]:
            tar.addfile(info)
    images = open_images(str(tmp_path / "in.tar"))
    found = {name: (label, images.key(i)) for i, (name, label) in enumerate(named_labels(images))}
    assert len(found) == len(MEMBERS) + 2
    assert found["in.tar/bus/b.png"] == ("bus", found["in.tar/cat/a.png"][1])
    assert images.left_out == "passed over 3 files that are no pictures: 3 links (pack with tar -h)"
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for info in soft:
            tar.addfile(info)
    assert "fix: it holds 2 links (pack with tar -h); images end in" in error_text(tmp_path / "links.tar")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_prgkit_wrote_is_not_learned_from(tmp_path: Path, kind: str) -> None:
    run, bundle = b'{\n  "schema": "prgkit.run/1"', b'{\n  "schema": "prgkit.bundle/1"'
    ours = {"runs/one/card.json": run, "runs/one/bundle/manifest.json": bundle, "old/manifest.json": bundle}
    ours |= {"targets/pictures/pictures.u8": b"", "targets/pictures/journal.jsonl": b""}
    golden = {f"{folder}/golden/00.png": encode(noise(7)) for folder in ("runs/one/bundle", "old")}
    theirs = {"runs/x.png": encode(noise(8)), "web/manifest.json": b'{"name": "shop"}', "web/y.png": encode(noise(6))}
    write = {"folder": write_folder, "zip": write_zip}[kind]
    path = write(tmp_path / ("in" if kind == "folder" else "in.zip"), MEMBERS | ours | golden | theirs)
    images = open_images(str(path))
    assert {images.name(i) for i in range(len(images))} == {*MEMBERS, "runs/x.png", "web/y.png"}
    assert images.left_out == (
        "passed over 1 file that is no picture: 1 .json; "
        "passed over 3 folders that prgkit wrote: old, runs/one, targets/pictures"
    )
    if kind == "folder":
        assert len(open_images(str(path / "old"))) == 1  # asked for by name
        assert "fix: it holds 1 .json, what prgkit wrote (bundle); images end in" in error_text(path / "runs" / "one")


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_compressed_shards_are_decompressed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack = {"gz": gzip, "tgz": gzip, "bz2": bz2, "xz": lzma}[suffix.removeprefix("tar.")].compress
    for number in range(2):
        plain = write_tar(tmp_path / "plain.tar", {"0.png": encode(noise(number)), "0.cls": b"4"})
        (tmp_path / f"s-{number}.{suffix}").write_bytes(pack(plain.read_bytes()))
    said: list[str] = []
    images = open_images(f"{tmp_path}/s-{{0..1}}.{suffix}", note=said.append)
    assert named_labels(images) == [("s-0.tar/0.png", "4"), ("s-1.tar/0.png", "4")]
    assert (pixels(images.read(1)) == pixels(noise(1))).all()
    cache = tmp_path / "cache" / "prgkit" / "shards"
    assert said == [f"decompressing s-{number}.{suffix} to {cache}, once" for number in range(2)]
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(before) == 2
    assert len(open_images(f"{tmp_path}/s-{{0..1}}.{suffix}", note=said.append)) == len(said) == 2
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    shard = tmp_path / f"s-0.{suffix}"
    shard.write_bytes(pack(write_tar(tmp_path / "plain.tar", {"1.png": encode(noise(5)), "2.png": b""}).read_bytes()))
    assert len(open_images(str(shard))) == 2  # another file by now
    assert len(list(cache.iterdir())) == 2
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-20] if len(whole) > 40 else whole[:10])
    assert error_text(shard).startswith(f"s-0.{suffix} is damaged: ")
    assert len(list(cache.iterdir())) == 1


def test_json_labels_of_a_webdataset(tmp_path: Path) -> None:
    facts = [
        '{"label": 3}',
        '{"class_name": "oak tree", "width": 8}',
        '{"caption": "a cat"}',
        "[3]",
        "{broken",
        '{"cls": true}',
    ]
    members = {f"{number}.png": encode(noise(number)) for number in range(6)}
    members |= {f"{number}.json": text.encode() for number, text in enumerate(facts)}
    images = open_images(str(write_tar(tmp_path / "s.tar", members | {"0.x.json": b"{}", "5.cls": b"7"})))
    assert labels_of(images) == ["3", "oak tree", None, None, None, "7"]
    assert images.left_out == ""


# --- the catalogue ---


def test_catalogue_counts_skips_and_reports_progress(tmp_path: Path) -> None:
    write_folder(
        tmp_path, MEMBERS | {"copy.png": MEMBERS["cat/a.png"], "copy2.png": MEMBERS["cat/a.png"], "x.png": b""}
    )
    write_folder(tmp_path, {f"more/{seed}.png": encode(noise(seed)) for seed in range(100, 193)})
    calls: list[int] = []
    found = index_images(open_images(str(tmp_path)), workers=2, advance=calls.append)
    assert (len(found), found.duplicates) == (97, 2)
    assert [(one.name, one.reason) for one in found.unreadable] == [("x.png", "the file is empty")]
    assert list(found.keys) == sorted(found.keys)
    assert [found.source.key(int(index)) for index in found.indices] == list(found.keys)
    assert (len(calls), sum(calls)) == (4, 100)  # in steps, each saying how many more are done
    assert (pixels(found.read(0)) == pixels(found.source.read(int(found.indices[0])))).all()


def deep(*values: int) -> bytes:
    return encode(Image.fromarray(np.array([values], dtype=np.uint16)))


def test_deep_greys_of_a_set_have_one_range(tmp_path: Path) -> None:
    members = {"a.png": deep(0, 900), "b.png": deep(100, 3987), "c.png": deep(800, 819), "d.png": deep(5, 6)[:-30]}
    found = index_images(open_images(str(write_folder(tmp_path, MEMBERS | members))), workers=2)
    assert found.source.grey == (0, 4095)
    assert str(found.deep_greys) == (
        "4 images are deep grey; the values of the 3 looked at go from 0 to 3,987, so 0 to 4,095 (12 bits) is black to white"
    )
    read = {found.source.name(int(index)): found.read(place) for place, index in enumerate(found.indices)}
    assert [pixels(read[name])[0, :, 0].tolist() for name in ("a.png", "b.png", "c.png")] == [
        *([0, 56], [6, 248], [50, 51])  # v * 255 / 4095
    ]
    assert [one.name for one in found.unreadable] == ["d.png"]
    plain = index_images(open_images(str(write_folder(tmp_path / "plain", MEMBERS))), workers=2)
    assert set(plain.keys) < set(found.keys)  # all else is known as before
    assert (plain.source.grey, plain.deep_greys) == (None, None)
    again = index_images(found.source, workers=1)
    assert again.keys == found.keys
    assert [found.source.key(int(index)) for index in found.indices] == list(found.keys)
    assert index_images(open_images(str(tmp_path)).with_grey((0, 8000)), workers=1).keys != found.keys


def test_deep_greys_of_other_images_go_by_the_range_that_was_settled_and_by_their_own_values_where_none_was(
    tmp_path: Path,
) -> None:
    spec = ImageSpec(str(write_folder(tmp_path, {"a.png": deep(0, 250), "b.png": deep(0, 4000)})))
    quiet = NullProgress()
    assert read_image_index(spec, quiet).source.grey == (0, 4095)
    settled = read_image_index(spec, quiet, grey=(0, 4095))
    own = read_image_index(spec, quiet, grey=None)
    assert (settled.source.grey, own.source.grey) == ((0, 4095), None)
    true_16_bits = read_image_index(spec, quiet, grey=(0, 65535))
    assert set(own.keys).isdisjoint({*settled.keys, *true_16_bits.keys})  # a teacher saw other pictures
    assert set(own.keys) == {own.source.key(place) for place in range(2)}
    for place in range(2):  # as a device reads them whose manifest has no range
        path = tmp_path / own.source.name(int(own.indices[place]))
        assert (pixels(own.read(place)) == pixels(load_image(path))).all()
        assert pixels(own.read(place)).max() > 240
    assert min(pixels(settled.read(place)).max() for place in range(2)) == 16  # 250 * 255 / 4095


def test_true_16_bits_stay_what_they_were(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": deep(0, 65535), "b.png": deep(257, 30 * 257)})
    found = index_images(open_images(str(tmp_path)), workers=1)
    assert found.source.grey == (0, 65535)
    assert set(found.keys) == {content_key(path.read_bytes()) for path in tmp_path.iterdir()}
    assert sorted(pixels(found.read(place))[0, 1, 0] for place in range(2)) == [30, 255]


def test_pictures_that_a_library_hands_out_are_gauged_too() -> None:
    class Source:
        def __len__(self) -> int:
            return 2

        def name(self, index: int) -> str:
            return str(index)

        def label(self, index: int) -> None:
            return None

        def fetch(self, index: int) -> Image.Image:
            return Image.fromarray(np.array([[0, (400, 1023)[index]]], dtype=np.int32))

    found = index_images(ImageSource("two", Source(), None), workers=1)
    assert sorted(pixels(found.read(place))[0, 1, 0] for place in range(2)) == [100, 255]


def test_what_is_nearly_black_is_found(tmp_path: Path) -> None:
    dark = np.full((40, 40, 3), 15, dtype=np.uint8)
    dark[7, 7] = 255  # a hot pixel
    write_folder(tmp_path, {f"{n}.png": encode(Image.fromarray(dark - np.uint8(n))) for n in range(5)})
    assert nearly_black(index_images(open_images(str(tmp_path)), workers=1))
    dark[0] = 16
    write_folder(tmp_path, {f"more{n}.png": encode(Image.fromarray(dark + np.uint8(n))) for n in range(5)})
    assert nearly_black(index_images(open_images(str(tmp_path)), workers=1))  # half are
    write_folder(tmp_path, {"more5.png": encode(Image.fromarray(dark + np.uint8(5)))})
    assert not nearly_black(index_images(open_images(str(tmp_path)), workers=1))


def test_what_is_of_one_colour_is_found(tmp_path: Path) -> None:
    members = {f"{n}.png": encode(Image.new("RGB", (8, 6), (n, 255, 0))) for n in range(2)}
    members |= {f"more{n}.png": encode(noise(n)) for n in range(2)}
    assert of_one_colour(index_images(open_images(str(write_folder(tmp_path, members))), workers=1))
    write_folder(tmp_path, {"more2.png": encode(noise(2))})
    assert not of_one_colour(index_images(open_images(str(tmp_path)), workers=1))


def test_names_places_and_containers_change_nothing(tmp_path: Path) -> None:
    """Keys and order come from content, so neither a rename nor a class folder can leak into training."""
    members = {f"{seed}.png": encode(noise(seed)) for seed in range(50)}
    moved = {f"class{int(name[:-4]) % 3}/{99 - int(name[:-4])}.png": data for name, data in members.items()}
    sources = (
        write_folder(tmp_path / "before", members),
        write_folder(tmp_path / "after", moved),
        write_zip(tmp_path / "a.zip", moved),
        write_tar(tmp_path / "a.tar", members),
    )
    catalogues = [index_images(open_images(str(source)), workers=workers) for workers, source in enumerate(sources, 1)]
    assert len(catalogues[0]) == 50
    for other in catalogues[1:]:
        assert other.keys == catalogues[0].keys
        assert all((pixels(other.read(i)) == pixels(catalogues[0].read(i))).all() for i in range(50))


def test_interrupt_stops_the_catalogue(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{seed}.png": encode(noise(seed)) for seed in range(200)})

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_images(open_images(str(tmp_path)), workers=2, advance=interrupt)


@pytest.mark.skipif(not REAL.exists(), reason="the CIFAR-100 tars are not here")
def test_real_shards() -> None:
    images = open_images(str(REAL / "test-000000.tar"))
    found = index_images(images, workers=2)
    assert len(images) == 5000
    assert not found.unreadable
    assert len(found) + found.duplicates == 5000
    names = (REAL / "classes.txt").read_text().split("\n")[:100]
    notes: list[str] = []
    kept, indices = image_module.select_labelled(found, names, note=notes.append)
    assert (len(kept), len(indices)) == (len(found) - 1, len(found) - 1)  # CIFAR-100 has one picture in two classes
    assert notes[-1].startswith("1 image has two labels, and is left out: ")
    assert set(indices.tolist()) == set(range(100))


# --- labels ---


def open_labelled(root: Path, rows: str) -> list[str | int | None]:
    (root.parent / "labels.csv").write_text(rows, encoding="utf-8-sig")
    images = open_images(ImageSpec(str(root), root.parent / "labels.csv"))
    return labels_of(images, ("x y", "x", "z"))


def test_csv_labels(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", MEMBERS)
    whole = ["x y", "x", "z", None]
    assert open_labelled(root, "cat/a.png,x y\ncat/b.png,x\nd.bmp,z\nmissing.png,q\n") == whole
    assert open_labelled(root, "file,label\na.png,x y\n./cat/b.png,x\nd.bmp,z\n") == whole
    assert open_labelled(root, 'label;id;filename\n"x y";1;cat\\a.png\nx;2;b.png\nz;3;d.bmp\n') == whole
    tar = write_tar(tmp_path / "s.tar", {"0.png": MEMBERS["cat/a.png"], "x/1.png": MEMBERS["cat/b.png"]})
    (tmp_path / "t.csv").write_text("s.tar/0.png,cat\nx/1.png,dog\n")
    images = open_images(ImageSpec(str(tar), tmp_path / "t.csv"))
    assert labels_of(images, ("cat", "dog")) == ["cat", "dog"]


def test_csv_mistakes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", MEMBERS | {"dog/a.png": MEMBERS["d.bmp"]})
    table = tmp_path / "labels.csv"

    def text(rows: str) -> str:
        table.write_text(rows)
        return error_text(root, labels=table)

    assert text("a.png,cat\n") == (
        f"'a.png' could be any of cat/a.png, dog/a.png\n  where: {table}, line 1\n  fix: write the whole path"
    )
    assert text("d.bmp,cat\nd.bmp,dog\n").startswith("'d.bmp' is labelled 'cat' and 'dog'")
    assert text("d.bmp,cat\nc.JPG\n").startswith("labels.csv has a row without a label column")
    assert text("file,label\nq.png,cat\n").startswith("no row of labels.csv names an image: it has 'q.png', the images")
    assert text("").startswith("no row of labels.csv names an image: it has nothing")
    table.unlink()
    assert error_text(root, labels=table).startswith("the labels in labels.csv cannot be read: No such file")


def labelled(tmp_path: Path, labels: list[str]) -> ImageIndex:
    members = {f"{label}/{seed}.png": encode(noise(seed)) for seed, label in enumerate(labels)}
    return index_images(open_images(str(write_folder(tmp_path, members))), workers=1)


def matched(tmp_path: Path, labels: list[str], classes: list[str]) -> dict[str, int]:
    found = labelled(tmp_path, labels)
    return {
        str(label): index
        for label, index in zip(
            found.source.labels(found.indices.tolist(), classes), select_labelled(found, classes)[1], strict=True
        )
    }


def test_labels_match_names_loosely_and_numbers(tmp_path: Path) -> None:
    assert matched(tmp_path / "a", ["Oak_Tree", "cat"], ["cat", "oak tree"]) == {"Oak_Tree": 1, "cat": 0}
    assert matched(tmp_path / "b", ["Crane", "crane"], ["crane", "Crane"]) == {"Crane": 1, "crane": 0}
    assert matched(tmp_path / "c", ["0", "2"], ["cat", "dog", "fox"]) == {"0": 0, "2": 2}
    assert matched(tmp_path / "d", ["1", "9"], ["9", "1"]) == {"1": 1, "9": 0}  # names first


def test_labels_that_match_no_class(tmp_path: Path) -> None:
    found = labelled(tmp_path / "in", ["cat", "dgo", "1", "zebra", "yak"])
    with pytest.raises(ImagesError) as raised:
        select_labelled(found, ["cat", "dog", "fox"])
    assert str(raised.value) == (
        "4 of 5 labels match no class: '1', 'dgo' (did you mean 'dog'?), 'yak' and 1 more\n"
        f"  where: {tmp_path / 'in'}\n"
        "  fix: label with the class names, or with numbers from 0 to 2 in their order"
    )


def test_labels_out_of_range_or_missing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": MEMBERS["cat/a.png"], "0.cls": b"7"})
    with pytest.raises(ImagesError, match=r"^1 of 1 labels match no class: '7'\n"):
        select_labelled(index_images(open_images(str(path)), workers=1), ["cat", "dog"])
    write_folder(tmp_path / "in", {"a.png": MEMBERS["cat/a.png"]})
    with pytest.raises(ImagesError) as raised:
        select_labelled(index_images(open_images(str(tmp_path / "in")), workers=1), ["cat", "dog"])
    assert str(raised.value) == (
        "1 of 1 images have no label: a.png\n"
        f"  where: {tmp_path / 'in'}\n"
        "  fix: put the images into folders named by class, or give a CSV of file,label rows"
    )


def test_imagenet_folders_are_in_wordnet_order(tmp_path: Path) -> None:
    from prgkit.config.prompts import load_classes
    from prgkit.data.labels import IMAGENET, class_indices, lookup

    folders = [f"n{number:08d}" for number in range(5000, 6000)]
    names = [IMAGENET.get(number, f"class {number}") for number in range(1000)]
    shuffled = random.Random(0).sample(folders, 1000)
    found = lookup(shuffled, names)
    assert [found[folder] for folder in folders] == list(range(1000))
    notes: list[str] = []
    class_indices(shuffled, names, names=shuffled, where="here", note=notes.append)
    assert notes == ["labels are WordNet ids, read in their order: n00005000 is tench, n00005999 is toilet"]
    assert lookup(folders, names[::-1]) == {}  # another order, as Caffe's: which id is which class is not known
    with pytest.raises(ImagesError, match=r"1000 of 1000 labels match no class(.|\n)*data.classes: imagenet1k"):
        class_indices(folders, names[::-1], names=folders, where="here")
    assert lookup(folders, shuffled) == {folder: shuffled.index(folder) for folder in folders}
    pytest.importorskip("open_clip")
    assert len(lookup(folders, load_classes("imagenet1k"))) == 1000


# --- what a user can get wrong, word for word ---


def test_empty_folder(tmp_path: Path) -> None:
    assert error_text(tmp_path) == (
        f"{tmp_path} holds no images\n  where: {tmp_path}\n  fix: it is empty: name another"
    )
    write_folder(tmp_path, {"a.txt": b"", "b.txt": b"", "c.mp4": b""})
    assert error_text(tmp_path) == (
        f"{tmp_path} holds no images\n  where: {tmp_path}\n"
        "  fix: it holds 2 .txt, 1 .mp4; images end in .jpg, .png, .webp, .tif"
    )
    assert error_text(write_zip(tmp_path / "a.zip", {"x.txt": b""})).startswith(f"{tmp_path}/a.zip holds no images")
    assert error_text(write_tar(tmp_path / "a.tar", {"x.txt": b""})).startswith(f"{tmp_path}/a.tar holds no images")


def test_every_image_unreadable(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": b"", "b.jpg": b"<html>", "c.png": MEMBERS["cat/a.png"][:60], "d.png": b"text"})
    assert error_text(tmp_path) == (
        f"none of the 4 images in {tmp_path} can be read (a.png: the file is empty; "
        "b.jpg: a web page or XML, not an image; c.png: truncated)\n"
        f"  where: {tmp_path}\n"
        "  fix: open one of them in an image viewer; copy or download the images again if they are damaged"
    )


def test_missing_paths(tmp_path: Path) -> None:
    kinds = (
        "give a folder, a .zip, tar shards such as shards-{000..004}.tar, torchvision:NAME/split or hf:owner/name/split"
    )
    write_folder(tmp_path / "photos", MEMBERS)
    assert error_text(tmp_path / "phtos") == (
        f"{tmp_path}/phtos does not exist; did you mean 'photos'?\n  where: {tmp_path}\n  fix: {kinds}"
    )
    assert error_text(tmp_path / "phtos" / "cat").startswith(
        f"{tmp_path}/phtos/cat does not exist; did you mean 'photos'?"
    )
    assert error_text("$PRGKIT_NOT_SET/photos").startswith(
        "$PRGKIT_NOT_SET/photos does not exist; $PRGKIT_NOT_SET is not set"
    )
    write_tar(tmp_path / "s-0.tar", MEMBERS)
    assert error_text(tmp_path / "s-{0..2}.tar").startswith(
        f"s-1.tar of {tmp_path}/s-{{0..2}}.tar does not exist; did you mean 's-0.tar'?"
    )


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path, MEMBERS))
    monkeypatch.setenv("PRGKIT_EMPTY", "")
    for empty in ("", "$PRGKIT_EMPTY"):
        assert error_text(empty).startswith(f"the images have no name: {empty!r}\n")


@pytest.mark.parametrize("name", ["demo", "hf", "torchvision"])
def test_a_folder_may_be_called_as_a_library_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / name, MEMBERS)
    images = open_images(name)
    assert (len(images), lies_in_files(name)) == (len(MEMBERS), True)
    assert not lies_in_files(f"{name}:digits/train")
    assert Path(images.path(0)).exists()


def test_what_is_no_source(tmp_path: Path) -> None:
    write_folder(tmp_path, MEMBERS | {"a.txt": b"", "a.zip": b"no zip", "a.tar": b"no tar" * 200, "a.tar.zst": b""})
    assert error_text(tmp_path / "d.bmp").startswith(f"{tmp_path}/d.bmp is a single image")
    assert error_text(tmp_path / "a.txt").startswith(f"{tmp_path}/a.txt is neither a folder nor an archive")
    assert error_text(tmp_path / "a.tar.zst").endswith("fix: decompress it to a plain .tar")
    assert error_text(tmp_path / "a.zip").startswith(f"{tmp_path}/a.zip is damaged: File is not a zip file")
    assert error_text(tmp_path / "a.tar").startswith("a.tar is not a whole tar file: ")
    whole = write_tar(tmp_path / "b.tar", {"0.png": bytes(5000), "1.png": bytes(5000)}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:8000])
    assert error_text(tmp_path / "b.tar").startswith("b.tar is not a whole tar file: unexpected end of data")


def test_load_image(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": MEMBERS["cat/a.png"], "b.png": b"text"})
    assert (pixels(load_image(tmp_path / "a.png")) == pixels(load_image(MEMBERS["cat/a.png"]))).all()
    with pytest.raises(ImagesError, match=r"c\.png does not exist; did you mean '[ab]\.png'\?"):
        load_image(str(tmp_path / "c.png"))
    with pytest.raises(UnreadableImage, match=r"b\.png cannot be read: not an image that Pillow knows$"):
        load_image(tmp_path / "b.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        load_image(tmp_path)


# --- preprocessing ---


def preprocessing(
    image_size: int | tuple[int, int] = 24, crop: float = 1.0, interpolation: str = "bicubic"
) -> Preprocessing:
    return Preprocessing(image_size, crop, interpolation, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(("image_size", "crop"), [(24, 1.0), (24, 0.875), (25, 0.95), (64, 0.9)])
def test_prepare_equals_timm_and_torchvision(interpolation: str, image_size: int, crop: float) -> None:
    create_transform = pytest.importorskip("timm.data").create_transform
    expected = create_transform(image_size, interpolation=interpolation, crop_pct=crop, mean=(0,) * 3, std=(1,) * 3)
    for size in ((31, 57), (57, 31), (24, 24), (25, 24), (7, 500), (301, 200), (64, 65), (1, 1)):
        image = noise(1, size)
        # ToTensor divides by 255 and puts channels first.
        reference = (expected(image) * 255).round().byte().permute(1, 2, 0).numpy()
        prepared = preprocessing(image_size, crop, interpolation).prepare(image)
        assert prepared.shape == (image_size, image_size, 3)
        assert prepared.dtype == np.uint8
        assert prepared.flags.writeable
        assert (prepared == reference).all(), size


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 1001)])
def test_of_a_thin_picture_the_middle_is_resized(
    size: tuple[int, int], squash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, (width, height) = noise(1, size), size
    largest: list[int] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, to: tuple[int, int], *options: Any) -> Image.Image:
        largest.append(to[0] * max(to[1], self.height))
        return resize(self, to, *options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    settings = replace(preprocessing(224), squash=squash)
    prepared = settings.prepare(image)
    assert largest[0] <= 101 * 224 * 224  # pixels; it would be 3 billion
    longest = 100 * min(size)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    cut = image.crop((left, top, width - left, height - top))
    assert max(cut.size) - longest in (0, 1)
    assert (prepared == settings.prepare(cut)).all()


def test_prepare_equals_open_clip() -> None:
    open_clip_transform = pytest.importorskip("open_clip.transform")
    expected = open_clip_transform.image_transform(24, is_train=False, mean=(0,) * 3, std=(1,) * 3)
    for size in ((31, 57), (57, 31), (24, 24), (301, 200)):
        reference = (expected(noise(1, size)) * 255).round().byte().permute(1, 2, 0).numpy()
        assert (preprocessing().prepare(noise(1, size)) == reference).all()


TALL = [(48, 24), (24, 48), (128, 64), (40, 39), (25, 60)]
SHAPES = [(31, 57), (57, 31), (24, 48), (48, 24), (47, 24), (7, 200), (301, 200), (64, 128), (1, 1), (90, 33)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.95])
@pytest.mark.parametrize("image_size", TALL)
def test_what_is_not_square_is_prepared_as_timm_does(
    interpolation: str, image_size: tuple[int, int], crop: float
) -> None:
    create_transform = pytest.importorskip("timm.data").create_transform
    expected = create_transform(
        (3, *image_size), interpolation=interpolation, crop_pct=crop, mean=(0,) * 3, std=(1,) * 3
    )
    for shape in SHAPES:
        reference = (expected(noise(1, shape)) * 255).round().byte().permute(1, 2, 0).numpy()
        prepared = preprocessing(image_size, crop, interpolation).prepare(noise(1, shape))
        assert prepared.shape == (*image_size, 3)
        assert (prepared == reference).all(), shape


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("image_size", TALL)
def test_what_is_not_square_is_prepared_as_open_clip_does(mode: str, image_size: tuple[int, int]) -> None:
    open_clip_transform = pytest.importorskip("open_clip.transform")
    expected = open_clip_transform.image_transform(
        image_size, is_train=False, mean=(0,) * 3, std=(1,) * 3, resize_mode=mode
    )
    made = Preprocessing(image_size, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3, mode == "squash")
    for shape in SHAPES:
        reference = (expected(noise(1, shape)) * 255).round().byte().permute(1, 2, 0).numpy()
        assert (made.prepare(noise(1, shape)) == reference).all(), shape


def test_a_size_that_is_not_square_travels_as_json() -> None:
    made = preprocessing((128, 64))
    assert json.loads(json.dumps(made.to_dict()))["image_size"] == [128, 64]
    assert PREPROCESSING.validate_python(json.loads(json.dumps(made.to_dict()))) == made
    assert PREPROCESSING.validate_python({**made.to_dict(), "image_size": [64, 64]}) == preprocessing(64)
    with pytest.raises(ImagesError, match="cannot prepare images with image_size"):
        preprocessing((128, 0))


def test_preprocessing_travels_as_json() -> None:
    made = preprocessing(64, 0.95, "bilinear")
    assert PREPROCESSING.validate_python(made.to_dict()) == made
    assert made.to_dict()["mean"] == [0.5, 0.5, 0.5]
    assert made.to_dict()["grey_range"] is None
    ranged = replace(made, grey_range=(0.0, 4095.0))
    assert PREPROCESSING.validate_python(json.loads(json.dumps(ranged.to_dict()))) == ranged
    with pytest.raises(ValidationError, match=r"crop\n  Field required"):
        PREPROCESSING.validate_python({"image_size": 3})
    with pytest.raises(ImagesError, match=r"cannot prepare images with image_size 24, crop 1\.0, 'lanczos'"):
        preprocessing(interpolation="lanczos")


def test_a_name_that_begins_like_a_home_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 3)).save("~$x.png")
    assert load_image("~$x.png").size == (4, 3)
