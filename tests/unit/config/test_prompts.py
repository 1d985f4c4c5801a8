"""Class names and templates: the named ones are right, and every mistake is named with its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prgkit.config.prompts import (
    LISTS,
    NAMED_CLASSES,
    NAMED_TEMPLATES,
    canonical,
    fill,
    load_classes,
    load_templates,
    load_words,
)
from prgkit.errors import RecipeError

REAL = Path(os.environ.get("PRGKIT_DATA", "not given")) / "cifar100"


def classes_error(value: str | list[object]) -> str:
    with pytest.raises(RecipeError) as raised:
        load_classes(value)  # type: ignore[arg-type]
    return str(raised.value)


def templates_error(value: str | list[object]) -> str:
    with pytest.raises(RecipeError) as raised:
        load_templates(value)  # type: ignore[arg-type]
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("caltech101", 101, "off-center face", "yin and yang symbol"),
        ("cifar10", 10, "airplane", "truck"),
        ("cifar100", 100, "apple", "worm"),
        ("digits", 10, "zero", "nine"),
        ("dtd", 47, "banded", "zigzagged"),
        ("eurosat", 10, "annual crop land", "lake or sea"),
        ("fgvcaircraft", 100, "707-320", "Yak-42"),
        ("flowers102", 102, "pink primrose", "blackberry lily"),
        ("food101", 101, "apple pie", "waffles"),
        ("imagenet1k", 1000, "tench", "toilet paper"),
        ("oxfordpets", 37, "Abyssinian", "yorkshire terrier"),
        ("stanfordcars", 196, "AM General Hummer SUV 2000", "smart fortwo Convertible 2012"),
        ("sun397", 397, "abbey", "youth hostel"),
        ("ucf101", 101, "apply eye makeup", "yo yo"),
    ],
)
def test_named_classes(name: str, count: int, first: str, last: str) -> None:
    if name == "imagenet1k":
        pytest.importorskip("open_clip")
    names = load_classes(name)
    assert (len(names), names[0], names[-1]) == (count, first, last)
    assert len({canonical(one) for one in names}) == count
    assert name in NAMED_CLASSES


def test_every_shipped_list_is_named() -> None:
    assert sorted(path.stem for path in LISTS.iterdir()) == sorted({*NAMED_CLASSES} - {"digits", "imagenet1k"})


def test_cifar_names_equal_torchvision_and_the_data() -> None:
    assert [load_classes("cifar100")[index] for index in (1, 41, 58, 83)] == [
        *("aquarium fish", "lawn mower", "pickup truck", "sweet pepper")
    ]
    if (REAL / "classes.txt").exists():
        assert load_classes(str(REAL / "classes.txt")) == load_classes("cifar100")


def test_imagenet_names_are_open_clips_except_the_two_it_repeats() -> None:
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    ours = load_classes("imagenet1k")
    changed = {i: (a, b) for i, (a, b) in enumerate(zip(metadata.IMAGENET_CLASSNAMES, ours, strict=True)) if a != b}
    assert changed == {744: ("missile", "projectile"), 836: ("sunglasses", "sunglass")}


def test_class_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeff# pets\ncat\r\n\n  oak tree  \n# more\ndog\n".encode())
    assert load_classes(str(tmp_path / "names.txt")) == ("cat", "oak tree", "dog")


ABC = ("apple", "bus", "oak tree")
LEFT_OUT = "class names begin with ids, which are left out"
NUMBERED = "class names are numbered: 0 is apple, 1 is bus, 2 is oak tree"
FORMS = {
    "0 apple\n1 bus\n2 oak tree\n": f"{LEFT_OUT}: '0 apple' is read as 'apple'",
    "0\tapple\n1\tbus\n2\toak tree\n": "class names seem to be column 2 of names.txt: apple, bus, oak tree",
    "0:apple\n1:bus\n2:oak tree\n": f"{LEFT_OUT}: '0:apple' is read as 'apple'",
    "0,apple\n1,bus\n2,oak tree\n": f"{LEFT_OUT}: '0,apple' is read as 'apple'",
    "1. apple\n2. bus\n3. oak tree\n": f"{LEFT_OUT}: '1. apple' is read as 'apple'",
    "1) apple\n2) bus\n3) oak tree\n": f"{LEFT_OUT}: '1) apple' is read as 'apple'",
    "(0) apple\n(1) bus\n(2) oak tree\n": f"{LEFT_OUT}: '(0) apple' is read as 'apple'",
    "class 0: apple\nclass 1: bus\nclass 2: oak tree\n": f"{LEFT_OUT}: 'class 0: apple' is read as 'apple'",
    "1 001.apple\n2 002.bus\n3 003.oak tree\n": f"{LEFT_OUT}: '1 001.apple' is read as '001.apple'",
    "003.apple\n007.bus\n042.oak tree\n": f"{LEFT_OUT}: '003.apple' is read as 'apple'",
    "n07739125 apple\nn02924116 bus\nn12268246 oak tree\n": f"{LEFT_OUT}: 'n07739125 apple' is read as 'apple'",
    "n07739125-apple\nn02924116-bus\nn12268246-oak tree\n": f"{LEFT_OUT}: 'n07739125-apple' is read as 'apple'",
    "apple,0\nbus,1\noak tree,2\n": "class names seem to end with ids, which are left out: 'apple,0' is read as 'apple'",
    "- apple\n- bus\n- oak tree\n": "class names begin with the marks of a list, which are left out: '- apple' is read as 'apple'",
    "names:\n  0: apple\n  1: bus\n  2: oak tree\n": "class names are numbered: 0 is apple, 1 is bus, 2 is oak tree",
    "path: ../data\nnc: 3\nnames: ['apple', 'bus', 'oak tree']\n": (
        "class names look like a list, and are read as one: 'apple', 'bus', ..."
    ),
    "0 -> apple\n1 -> bus\n2 -> oak tree\n": f"{LEFT_OUT}: '0 -> apple' is read as 'apple'",
    "'apple',\n'bus',\n'oak tree'\n": "class names begin and end with quotes, which are left out: \"'apple'\" is read as 'apple'",
    "apple, bus, oak tree\n": "class names seem to stand in one line, and are parted at ',': apple, bus, oak tree",
    '["apple", "bus", "oak tree"]': "class names look like a list, and are read as one: 'apple', 'bus', ...",
    "['apple', 'bus', 'oak tree']": "class names look like a list, and are read as one: 'apple', 'bus', ...",
    '{"0": "apple", "2": "oak tree", "1": "bus"}': NUMBERED,
    "{0: 'apple',\n 1: 'bus',\n 2: 'oak tree'}": NUMBERED,
    '{"apple": 0, "oak tree": 2, "bus": 1}': NUMBERED,
    '{"0": ["n07739125", "apple"], "1": ["n02924116", "bus"], "2": ["n12268246", "oak tree"]}': NUMBERED,
    '{"id2label": {"0": "apple", "1": "bus", "2": "oak tree"}}': NUMBERED,
    '{"categories": [{"id": 2, "name": "oak tree"}, {"id": 0, "name": "apple"}, {"id": 1, "name": "bus"}]}': NUMBERED,
    "2 oak tree\n0 apple\n1 bus\n":
        "class names are numbered, and put in the order of their numbers: 0 is apple, 1 is bus, 2 is oak tree",
    "0_apple\n1_bus\n2_oak tree\n": f"{LEFT_OUT}: '0_apple' is read as 'apple'",
    "01_apple\n02_bus\n03_oak tree\n": f"{LEFT_OUT}: '01_apple' is read as 'apple'",
    "class_0 apple\nclass_1 bus\nclass_2 oak tree\n": f"{LEFT_OUT}: 'class_0 apple' is read as 'apple'",
    "n07739125_apple\nn02924116_bus\nn12268246_oak tree\n": f"{LEFT_OUT}: 'n07739125_apple' is read as 'apple'",
    "label\napple\nbus\noak tree\n": "class names begin below a header: 'label' is none of them",
    "class_name\napple\nbus\noak tree\n": "class names begin below a header: 'class_name' is none of them",
    "id name\n0 apple\n1 bus\n2 oak tree\n": "class names begin below a header: 'id name' is none of them",
    "# label:color_rgb:parts:actions\napple:128,0,0::\nbus:0,128,0::\noak tree:0,0,128::\n":
        "class names end with colors, which are left out: 'apple:128,0,0::' is read as 'apple'",
    "CLASSES = [\n    'apple',\n    'bus',\n    'oak tree',\n]\n":
        "class names look like a list, and are read as one: 'apple', 'bus', ...",
    "CLASSES: list[str] = ['apple', 'bus', 'oak tree']": "class names look like a list, and are read as one: 'apple', 'bus', ...",
    'const names = ["apple", "bus", "oak tree"];': "class names look like a list, and are read as one: 'apple', 'bus', ...",
    '("apple", "bus", "oak tree")': "class names look like a list, and are read as one: 'apple', 'bus', ...",
    "apple/\nbus/\noak tree/\n": "class names end with slashes, which are left out: 'apple/' is read as 'apple'",
    "apple;\nbus;\noak tree;\n": "class names end with semicolons, which are left out: 'apple;' is read as 'apple'",
    "data/train/apple\ndata/train/bus\ndata/train/oak tree\n":
        "class names begin with a folder, which are left out: 'data/train/apple' is read as 'apple'",
    "- [ ] apple\n- [x] bus\n- [ ] oak tree\n":
        "class names begin with the marks of a list, which are left out: '- [ ] apple' is read as 'apple'",
    "#0 apple\n#1 bus\n#2 oak tree\n": f"{LEFT_OUT}: '0 apple' is read as 'apple'",
    "# apple\n# pear\napple\nbus\noak tree\n": "2 lines are comments, and are left out of the class names: '# apple'",
    '{"label2id": {"apple": "0", "oak tree": "2", "bus": "1"}}': NUMBERED,
    '{"labels": {"img1": 1, "img2": 0, "img3": 2}, "classes": ["apple", "bus", "oak tree"]}':
        "class names are those in 'classes'",
    '{"id2label": {"0": "apple", "1": "bus", "2": "oak tree"}, "label2id": {"apple": 0, "bus": 1, "oak tree": 2}}': NUMBERED,
}  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_class_files_of_other_tools(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    notes: list[str] = []
    assert load_classes(str(tmp_path / "names.txt"), note=notes.append) == ABC
    assert FORMS[text] in notes


@pytest.mark.parametrize(
    "text",
    [
        "id,name\n0,apple\n1,bus\n2,oak tree\n",
        "class_name;description\napple;a, fruit\nbus;\noak tree;x\n",
        "apple,\nbus,\noak tree,\n",
        '"apple"\n"bus"\n"oak tree"\n',
        "name\napple\nbus\noak tree\n",
        "1,apple\n2,bus\n3,oak tree\n",
        "apple\tn07739125\nbus\tn02924116\noak tree\tn12268246\n",
        "sep=;\nid;name\n2;oak tree\n0;apple\n1;bus\n",
        "apple\nbus\noak tree\n",
    ],
)
def test_class_tables(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.csv").write_text(text)
    assert load_classes(str(tmp_path / "names.csv")) == ABC
    (tmp_path / "names.csv").write_text(text, encoding="utf-16")
    assert load_classes(str(tmp_path / "names.csv")) == ABC


@pytest.mark.parametrize(
    "names",
    [
        ("2 wheeler", "4 wheeler"),
        ("1 wheeler", "2 wheeler", "3 wheeler"),
        ("7 up", "cola"),
        ("channel 1", "channel 2"),
        ("707-320", "727-200"),
        ("1.5 tonne", "2.5 tonne"),
        ("tench, Tinca tinca", "goldfish"),
        ("2_wheeler", "4_wheeler"),
        ("1_wheeler", "2_wheeler", "3_wheeler"),
        ("apse/indoor", "F/A-18"),
        ("label maker", "name tag"),
        ("3D printer", "2D plot"),
        ('5" disk', "floppy"),
        ("[unknown]", "cat"),
    ],
)
def test_names_that_have_numbers_and_marks_of_their_own_keep_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "names.txt").write_text("\n".join(names))
    notes: list[str] = []
    assert load_classes(str(tmp_path / "names.txt"), note=notes.append) == names
    assert notes == []


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("names.json", '{"type": "service_account", "private_key": "secret"}',
         "names.json is no list of class names, nor a mapping of numbers to names"),
        ("names.json", "secret one\nsecret two\n", "names.json is no list of class names, nor a mapping of numbers to names"),
        ("names.json", '{"0": "a", "0": "b"}', "a key stands twice in the class names"),
        ("names.csv", "apple,fruit\nbus,vehicle\n", "which column of names.csv holds the class names is not certain:"),
        ("names.csv", "apple\nSedan, compact\nbus\n", "names.csv has rows of different lengths"),
        ("names.csv", '"apple\nbus\n', "names.csv is no CSV file: unexpected end of data"),
        ("names.json", '{"names": ["a", "b"], "classes": ["b", "a"]}',
         "names.json has other class names in 'classes' than in 'names'"),
        ("names.txt", "# a\n# b\n", "every line of names.txt is a comment, as it begins with #"),
        ("names.yaml.txt", "names:\n  0: a\n  1: b\n  1: c\n", "a key stands twice"),
        ("names.txt", "0: apple\n1: apple\n", "class names repeat: 'apple' (line 1 and line 2)"),
    ],
)  # fmt: skip
def test_class_files_that_do_not_say_it_are_refused(tmp_path: Path, file: str, text: str, what: str) -> None:
    (tmp_path / file).write_text(text)
    error = classes_error(str(tmp_path / file))
    assert error.splitlines()[0] == what
    assert "secret" not in error
    assert "fix: " in error


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (("tench, Tinca tinca", "goldfish, Carassius auratus"),
         "class names have commas, and each line is one class: tench, Tinca tinca; ..."),
        (('"apple", "bus"', '"car", "dog"'), "class names have commas"),
        (("apse/indoor", "apse/outdoor"), "look odd"),
        (("apple", ".DS_Store"), "look odd"),
        (("total 8", "drwxr-xr-x 2 me me 4096 May  1 10:00 apple"), "look odd"),
        (("apple  # a fruit", "bus"), "look odd"),
        (("apple #ff0000", "bus #00ff00"), "look odd"),
        (("apple (1200)", "bus (37)"), "look like ids"),
        (("1200 apple", "37 bus"), "look like ids"),
        (("5 apple", "5 bus", "9 oak tree"), "look like ids"),
        (("-1 background", "0 apple", "1 bus"), "look like ids"),
    ],
)  # fmt: skip
def test_names_that_are_kept_with_what_they_have_are_told(tmp_path: Path, lines: tuple[str, ...], told: str) -> None:
    (tmp_path / "names.txt").write_text("\n".join(lines))
    notes: list[str] = []
    assert load_classes(str(tmp_path / "names.txt"), note=notes.append) == tuple(" ".join(x.split()) for x in lines)
    assert len(notes) == 1
    assert told in notes[0]


def test_names_that_look_like_ids_are_told() -> None:
    def told(*names: str) -> list[str]:
        notes: list[str] = []
        assert load_classes(list(names), note=notes.append) == names
        return notes

    odd = ["class_07", "label3", "n02085620", "17", "3fa9c1d2", "12: bus"]
    assert told("cat", *odd) == [
        "class names look like ids: class_07, label3, n02085620, ...; the teacher reads them as words"
    ]
    assert all(told("cat", one) for one in odd)
    assert told("707-320", "A330-200", "decade", "facade", "4x4", "Formula 1") == []
    # ids with gaps, as those of a part of a list, and ids behind; "2 wheeler" and "4 wheeler" are names
    assert told("1 apple", "3 bus", "7 oak tree") == [
        "class names look like ids: 1 apple, 3 bus, 7 oak tree; the teacher reads them as words"
    ]
    assert told("apple 4", "bus 7") == ["class names look like ids: apple 4, bus 7; the teacher reads them as words"]
    assert told("2 wheeler", "4 wheeler") == []
    assert told("**apple**", "black &amp; white", "./train/bus", "oak tree") == [
        "class names look odd: **apple**, black &amp; white, ./train/bus; the teacher reads them as they are"
    ]


def test_shipped_lists_are_read_as_they_are() -> None:
    for name in NAMED_CLASSES:
        notes: list[str] = []
        path = LISTS / f"{name}.txt"
        if path.exists():
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            assert load_classes(str(path), note=notes.append) == tuple(
                line for line in lines if line and line[0] != "#"
            )
        assert notes == []


def test_names_are_composed_and_compared_without_marks() -> None:
    assert load_classes(["cafe\u0301", "tea"]) == ("caf\u00e9", "tea")
    assert classes_error(["cafe\u0301", "caf\u00e9"]).startswith("class names repeat")
    assert load_classes(["oak\n tree", "tea"]) == ("oak tree", "tea")
    assert classes_error(["a\x1b[2Jb", "tea"]).startswith("class name 'a\\x1b[2Jb' has a control character (entry 1)\n")
    assert canonical("so\u00adft \u200eHyphen") == canonical("Soft_hyphen")


def test_class_file_relative_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    monkeypatch.chdir(tmp_path)
    assert load_classes("names.txt") == ("cat", "dog")
    monkeypatch.setenv("WHERE", str(tmp_path))
    assert load_classes("$WHERE/names.txt") == ("cat", "dog")


def test_names_themselves() -> None:
    assert load_classes([" cat", "dog "]) == ("cat", "dog")


def test_repeated_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\n# note\nOak_tree\ndog\noak  tree\ncat\n")
    assert classes_error(str(path)) == (
        "class names repeat: 'oak  tree' (line 3 and line 5), 'cat' (line 1 and line 6)\n"
        f"  where: {path}\n"
        "  fix: keep one of each; case, spaces and underscores make no difference"
    )
    assert classes_error(["cat", "dog", "cat"]).startswith("class names repeat: 'cat' (entry 1 and entry 3)")


def test_too_few_names(tmp_path: Path) -> None:
    assert classes_error(["cat"]) == (
        "there is only one class, 'cat'\n  where: the class names\n"
        "  fix: give at least two, or there is nothing to tell apart"
    )
    (tmp_path / "names.txt").write_text("# nothing\n\n")
    assert classes_error(str(tmp_path / "names.txt")).startswith("there are no class names\n")


def test_one_contrast_pair_is_enough(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("striped / plain\n")
    assert load_words(["striped / plain"]) == load_words(str(tmp_path / "words.txt")) == ("striped / plain",)
    with pytest.raises(RecipeError, match=r"there are no class names\n  where: data\.words\n  fix: give one, or"):
        load_words([])


def test_names_that_are_not_names() -> None:
    assert classes_error(["cat", " "]).startswith("a class name is empty (entry 2)\n")
    assert classes_error(["cat", "_"]).startswith("a class name is empty (entry 2)\n")
    assert classes_error(["yes", False]).startswith("class name False is not text (entry 2)\n")


def test_missing_class_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert classes_error("cifar-100") == (
        "there is no class list 'cifar-100'; did you mean 'cifar100'?\n"
        f"  where: {tmp_path}\n"
        "  fix: give a text file with one name a line, or one of caltech101, cifar10, cifar100, digits, dtd, eurosat, "
        "fgvcaircraft, flowers102, food101, imagenet1k, oxfordpets, stanfordcars, sun397, ucf101"
    )
    assert classes_error("name.txt").startswith("there is no class list 'name.txt'; did you mean 'names.txt'?")


def test_class_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xfe\x00\x80")
    assert classes_error(str(tmp_path / "names.txt")).startswith("names.txt cannot be read: it is not UTF-8 text\n")


TEMPLATE_COUNTS = {
    **{"actions": 48, "aircraft": 2, "cars": 8, "cifar": 18, "flowers": 1, "food": 1, "imagenet": 80, "objects": 34},
    **{"pets": 1, "photo": 7, "plain": 1, "satellite": 3, "scenes": 2, "textures": 8, "digits": 7},
}


@pytest.mark.parametrize(("name", "count"), TEMPLATE_COUNTS.items())
def test_named_templates(name: str, count: int) -> None:
    if name == "imagenet":
        pytest.importorskip("open_clip")
    templates = load_templates(name)
    assert len(set(templates)) == len(templates) == count
    assert all(template.count("{}") == 1 for template in templates)
    assert load_templates(templates) == templates
    assert {*TEMPLATE_COUNTS} == {*NAMED_TEMPLATES}


def test_digit_names_and_templates_are_the_demos() -> None:
    from prgkit.demo import digits

    assert load_classes("digits") == digits.CLASSES
    assert load_templates("digits") == load_templates(digits.TEMPLATES) == digits.TEMPLATES


def test_cifar_templates_are_openais() -> None:
    templates = load_templates("cifar")
    assert templates[:3] == ("a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}.")
    assert templates[7:10] == ("a photo of a small {}.", "a photo of a big {}.", "a photo of the {}.")
    assert templates[-1] == "a photo of the big {}."


def test_templates_that_are_combined_are_openais() -> None:
    assert load_templates("satellite") == (
        *("a centered satellite photo of {}.", "a centered satellite photo of a {}."),
        "a centered satellite photo of the {}.",
    )
    assert load_templates("textures")[3:5] == ("a photo of a {} object.", "a photo of the {} texture.")
    assert {"a photo of a {}.", "the plushie {}.", "a {} in a video game.", "graffiti of the {}."} <= {
        *load_templates("objects")
    }
    assert {"a photo of a person {}.", "a example of the person performing {}."} <= {*load_templates("actions")}


def test_photo_templates_are_open_clips_short_list() -> None:
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    assert load_templates("photo") == tuple(make("{}") for make in metadata.SIMPLE_IMAGENET_TEMPLATES)


def test_template_mistakes() -> None:
    assert templates_error(["a photo of a {}.", "a photo"]) == (
        "the template 'a photo' has not exactly one {}\n"
        "  fix: write {} once, where the class name belongs, as in 'a photo of a {}.'"
    )
    assert templates_error(["{} and {}"]).startswith("the template '{} and {}' has not exactly one {}")
    assert templates_error("a photo of").startswith("the template 'a photo of' has not exactly one {}")
    assert templates_error([3]).startswith("the template 3 has not exactly one {}")
    assert templates_error([]).startswith("there are no prompt templates")
    assert templates_error("phtoo") == (
        "there is no template set 'phtoo'; did you mean 'photo'?\n"
        "  fix: use one of actions, aircraft, cars, cifar, digits, flowers, food, imagenet, objects, pets, photo, plain, "
        "satellite, scenes, textures, or write templates such as 'a photo of a {}.'"
    )


def test_fill() -> None:
    prompts = fill(load_templates(["a {}.", "{}, {braces} stay"]), ["cat", "oak_tree"])
    assert prompts == [["a cat.", "a oak tree."], ["cat, {braces} stay", "oak tree, {braces} stay"]]
    assert load_templates("an image of {}") == ("an image of {}",)
