"""The report's section on single classes."""

from __future__ import annotations

from html import escape

from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.html import cell, grid, heading, section
from prgkit.evaluate.report.plots.charts import Share, class_shares
from prgkit.evaluate.report.schema import ClassShare, PerClass, Report

MOST_AT_ONCE = 20  # so many classes are shown whole; of more, the worst and a few of the best

WORST, BEST = 12, 4

FEW = 50  # images a class, below which intervals are wider than most differences


def worst_first(found: PerClass) -> list[ClassShare]:
    """Return the classes that have images, the student's worst first; of equal ones, that with more images."""
    asked = [one for one in found.classes if one.images]
    return sorted(asked, key=lambda one: (one.student or 0.0, -one.images))


def shown(found: PerClass) -> tuple[list[ClassShare], list[ClassShare]]:
    """Return the classes to show: all of a few, else the worst and the best, each from the worse to the better."""
    ordered = worst_first(found)
    return (ordered, []) if len(ordered) <= MOST_AT_ONCE else (ordered[:WORST], ordered[-BEST:])


def class_header(found: PerClass) -> list[str]:
    """Return the columns of the table; nobody but the student is judged where there are no labels."""
    return [
        "class",
        "images",
        *(["student", "95 %", "teacher", "95 %"] if labelled(found) else ["same answer", "95 %"]),
    ]


def class_line(found: PerClass, one: ClassShare) -> list[str]:
    """Return the cells of a class."""
    judged = [(one.student, one.student_interval), (one.teacher, one.teacher_interval)][: 2 if labelled(found) else 1]
    figures = [(formatting.percent(share), formatting.interval(bounds)) for share, bounds in judged]
    return [one.name, f"{one.images:,}", *(figure for pair in figures for figure in pair)]


def labelled(found: PerClass) -> bool:
    """Return whether the classes are those of labels, not of the teacher's answers."""
    return found.measure == "recall"


def class_about(found: PerClass) -> str:
    """Return what the shares are shares of, and how few images they rest on."""
    counts = [one.images for one in found.classes if one.images]
    empty = len(found.classes) - len(counts)
    if labelled(found):
        said = f"The share of each class's images that {found.artifact} and the teacher name right (recall)"
    else:
        said = f"Of the images that the teacher gives a class, the share to which {found.artifact} gives the same"
    size = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    chance = ", so few that much of the order is chance" if sum(counts) < FEW * len(counts) else ""
    none = f" {empty:,} of {len(found.classes):,} classes have none here." if empty else ""
    return f"{said}, the worst first. A class has {size} images{chance}.{none}"


def pair_header(found: PerClass) -> list[str]:
    """Return the columns of the table of pairs."""
    return ["class", "taken for", "images", "teacher too"] if labelled(found) else ["teacher", "student", "images"]


def pair_lines(found: PerClass) -> list[list[str]]:
    """Return a line for each pair of classes that are taken for each other."""
    shown = 2 if labelled(found) else 1
    return [[one.name, one.answer, *[f"{one.images:,}", f"{one.teacher_too:,}"][:shown]] for one in found.pairs]


def classes_section(report: Report) -> str:
    """Return the page's section: the classes as marks with intervals, the pairs, and every figure to unfold."""
    found = report.per_class
    if not found or not worst_first(found):
        return ""
    groups = [[class_share(one) for one in group] for group in shown(found) if group]
    chart = class_shares(groups, left_out=len(worst_first(found)) - sum(map(len, groups)))
    body = (
        f'<div class="plots"><div>{chart}</div><div>{mistakes(found)}</div></div>'
        f"<details><summary>Every class in figures</summary>{every_class(found)}</details>"
    )
    return section("Class by class", class_about(found), body)


def class_share(one: ClassShare) -> Share:
    """Return a class as a line of the chart."""
    assert one.student is not None  # it has images
    assert one.student_interval is not None
    return Share(one.name, one.images, one.student, one.student_interval, one.teacher)


def mistakes(found: PerClass) -> str:
    """Return the table of pairs, or that there is none."""
    lines = pair_lines(found)
    if not lines:
        return '<p class="about">No image is answered otherwise.</p>'
    names = [name.capitalize() for name in pair_header(found)]
    rows = [
        f'<tr><th scope="row">{escape(one)}</th><td class="name">{escape(other)}</td>'
        + "".join(cell(name, figure, "") for name, figure in zip(names[2:], figures, strict=True))
        + "</tr>"
        for one, other, *figures in lines
    ]
    header = heading(names[0]) + f'<th scope="col" class="name">{names[1]}</th>' + "".join(map(heading, names[2:]))
    title = "Most frequent mistakes" if labelled(found) else "Most frequent differences"
    return f"<h3>{title}</h3>{grid(header, rows, kind='wrapped')}"


def every_class(found: PerClass) -> str:
    """Return the table of all classes, an interval under its share."""
    rows = []
    for one in worst_first(found):
        name, images, *figures = class_line(found, one)
        shares = "".join(cell("", share, bounds) for share, bounds in zip(figures[::2], figures[1::2], strict=True))
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cell("", images, "")}{shares}</tr>')
    names = ["class", "images", *class_header(found)[2::2]]
    return grid("".join(heading(name.capitalize()) for name in names), rows, kind="wrapped")
