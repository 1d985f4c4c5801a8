"""The model card of a bundle on the Hugging Face Hub: what its manifest says, and nothing of the machine it is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from prgkit import metrics
from prgkit.config.image_size import size_told
from prgkit.errors import some
from prgkit.export.bundle.bundle import Evaluation
from prgkit.export.bundle.manifest import ENGINE, Manifest, NotBuilt
from prgkit.export.formats.snippets import section

UNKNOWN = "unknown: check"
# What the publishers of open_clip's weights say of them, by how a tag begins.
LICENCES = {
    "openai": "MIT, as its publisher states",
    "laion": "MIT, as its publisher states",
    "datacomp": "MIT, as its publisher states",
    "commonpool": "MIT, as its publisher states",
    "webli": "Apache-2.0, as its publisher states",
    "metaclip": "CC-BY-NC-4.0, as its publisher states",
}
NOT_PUBLISHED = "not published"
CLASSES_NAMED = 100


class Figure(NamedTuple):
    """A share of the evaluation images in percent, with its 95 % interval."""

    metric: str | None  # as a model index names it; None: it is not of this model
    label: str
    value: float
    interval: tuple[float, float]


def published(manifest: Manifest, name: str, *, with_images: bool) -> Manifest:
    """Return the manifest as others may see it: no path, no name of an image, and no engine, which is executable code.

    Class names, counts, the recipe's choices and what the student began with stay.
    """
    recipe: dict[str, Any] = dict(manifest.recipe)
    learned = dict(recipe.get("data") or {})
    data = {key: learned[key] for key in ("classes", "prompts", "words", "held_out", "keep") if key in learned}
    recipe["data"] = {**data, "images": NOT_PUBLISHED}
    if learned.get("labelled"):
        recipe["data"]["labelled"] = NOT_PUBLISHED
    if "teacher" in recipe:
        cleaned = [without_paths(teacher) for teacher in teachers_of(recipe)]
        recipe["teacher"] = cleaned[0] if len(cleaned) == 1 else cleaned
    if "student" in recipe:
        recipe["student"] = without_paths(recipe["student"])
    quality = manifest.run.quality
    if quality:  # its examples are names of images
        near = quality.near_duplicates.model_copy(update={"pairs": []})
        quality = quality.model_copy(
            update={"near_duplicates": near, "outliers": quality.outliers.model_copy(update={"lowest": []})}
        )
    began = {key: value for key, value in manifest.student.to_json().items() if key in ("model", "initial")}
    return manifest.model_copy(
        update={
            "run": manifest.run.model_copy(update={"name": name, "quality": quality}),
            "recipe": recipe,
            "teacher": manifest.teacher.model_copy(update=without_paths(manifest.teacher.to_json())),
            "student": manifest.student.model_copy(update=without_paths(began)),
            "artifacts": tuple(one for one in manifest.artifacts if one.format != ENGINE),
            "not_kept": tuple(one for one in manifest.not_kept if not isinstance(one, NotBuilt)),  # a builder's words
            "evaluation": manifest.evaluation.model_copy(
                update={"source": "published with the model"}
                if with_images
                else {"images": 0, "labelled": False, "source": NOT_PUBLISHED}
            ),
            "checksums": {
                file: digest for file, digest in manifest.checksums.items() if with_images or "/" not in file
            },
        }
    )


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of a recipe in which files and folders have their last names alone."""
    return {key: last_name(value) if isinstance(value, str) else value for key, value in config.items()}


def last_name(word: str) -> str:
    """Return the last part of a path, in either system's form; names of the Hub's models stay whole."""
    if word.startswith("hf-hub:"):
        return word
    prefix = "local-dir:" if word.startswith("local-dir:") else ""
    return prefix + PurePath(word.removeprefix(prefix).replace("\\", "/")).name


def teachers_of(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sections of a recipe's teachers."""
    given = recipe["teacher"]
    return list(given) if isinstance(given, list | tuple) else [given]


def model_card(manifest: Manifest, repo: str, license: str, evaluation: Evaluation) -> str:
    """Return the card of a published manifest: front matter that the Hub reads, and what a person reads.

    Args:
        manifest: of `published`.
        repo: OWNER/NAME.
        license: the Hub's word for that of the model.
        evaluation: the images that the figures are of, which may stay behind.
    """
    name, figures = repo.rpartition("/")[2], figures_of(evaluation)
    teachers = teachers_of(manifest.recipe) if "teacher" in manifest.recipe else [manifest.teacher.to_json()]
    named = [" ".join(filter(None, (last_name(one["model"]), one.get("weights")))) for one in teachers]
    kind = "labelled images" if evaluation.labels is not None else "images without labels"
    text = section(
        "card.md",
        manifest,
        title=name,
        repo=repo,
        license="not stated by its publisher" if license == "unknown" else license,
        size=size_told(manifest.preprocessing.image_size),
        class_names=some(manifest.classes, CLASSES_NAMED),
        teachers=" and ".join(named),
        teacher_licences=[(one, licence_of(config)) for one, config in zip(named, teachers, strict=True)],
        figures=[(one.label, told(one)) for one in figures],
        figured_on=f"{len(evaluation.logits):,} {kind} that it did not learn from",
    )
    return f"---\n{front_matter(manifest, name, license, figures, len(evaluation.logits))}\n---\n\n{text}"


def front_matter(manifest: Manifest, name: str, license: str, figures: Sequence[Figure], images: int) -> str:
    """Return the YAML that the Hub reads."""
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="private",
            dataset_name=f"{images:,} images, {manifest.evaluation.source}",
            metric_type=figure.metric,
            metric_name=figure.label,
            metric_value=round(figure.value / 100, 4),
        )
        for figure in figures
        if figure.metric is not None
    ]
    data = ModelCardData(
        license=license,
        library_name="prgkit",
        pipeline_tag="image-classification",
        tags=["prgkit", "onnx", "image-classification", "knowledge-distillation", "clip"],
        metrics=["accuracy"] if any(figure.metric == "accuracy" for figure in figures) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    yaml: str = data.to_yaml()
    return yaml


def figures_of(evaluation: Evaluation) -> list[Figure]:
    """Return what is known of the FP32 student on the evaluation images, and of its teacher where there are labels."""
    scores = metrics.scores(evaluation.logits, teacher=evaluation.teacher_logits, labels=evaluation.labels)
    teacher = metrics.scores(evaluation.teacher_logits, labels=evaluation.labels)
    known = [
        ("accuracy", "Accuracy (top-1)", scores.top1, scores.top1_interval),
        (None, "The teacher's own accuracy", teacher.top1, teacher.top1_interval),
        ("agreement", "Same answer as the teacher", scores.agreement_teacher, scores.agreement_teacher_interval),
    ]
    return [Figure(*one[:2], one[2], one[3]) for one in known if one[2] is not None and one[3] is not None]


def told(figure: Figure) -> str:
    """Return a figure with its interval, as a person reads it."""
    return f"{figure.value:.1f} % ({figure.interval[0]:.1f} to {figure.interval[1]:.1f} %)"


def licence_of(teacher: Mapping[str, Any]) -> str:
    """Return what is known of the licence of a teacher's weights."""
    if teacher["model"].startswith("demo:"):
        return "Apache-2.0, as prgkit"
    if ":" in teacher["model"]:
        return UNKNOWN
    return next((stated for tag, stated in LICENCES.items() if str(teacher.get("weights")).startswith(tag)), UNKNOWN)
