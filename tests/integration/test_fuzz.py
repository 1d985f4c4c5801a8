"""Whatever is thrown at the readers of recipes and images, what comes out is a result or a mistake told in words."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prgkit.config.prompts import load_classes
from prgkit.config.recipe import Recipe, load_recipe, shipped_recipes, validate
from prgkit.config.sections import ImageSpec
from prgkit.config.yaml_io import parse_yaml
from prgkit.data.files import printable
from prgkit.data.index import index_images
from prgkit.data.label_table import read_label_table, read_ways
from prgkit.data.labels import class_indices
from prgkit.data.preprocessing import load_image
from prgkit.data.sources import ImageSource, open_images
from prgkit.errors import ImagesError, PrgkitError, RecipeError
from prgkit.storage.find import RUNS, run_name

QUICK, SOAK = 150, 1500  # inputs to each of the ten tests below

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
        recipe = validate(parse_yaml(text, where="page"), where="page").resolved()
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
                images.labels([index], ())
            read = index_images(images, workers=1)
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


# Labels and class names, against a truth that knows them: read as it says, or refused; never as something else.

CLASS_POOL = (
    "apple", "bus", "train", "fire engine", "Löwe", "crème brûlée", "tench, Tinca tinca", "7 up", "2 wheeler", "4 wheeler",
    "channel 1", "dr.", "707-320", "rock 'n' roll", 'the "Beagle"', "image of a cat", "label maker", "one", "apse/indoor", "日本",
)  # fmt: skip
FILE_POOL = (
    "a", "b", "x 1", "IMG_0001", "1", "2", "3", "10", "é", "train", "apple", "a,b", "a;b", "it's", "#7", "v1.2", "0", "A", "日本", "tab",
)  # fmt: skip
FILE_TITLES = ("file", "Filename", "image_path", "ID", "image id", "Datei", "")
LABEL_TITLES = ("label", "Labels", "class", "Breed", "target", "what", "Klasse")


class Named:
    """A source of which only the names of its images are asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return printable(self.names[index])

    def label(self, index: int) -> None:
        return None

    def fetch(self, index: int) -> bytes:
        raise NotImplementedError


@dataclass(frozen=True)
class Case:
    """A table, and what its writer meant."""

    text: bytes
    classes: list[str]
    truth: dict[str, int]


def forms(text: str, form: str) -> str:
    return unicodedata.normalize(form, text)


@st.composite
def label_tables(draw: st.DrawFn) -> Case:
    """Write labels of images as somebody might, and change the writing afterwards as somebody else might."""
    classes = draw(st.lists(st.sampled_from(CLASS_POOL), min_size=2, max_size=6, unique=True))
    folders = draw(st.sampled_from([("",), ("", "deep/"), ("cat/", "dog/"), ("train/", "test/")]))
    stems = draw(st.lists(st.sampled_from(FILE_POOL), min_size=1, max_size=8, unique=True))
    suffixes = draw(st.sampled_from([(".png",), (".png", ".jpg"), (".JPG",)]))
    files = sorted({f"{draw(st.sampled_from(folders))}{stem}{draw(st.sampled_from(suffixes))}" for stem in stems})
    truth = {file: draw(st.integers(0, len(classes) - 1)) for file in files}

    path = draw(
        st.sampled_from(
            ["{}", "./{}", "photos/{}", "/data/photos/{}", "C:\\data\\photos\\{}", "old/{}", "base", "stem"]
        )
    )
    spell: dict[str, Callable[[str], str]] = {
        "base": lambda file: file.rpartition("/")[2],
        "stem": lambda file: file.rpartition(".")[0],
    }
    slashes = "\\" if "\\" in path else "/"
    written = {file: spell.get(path, lambda file: path.format(file.replace("/", slashes)))(file) for file in files}
    style = draw(st.sampled_from(["name", "under_score", "upper", "0", "0.0", "1", "1.0", "one-hot"]))
    titles, cells = {"file": draw(st.sampled_from(FILE_TITLES))}, {"file": list(written.values())}
    if style == "one-hot":
        for number in draw(st.permutations(range(len(classes)))):
            titles[f"hot{number}"] = classes[number]
            cells[f"hot{number}"] = [str(int(number == truth[file])) for file in files]
    else:
        first, point = int(style[0] == "1"), ".0" if style.endswith(".0") else ""
        spelled = {
            "name": lambda index: classes[index],
            "under_score": lambda index: classes[index].replace(" ", "_"),
            "upper": lambda index: classes[index].upper(),
        }.get(style, lambda index: f"{index + first}{point}")
        titles["label"] = draw(st.sampled_from(LABEL_TITLES))
        cells["label"] = [spelled(truth[file]) for file in files]
    noise = {
        "width": st.integers(0, 900).map(str),
        "fold": st.integers(0, 3).map(str),
        "guess": st.sampled_from(classes),
        "flag": st.sampled_from(["0", "1"]),
        "near": st.sampled_from(list(written.values())),
        "split": st.sampled_from(["train", "test"]),
        "remark": st.sampled_from(["", "blurred", "apple?", "a, b"]),
        "score": st.sampled_from(["0.5", "0.25", "1.0"]),
    }
    # A header of its own over the labels, or none, leaves names the likelier labels beside numbers.
    with_header = draw(st.booleans()) or style == "one-hot"
    if not (with_header and titles.get("label", "label") in LABEL_TITLES[:5]):
        del noise["guess"]
        noise["split"] = st.sampled_from(["training", "test"])  # train is a class
    for title in draw(st.lists(st.sampled_from(sorted(noise)), max_size=2, unique=True)):
        titles[title], cells[title] = title, [draw(noise[title]) for _ in files]
    order = draw(st.permutations(sorted(titles)))
    lines = [[cells[column][row] for column in order] for row in range(len(files))]
    lines = draw(st.permutations(lines))
    if draw(st.booleans()):  # of images that are not here
        lines = [*lines, ["elsewhere.png" if column == "file" else cells[column][0] for column in order]]
    header = [[titles[column] for column in order]] if with_header else []
    lines = draw(changed([*header, *lines], len(header)))

    buffer = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    delimiter = draw(st.sampled_from([",", ";", "\t", "|"]))
    csv.writer(
        buffer, delimiter=delimiter, quoting=quoting, lineterminator=draw(st.sampled_from(["\n", "\r\n"]))
    ).writerows(lines)
    text = draw(st.sampled_from(["", "", "# of May\n", f"sep={delimiter}\n"])) + buffer.getvalue()
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    form = st.sampled_from(["NFC", "NFD"])
    return Case(
        text=forms(text, draw(form)).encode(encoding),
        classes=[forms(name, draw(form)) for name in classes],
        truth={forms(file, draw(form)): index for file, index in truth.items()},
    )


@st.composite
def changed(draw: st.DrawFn, lines: list[list[str]], start: int) -> list[list[str]]:
    """Make a mistake that leaves no other truth: a row lost or cut, a word misspelt, columns out of order in the header."""
    lines = [list(line) for line in lines]
    how, place = (
        draw(st.sampled_from(["", "", "", "lost", "cut", "misspelt", "header"])),
        draw(st.integers(start, len(lines) - 1)),
    )
    column = draw(st.integers(0, len(lines[0]) - 1))
    if how == "lost":
        del lines[place]
    elif how == "cut":
        lines[place] = lines[place][: max(1, column)]
    elif how == "misspelt":
        lines[place][column] += "q"
    elif how == "header" and start and len(lines[0]) == 2:
        lines[0] = draw(st.permutations(lines[0]))
    return lines or [[""]]


@sizes
def test_label_tables_are_read_as_meant_or_refused(tmp_path: Path, count: int) -> None:
    table = tmp_path / "labels.csv"
    read = 0

    def check(case: Case) -> None:
        nonlocal read
        table.write_bytes(case.text)
        classes = load_classes(case.classes)
        source, places = Named(list(case.truth)), range(len(case.truth))
        try:
            images = ImageSource("photos", source, read_label_table(table, ImageSpec("photos", labels=table), source))
            labels = images.labels(places, classes)
            names = [images.name(place) for place in places]
            found = class_indices(labels, classes, names=names, where="photos").tolist()
        except ImagesError as error:
            told(error)
            return
        read += 1
        assert found == list(case.truth.values()), case

    fuzz(check, label_tables(), count)
    assert read > count / 5


@st.composite
def class_files(draw: st.DrawFn) -> tuple[str, bytes, list[str]]:
    """Write class names in one of the forms of other tools: the file's name, its content, and the names."""
    names = draw(
        st.lists(st.sampled_from(CLASS_POOL), min_size=1, max_size=12, unique=True).filter(
            lambda them: "one" not in them
        )
    )
    names.insert(draw(st.integers(0, len(names))), "one")  # which no number begins
    first = draw(st.sampled_from([0, 1]))
    rows: list[tuple[int | str, str]] = list(enumerate(names, first))
    if draw(st.booleans()):
        ids = draw(st.permutations(range(len(names))))
        rows = [(f"n{10000000 + number}", name) for number, name in zip(ids, names, strict=True)]
    elif draw(st.booleans()):
        rows = draw(st.permutations(rows))
    numbered = all(isinstance(number, int) for number, _ in rows)
    wanted = [name for _, name in sorted(rows)] if numbered else [name for _, name in rows]
    shape = draw(
        st.sampled_from(
            ["plain", "{} {}", "{}: {}", "{}. {}", "{}) {}", "{}\t{}", "-", "csv", "json", "python", "quotes"]
        )
    )
    suffix = ".txt"
    if shape == "plain":
        text, wanted = "\n".join(name for _, name in rows), [name for _, name in rows]
    elif shape == "-":
        text, wanted = "\n".join(f"- {name}" for _, name in rows), [name for _, name in rows]
    elif shape == "quotes":
        text, wanted = "\n".join(f'"{name}",' for _, name in rows), [name for _, name in rows]
    elif shape == "csv":
        buffer, suffix = io.StringIO(), ".csv"
        writer = csv.writer(buffer, quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
        swap = draw(st.sampled_from([1, -1]))
        writer.writerows([row[::swap] for row in ([("id", "name")] if draw(st.booleans()) else []) + rows])
        text = buffer.getvalue()
    elif shape in ("json", "python"):
        suffix = draw(st.sampled_from([".txt", ".json"]))
        mapping = {str(number): name for number, name in rows} if draw(st.booleans()) else {name: n for n, name in rows}
        text = json.dumps(mapping, ensure_ascii=draw(st.booleans())) if shape == "json" else repr(dict(rows))
    else:
        text = "\n".join(shape.format(*row) for row in rows)
    text = draw(st.sampled_from(["", "# made in May\n"] if shape not in ("json", "python") else [""])) + text
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    return f"names{suffix}", forms(text, draw(st.sampled_from(["NFC", "NFD"]))).encode(encoding), wanted


@sizes
def test_class_files_are_read_as_meant_or_refused(tmp_path: Path, count: int) -> None:
    read = 0

    def check(case: tuple[str, bytes, list[str]]) -> None:
        nonlocal read
        file, content, wanted = case
        (tmp_path / file).write_bytes(content)
        try:
            names = load_classes(str(tmp_path / file))
        except RecipeError as error:
            told(error)
            return
        read += 1
        assert list(names) == wanted, case

    fuzz(check, class_files(), count)
    assert read > count / 2
