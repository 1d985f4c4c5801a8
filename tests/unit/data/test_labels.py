"""Tables of labels, numbers and class names as people write them: each is read as its writer meant it, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.config.sections import ImageSpec, LabelFormat
from prgkit.data.index import ImageIndex, index_images, select_labelled
from prgkit.data.sources import open_images
from prgkit.errors import ImagesError

NAMES = ("apple", "bus", "fire engine", "Löwe")
TRUTH = {"x.png": 0, "y.png": 3, "z.png": 2, "1.png": 1}  # file, class


def picture(path: Path, seed: int) -> None:
    """Write a picture; the same seed gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), seed, dtype=np.uint8)).save(path)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Four pictures in one folder."""
    for seed, name in enumerate(TRUTH):
        picture(tmp_path / "flat" / name, seed)
    return tmp_path / "flat"


def opened(folder: Path, text: str | None = None, encoding: str = "utf-8", **label_format: Any) -> ImageIndex:
    """Catalogue a folder with a table of labels."""
    table = None
    if text is not None:
        table = folder.parent / "labels.csv"
        table.write_bytes(text.encode(encoding))
    images = open_images(ImageSpec(str(folder), table, LabelFormat(**label_format)))
    return index_images(images, workers=1)


def read(folder: Path, text: str | None = None, names: Sequence[str] = NAMES, **options: Any) -> dict[str, int]:
    """Return the class index of each image by its name."""
    found = opened(folder, text, **options)
    labels = select_labelled(found, names)[1]
    return {found.source.name(int(i)): int(c) for i, c in zip(found.indices, labels, strict=True)}


def refused(folder: Path, text: str | None = None, names: Sequence[str] = NAMES, **options: Any) -> ImagesError:
    """Return the error that a table gives."""
    with pytest.raises(ImagesError) as caught:
        read(folder, text, names, **options)
    return caught.value


def said(folder: Path, text: str | None = None, names: Sequence[str] = NAMES, **options: Any) -> list[str]:
    """Return what is said when labels are read."""
    notes: list[str] = []
    select_labelled(opened(folder, text, **options), names, note=notes.append)
    return notes


def table(row: str, header: str = "", *, join: str = "\n") -> str:
    """Write one row for each image: {base}, {stem}, {name}, {number}, {one} from 1 and {hot} are filled in."""
    rows = [header] if header else []
    for file, index in TRUTH.items():
        hot = ",".join(str(int(index == column)) for column in range(len(NAMES)))
        stem = file.removesuffix(".png")
        rows.append(row.format(base=file, stem=stem, name=NAMES[index], number=index, one=index + 1, hot=hot))
    return join.join(rows) + "\n"


DIALECTS = {
    "file,label": table("{base},{name}", "file,label"),
    "no header": table("{base},{name}"),
    "an id without suffix, and a header of its own": table("{stem},{name}", "id,breed"),
    "absolute": table("/data/old/flat/{base},{name}", "file,label"),
    "Windows": table("C:\\data\\flat\\{base},{name}", "file,label", join="\r\n"),
    "the folder in front": table("flat/{base},{name}", "file,label"),
    "dots": table("./{base},{name}"),
    "number, file and name": table("{one},{base},{name}", "class id,filepaths,labels"),
    "label first": table("{name},{base}", "label,image_path"),
    "label first, no header": table("{name},{base}"),
    "numbers": table("{base},{number}", "file,label"),
    "numbers with a point": table("{base},{number}.0", "file,label"),
    "numbers from one": table("{base},{one}", "image,target"),
    "ids and numbers": table("{stem},{number}", "id,label"),
    "a comment": "# of May, for all\n" + table("{base},{name}", "file,label"),
    "a comment at the end": table("{base},{name}", "file,label") + "# the end\n",
    "a header in a comment": table("{base} {number}", "# filename label"),
    "semicolons": table("{base};{name};0,5", "Datei;Name;Wert"),
    "tabs": table("{base}\t{name}"),
    "bars": table("{base}|{name}", "file|label"),
    "Excel's delimiter": "sep=;\n" + table("{base};{name}", "file;label"),
    "spaces": table("{base} {number}"),
    "spaces and names with spaces": table("{base} {name}"),
    "one-hot": table("{base},{hot}", "filename,apple,bus,fire_engine,Löwe"),
    "one-hot in another order": table("{base},{hot}", "filename,apple,bus,fire_engine,Löwe").replace("apple,bus", "apple, bus"),
    "one-hot, and another flag": table("{base},{hot},0", "filename,apple,bus,fire_engine,Löwe,difficult"),
    "one-hot and names": table("{base},{name},{hot}", "file,label,apple,bus,fire engine,löwe"),
    "quotes": table('"{base}","{name}"', '"file","label"'),
    "blank lines": table("{base},{name}", "file,label\n\n", join="\n\n"),
    "a split beside": table("{base},train,{name}", "file,split,label"),
    "boxes": table("{base},640,480,{name},1,2", "filename,width,height,class,xmin,ymin"),
    "two rows alike": table("{base},{name}", "file,label") + "x.png,Apple\n".replace("A", "a"),
    "more images than here": table("{base},{name}", "file,label") + "far.png,bus\n",
    "capitals": table("{base},{name}", "FILE,LABEL").replace(".png", ".PNG"),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tables_are_read_as_people_write_them(flat: Path, dialect: str) -> None:
    assert read(flat, DIALECTS[dialect]) == TRUTH


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_in_the_encodings_of_spreadsheets(flat: Path, encoding: str) -> None:
    assert read(flat, DIALECTS["file,label"], encoding=encoding) == TRUTH


REFUSED = {
    "scores, not labels": table("{base},0.7,0.1,0.1,0.1", "file,apple,bus,fire engine,Löwe"),
    "4 of 4 rows have not exactly one class marked": table("{base},1,0,0,1", "file,apple,bus,fire engine,Löwe"),
    "2 of 4 rows have not exactly one class marked with 1: y.png, z.png; column 'lowe' is no class": (
        table("{base},{hot}", "file,apple,bus,fire engin,lowe").replace("z.png,0,0,1,0", "z.png,0,0,0,0").replace(
            "fire engin,", "fire engine,")
    ),
    "which column of labels.csv holds the labels is not certain": table("{base},{number},{one}", "file,fold,angle"),
    "which column of labels.csv holds": table("{base},{name},bus", "file,first,second"),
    "which column of labels.csv": table("{base},1,{name}", "file,label,guess").replace("x.png,1", "x.png,0").replace(
        "y.png,1", "y.png,2") + "w.png,1,apple\n",
    "1 of 4 labels match no class: 'appel' (did you mean 'apple'?)": table("{base},{name}").replace("apple", "appel"),
    "'x.png' is labelled 'apple' and 'bus'": table("{base},{name}") + "x.png,bus\n",
    "1 of 4 images have no label: z.png": table("{base},{name}").replace("z.png,", "far.png,"),
    "labels.csv is no CSV file": table("{base},{name}").replace("x.png,", '"x.png,'),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_tables_that_do_not_say_it_are_refused(flat: Path, what: str) -> None:
    if "guess" in REFUSED[what]:
        picture(flat / "w.png", 99)
    error = refused(flat, REFUSED[what])
    assert error.what.startswith(what) or what in error.what.splitlines()[0]
    assert error.fix


def test_an_unsure_table_shows_its_rows_each_way_and_the_option_that_says_it(flat: Path) -> None:
    text = table("{base},{number},{one}", "file,fold,angle")
    error = refused(flat, text)
    assert error.what.splitlines() == [
        "which column of labels.csv holds the labels is not certain:",
        "    file,fold,angle",
        "    x.png,0,1",
        "    y.png,3,4",
        "    z.png,2,3",
        "    by column 'fold': x.png is '0', y.png is '3', z.png is '2'",
        "    by column 'angle': x.png is '1', y.png is '4', z.png is '3'",
    ]
    assert error.fix == "name it: --set data.label_format.label_column=NAME, or its number, counted from 1"
    assert read(flat, text, label_column="fold") == TRUTH
    assert read(flat, text, label_column="angle") == TRUTH
    assert read(flat, text, label_column=2, image_column="file") == TRUTH
    assert refused(flat, text, label_column="angel").what == ("labels.csv has no column 'angel'; did you mean 'angle'?")


def test_which_folder_a_path_means(tmp_path: Path) -> None:
    for seed, name in enumerate(("test/1.png", "test/2.png")):
        picture(tmp_path / name, seed)
    both = "train/1.png,bus\ntrain/2.png,bus\ntest/1.png,apple\ntest/2.png,Löwe\n"
    assert read(tmp_path / "test", both) == {"1.png": 0, "2.png": 3}
    assert read(tmp_path, both) == {"test/1.png": 0, "test/2.png": 3}
    assert refused(tmp_path / "test", "train/1.png,bus\ntrain/2.png,bus\n").what.startswith(
        "no row of labels.csv names"
    )
    elsewhere = "a/1.png,bus\na/2.png,Löwe\n"
    assert read(tmp_path / "test", elsewhere) == {"1.png": 1, "2.png": 3}
    assert said(tmp_path / "test", elsewhere) == [
        "labels.csv: 'a/1.png' is taken for an image here, whose folder has another name"
    ]
    assert refused(tmp_path / "test", elsewhere + "b/1.png,apple\n").what == "'b/1.png' is labelled 'bus' and 'apple'"


def test_a_whole_path_goes_before_a_base_name(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png", 1)
    picture(tmp_path / "in" / "deep" / "a.png", 2)
    assert read(tmp_path / "in", "a.png,apple\ndeep/a.png,bus\n") == {"a.png": 0, "deep/a.png": 1}


def test_what_is_said_of_a_table(flat: Path) -> None:
    text = "class id,filepaths,labels\n9,far.png,bus\n" + table("{number},{base},{name}")
    assert said(flat, text) == [
        "labels.csv: images by column 'filepaths', labels by column 'labels'",
        "1 row names no image here, e.g. 'far.png' (labels.csv, line 2)",
    ]
    assert said(flat, table("{base},{name}")) == []


def numbered(folder: Path, numbers: Sequence[object]) -> Path:
    for seed, number in enumerate(numbers):
        picture(folder / "in" / str(number) / f"{seed}.png", seed)
    return folder / "in"


@pytest.mark.parametrize(
    ("numbers", "indices", "note"),
    [
        ([0, 3], [0, 3], "read from 0: 0 is apple, 1 is bus, 2 is fire engine, 3 is Löwe; no image has 1, 2"),
        ([1, 4], [0, 3], "read from 1: 1 is apple, 2 is bus, 3 is fire engine, 4 is Löwe; no image has 2, 3"),
        (["00", "01"], [0, 1], "read from 0: 0 is apple, 1 is bus, 2 is fire engine, 3 is Löwe; no image has 2, 3"),
    ],
)
def test_numbers_are_told(tmp_path: Path, numbers: list[object], indices: list[int], note: str) -> None:
    folder = numbered(tmp_path, numbers)
    assert list(read(folder).values()) == indices or sorted(read(folder).values()) == indices
    assert said(folder) == [f"labels are numbers, {note}"]


def test_numbers_that_could_count_from_0_or_1_are_refused(tmp_path: Path) -> None:
    folder = numbered(tmp_path, [1, 2, 3])
    error = refused(folder)
    assert error.what.splitlines() == [
        "the labels are numbers from 1 to 3, and could count from 0 as well as from 1:",
        "    from 0: 1 is bus (1/0.png), 2 is fire engine (2/1.png), 3 is Löwe (3/2.png)",
        "    from 1: 1 is apple (1/0.png), 2 is bus (2/1.png), 3 is fire engine (3/2.png)",
    ]
    assert error.fix == "say which: --set data.label_format.first_number=0, or 1; or label with the class names"
    assert sorted(read(folder, first_number=0).values()) == [1, 2, 3]
    assert sorted(read(folder, first_number=1).values()) == [0, 1, 2]
    assert refused(numbered(tmp_path / "b", [0, 4])).what == "1 of 2 labels match no class: '4'"
    assert refused(numbered(tmp_path / "c", [0, 1]), first_number=1).what == "1 of 2 labels match no class: '0'"


def test_what_a_library_hands_out_counts_from_0_unless_it_is_said() -> None:
    from prgkit.data.labels import class_indices

    notes: list[str] = []
    found = class_indices([1, 2], NAMES, names=["a", "b"], where="here", note=notes.append)
    assert found.tolist() == [1, 2]
    assert notes == [
        "labels are numbers, read from 0: 0 is apple, 1 is bus, 2 is fire engine, 3 is Löwe; no image has 0, 3"
    ]
    from_1 = partial(class_indices, class_names=NAMES, where="here", first_number=1)
    assert from_1([1, 4], names=["a", "b"]).tolist() == [0, 3]
    assert from_1([1, "Löwe"], names=["a", "b"]).tolist() == [0, 3]
    with pytest.raises(ImagesError, match="1 of 2 labels match no class: 0"):
        from_1([0, 1], names=["a", "b"])


def test_folders_with_numbers_in_front_of_names(tmp_path: Path) -> None:
    from prgkit.data.labels import lookup

    names = ["Black footed Albatross", "Chihuahua", "2 wheeler", "4 wheeler", "wheeler"]
    folders = ["001.Black_footed_Albatross", "n02085620-Chihuahua", "2_wheeler"]
    assert lookup(folders, names) == dict(zip(folders, [0, 1, 2], strict=True))
    assert lookup(["1_cat", "2_cat"], ["cat", "dog"]) == {}  # it would make one of two


def test_label_studios_names_are_those_before_the_upload(flat: Path) -> None:
    rows = table("/data/upload/1/a1b2c3d4-{base},{name}", "image,choice")
    assert read(flat, rows) == TRUTH
    picture(flat / "old" / "x.png", 9)  # of two with that name none is meant
    assert refused(flat, rows).what == "1 of 5 images have no label: old/x.png"
    assert refused(flat, table("20240131-{base},{name}")).what.startswith("no row of labels.csv names an image")
    error = refused(flat, "annotation_id,choice,image\n7,bus,/data/upload/1/a1b2c3d4-far.png\n")
    assert error.what == (
        "no row of labels.csv names an image: it has '/data/upload/1/a1b2c3d4-far.png', the images '1.png'"
    )


@pytest.mark.parametrize("text", ['[{"file": "x.png", "label": "bus"}]', '{"file": "x.png", "label": "bus"}\n'])
def test_json_is_no_table(flat: Path, text: str) -> None:
    error = refused(flat, text)
    assert (error.what, error.fix) == (
        "labels.csv is a JSON file, and no table of labels",
        "give a CSV file of file,label rows",
    )


def test_a_picture_with_two_labels_is_left_out_and_said(tmp_path: Path) -> None:
    for name, seed in {"apple/x.png": 1, "apple/z.png": 2, "bus/y.png": 1, "bus/w.png": 3, "bus/v.png": 3}.items():
        picture(tmp_path / "in" / name, seed)
    found = opened(tmp_path / "in")
    notes: list[str] = []
    kept, labels = select_labelled(found, NAMES, note=notes.append)
    assert notes == ["1 image has two labels, and is left out: apple/x.png (apple) is also bus/y.png (bus)"]
    names = [kept.source.name(int(index)) for index in kept.indices]
    assert dict(zip(names, labels.tolist(), strict=True)) == {"apple/z.png": 0, "bus/v.png": 1}
    assert (len(kept), kept.duplicates) == (2, 1)
    assert kept.source.name(int(kept.copies[0, 1])) == "bus/w.png"
    assert kept.keys[int(kept.copies[0, 0])] == found.source.key(int(kept.copies[0, 1]))
    assert len(found) - len(kept) == 1


def test_a_copy_without_a_label_has_that_of_the_other(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "in" / name, 1)
    assert read(tmp_path / "in", "b.png,bus\n") == {"a.png": 1}


def test_names_in_two_unicode_forms_are_one(tmp_path: Path) -> None:
    import unicodedata

    names = ["café", "crème brûlée"]
    for seed, name in enumerate(names):
        picture(tmp_path / "in" / unicodedata.normalize("NFD", name) / f"é{seed}.png", seed)
    assert sorted(read(tmp_path / "in", names=names).values()) == [0, 1]
    text = "file,label\n" + "".join(f"é{seed}.png,{name}\n" for seed, name in enumerate(names))
    for form in ("NFC", "NFD"):
        assert sorted(read(tmp_path / "in", unicodedata.normalize(form, text), names=names).values()) == [0, 1]


def test_paths_that_are_typed_in_another_unicode_form_are_found(tmp_path: Path) -> None:
    import unicodedata

    from prgkit.config.prompts import load_classes

    folder = tmp_path / unicodedata.normalize("NFD", "Bücher") / "é"
    picture(folder / "a.png", 1)
    (folder / unicodedata.normalize("NFD", "ä.csv")).write_text("a.png,bus\n")
    typed = unicodedata.normalize("NFC", str(folder))
    images = open_images(ImageSpec(typed, Path(typed) / "ä.csv"))
    assert (len(images), images.labels([0], ["bus", "cat"])) == (1, ["bus"])
    (folder / unicodedata.normalize("NFD", "ö.txt")).write_text("cat\ndog\n")
    assert load_classes(f"{typed}/ö.txt") == ("cat", "dog")


def test_file_names_with_characters_that_act(tmp_path: Path) -> None:
    from prgkit.data.files import printable

    assert printable("a\nb\t\x1b[2J\u202e\u2028.png") == r"a\nb\t\x1b[2J\u202e\u2028.png"
    picture(tmp_path / "in" / "a\nb.png", 1)
    assert read(tmp_path / "in", 'file,label\n"a\nb.png",bus\n') == {r"a\nb.png": 1}
    assert read(tmp_path / "in", "file,label\na\\nb.png,bus\n") == {r"a\nb.png": 1}
