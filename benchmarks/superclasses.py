"""Tasks of few classes made of CIFAR-100's superclasses: images, labelled test images and a recipe for each.

    python benchmarks/superclasses.py cifar.yaml --targets targets --teacher local-dir:broad-lite2-160 --out few

The recipe is one of CIFAR-100 in tar shards, whose images its teacher has seen. A class of such a task is five of the
100, and its name lists theirs; the unlabelled images are those that the teacher takes for one of these, by its answer
among all 100. --teacher is who teaches the tasks: one that has read single names only does not read lists of them.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

import click
import numpy as np

from prgkit.config.recipe import Recipe, load_recipe, save_recipe
from prgkit.config.sections import ImageSpec, TeacherConfig
from prgkit.data.index import ImageIndex, read_image_index, select_labelled
from prgkit.progress import NullProgress
from prgkit.teacher.clip import teacher_loader
from prgkit.teacher.ensemble import TeacherFeatures, averaged, existing_targets
from prgkit.teacher.zero_shot import ZeroShotClassifier, no_adjustment

SUPERCLASSES = {
    "large carnivores": "bear or leopard or lion or tiger or wolf",
    "large herbivores": "camel or cattle or chimpanzee or elephant or kangaroo",
    "flowers": "orchid or poppy or rose or sunflower or tulip",
    "fruit": "apple or mushroom or orange or pear or sweet pepper",
    "trees": "maple tree or oak tree or palm tree or pine tree or willow tree",
    "insects": "bee or beetle or butterfly or caterpillar or cockroach",
    "reptiles": "crocodile or dinosaur or lizard or snake or turtle",
}
TASKS = {
    "two": ("large carnivores", "large herbivores"),
    "five": ("flowers", "fruit", "trees", "insects", "reptiles"),
}
ASPECTS = (
    "striped animal / plain animal", "furry animal / smooth animal", "red flower / white flower", "forest / desert",
    "small thing / large thing", "green leaf / bare branch",
)  # fmt: skip


@click.command()
@click.argument("recipe")
@click.option("--targets", type=click.Path(path_type=Path, exists=True), default="targets")
@click.option("--teacher", help="An open_clip model in place of the recipe's.")
@click.option("--out", type=click.Path(path_type=Path), default="few")
def main(recipe: str, targets: Path, teacher: str | None, out: Path) -> None:
    """Write NAME-train.tar, NAME-test.tar, NAME.yaml and, for aspects, NAME-aspects.yaml into a folder."""
    loaded = load_recipe(recipe)
    store = existing_targets(loaded, targets)
    if store is None or loaded.data.evaluation_spec is None:
        raise click.ClickException(f"no labelled images, or no targets of this recipe in {targets}: prgkit targets")
    images = read(loaded.data.image_spec, store)
    answers = teacher_labels(loaded, store, images)
    judged, labels = select_labelled(
        read(loaded.data.evaluation_spec, store), loaded.classes, note=partial(click.echo, err=True)
    )
    out.mkdir(parents=True, exist_ok=True)
    if teacher is not None:
        loaded = loaded.model_copy(update={"teacher": (TeacherConfig(model=teacher),)})
    for task, chosen in TASKS.items():
        members = [SUPERCLASSES[name].split(" or ") for name in chosen]
        place = {loaded.classes.index(word): number for number, words in enumerate(members) for word in words}
        pack(out / f"{task}-train.tar", images, ((n, None) for n, label in enumerate(answers) if label in place))
        pack(out / f"{task}-test.tar", judged, ((n, place[label]) for n, label in enumerate(labels) if label in place))
        others = [name for name in loaded.classes if loaded.classes.index(name) not in place]
        for suffix, words in (("", others), ("-aspects", ASPECTS)):
            save_recipe(task_recipe(loaded, out, task, chosen, words), out / f"{task}{suffix}.yaml")
        click.echo(f"{task}: {', '.join(chosen)}")


def read(spec: ImageSpec, store: TeacherFeatures) -> ImageIndex:
    """Return the images of a source."""
    return read_image_index(spec, NullProgress(), known=store)


def teacher_labels(recipe: Recipe, store: TeacherFeatures, images: ImageIndex) -> list[int]:
    """Return the class among all of the recipe's that the teacher takes each image for."""
    prompts = store.prompts(recipe.classes, recipe.templates, teacher_loader(NullProgress()))
    plain = ZeroShotClassifier(prompts, store.logit_scale, recipe.prompt_weighting, no_adjustment(len(recipe.classes)))
    rows = store.rows(images.keys, views=1)
    if (rows < 0).any():
        raise click.ClickException("the teacher has not seen all of these images: prgkit targets")
    features = store.features(rows, np.zeros(len(rows), dtype=int))
    labels: list[int] = averaged(plain, store, recipe).logits(features).argmax(dim=1).tolist()
    return labels


def pack(path: Path, images: ImageIndex, chosen: Iterable[tuple[int, int | None]]) -> None:
    """Copy images, byte for byte, into a tar; a label goes beside its image as .cls."""
    folder = Path(images.source.path(0)).parent.parent
    with contextlib.ExitStack() as opened:
        packed = opened.enter_context(tarfile.open(path, "w"))
        shard_of = cache(lambda shard: opened.enter_context(tarfile.open(folder / shard)))
        for number, (position, label) in enumerate(chosen):
            shard, _, member = images.source.name(int(images.indices[position])).partition("/")
            file = shard_of(shard).extractfile(member)
            assert file is not None
            add(packed, f"{number:06}{Path(member).suffix}", file.read())
            if label is not None:
                add(packed, f"{number:06}.cls", str(label).encode())


def add(packed: tarfile.TarFile, name: str, content: bytes) -> None:
    """Write one member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    packed.addfile(member, io.BytesIO(content))


def task_recipe(recipe: Recipe, out: Path, task: str, chosen: Iterable[str], words: Iterable[str]) -> Recipe:
    """Return the recipe of a task: its images and classes, and words that are none of them."""
    update = {
        "images": str((out / f"{task}-train.tar").absolute()),
        "evaluation": str((out / f"{task}-test.tar").absolute()),
        "classes": tuple(SUPERCLASSES[name] for name in chosen),
        "words": tuple(words),
    }
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})


if __name__ == "__main__":
    main()
