"""How objectives and students stand to each other: means over seeds, their spread, paired differences, as three files.

Two cells are compared on the same images and the same seed, so what both find hard cancels out. With several seeds the
interval is Student's t over the seeds' differences, which holds the noise of training; with one seed it is over the
images alone, and says nothing of how another seed would have fared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from prgkit.config.image_size import size_told
from prgkit.evaluate.report.html import cell, document, grid, heading, section
from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.write import cell as plain
from prgkit.evaluate.report.write import grid as text_grid
from prgkit.storage.atomic import write_json, write_text

SCHEMA = "prgkit.comparison/1"
# Student's t at 97.5 % for 1 to 30 degrees of freedom; beyond, 2.042 is on the safe side.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
COLUMNS = {  # of a row's facts, as the terminal and Markdown call them, and as the page does
    "top1": ("top-1 %", "top-1"),
    "ratio": ("student / teacher", "of its teacher"),
    "agreement": ("agreement %", "agreement"),
    "held_out_agreement": ("held-out agreement %", "held-out agreement"),
    "novel": ("novel top-1 %", "top-1 of novel classes"),
    "harmonic": ("harmonic mean %", "harmonic mean"),
}


def standings(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the comparison of finished cells: a row for each student and objective, seeds together.

    The reference of the differences is PRG where it is among the rows, else the last row; of each student its own.
    """
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in cells:
        rows.setdefault((one["student"], one["row"]), []).append(one)
    names = list(dict.fromkeys(row for _, row in rows))
    reference = "prg" if "prg" in names else names[-1]
    return {
        "schema": SCHEMA,
        "reference": reference,
        "labelled": cells[0]["labels"] is not None,
        "novel": cells[0].get("novel"),
        **{key: shared(cells, key) for key in ("images", "epochs", "image_size", "evaluation", "teacher")},
        "seeds": sorted({one["seed"] for one in cells}),
        "rows": [
            summary(student, row, mine, rows.get((student, reference)) if row != reference else None)
            for (student, row), mine in rows.items()
        ],
    }


def shared(cells: Sequence[dict[str, Any]], key: str) -> Any:
    """Return what all cells have in common, or every value where they differ."""
    values = [value for place, one in enumerate(cells) if (value := one[key]) not in [o[key] for o in cells[:place]]]
    return values[0] if len(values) == 1 else values


def summary(
    student: str, row: str, mine: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """Return a row: mean and standard deviation over seeds, and how far it lies from the reference."""
    return {
        "student": student,
        "row": row,
        "objective": mine[0]["objective"],
        "seeds": [one["seed"] for one in mine],
        "top1": spread([one["top1"] for one in mine]),
        "ratio": spread([ratio(one) for one in mine]),
        "agreement": spread([one["agreement_teacher"] for one in mine]),
        "held_out_agreement": spread([one["selected"]["agreement"] for one in mine]),
        "images_per_s": spread([one["images_per_s"] for one in mine]),
        "novel": spread([one["novel"]["top1"] if one.get("novel") else None for one in mine]),
        "harmonic": spread([harmonic(one) for one in mine]),
        "difference": difference(mine, reference) if reference else None,
    }


def ratio(one: dict[str, Any]) -> float | None:
    """Return what the student keeps of its teacher's accuracy, in percent; None where there is none to keep."""
    top1, teacher = one["top1"], one["teacher"]["top1"]
    return 100 * top1 / teacher if top1 is not None and teacher else None


def harmonic(one: dict[str, Any]) -> float | None:
    """Return the harmonic mean of top-1 on base and novel classes, in percent; None where none were novel."""
    base, novel = one["top1"], (one.get("novel") or {}).get("top1")
    return 2 * base * novel / (base + novel) if base and novel else None


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Return the mean and the standard deviation of a sample (None for one value); None where any is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)), "deviation": deviation, "values": known}


def difference(mine: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return mine minus reference in points of top-1 (of agreement where there are no labels), paired, with 95 %."""
    pairs = [(one, other) for one in mine for other in reference if one["seed"] == other["seed"]]
    if not pairs:
        return None
    what = "top1" if pairs[0][0]["labels"] is not None else "agreement_teacher"
    by_seed = [one[what] - other[what] for one, other in pairs]
    mean, count = float(np.mean(by_seed)), len(by_seed)
    if count > 1:
        half = T[min(count, len(T) + 1) - 2] * float(np.std(by_seed, ddof=1)) / math.sqrt(count)
        return {"of": what, "mean": mean, "interval": [mean - half, mean + half], "over": "seeds"}
    if what == "agreement_teacher":
        return {"of": what, "mean": mean, "interval": None, "over": None}
    one, other = pairs[0]
    labels = np.array(one["labels"])
    by_image = 100.0 * ((np.array(one["answers"]) == labels) * 1.0 - (np.array(other["answers"]) == labels) * 1.0)
    half = 1.96 * float(np.std(by_image, ddof=1)) / math.sqrt(len(by_image))
    return {"of": what, "mean": mean, "interval": [mean - half, mean + half], "over": "images"}


def write_standings(folder: Path, found: dict[str, Any]) -> None:
    """Write compare.json, compare.md and compare.html into ``folder``; each appears whole or not at all."""
    write_text(folder / "compare.md", markdown(found))
    write_text(folder / "compare.html", html(found))
    write_json(folder / "compare.json", found)


def headline(found: dict[str, Any]) -> str:
    """Return what was compared in a sentence: sizes first, since no figure means anything without them."""
    teacher, seeds = found["teacher"], len(found["seeds"])
    said = f"{told(found['images'])} images, {told(found['epochs'])} epoch{'' if found['epochs'] == 1 else 's'}, "
    said += f"{sizes_told(found['image_size'])} px, {seeds} seed{'' if seeds == 1 else 's'}"
    if found["labelled"] and isinstance(teacher, dict):
        said += (
            f"; {told(found['evaluation']['images'])} labelled images; the teacher is right on {teacher['top1']:.1f} %"
        )
        said += f" of them, with uniform prompts on {teacher['top1_uniform']:.1f} %"
    return said


def sizes_told(size: Any) -> str:
    """Return the students' input size, or the several sizes of a comparison: 224, or [height, width], or a list."""
    several = isinstance(size, list) and (len(size) != 2 or any(isinstance(one, list) for one in size))
    return ", ".join(map(size_told, size)) if several else size_told(size)


def told(value: Any) -> str:
    """Return a size, or the several sizes of a comparison."""
    return ", ".join(f"{one:,}" for one in value) if isinstance(value, list) else f"{value:,}"


def columns(found: dict[str, Any]) -> list[str]:
    """Return which facts of a row are shown: those of novel classes where any were asked for."""
    return [key for key in COLUMNS if found["novel"] or key not in ("novel", "harmonic")]


def header(found: dict[str, Any]) -> list[str]:
    """Return the head of the table in the terminal and in Markdown."""
    return ["student", "objective", *(COLUMNS[key][0] for key in columns(found)), "difference"]


def lines(found: dict[str, Any]) -> list[list[str]]:
    """Return the cells of each row."""
    return [
        [
            row["student"],
            row["row"],
            *(spelled(row[key]) for key in columns(found)),
            spelled_difference(row["difference"]),
        ]
        for row in found["rows"]
    ]


def spelled(value: dict[str, Any] | None) -> str:
    """Return ``43.4 ± 0.3``, or the mean alone of one seed."""
    if value is None:
        return "–"
    return f"{value['mean']:.1f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.1f}")


def spelled_difference(value: dict[str, Any] | None) -> str:
    """Return ``-1.2 [-2.0, -0.4]``."""
    if value is None:
        return "–"
    interval = value["interval"]
    return f"{value['mean']:+.1f}" + (f" [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else "")


def about(found: dict[str, Any]) -> str:
    """Return how to read the table."""
    over = {row["difference"]["over"] for row in found["rows"] if row["difference"]}
    what = "Mean ± standard deviation over seeds. " if len(found["seeds"]) > 1 else ""
    how = {
        "seeds": "paired by seed, with its 95 % interval over seeds",
        "images": "paired by image, with its 95 % interval over images: another seed may differ by more",
    }
    paired = "; ".join(how[one] for one in ("seeds", "images") if one in over)
    difference = f"The difference is to {found['reference']}, in points{f', {paired}' if paired else ''}. "
    failed = "".join(f"Left out: {one['cell']} ({one['reason'].splitlines()[0]}). " for one in found.get("failed", []))
    if novel := found["novel"]:
        failed += (
            "Students were taught the base classes; the novel ones they know by class vectors alone: "
            f"{novel['classes']} classes, {novel['images']:,} images, of which the teacher is right on "
            f"{novel['teacher_top1']:.1f} %. "
        )
    names = {page["name"] for row in found["rows"] for page in row["objective"]}
    chosen = failed + "Checkpoints are chosen by agreement with the teacher on held-out images, never by a label"
    chosen += "; how the heads of dho vote, by a quarter of data.labelled." if "dho" in names else "."
    return what + (difference if over or len(found["rows"]) > 1 else "") + chosen


def markdown(found: dict[str, Any]) -> str:
    """Return the comparison as Markdown."""
    parts = [
        "# Comparison",
        plain(headline(found)),
        text_grid(header(found), lines(found), names=2),
        plain(about(found)),
        f"`{found.get('command', 'prgkit compare')}`",
    ]
    return "\n\n".join(parts) + "\n"


def html(found: dict[str, Any]) -> str:
    """Return the comparison as a page of its own."""
    shown = columns(found)
    units = ("", "", *("%" for _ in shown), "points")
    names = ("student", "objective", *(COLUMNS[key][1] for key in shown), "difference")
    head = "".join(heading(name, unit) for name, unit in zip(names, units, strict=True))
    body = [
        "<tr>" + "".join(cell(name, value, "") for name, value in zip(names, line, strict=True)) + "</tr>"
        for line in lines(found)
    ]
    parts = [
        f"<h1>Comparison</h1><p>{escape(headline(found))}</p>",
        section("Objectives and students", about(found), grid(head, body, kind="stacked")),
        *(section(title, "Means over seeds.", drawing) for title, drawing in heat_maps(found)),
        section("Command", "", f"<pre>{escape(found.get('command', 'prgkit compare'))}</pre>"),
    ]
    return document("prgkit compare", parts)


def heat_maps(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a titled heat map of each student over the two numbers that a sweep has changed; none without."""
    maps = []
    for student in dict.fromkeys(row["student"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["student"] == student and row["objective"][0]["name"] == "prg"]
        pages = [row["objective"][0] for row in rows]
        keys = [key for key in (pages[0] if pages else {}) if len({str(page[key]) for page in pages}) > 1]
        if len(keys) == 2:
            what = "top1" if found["labelled"] else "agreement"
            values = {(page[keys[1]], page[keys[0]]): row[what]["mean"] for page, row in zip(pages, rows, strict=True)}
            maps.append((f"{student}: {keys[0]} × {keys[1]}", heat_map(values, *keys)))
    return maps


def heat_map(values: dict[tuple[Any, Any], float], across: str, down: str) -> str:
    """Draw percentages over two parameters, the higher the darker."""
    columns, rows = (list(dict.fromkeys(pair[place] for pair in values)) for place in (1, 0))
    low, high = min(values.values()), max(values.values())
    left, top, height = 92.0, 44.0, 34.0
    width = (svg.WIDTH - left) / len(columns)
    parts = [svg.text(left, 14, f"{across} →", muted=True), svg.text(0, 34, f"{down} ↓", muted=True)]
    parts += [svg.text(left + (i + 0.5) * width, 34, str(column), anchor="middle") for i, column in enumerate(columns)]
    for r, row in enumerate(rows):
        parts.append(svg.text(left - 10, top + (r + 0.5) * height + 5, str(row), anchor="end"))
        for c, column in enumerate(columns):
            if (row, column) not in values:
                continue
            value = values[row, column]
            share = (value - low) / (high - low) if high > low else 0.5
            x, y = left + c * width, top + r * height
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" rx="3" '
                f'fill="{svg.colour(0)}" fill-opacity="{0.08 + 0.5 * share:.2f}"/>'
            )
            parts.append(
                svg.text(x + width / 2, y + height / 2 + 5, f"{value:.1f}", anchor="middle", bold=value == high)
            )
    said = "; ".join(f"{down} {row}, {across} {column}: {value:.1f}" for (row, column), value in values.items())
    return svg.drawing(top + len(rows) * height + 4, parts, title=f"{across} and {down}", description=said)
