"""What a report is about: the run, its evaluation images, teacher and student, and how it was trained."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from prgkit import metrics
from prgkit.config.recipe import Export
from prgkit.export.bundle.bundle import Bundle, Evaluation
from prgkit.export.bundle.engine_metadata import load_engine_metadata
from prgkit.storage.atomic import fingerprint
from prgkit.storage.run import Run

Row = dict[str, Any]
NOT_TRAINING = {"learning_rate", "seconds", "images_per_s", "step"}


def subject(bundle: Bundle, evaluation: Evaluation, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the report's parts on the run, the evaluation set, the teacher and the student."""
    manifest, labels = bundle.manifest, evaluation.labels
    teacher = metrics.scores(evaluation.teacher_logits, labels=labels)
    uniform = metrics.scores(evaluation.teacher_uniform_logits, labels=labels)
    # The student's figures are its FP32 file's as measured here; where that could not run, as exported.
    reference = next((row for row in rows if row["artifact"] == "onnx-fp32" and row["status"] == "measured"), None)
    student = reference or metrics.scores(evaluation.logits, teacher=evaluation.teacher_logits, labels=labels)
    name = " ".join(str(part) for part in (manifest.teacher.model, manifest.teacher.weights) if part)
    if name.startswith("local-dir:"):
        name = PurePath(name).name  # where it lay is nobody's business
    return {
        "run": {
            "name": manifest.run.name,
            "student": manifest.student.model,
            "teacher": name,
            "objective": manifest.run.objective,
            "learned_labels": manifest.run.learned_labels,  # of some, by the student or its teacher
            "classes": len(bundle.classes),
            "epochs": manifest.run.epochs,
        },
        "evaluation": identity(evaluation, bundle),
        "teacher": {"top1": teacher["top1"], "top5": teacher["top5"], "top1_uniform_prompts": uniform["top1"]},
        "student": {"top1": student["top1"], "top5": student["top5"], "agreement": student["agreement_teacher"]},
        "ratio": student["top1"] / teacher["top1"] if teacher["top1"] else None,
    }


def identity(evaluation: Evaluation, bundle: Bundle) -> dict[str, Any]:
    """Return which images the quality is measured on; the digest is the same where pictures, labels and classes are."""
    labels = None if evaluation.labels is None else evaluation.labels.tolist()
    asked = [bundle.classes] if bundle.manifest.relabelled else []
    return {
        "images": len(evaluation.pixels),
        "labelled": labels is not None,
        "source": bundle.manifest.evaluation.source,
        # Bundles of earlier versions do not say which pictures they hold.
        "digest": None if evaluation.keys is None else fingerprint([evaluation.keys, labels, *asked]),
    }


def made_by(bundle: Bundle, typed: str) -> list[str]:
    """Return the commands that make the bundle again from the run's recipe, as far as what was typed does not."""
    run = shlex.quote(f"runs/{bundle.manifest.run.name}")
    options = dict.fromkeys(option for artifact in bundle.artifacts for option in artifact.export_options)
    asked = sorted(options, key="--trt".__eq__)  # --trt last: what says how engines are built follows it
    again: list[str] = []
    if engines := [one.file for one in bundle.artifacts if one.format == "engine"]:
        card = load_engine_metadata(bundle.folder / engines[0])
        built = ["--backend", card.backend, "--batch", ",".join(map(str, card.batch))]
        if bundle.manifest.relabelled:  # which removed those of the old classes
            asked.remove("--trt")
            again = ["--trt", *(option for option in ("--fp16", "--int8") if option in asked), *built]
        else:
            asked += built
    if scoring := bundle.manifest.open_vocabulary:
        asked += ["--open-vocabulary", scoring.class_vectors]
    usual = Export().evaluation_images
    travelling = bundle.manifest.export.evaluation_images
    if travelling != usual:
        asked += ["--evaluation-images", str(travelling)]
    steps = {
        "distill": f"prgkit distill {run}/recipe.yaml --run {run}",
        "export": " ".join(["prgkit export", *asked, "--run", run]),
    }
    if scoring and scoring.relabelled:
        steps["relabel"] = f"prgkit relabel --classes FILE --run {run}"
        if again:
            steps["engines"] = " ".join(["prgkit export", *again, "--run", f"{run}/bundle"])
    return [step for command, step in steps.items() if command not in typed.split()]


def vocabulary_notes(bundle: Bundle) -> list[str]:
    """Say that the classes are not the network's, and what is left of a report that was about other ones."""
    scoring = bundle.manifest.open_vocabulary
    if scoring is None:
        return []
    notes = ["Open vocabulary: images are scored by the teacher's class vectors; prgkit relabel changes the classes."]
    if scoring.relabelled:
        notes.append(
            f"The classes were changed at {scoring.relabelled}: what is said of the training and its targets is of "
            "those that the student learned with, and ticks of those are left out."
        )
    return notes


def training(bundle: Bundle, run_folder: Path | None) -> list[dict[str, Any]]:
    """Return each epoch's loss, its terms and the agreement: the run's, or on a device what the bundle took along."""
    records = Run(run_folder).metrics() if run_folder is not None else bundle.manifest.run.training
    return [
        {key: value for key, value in record.items() if key not in NOT_TRAINING and isinstance(value, (int, float))}
        for record in records
    ]


def trust(bundle: Bundle, run_folder: Path | None) -> dict[str, Any] | None:
    """Return what was known of the pseudo-labels before training: the run's, or what the bundle took along."""
    own = Run(run_folder).quality() if run_folder is not None else None
    brought: dict[str, Any] | None = bundle.manifest.run.quality
    return own or brought
