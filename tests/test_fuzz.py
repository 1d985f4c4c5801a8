"""Whatever is thrown at the readers of recipes and images, what comes out is a result or a mistake told in words."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prgkit.errors import PrgkitError
from prgkit.images import catalogue, load_image, open_images
from prgkit.page import parse
from prgkit.prompts import load_classes
from prgkit.recipe import Recipe, load_recipe, shipped_recipes, validate
from prgkit.run import RUNS, run_name
from prgkit.table import read_ways

QUICK, SOAK = 150, 1500  # inputs to each of the eight tests below

PAGES = [path.read_text() for path in shipped_recipes().values()]
KEYS = sorted({word for page in PAGES for word in page.replace(":", " ").split() if word.isidentifier()})
HOSTILE = [
    "&a [*a]", "*a", "!!python/object/apply:os.system [ls]", "!!binary x", "!!set {a, b}", "!!int ''", "!!timestamp x",
    "2020-13-45", "2020-01-01", "190:20:30", "1e999", "-.inf", ".nan", "9" * 5000, "0b" + "1" * 9000, "0x", "0o9", "1__0",
    "'\\0'", '"\\0"', '"\\ud800"', '"\\x00a"', "\ufeff", "\x00", "\x85", "\u2028", "~", "<<: a", "? [a]", "? {a: b}", "- - -",
    "{" * 400, "[" * 5000, "%YAML 9.9\n---", "---\n---", "...", "'" * 99, "|", ">", "%s%n", "a" * 4000, "../" * 50, "/dev/zero",
    "/etc/passwd", "/proc/self/mem", "\\", "a\\b", "NUL", "~root", "$HOME", "${", "{0..99999999999}.tar", "x-{000..9}.tar",
]  # fmt: skip


def each(test: Callable[..., None]) -> list[Any]:
    """Return the sizes of a test: the few inputs of `make test`, and the many of `make soak`."""
    return [pytest.param(QUICK, id="quick"), pytest.param(SOAK, id="soak", marks=pytest.mark.soak)]


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what a recipe may ask for, so that no input waits for it."""
    pytest.importorskip("torch")
    load_recipe("imagenet1k")


def told(error: PrgkitError) -> None:
    """A mistake is told in words, and not at the length of its input."""
    assert 0 < len(str(error)) < 100_000


def fuzz(check: Callable[[Any], None], inputs: st.SearchStrategy[Any], count: int) -> None:
    """Throw ``count`` inputs at ``check``: the same ones each time, none of which may take long."""
    run = settings(
        max_examples=count,
        deadline=5000,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(inputs)(lambda value: check(value)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()


sizes = pytest.mark.parametrize("count", each(fuzz))


# Recipes.


def read_recipe(text: str) -> None:
    """Take a page as far as `prgkit distill --dry-run` would before it looks for images."""
    try:
        recipe = validate(parse(text, where="page"), where="page").resolved()
    except PrgkitError as error:
        told(error)
    else:
        assert isinstance(recipe, Recipe)
        assert is_inside_runs(run_name(recipe.data.images))


def is_inside_runs(name: str) -> bool:
    """Tell whether a run's folder is one below runs/, whatever it was named after."""
    return (RUNS / name).resolve().parent == RUNS.resolve() and 0 < len(name.encode()) <= 255


@st.composite
def mutated_pages(draw: st.DrawFn) -> str:
    """A shipped recipe with a few characters, lines or values replaced by something that should not be there."""
    text = draw(st.sampled_from(PAGES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 1, 3, 20])))
        text = text[:start] + draw(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=6))) + text[end:]
    return text


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(HOSTILE), st.dates()
)
structures = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5), scalars), inner, max_size=4),
    ),
    max_leaves=12,
)


@sizes
def test_recipe_bytes(tmp_path: Path, count: int) -> None:
    page = tmp_path / "page.yaml"

    def check(content: bytes) -> None:
        page.write_bytes(content)
        try:
            load_recipe(str(page))
        except PrgkitError as error:
            told(error)

    fuzz(
        check,
        st.one_of(st.binary(max_size=200), mutated_pages().map(lambda page: page.encode("utf-8", "replace"))),
        count,
    )


@sizes
def test_recipe_structures(count: int) -> None:
    def check(page: Any) -> None:
        read_recipe(yaml.dump(page, allow_unicode=True))  # tagged where there is no plain form
        if isinstance(page, dict):
            sections = dict.fromkeys(Recipe.model_fields, page)
            read_recipe(yaml.dump({**sections, "student": {"model": "repvit_m0_9"}, **page}))

    fuzz(check, structures, count)


@sizes
def test_recipe_overrides(count: int) -> None:
    keys = [
        f"{section}.{key}" for section in Recipe.model_fields for key in ("", "name", "images", "classes", "epochs")
    ]

    def check(override: str) -> None:
        try:
            load_recipe("demo", overrides=[override])
        except PrgkitError as error:
            told(error)

    values = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20), st.integers().map(str))
    given_keys = st.one_of(st.sampled_from([*keys, *Recipe.model_fields]), st.text(max_size=10))
    fuzz(check, st.builds("{}={}".format, given_keys, values), count)


@sizes
def test_run_names(count: int) -> None:
    def check(source: str) -> None:
        try:
            name = run_name(source)
        except PrgkitError:
            return
        assert is_inside_runs(name), (source, name)

    parts = st.lists(
        st.one_of(st.sampled_from(["..", ".", "/", "~", "hf:", "torchvision:", "\0", "con", *HOSTILE]), st.text())
    )
    fuzz(check, parts.map("".join), count)


# Images.


def seeds() -> dict[str, bytes]:
    """Return small real images in every common format and mode."""
    generator = np.random.default_rng(0)
    rgb = Image.fromarray(generator.integers(0, 256, (12, 17, 3), dtype=np.uint8))
    found = {}
    for suffix, picture, options in [
        ("png", rgb, {}),
        ("png", rgb.convert("P"), {"transparency": 3}),
        ("png", rgb.convert("LA"), {}),
        ("jpg", rgb, {"exif": exif()}),
        ("jpg", rgb.convert("CMYK"), {"progressive": True}),
        ("gif", rgb.convert("P"), {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("webp", rgb, {"lossless": True}),
        ("tif", rgb, {"compression": "tiff_lzw"}),
        ("tif", Image.fromarray(generator.integers(0, 60000, (9, 9), dtype=np.uint16)), {}),
        ("bmp", rgb, {}),
        ("ico", rgb, {}),
    ]:
        buffer = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        picture.save(buffer, kind, **options)
        found[f"{len(found)}.{suffix}"] = buffer.getvalue()
    return found


def exif() -> Any:
    found = Image.Exif()
    found[0x0112] = 6
    return found


SEEDS = seeds()


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Real bytes, damaged: flipped, cut, doubled, overwritten with extreme numbers."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.integers(0, 4))
        if how == 0 and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif how == 1:
            del data[start : start + draw(st.integers(1, 40))]
        elif how == 2:
            data[start : start + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1"])
            )
        elif how == 3:
            data[start:start] = draw(st.binary(max_size=12))
        else:
            data[start:start] = data[start : start + draw(st.integers(1, 60))]
    return bytes(data)


@sizes
def test_image_bytes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # a smaller bomb is as good, and the test is sooner done

    def check(data: bytes) -> None:
        try:
            image = load_image(data)
        except PrgkitError as error:
            told(error)
            return
        assert image.mode == "RGB"
        assert image.width * image.height <= 2 << 20

    fuzz(check, st.one_of(mutated(list(SEEDS.values())), st.binary(max_size=100)), count)


def packed_zip() -> list[bytes]:
    """Return zip archives of the seeds, some with members that climb, lie and nest."""
    found = []
    for names in (
        list(SEEDS),
        ["../up.png", "/root.png", "C:\\x.png", "a/../../b.png"],
        ["\ud7ff.png", "a\tb.png", ".hidden.png"],
    ):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in zip(names, SEEDS.values(), strict=False):
                archive.writestr(name, data)
        found.append(buffer.getvalue())
    return found


def packed_tar() -> list[bytes]:
    """Return tar archives of the seeds in three dialects, with links and devices among the members."""
    found = []
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=dialect) as archive:
            for name, data in [*SEEDS.items(), ("../up.png", b"x"), ("long" * 30 + "/é.png", b"y"), ("0.cls", b"3")]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
                member = tarfile.TarInfo(f"special{kind.decode()}.png")
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
        found.append(buffer.getvalue())
    return found


@sizes
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives(tmp_path: Path, count: int, kind: str) -> None:
    archive = tmp_path / f"images.{kind}"

    def check(data: bytes) -> None:
        archive.write_bytes(data)
        try:
            images = open_images(str(archive))
            for index in range(len(images)):
                str(images.name(index)).encode()
                images.label(index)
            read = catalogue(images, workers=1)
        except PrgkitError as error:
            told(error)
            return
        for file in read.unreadable:
            assert file.reason
        assert [path.name for path in tmp_path.iterdir()] == [archive.name]  # nothing was extracted

    fuzz(check, mutated(packed_zip() if kind == "zip" else packed_tar()), count)
    assert not (tmp_path.parent / "up.png").exists()


# Files of text that a recipe names.


@sizes
def test_class_lists_and_label_tables(tmp_path: Path, count: int) -> None:
    names, table = tmp_path / "names.txt", tmp_path / "labels.csv"

    def check(content: bytes) -> None:
        for read, path in (
            (load_classes, str(names)),
            (lambda path: [way() for way in read_ways(path)[1]], table),
        ):
            Path(path).write_bytes(content)
            try:
                read(path)  # type: ignore[operator]
            except PrgkitError as error:
                told(error)

    texts = st.lists(
        st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8), st.sampled_from([",", "\n", '"', ";", "\t"]))
    )
    fuzz(
        check,
        st.one_of(st.binary(max_size=200), texts.map(lambda parts: "".join(parts).encode("utf-8", "replace"))),
        count,
    )
