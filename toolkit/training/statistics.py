"""How far the teacher's pseudo-labels can be trusted, known before the first epoch and without a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prgkit.config.sections import TargetsConfig
from prgkit.storage.quality import (
    AdjustmentEffect,
    Balance,
    BeforeAfter,
    ClassCount,
    ContestedClass,
    CorrectionRow,
    Disagreement,
    Distribution,
    NearDuplicates,
    Outliers,
    Statistics,
    TeacherAgreement,
    TemplateAgreement,
)

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

NONE = "none"  # the name of no correction
BINS = 20
LISTED = 10  # of anything that is named one by one
CLOSE_CALL = 0.2  # a margin below it is a close call between two classes
DUPLICATE_SHARE = 0.02  # of the usual distance between two images of one pseudo-class: teachers spread differently
MOST_IMAGES = 20_000  # a sample says as much, and comparing all with all is quadratic
COMPARED = 256  # images that are compared with all others at once
FLAT = 0.85  # of ln C: a mean entropy from there on is nearly even odds; sound teachers stay below 0.6
ALIKE = 0.98  # a mean cosine from there on: what differs is less than what rounding and cropping change
ONE_CLASS = 0.95  # of the images
UNSURE = 0.6  # of ln C: a teacher that sees one class in everything should be sure of it
BY_CHANCE = 0.1  # Cohen's kappa of two views of one image
SAME = 1e-5  # between two unit vectors, a distance that is rounding alone
FENCE = 3.0  # interquartile ranges below the first quartile: "far out" (Tukey, 1977)


def compute_statistics(
    features: Floats,
    logits: Floats,
    *,
    cosines: Floats,
    templates: Sequence[TemplateAgreement],
    classes: Sequence[str],
    names: Sequence[str],
) -> Statistics:
    """Return what there is to know of pseudo-labels before anyone learns from them.

    Args:
        features: the teacher's unit features I [n, D] of the evaluation view.
        logits: its logits W [n, C], as the student will learn them.
        cosines: of each image [n] with the class nearest to it, before any correction.
        templates: how far each agrees with all of them.
        classes: C names.
        names: n names of images, for the ones worth a look.
    """
    probabilities = softmax(logits)  # [n, C]
    order = np.argsort(-logits, axis=1)[:, :2]  # the best and the second best class
    best, second = np.take_along_axis(probabilities, order, axis=1).T
    labels, margin = order[:, 0], best - second
    return Statistics(
        images=len(logits),
        confidence=distribution(best),
        close_calls=int((margin < CLOSE_CALL).sum()),
        balance=balance(labels, classes),
        confused=confused(order[margin < CLOSE_CALL], classes),
        near_duplicates=near_duplicates(features.astype(np.float32), labels, names),
        outliers=outliers(cosines, names),
        templates=list(templates),
    )


def template_agreement(alone: Labels, together: Labels, templates: Sequence[str]) -> list[TemplateAgreement]:
    """Return how often each of M templates names by itself [M, n] the class that all together name [n], uncorrected."""
    return [
        TemplateAgreement(template=template, agreement=percent(labels == together))
        for template, labels in zip(templates, alone, strict=True)
    ]


def find_doubts(features: Floats, logits: Floats, class_vectors: Floats, views: tuple[Labels, Labels]) -> list[str]:
    """Return why the teacher's answers look like chance, as those of random weights do; nothing for a sound teacher.

    Args:
        features: the teacher's unit features I [n, D] of the evaluation view.
        logits: its logits W [n, C], not adjusted.
        class_vectors: the class names as it reads them [C, D], unit vectors.
        views: the classes that it names for some images [m] in one view, and in another.
    """
    probabilities, classes = softmax(logits), logits.shape[1]
    entropy = float(-(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=1).mean() / np.log(classes))
    largest = float(np.bincount(logits.argmax(axis=1)).max() / len(logits))
    doubts = []
    if not entropy < FLAT:  # nor where it is no number
        doubts.append(f"nearly even odds for every class (mean entropy {entropy:.2f} of ln {classes})")
    if len(features) > 1 and (cosine := mean_cosine(features)) > ALIKE:
        doubts.append(f"nearly the same is seen in every image (mean cosine {cosine:.3f})")
    if (cosine := mean_cosine(class_vectors)) > ALIKE:
        doubts.append(f"nearly the same is read in every class name (mean cosine {cosine:.3f})")
    if largest > ONE_CLASS and entropy > UNSURE:
        doubts.append(
            f"one class is named for {100 * largest:.0f} % of the images, with a mean entropy of {entropy:.2f}"
        )
    if len(views[0]) >= 50 and largest <= ONE_CLASS and (agreement := kappa(*views)) < BY_CHANCE:
        doubts.append(f"two views of one image agree hardly more often than by chance (kappa {agreement:.2f})")
    return doubts


def mean_cosine(vectors: Floats) -> float:
    """Return the mean cosine of two different ones of n unit vectors [n, D]."""
    count = len(vectors)
    return float(((vectors.sum(axis=0, dtype=np.float64) ** 2).sum() - count) / (count * (count - 1)))


def kappa(first: Labels, second: Labels) -> float:
    """Return Cohen's kappa of two namings [n] of the same images: 0 for chance, 1 where they are equal."""
    most = int(max(first.max(), second.max())) + 1
    shares = [np.bincount(labels, minlength=most) / len(labels) for labels in (first, second)]
    chance = float(shares[0] @ shares[1])
    return 1.0 if chance == 1 else (float((first == second).mean()) - chance) / (1 - chance)


def find_read_as_one(class_vectors: Floats, classes: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of classes whose vectors [C, D] are one and the same, at most LISTED."""
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(classes), 1024):
        cosines = np.triu(class_vectors[start : start + 1024] @ class_vectors[start:].T, k=1)
        for row, column in zip(*np.nonzero(cosines > 1 - SAME), strict=True):
            if np.abs(class_vectors[start + row] - class_vectors[start + column]).max() < SAME:
                pairs.append((classes[start + row], classes[start + column]))
        if len(pairs) >= LISTED:
            break
    return pairs[:LISTED]


def summarise(statistics: Statistics) -> list[tuple[str, str]]:
    """Return the few lines that a person reads before training starts."""
    spread, alike, far = statistics.balance, statistics.near_duplicates, statistics.outliers
    close = 100 * statistics.close_calls / statistics.images
    lines = [("doubtful", f"looks like chance: {doubt}") for doubt in statistics.doubts]
    if whole := statistics.sampled_from:
        lines.append(("a sample", f"{statistics.images:,} of {whole:,} images: all counts are of these"))
    if statistics.read_as_one:
        lines.append(("one vector", ", ".join(f"{a} / {b}" for a, b in statistics.read_as_one[:3])))
    if statistics.correction:
        lines.append(("correction", summarise_adjustment(statistics.correction)))
    if statistics.teachers:
        lines += summarise_disagreement(statistics.teachers)
    if statistics.teacher_shares:
        lines.append(("shares", summarise_shares(statistics.teacher_shares)))
    lines += [
        ("confidence", f"{statistics.confidence.mean:.2f} on average, {close:.0f} % of the images are close calls"),
        (
            "balance",
            f"{spread.smallest.count:,} ({spread.smallest.class_name}) to {spread.largest.count:,} "
            f"({spread.largest.class_name}) images a class; {spread.uniform:,.0f} would be even",
        ),
    ]
    if weights := statistics.class_weights:
        least, most = min(weights, key=weights.__getitem__), max(weights, key=weights.__getitem__)
        lines.append(("weights", f"an image counts {weights[least]:.2f} ({least}) to {weights[most]:.2f} ({most})"))
    if spread.unmatched:
        lines.append(("no image", f"{len(spread.unmatched)} classes, e.g. {', '.join(spread.unmatched[:5])}"))
    if statistics.confused:
        lines.append(("confused", ", ".join(f"{a} / {b} ({count:,})" for a, b, count in statistics.confused[:3])))
    if alike.images:
        example = "".join(f", e.g. {one} = {other}" for one, other, _ in alike.pairs[:1])  # none where it was published
        lines.append(("near copies", f"{alike.images:,} of {alike.compared:,} images{example}"))
    if far.count:
        example = "".join(f", e.g. {name}" for name, _ in far.lowest[:1])
        lines.append(("outliers", f"{far.count:,} images fit no class{example}"))
    worst = min(statistics.templates, key=lambda template: template.agreement)
    if len(statistics.templates) > 1:
        lines.append(("odd prompt", f"{worst.template!r} agrees with the others on {worst.agreement:.1f} %"))
    return lines


def correction_cells(rows: Sequence[CorrectionRow]) -> list[list[str]]:
    """Return the comparison of corrections as text: a line of headings, and one for each correction."""
    others = [row.name for row in rows if row.name != NONE]
    heading = ["", "changed", "a class holds", "even classes", "two views", *(f"as {name}" for name in others)]
    cells = [heading + ["ticked"] * any(row.ticked is not None for row in rows)]
    for row in rows:
        line = [
            f"{row.name} (used)" if row.used else row.name,
            f"{row.changed:.1f} %",
            f"{100 * min(row.mass):.1f} to {100 * max(row.mass):.1f} %",
            f"{row.effective_classes:.1f}",
            f"{row.two_views:.1f} %",
        ]
        line += [f"{row.agreement[name]:.1f} %" if name in row.agreement else "" for name in others]
        if row.ticked is not None:
            right, perhaps, images = row.ticked
            line.append(f"{right} of {images}" if right == perhaps else f"{right} to {perhaps} of {images}")
        cells.append(line)
    return cells


def corrections_table(rows: Sequence[CorrectionRow]) -> list[str]:
    """Return the comparison of corrections as aligned lines, for a person to read before training starts."""
    cells = correction_cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"{line[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in cells
    ]


def summarise_shares(shares: Mapping[str, float]) -> str:
    """Say how much of the answers is each teacher's."""
    return ", ".join(f"{teacher} {100 * share:.1f} %" for teacher, share in shares.items()) + " of the answers"


def summarise_adjustment(effect: AdjustmentEffect) -> str:
    """Say what was done to the teacher's logits."""
    parts, varied = [], effect.effective_classes
    names = [name for name in (effect.refine, f"debias {effect.debias}" if effect.debias else None) if name]
    if names:
        parts.append(
            f"{' and '.join(names)} changed {effect.changed:,} of {effect.images:,} "
            f"pseudo-labels, as varied as {varied.after:.1f} even classes, before {varied.before:.1f}"
        )
    if effect.entropy is not None:
        parts.append(f"temperature {effect.temperature:.3g}")
    return "; ".join(parts)


def summarise_disagreement(disagreement: Disagreement) -> list[tuple[str, str]]:
    """Say how far several teachers differ."""
    agreeing = ", ".join(f"{teacher.teacher} on {teacher.agreement:.1f} %" for teacher in disagreement.average)
    differ = f"they name different classes on {disagreement.differ:.1f} % of the images"
    lines = [("teachers", f"{differ}; with their average agree {agreeing}")]
    if disagreement.classes:
        contested = [f"{one.class_name} ({one.contested:,} of {one.named:,})" for one in disagreement.classes[:3]]
        lines.append(("contested", f"{', '.join(contested)} of the images that a teacher gives to that class"))
    return lines


def balance(labels: Labels, classes: Sequence[str]) -> Balance:
    """Return images per pseudo-class."""
    counts = np.bincount(labels, minlength=len(classes))
    largest, smallest = (
        ClassCount(class_name=classes[int(label)], count=int(counts[label]))
        for label in (counts.argmax(), counts.argmin())
    )
    return Balance(
        counts=counts.tolist(),
        uniform=len(labels) / len(classes),
        largest=largest,
        smallest=smallest,
        unmatched=[name for name, count in zip(classes, counts, strict=True) if count == 0],
        effective_classes=effective_classes(counts),
    )


def effective_classes(counts: Labels) -> float:
    """Return exp(entropy) of images per class [C]: as many evenly filled classes would be as varied."""
    shares = counts[counts > 0] / counts.sum()
    return round(float(np.exp(-(shares * np.log(shares)).sum())), 2)


def adjustment_effect(before: Floats, after: Floats, config: TargetsConfig, *, temperature: float) -> AdjustmentEffect:
    """Return what a correction did to the pseudo-labels: logits W [n, C] before and after it."""
    labels = [logits.argmax(axis=1) for logits in (before, after)]
    varied = [effective_classes(np.bincount(some, minlength=before.shape[1])) for some in labels]
    return AdjustmentEffect(
        refine=config.refine,
        debias=config.debias,
        entropy=config.entropy,
        temperature=temperature,
        changed=int((labels[0] != labels[1]).sum()),
        images=len(before),
        effective_classes=BeforeAfter(before=varied[0], after=varied[1]),
    )


def measure_disagreement(
    alone: Labels, together: Labels, *, teachers: Sequence[str], classes: Sequence[str]
) -> Disagreement:
    """Return how far K teachers differ: the classes that each names by itself [K, n], and that their average does [n].

    A class is contested on an image that some teacher gives to it and another does not.
    """
    differ = (alone != alone[0]).any(axis=0)  # [n]
    named, contested = np.zeros((2, len(classes)), dtype=np.int64)
    for place, mine in enumerate(alone):
        fresh = (alone[:place] != mine).all(axis=0)  # an image counts once for a class
        named += np.bincount(mine[fresh], minlength=len(classes))
        contested += np.bincount(mine[fresh & differ], minlength=len(classes))
    most = [int(label) for label in np.argsort(-contested, kind="stable")[:LISTED] if contested[label]]
    return Disagreement(
        differ=percent(differ),
        average=[
            TeacherAgreement(teacher=name, agreement=percent(mine == together))
            for name, mine in zip(teachers, alone, strict=True)
        ],
        classes=[
            ContestedClass(class_name=classes[label], contested=int(contested[label]), named=int(named[label]))
            for label in most
        ],
    )


def confused(close_calls: Labels, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return the pairs of classes [(a, b, images)] between which the teacher hesitates most."""
    pairs = Counter(tuple(sorted(pair)) for pair in close_calls.tolist())
    return [(classes[a], classes[b], count) for (a, b), count in pairs.most_common(LISTED)]


def near_duplicates(features: Floats, labels: Labels, names: Sequence[str]) -> NearDuplicates:
    """Return how many images have a near copy, and the closest pairs."""
    nearest, cosines = nearest_copies(features, labels)
    pairs = {(min(a, b), max(a, b)): float(cosines[a]) for a, b in enumerate(nearest.tolist()) if b >= 0}
    closest = sorted(pairs.items(), key=lambda pair: -pair[1])[:LISTED]
    listed = [(names[a], names[b], round(cosine, 4)) for (a, b), cosine in closest]
    return NearDuplicates(compared=len(features), images=int((nearest >= 0).sum()), pairs=listed)


def nearest_copies(
    features: Floats, labels: Labels, advance: Callable[[int], None] = lambda count: None
) -> tuple[Labels, Floats]:
    """Return the image that each one nearly repeats [n], -1 where there is none, and its cosine with the nearest [n].

    Args:
        features: unit features [n, D]; it takes the time of n^2 / 2 cosines, and the memory of `COMPARED` n.
        labels: pseudo-classes [n], within which the usual distance is measured.
        advance: called with how many more images are compared.
    """
    nearest, best = np.full(len(features), -1), np.full(len(features), -np.inf, dtype=np.float32)
    for start in range(0, len(features), COMPARED):
        cosines = features[start : start + COMPARED] @ features[start:].T
        np.fill_diagonal(cosines, -np.inf)  # an image is no copy of itself
        for axis, part in ((1, slice(start, start + COMPARED)), (0, slice(start, None))):
            found = cosines.max(axis=axis)
            closer = found > best[part]
            nearest[part][closer] = start + cosines.argmax(axis=axis)[closer]
            best[part][closer] = found[closer]
        advance(len(cosines))
    nearest[best <= 1 - DUPLICATE_SHARE * usual_distance(features, labels)] = -1
    return nearest, best


def usual_distance(features: Floats, labels: Labels) -> float:
    """Return the median cosine distance between two images of one pseudo-class."""
    order = np.argsort(labels, kind="stable")
    one, other = order[:-1], order[1:]
    same = labels[one] == labels[other]
    distances = 1 - (features[one[same]] * features[other[same]]).sum(axis=1)
    return float(np.median(distances)) if len(distances) else 0.0


def outliers(cosines: Floats, names: Sequence[str]) -> Outliers:
    """Return the images that fit no class, by their cosine [n] with the class nearest to each."""
    floor = outlier_floor(cosines)
    lowest = [int(place) for place in np.argsort(cosines)[:LISTED] if cosines[place] < floor]
    return Outliers(
        count=int((cosines < floor).sum()),
        floor=round(floor, 4),
        lowest=[(names[place], round(float(cosines[place]), 4)) for place in lowest],
    )


def outlier_floor(cosines: Floats) -> float:
    """Return the cosine below which an image fits no class: Tukey's outer fence of those [n] with the nearest class."""
    first, third = np.percentile(cosines, [25, 75])
    return float(first - FENCE * (third - first))


def distribution(values: Floats) -> Distribution:
    """Return the mean of values in [0, 1], and their counts in equal bins."""
    return Distribution(mean=round(float(values.mean()), 4), histogram=np.histogram(values, BINS, (0, 1))[0].tolist())


def softmax(logits: Floats) -> Floats:
    """Return probabilities [n, C]."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = exponents / exponents.sum(axis=1, keepdims=True)
    return shares


def percent(chosen: NDArray[np.bool_]) -> float:
    """Return how many of them are true, in percent, for JSON."""
    return round(100 * float(chosen.mean()), 2)
