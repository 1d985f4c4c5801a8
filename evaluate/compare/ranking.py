"""How a ranking of untrained students reads, and whether its order is that of their measured accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prgkit.config.image_size import size_told
from prgkit.evaluate.compare.aggregate import spelled
from prgkit.evaluate.report.formatting import counted

CANDIDATES = (
    *("repvit_m0_9", "repvit_m1_0", "repvit_m1_1", "repvit_m1_5", "repvit_m2_3"),
    *("efficientnet_lite0", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2"),
)
# What could tell beforehand which student will be best: whether more of it is better, and its name.
PREDICTORS = {
    "score": (1, "score"),
    "relations": (-1, "relations alone"),
    "semantics": (-1, "semantics alone"),
    "parameters": (1, "more parameters"),
    "macs": (1, "more MACs"),
}


def candidates(student: str) -> list[str]:
    """Return the students to rank where none is named: the recipe's own, then the two families."""
    return list(dict.fromkeys([student, *CANDIDATES]))


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return for each predictor its rank correlation with what the trained students among ``rows`` came to."""
    trained = [row for row in rows if row["measured"]]
    reached = [row["measured"]["mean"] for row in trained]
    return {
        name: rank_correlation([sign * mean_of(row[name]) for row in trained], reached)
        for name, (sign, _) in PREDICTORS.items()
    }


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> dict[str, float | None]:
    """Return Spearman's rho and Kendall's tau-b of n pairs, ties shared; None where one side is all the same."""
    signs = [np.sign(np.subtract.outer(side, side)) for side in (one, other)]  # [n, n]
    if not all(side.any() for side in signs):
        return {"spearman": None, "kendall": None}
    # A row's sum is twice the rank among the others, up to a constant; ranks of mean 0 correlate by their products.
    return {"spearman": cosine(*(side.sum(axis=1) for side in signs)), "kendall": cosine(*signs)}


def cosine(one: Any, other: Any) -> float:
    """Return the cosine of two arrays of the same shape."""
    return float((one * other).sum() / math.sqrt((one * one).sum() * (other * other).sum()))


def mean_of(value: Any) -> float:
    """Return a figure, or the mean of one that has a spread."""
    return float(value["mean"] if isinstance(value, dict) else value)


def headline(found: dict[str, Any]) -> str:
    """Return what was ranked in a sentence."""
    sizes = " and ".join(map(str, sorted(set(found["batches"]))))
    return (
        f"{counted(len(found['rows']), 'untrained student')} at {size_told(found['image_size'])} px, "
        f"{counted(len(found['seeds']), 'initialisation')}, {len(found['batches'])} "
        f"batch{'' if len(found['batches']) == 1 else 'es'} of {sizes} images; the most like the teacher first"
    )


def header(found: dict[str, Any]) -> list[str]:
    """Return the names of the columns."""
    names = ["student", "score", "relations", "semantics", "parameters M", "MACs M"]
    return [*names, *(["top-1 %" if found["measured"]["of"] == "top1" else "agreement %"] if found["measured"] else [])]


def lines(found: dict[str, Any]) -> list[list[str]]:
    """Return the cells of each row."""
    return [
        [
            row["student"],
            f"{row['score']['mean']:.3f} ± {row['score']['deviation']:.3f}",
            *(f"{row[part]['mean']:.3f}" for part in ("relations", "semantics")),
            *(f"{row[part] / 1e6:,.1f}" for part in ("parameters", "macs")),
            *([spelled(row["measured"])] if found["measured"] else []),
        ]
        for row in found["rows"]
    ]


def about(found: dict[str, Any]) -> list[str]:
    """Return how to read the table, and how much of it is proved."""
    said = [
        "Score: minus the two distances to the teacher, of sample relations and of class activations, before training; "
        "mean ± standard deviation over initialisations."
    ]
    if not found["measured"]:
        return [*said, "None of these students is trained here yet: nothing shows that the best score is the best one."]
    what = "top-1" if found["measured"]["of"] == "top1" else "agreement with the teacher"
    told = "; ".join(f"{PREDICTORS[key][1]} {signed(both)}" for key, both in found["correlations"].items())
    count = sum(row["measured"] is not None for row in found["rows"])
    said.append(
        f"Rank correlation with the measured {what} of {found['measured']['row']} (Spearman, Kendall; "
        f"{counted(count, 'student')}): {told}."
    )
    return [*said, proof(count)]


def signed(both: dict[str, float | None]) -> str:
    """Return ``+0.60, +0.47``."""
    return ", ".join("–" if value is None else f"{value:+.2f}" for value in both.values())


def proof(students: int) -> str:
    """Say how far a rank correlation of so many students can be chance."""
    beyond = 1.96 / math.sqrt(students - 1) if students > 1 else math.inf  # Spearman's, normally approximated
    if beyond > 1:
        return f"{students} student{' proves' if students == 1 else 's prove'} nothing: chance alone gives any order."
    return f"Of {students} students, chance alone gives a Spearman beyond ±{beyond:.2f} one time in twenty."
