"""What a stranger could have written: recipes, class lists, names and archives that are refused, each in words."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest

from prgkit.config.prompts import load_classes
from prgkit.config.recipe import load_recipe
from prgkit.config.yaml_io import parse_yaml, read_recipe_text
from prgkit.data.label_table import read_ways
from prgkit.data.sources import open_images
from prgkit.errors import ImagesError, PrgkitError, RecipeError
from prgkit.storage.find import run_name

# A recipe may point at ../photos, since it is its user's; what is refused is what would leave the machine, or not end.


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../../../../../../etc/passwd", "id_rsa", ".netrc", "page.yaml"])
def test_a_class_list_has_to_be_one_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its lines would travel in every bundle; they are not even shown."""
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        (tmp_path / name).write_text("secret one\nsecret two\n")
    with pytest.raises(RecipeError) as caught:
        load_classes(name)
    file = os.path.basename(name)
    assert caught.value.what == f"{file} is not a class list by its name: its lines would travel in every bundle"
    assert caught.value.fix == "give a text file that ends in .txt, .names, .list, .csv, .json"
    assert "secret" not in str(caught.value)
    assert "root" not in str(caught.value).replace(str(tmp_path), "")


def test_text_files_that_would_not_end_are_not_read(tmp_path: Path) -> None:
    endless, pipe, sparse = (tmp_path / f"{name}.txt" for name in ("endless", "pipe", "sparse"))
    endless.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    with open(sparse, "wb") as file:
        file.truncate(10 << 30)
    for path, reason in [
        (endless, "it is not a regular file"),
        (pipe, "it is not a regular file"),
        (sparse, "it is 10.0 GiB, and the limit is 2.0 MiB"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_classes(str(path))
        assert caught.value.what == f"{path.name} cannot be read: {reason}"
        with pytest.raises(RecipeError, match=reason):
            read_recipe_text(path)
        with pytest.raises(ImagesError, match=reason.replace("2.0 MiB", "256.0 MiB")):
            read_ways(path)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("..", Path.cwd().parent.name),
        ("torchvision:../../x", "x"),
        ("hf:../../etc/passwd", "etc-passwd"),
        ("hf:..", "run"),
        ("a/../..", Path.cwd().parent.name),
        ("\0", Path.cwd().name),
        ("photos\0/../../x", "x"),
        ("x" * 5000, "x" * 200),
        ("é" * 5000, "é" * 100),
        ("/", "run"),
    ],
)
def test_a_run_is_named_after_its_source_and_stays_below_runs(source: str, name: str) -> None:
    assert run_name(source) == name


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("2020-13-45", "this cannot be read as a value: '2020-13-45'; put quotes around it"),
        ("!!timestamp x", "this cannot be read as a value: 'x'; put quotes around it"),
        ("!!int ''", "this cannot be read as a value: ''; put quotes around it"),
        ("9" * 5000, f"this cannot be read as a value: {'9' * 40!r}; put quotes around it"),
        ("{2020-01-01: x}", "a key is a single word; write key: value"),
        ("{<<: {a: b}}", "a key is a single word; write key: value"),
    ],
)
def test_yaml_that_its_own_reader_stumbles_over(value: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(f"\nvalue: {value}", where="page.yaml")
    assert caught.value.what == told
    assert caught.value.where == "page.yaml, line 2"


def test_numbers_that_no_line_could_hold() -> None:
    with pytest.raises(RecipeError, match="the recipe cannot be read: Exceeds the limit"):
        load_recipe("demo", overrides=["training.epochs=0x" + "f" * 5000])


@pytest.mark.parametrize(
    "spec", ["a" * 4000, "b" * 300 + "/photos", "x-{0..99999999999}.tar", "{a,b}" * 40 + ".tar", "\0", "a\0b.zip"]
)
def test_places_that_cannot_be(spec: str) -> None:
    with pytest.raises(ImagesError):
        open_images(spec)
    with pytest.raises(PrgkitError):
        load_classes(spec + ".txt")


@pytest.mark.parametrize("change", ["no name", "a name that is not what it says"])
def test_a_zip_that_python_stumbles_over(tmp_path: Path, change: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("é.png", b"x")  # a name in UTF-8, and said to be
    data = buffer.getvalue()
    if change == "no name":
        start = data.index(b"PK\x01\x02")
        data = data[: start + 28] + b"\0\0" + data[start + 30 :]
    else:
        data = data.replace("é.png".encode(), b"\xff\xff.png")
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ImagesError, match=r"x\.zip (is damaged|holds no images)"):
        open_images(str(tmp_path / "x.zip"))
