"""Distil, export and bench every (student, objective) on CIFAR-100 and print one JSON document of what came out.

    python benchmarks/cifar100.py --images 'train-{000000..000004}.tar' --evaluation test-000000.tar \
        --teacher local-dir:cifar100-rn18-64 --student repvit_m0_9:10 > results.json

A run that is finished is not trained again, so the command resumes; the teacher sees the images once for all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--images", required=True, help="Unlabelled images.")
@click.option("--evaluation", required=True, help="Labelled images.")
@click.option("--teacher", required=True, help="An open_clip model: ViT-L-14/openai, or local-dir:PATH.")
@click.option("--student", "students", multiple=True, required=True, metavar="MODEL:EPOCHS")
@click.option("--objectives", default="ce,kd,prg", show_default=True)
@click.option("--image-size", default=64, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Bench time for each artifact.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
def main(
    images: str,
    evaluation: str,
    teacher: str,
    students: tuple[str, ...],
    objectives: str,
    image_size: int,
    seconds: float,
    overrides: tuple[str, ...],
) -> None:
    model, _, weights = (teacher, "", "null") if teacher.startswith("local-dir:") else teacher.partition("/")
    common = [f"data.evaluation={evaluation}", f"teacher.model={model}", f"teacher.weights={weights or 'null'}"]
    common += [f"student.image_size={image_size}", "views.count=5", "training.batch_size=128"]
    rows = []
    for student in students:
        name, epochs = student.split(":")
        for objective in objectives.split(","):
            run = f"runs/{name}-{objective}"
            chosen = [f"student.model={name}", f"training.epochs={epochs}", f"objective.name={objective}"]
            values = [word for value in [*common, *overrides, *chosen] for word in ("--set", value)]
            arguments = ["distill", "cifar100", "--images", images, "--run", run, *values]
            rows.append(measure([*arguments, "export", "--fp16", "bench", "--seconds", f"{seconds:g}", "--json"], run))
    click.echo(json.dumps({"cpu_count": os.cpu_count(), "rows": rows}, indent=2))


def measure(arguments: list[str], run: str) -> dict[str, Any]:
    """Run one chain of prgkit and return what it found, as one row."""
    done = subprocess.run([sys.executable, "-m", "prgkit", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    report = found["bench"]
    distilled = found["distill"]
    return {
        "command": "prgkit " + " ".join(arguments),
        "run": Path(run).name,
        "student": report["run"]["student"],
        "objective": report["run"]["objective"],
        "epochs": report["run"]["epochs"],
        "images": distilled["images"]["used"],
        "train_images_per_s": distilled["images_per_s"],
        "best": distilled["best"],
        "evaluation": report["evaluation"],
        "teacher": report["teacher"],
        "student_scores": report["student"],
        "ratio": report["accuracy_ratio"],
        "artifacts": report["rows"],
        "machine": {key: report["machine"][key] for key in ("cpu", "cores", "os", "versions")},
    }


if __name__ == "__main__":
    main()
