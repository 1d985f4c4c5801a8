"""How people write the ten digits: skeletons of pen strokes, drawn from knowledge of handwriting and from no data set.

A skeleton is a list of strokes and a stroke a list of (x, y) points in the unit square, y pointing down. The pen
follows a smooth curve through the points; a point given twice is a sharp corner. ``write`` bends a skeleton the way
hands differ.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Skeleton = list[list[tuple[float, float]]]

# How wide each digit is usually written, as a fraction of its height.
ASPECT = (0.68, 0.30, 0.68, 0.62, 0.70, 0.66, 0.60, 0.64, 0.60, 0.60)


def write(digit: int, rng: np.random.Generator, *, looseness: float = 1.0) -> list[Points]:
    """Write one digit in a random hand: its strokes as dense lists of points, height about 1."""
    skeletons = SKELETONS[digit]
    skeleton = skeletons[rng.integers(len(skeletons))]
    wobble = looseness * rng.uniform(0.012, 0.05)
    aspect = ASPECT[digit] * math.exp(looseness * rng.normal(0.0, 0.22))
    strokes = [_curve(_shifted(stroke, rng, wobble)) for stroke in skeleton]
    return _bent(strokes, rng, aspect=aspect, looseness=looseness)


def _shifted(stroke: list[tuple[float, float]], rng: np.random.Generator, wobble: float) -> Points:
    """Move every point of a stroke a little, a corner (the same point twice) as one, and the stroke as a whole."""
    moved = {point: rng.normal(0.0, wobble, 2) for point in stroke}
    whole = rng.normal(0.0, 0.4 * wobble, 2)
    return np.array([np.array(point) + moved[point] + whole for point in stroke])


def _curve(points: Points) -> Points:
    """Follow a Catmull-Rom spline through the points."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0.0, 1.0, 10)[:, None]
    pieces = []
    for i in range(len(points) - 1):
        p0, p1, p2, p3 = padded[i : i + 4]
        pieces.append(
            p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
        )  # [10, 2]
    return np.concatenate(pieces)


def _bent(strokes: list[Points], rng: np.random.Generator, *, aspect: float, looseness: float) -> list[Points]:
    """Apply one smooth random warp, slant and rotation to all strokes together."""
    waves = [
        (rng.uniform(-1.0, 1.0, 2), rng.uniform(0, 2 * math.pi), rng.normal(0.0, 0.028 * looseness, 2))
        for _ in range(3)
    ]
    # Mostly upright, as the forms' reader straightened slanted writing; some stay slanted.
    slant = rng.normal(0.0, 0.10 if rng.random() < 0.7 else 0.28)
    angle = math.radians(rng.normal(0.0, 5.0 * looseness))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    bent = []
    for stroke in strokes:
        warped = stroke.copy()
        for frequency, phase, amplitude in waves:
            warped += np.sin(2 * math.pi * (stroke @ frequency) + phase)[:, None] * amplitude
        warped = (warped - 0.5) * np.array([aspect, 1.0])
        warped[:, 0] -= slant * warped[:, 1]
        bent.append(warped @ turn.T)
    return bent


# In hundredths: "x,y x,y ...", strokes separated by " / ".
WRITTEN: tuple[tuple[str, ...], ...] = (
    (  # 0
        "50,0 15,20 3,50 15,82 50,100 85,82 97,50 85,20 50,0",
        "60,2 20,15 3,50 20,88 50,100 85,80 97,45 75,10 35,5",
        "40,0 8,30 8,70 40,100 80,85 95,50 80,12 50,2 35,12",
        "50,0 90,20 97,55 75,92 40,100 8,75 5,35 30,5 62,3",
        "55,0 12,25 2,65 30,98 70,90 98,55 90,20 60,2 50,10",
    ),
    (  # 1
        "50,0 50,100",
        "55,0 45,50 50,100",
        "5,28 60,0 60,0 60,100",
        "-50,42 60,0 60,0 60,100",
        "-20,25 20,18 55,0 55,0 50,100",
        "0,22 50,0 50,0 50,100 / -30,100 130,100",
        "50,0 50,100 / -30,100 130,98",
        "-50,35 50,0 50,0 55,98 / -40,98 150,100",
    ),
    (  # 2
        "8,25 28,4 60,0 90,22 75,52 40,80 3,100 3,100 97,100",
        "10,20 45,0 85,20 70,55 30,90 6,94 12,80 38,82 65,97 100,95",
        "10,22 50,0 90,25 60,62 5,98 5,98 40,90 70,100 100,90",
        "5,12 50,0 88,12 75,45 35,75 2,98 2,98 50,96 98,100",
        "20,30 20,8 55,0 85,18 80,42 50,72 15,100 15,100 90,95",
        "0,8 45,0 80,15 72,50 40,85 12,100 2,85 20,74 50,85 95,100",
    ),
    (  # 3
        "10,12 45,0 85,15 75,40 35,48 35,48 80,58 92,80 55,100 5,88",
        "6,2 90,2 90,2 40,42 40,42 85,55 90,82 50,100 3,88",
        "10,10 50,0 86,20 60,45 35,48 65,52 94,75 60,100 6,92",
        "12,5 60,0 85,20 55,44 35,42 50,50 90,62 85,90 40,100 5,95",
        "5,20 30,2 75,5 80,32 40,45 40,45 90,55 95,85 50,100 10,80",
        "15,0 70,5 80,25 55,42 55,42 85,65 65,90 10,100",
    ),
    (  # 4
        "22,0 5,58 5,58 97,56 / 72,22 66,100",
        "70,100 70,0 70,0 3,68 3,68 98,68",
        "30,0 3,60 3,60 95,60 / 80,0 72,100",
        "10,2 6,40 30,56 88,48 / 88,0 82,100",
        "55,0 2,66 2,66 98,60 / 60,36 55,100",
        "10,0 10,50 10,50 85,50 / 85,0 85,100",
        "45,0 2,45 10,52 98,45 / 70,20 45,100",
        "85,0 5,60 5,60 95,62 / 85,0 75,100",
    ),
    (  # 5
        "20,2 14,43 14,43 50,36 90,60 78,92 40,100 4,90 / 20,2 95,2",
        "95,2 20,2 20,2 14,45 14,45 55,38 90,62 75,93 35,100 4,92",
        "92,0 40,3 15,25 40,45 85,65 70,95 5,98",
        "30,5 25,40 25,40 70,50 80,78 50,100 8,95 / 30,4 100,0",
        "90,4 15,0 15,0 10,50 10,50 75,50 90,75 60,100 2,100",
        "35,10 20,45 20,45 60,45 75,75 40,98 0,85 / 35,8 98,5",
    ),
    (  # 6
        "75,0 35,20 8,60 20,92 50,100 87,85 82,60 50,52 14,72",
        "60,0 16,50 8,80 40,100 82,88 82,65 50,57 10,78",
        "88,12 62,0 25,22 6,65 25,97 60,100 92,80 75,55 40,52 10,72",
        "45,0 14,45 8,85 40,100 74,88 68,70 38,66 10,84",
        "30,0 8,40 10,85 45,100 85,88 85,60 50,50 12,65",
        "90,0 45,30 12,70 30,100 70,95 80,72 55,58 20,75 25,90",
    ),
    (  # 7
        "4,3 95,3 95,3 35,100",
        "4,3 95,3 95,3 40,100 / 22,50 92,47",
        "6,20 8,3 8,3 92,3 92,3 40,100",
        "5,8 50,5 95,0 95,0 60,40 45,100",
        "6,18 8,3 8,3 92,3 92,3 45,100 / 20,52 95,48",
        "2,20 20,3 50,10 95,2 95,2 55,50 40,100",
        "5,5 60,2 85,12 70,50 50,100 / 25,50 100,50",
        "2,12 50,6 90,4 90,4 70,100 / 35,55 105,50",
    ),
    (  # 8
        "85,15 50,0 15,20 45,45 87,75 50,100 10,78 50,48 82,22 78,8",
        "50,0 16,20 50,45 84,20 50,0 / 50,45 8,72 50,100 92,72 50,45",
        "92,5 45,2 12,20 50,48 88,78 45,100 10,80 50,50 90,0",
        "50,47 15,22 50,0 85,22 50,47 10,78 50,100 90,75 50,47",
        "75,5 30,5 25,30 60,50 80,80 45,100 18,82 50,50 85,25 70,4",
        "60,45 20,30 35,2 75,5 75,30 30,60 15,85 50,100 75,80 55,45",
    ),
    (  # 9
        "86,13 50,0 12,22 35,50 85,20 85,20 80,100",
        "86,15 50,0 10,22 35,52 86,25 90,50 75,90 40,100 8,92",
        "88,10 50,0 15,22 40,48 88,12 88,12 70,60 35,100",
        "75,30 35,42 15,18 50,0 82,15 85,50 70,100",
        "50,0 8,25 40,55 90,35 80,8 50,0 / 88,20 85,60 78,100",
        "80,5 35,2 10,25 30,42 75,30 85,8 90,60 60,97 20,98",
    ),
)


def _parsed(text: str) -> Skeleton:
    points = [[point.split(",") for point in stroke.split()] for stroke in text.split("/")]
    return [[(int(x) / 100, int(y) / 100) for x, y in stroke] for stroke in points]


SKELETONS: tuple[list[Skeleton], ...] = tuple([_parsed(text) for text in texts] for texts in WRITTEN)
