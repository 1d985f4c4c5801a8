"""The ticked CSV: whatever a spreadsheet makes of it is read, and what cannot stand there is named with its line."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from prgkit.data.ticks import NO, YES, Tick, bring_ticks, carried, read_ticks, set_aside, write_ticks
from prgkit.errors import ImagesError

CLASSES = ("cat", "fire engine", "Löwe")
HEADER = "number,file,key,teacher,confidence,right,class\n"
A, B, C = (letter * 32 for letter in "abc")
BLANK = [Tick(1, "a.jpg", A, "cat", "91.2"), Tick(2, "b.jpg", B, "Löwe", "50.0"), Tick(3, "c.jpg", C, "cat", "7.1")]
TICKED = [replace(BLANK[0], right=True), replace(BLANK[1], right=False, named="fire engine"), BLANK[2]]


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "ticks.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_what_was_written_is_read_and_no_file_name_is_a_formula(tmp_path: Path) -> None:
    hostile = [replace(BLANK[0], file="=cmd|' /C calc'!A0"), replace(TICKED[1], file='a "b",\r\nc.jpg')]
    path = tmp_path / "ticks.csv"
    write_ticks(path, hostile)
    assert read_ticks(path, CLASSES) == hostile
    assert path.read_bytes().startswith(b"\xef\xbb\xbfnumber,file,key,")
    with open(path, encoding="utf-8-sig", newline="") as file:
        cells = [row[1] for row in csv.reader(file)]
    assert cells == ["file", "'=cmd|' /C calc'!A0", 'a "b",\r\nc.jpg']
    odd = [replace(TICKED[1], teacher="-5", named="+5")]
    write_ticks(path, odd)
    assert ",'-5,50.0,n,'+5\r\n" in path.read_bytes().decode("utf-8-sig")
    assert read_ticks(path, ["-5", "+5"]) == odd


ROWS = (f"1,a.jpg,{A},cat,91.2,y,", f"2,b.jpg,{B},Löwe,50.0,N,Fire_Engine", f"3,c.jpg,{C},cat,7.1,,")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (HEADER + "\n".join(ROWS), "utf-8"),
        ("\n".join([HEADER.strip(), *ROWS]).replace("\n", "\r\n") + "\r\n", "utf-8-sig"),
        ("sep=;\r\n" + "\r\n".join([HEADER.strip(), *ROWS]).replace(",", ";"), "utf-8-sig"),
        ("\n".join([HEADER.strip().upper(), *ROWS]).replace(",", "\t"), "utf-16"),
        (HEADER + "\n".join(ROWS) + "\n\n,,,,,,\n", "utf-8"),
        (HEADER + "\n".join([*ROWS[:2], f"3,c.jpg,{C},cat,7.1"]), "utf-8"),
        (HEADER + "\n".join([ROWS[0].replace("y", " TRUE "), ROWS[1].replace(",N,", ",,"), ROWS[2]]), "utf-8"),
    ],
    ids=["plain", "CRLF and BOM", "semicolons", "UTF-16 and tabs", "empty rows", "short row", "only the class"],
)
def test_what_spreadsheets_make_of_it_is_read(tmp_path: Path, text: str, encoding: str) -> None:
    assert read_ticks(written(tmp_path, text, encoding), CLASSES) == TICKED


def test_columns_may_be_moved_added_and_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, f"right,remark,teacher,key,number\nx,blurred,cat,{A},1\n")
    assert read_ticks(path, CLASSES) == [Tick(1, "", A, "cat", "", True)]


@pytest.mark.parametrize("word", sorted(YES | NO))
def test_every_word_for_yes_and_no(tmp_path: Path, word: str) -> None:
    path = written(tmp_path, f"{HEADER}1,a.jpg,{A},cat,91.2,{word.upper()},\n")
    assert read_ticks(path, CLASSES)[0].right is (word in YES)


SAID = "; the classes are cat, fire engine, Löwe"


@pytest.mark.parametrize(
    ("row", "what", "fix"),
    [
        (f"1,a.jpg,{A},cat,9,maybe,", "right is 'maybe', neither yes nor no",
         "write y (or yes, x, 1, true, right), n (or no, 0, false, wrong), or nothing"),
        (f"1,a.jpg,{A},cat,9,n,fire engin", "class is 'fire engin', which is no class (did you mean 'fire engine'?)",
         f"write a class name, or nothing{SAID}"),
        (f"1,a.jpg,{A},dog,9,n,", "teacher is 'dog', which is no class", f"these ticks are of a run with other classes{SAID}"),
        (f"1,a.jpg,{A},cat,9,y,Löwe", "right is 'y' and class 'Löwe': the teacher's 'cat' cannot be right then",
         "change one of the two"),
        (f"1,a.jpg,{A},cat,9,n,CAT", "right is 'n' and class 'cat': the teacher's 'cat' cannot be wrong then",
         "change one of the two"),
        ("1,a.jpg,1.2E+31,cat,9,y,", "key is '1.2E+31', not 32 hex digits",
         "take the column from the file that prgkit audit wrote; a spreadsheet must treat it as text"),
        (f"one,a.jpg,{A},cat,9,y,", "number is 'one'", "write the image's number on the sheet"),
        (f"2,a.jpg,{B},cat,9,y,", f"image 2 is the same as image 1: both have the key {B}", "keep one of the two rows"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: str, what: str, fix: str) -> None:
    path = written(tmp_path, f'{HEADER}1,"a\nb.jpg",{B},cat,91.2,y,\n{row}\n')
    with pytest.raises(ImagesError) as caught:
        read_ticks(path, CLASSES)
    assert str(caught.value) == f"{what}\n  where: {path}, line 4\n  fix: {fix}"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "ticks.csv has no column number, key, teacher, right"),
        (b"number,key,teacher\n", "ticks.csv has no column right"),
        ("number,key,teacher,right\nLöwe".encode("latin-1"), "the ticks in ticks.csv cannot be read: it is not UTF-8 text"),
        (b"number,key,teacher,right\n" + b"x" * 200_000, "ticks.csv is no CSV: field larger than field limit (131072)"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "ticks.csv"
    path.write_bytes(data)
    with pytest.raises(ImagesError) as caught:
        read_ticks(path, CLASSES)
    assert caught.value.what == what
    assert caught.value.fix


def test_ticks_go_with_the_image_as_far_as_they_hold() -> None:
    now = [
        replace(BLANK[0], number=7, teacher="Löwe"),  # it was a cat: this answer is wrong
        replace(BLANK[1], teacher="fire engine"),  # it was said to be one: now right
        replace(BLANK[2], teacher="Löwe"),  # it is no cat, and maybe a lion
        Tick(9, "new.jpg", "d" * 32, "cat", "1.0"),
    ]
    known = carried(now, [*TICKED[:2], replace(BLANK[2], right=False)])
    assert [(tick.number, tick.right, tick.named) for tick in known] == [
        *((7, False, "cat"), (2, True, None), (3, None, None), (9, None, None)),
    ]
    assert carried(BLANK, TICKED) == TICKED
    assert carried(BLANK[2:], [replace(BLANK[2], right=False)]) == [replace(BLANK[2], right=False)]


def test_what_is_set_aside_has_a_name_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, "first")
    assert set_aside(path).name == "ticks-1.csv"
    path.write_text("second")
    assert set_aside(path).name == "ticks-2.csv"
    assert [(tmp_path / f"ticks-{n}.csv").read_text() for n in (1, 2)] == ["first", "second"]


def test_no_tick_is_lost_when_the_run_s_travel(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "run.csv", tmp_path / "bundle" / "ticks.csv"

    def after(source: list[Tick] | None, target: list[Tick] | None) -> list[str]:
        for path, ticks in ((ours, source), (theirs, target)):
            path.unlink(missing_ok=True)
            if ticks is not None:
                write_ticks(path, ticks)
        bring_ticks(ours, theirs, CLASSES)
        return sorted(path.name for path in theirs.parent.glob("*"))

    assert after(None, None) == []
    assert after(BLANK, None) == ["ticks.csv"]
    assert after(TICKED, BLANK) == ["ticks.csv"]
    assert read_ticks(theirs, CLASSES) == TICKED
    assert after(BLANK, TICKED) == ["ticks.csv"]  # ticked there alone
    assert read_ticks(theirs, CLASSES) == TICKED
    other = [replace(BLANK[0], right=False), *BLANK[1:]]
    assert after(other, TICKED) == ["ticks-1.csv", "ticks.csv"]
    assert read_ticks(theirs, CLASSES) == other
    assert read_ticks(theirs.with_name("ticks-1.csv"), CLASSES) == TICKED
