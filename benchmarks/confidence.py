"""How far calibrated confidences can be trusted, and which score tells images of none of the classes: JSON.

    python benchmarks/confidence.py --bundle digits=runs/digits/bundle --others cifar100=test-000000.tar > found.json

Every bundle's evaluation images are labelled: confidences are held against the teacher's answers and against labels.
Images of the other sources show nothing that the bundle has a class for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from prgkit.data.sources import open_images
from prgkit.export.bundle.bundle import Bundle, Evaluation, batches, fp32_onnx, open_bundle, read_evaluation
from prgkit.export.bundle.confidence import LEAST_IMAGES, TEMPERATURES, confidences, energy, fit_temperature
from prgkit.export.bundle.manifest import Confidence
from prgkit.export.runtimes import open_runner
from prgkit.metrics import Logits, calibration_error, log_softmax, wilson

COUNTS = (60, 120, 500)
DRAWS = 40
MOST_IMAGES = 1000  # of another source
Scores = NDArray[np.float64]


def fits(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return what each way to fit a temperature on some images brings on the others, in the mean over `DRAWS`."""
    logits, teacher, labels = evaluation.logits, evaluation.teacher_logits, evaluation.labels
    assert labels is not None
    answers, rows = teacher.argmax(axis=1), []
    for count in (count for count in COUNTS if 2 * count <= len(logits)):
        found: dict[str, list[tuple[float, ...]]] = {}
        for seed in range(DRAWS):
            order = np.random.default_rng(seed).permutation(len(logits))
            fitted, judged = order[:count], order[count:]
            for name, fit in FITS.items():
                temperature = fit(logits[fitted], teacher[fitted])
                errors = (calibration_error(logits[judged] / temperature, truth[judged]) for truth in (answers, labels))
                found.setdefault(name, []).append((temperature, *errors))
        for name, draws in found.items():
            keys = ("temperature", "ece_teacher", "ece_labels")
            means, spread = np.mean(draws, axis=0), np.std(draws, axis=0)
            rows.append(
                {"fit": name, "images": count, **named(keys, means), **named([f"{k}_std" for k in keys], spread)}
            )
    return rows


def named(keys: Any, values: Any) -> dict[str, float]:
    """Return rounded values by their keys."""
    return {key: round(float(value), 3) for key, value in zip(keys, values, strict=True)}


def by_likelihood(logits: Logits, targets: Scores) -> float:
    """Return the temperature at which the cross-entropy to ``targets`` [n, C] is least."""
    tried = np.geomspace(TEMPERATURES[0], TEMPERATURES[1], 300)
    return float(tried[np.argmin([-(targets * log_softmax(logits / value)).sum() for value in tried])])


def one_hot(teacher: Logits) -> Scores:
    """Return the teacher's answers [n, C], smoothed as Platt does."""
    count, classes = teacher.shape
    targets = np.full(teacher.shape, 1 / (count + 2) / (classes - 1))
    targets[np.arange(count), teacher.argmax(axis=1)] = (count + 1) / (count + 2)
    return targets


FITS: dict[str, Callable[[Logits, Logits], float]] = {
    "none": lambda logits, teacher: 1.0,
    "teacher's probabilities": lambda logits, teacher: by_likelihood(logits, np.exp(log_softmax(teacher))),
    "teacher's answers": lambda logits, teacher: by_likelihood(logits, one_hot(teacher)),
    "right or wrong": lambda logits, teacher: fit_temperature(logits, logits.argmax(axis=1) == teacher.argmax(axis=1)),
}
SCORES: dict[str, Callable[[Logits], Scores]] = {
    "max softmax": confidences,
    "max logit": lambda logits: logits.max(axis=1).astype(np.float64),
    "energy": energy,
    "entropy": lambda logits: (np.exp(log_softmax(logits)) * log_softmax(logits)).sum(axis=1),
    "margin": lambda logits: np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0].astype(np.float64),
    "logit spread": lambda logits: (logits.max(axis=1) - logits.mean(axis=1)).astype(np.float64),
}


def logits_of(bundle: Bundle, spec: str) -> Logits:
    """Return the FP32 student's logits of images drawn from a source."""
    images = open_images(spec, note=lambda text: None).with_grey(bundle.preprocessing.grey_range)
    chosen = np.random.default_rng(0).permutation(len(images))[:MOST_IMAGES]
    runner = open_runner(bundle.folder, fp32_onnx(bundle))
    prepared = (bundle.preprocessing.prepare(images.read(int(place))) for place in chosen)
    logits = np.concatenate([runner.run(batch) for batch in batches(prepared, 32)])
    runner.close()
    return logits


def rejection(known: Logits, unknown: Logits) -> dict[str, dict[str, float]]:
    """Return AUROC, and the share of unknown images that pass where 95 % of the known ones do, by score."""
    truth = np.repeat([1, 0], [len(known), len(unknown)])
    rows = {}
    for name, score in SCORES.items():
        inside, outside = score(known), score(unknown)
        auroc = 100 * roc_auc_score(truth, np.concatenate([inside, outside]))
        passing = 100 * (outside >= np.quantile(inside, 0.05)).mean()
        rows[name] = named(("auroc", "fpr95"), (auroc, passing))
    return rows


def promises(facts: Confidence, confidence: Scores, same: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Return what a bundle promises of answers from a confidence on, and what the evaluation images keep of it."""
    rows = []
    for least in (0.5, 0.7, 0.9):
        right, wrong = (sum(value >= least for value in values) for values in (facts.right, facts.wrong))
        if right + wrong >= LEAST_IMAGES:
            low, high = wilson(right, right + wrong)
            row = {"promised": low, "at_most": high, "seen": 100 * same[confidence >= least].mean()}
            rows.append({"least": least, **named(row, row.values()), "images": int((confidence >= least).sum())})
    return rows


def measure(bundle: Bundle, others: dict[str, str]) -> dict[str, Any]:
    """Return everything that is measured of one bundle."""
    evaluation, facts = read_evaluation(bundle.folder), bundle.manifest.confidence
    assert evaluation.labels is not None
    assert facts is not None
    known = evaluation.logits / facts.temperature
    unknown = {name: logits_of(bundle, spec) / facts.temperature for name, spec in others.items()}
    answers = evaluation.teacher_logits.argmax(axis=1)
    return {
        "student": bundle.manifest.student.model,
        "classes": len(bundle.classes),
        "images": len(known),
        "top1": 100 * float((known.argmax(axis=1) == evaluation.labels).mean()),
        "agreement": 100 * float((known.argmax(axis=1) == answers).mean()),
        "bundle": facts.model_dump(include={"temperature", "images"}),
        "ece_teacher": {
            "before": calibration_error(evaluation.logits, answers),
            "after": calibration_error(known, answers),
        },
        "ece_labels": {
            "before": calibration_error(evaluation.logits, evaluation.labels),
            "after": calibration_error(known, evaluation.labels),
        },
        "promises": promises(facts, confidences(known), known.argmax(axis=1) == answers),
        "fits": fits(evaluation),
        "unknown": {name: rejection(known, logits) for name, logits in unknown.items()},
        "rejected": {
            name: 100 * float((energy(logits) < facts.reject_below).mean())
            for name, logits in {"its own images": known, **unknown}.items()
        },
    }


@click.command()
@click.option("--bundle", "bundles", multiple=True, required=True, metavar="NAME=FOLDER")
@click.option("--others", multiple=True, required=True, metavar="NAME=IMAGES", help="Not for bundles of that name.")
def main(bundles: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Print as JSON what is measured of every bundle."""
    sources = dict(one.split("=", 1) for one in others)
    found = {}
    for name, folder in (one.split("=", 1) for one in bundles):
        foreign = {other: spec for other, spec in sources.items() if other != name.partition("-")[0]}
        found[name] = measure(open_bundle(Path(folder)), foreign)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
