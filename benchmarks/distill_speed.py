"""What stored targets, PRG itself and the input pipeline cost, as ratios against named peers in the same process.

    python benchmarks/distill_speed.py --photos photos/ --thumbnails cifar/ > results/distill_speed.json

``photos`` is a folder of JPEG files, ``thumbnails`` one of small PNG files. What is compared takes turns, and
a ratio is the median over rounds of the ratio within a round. Weights are random: that does not change how long a step
takes.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from prgkit.config.image_size import sides
from prgkit.config.objectives import CE, PRG
from prgkit.config.recipe import Recipe, validate
from prgkit.config.sections import StudentConfig, TeacherConfig, Training, Views
from prgkit.data.augment import Batch, MultiViewDataset, make_dataloader
from prgkit.data.cache import DecodedImageCache
from prgkit.data.index import ImageIndex, index_images
from prgkit.data.preprocessing import Preprocessing
from prgkit.data.sources import open_images
from prgkit.device import best_device, seed_everything
from prgkit.evaluate import system
from prgkit.objectives import Objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput
from prgkit.progress import NullProgress
from prgkit.storage.run_card import PrecisionProbe
from prgkit.student.model import build_student
from prgkit.teacher.clip import Teacher
from prgkit.teacher.feature_store import embed, open_store
from prgkit.teacher.zero_shot import ZeroShotClassifier, no_adjustment
from prgkit.training.checkpoint import model_ema
from prgkit.training.dataset import DistillationDataset
from prgkit.training.distributed import probe_precision
from prgkit.training.optimizer import build_optimizer

CLASSES, TEMPLATES = 100, 7
BATCH = 64  # of the loaders
Step = Callable[[], object]


@click.command()
@click.option("--photos", required=True, type=click.Path(exists=True, path_type=Path), help="A folder of JPEG files.")
@click.option("--thumbnails", required=True, type=click.Path(exists=True, path_type=Path), help="32-pixel PNG files.")
@click.option("--student", default="repvit_m0_9", show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--teachers", default="ViT-B-16,ViT-L-14", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--teacher-images", default=64, show_default=True, help="Images in a round of the teacher pass.")
@click.option("--only", default="steps,price,objective,pipeline,teacher", show_default=True)
def main(photos: Path, thumbnails: Path, only: str, **options: Any) -> None:
    """Print one JSON document of ratios, with the time of every round beside them."""
    parts: dict[str, Callable[[Bench], Any]] = {
        "steps": student_steps,
        "price": price_of_prg,
        "objective": objective_share,
        "pipeline": input_pipeline,
        "teacher": teacher_pass,
    }
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), photos, thumbnails, **options)
        found = {name: parts[name](bench) for name in only.split(",")}
    here = system.describe().model_dump(mode="json", include={"cpu", "cores", "os", "versions"})
    click.echo(json.dumps({"options": options, "threads": torch.get_num_threads(), "machine": here, **found}, indent=2))


class Bench:
    """The images, the student and the options that every part shares."""

    def __init__(
        self,
        scratch: Path,
        photos: Path,
        thumbnails: Path,
        *,
        student: str,
        image_size: int,
        batch_size: int,
        teachers: str,
        rounds: int,
        teacher_images: int,
    ) -> None:
        seed_everything(0)
        self.scratch, self.photos, self.thumbnails = scratch, photos, thumbnails
        self.student = StudentConfig(model=student, image_size=image_size)
        self.image_size, self.batch_size = image_size, batch_size
        self.rounds, self.teacher_images = rounds, teacher_images
        self.teachers = teachers.split(",")
        self.device = best_device()

    def teacher(self, name: str) -> Teacher:
        """Build an open_clip model with random weights, in the precision that is faster here."""
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=None)
        teachers = [
            Teacher(model, open_clip.get_tokenizer(name), self.device, TeacherConfig(model=name, precision=precision))
            for precision in ("fp32", "bf16")
        ]
        pixels = torch.randint(0, 256, (16, *sides(teachers[0].preprocessing.image_size), 3), dtype=torch.uint8)
        times = [timed(partial(teacher.embed_images, pixels), repeat=2) for teacher in teachers]
        return teachers[times.index(min(times))]


def student_steps(bench: Bench) -> list[dict[str, Any]]:
    """(a): steps on stored targets against the same steps with the teacher run in each of them."""
    found: list[dict[str, Any]] = []
    for name in bench.teachers:
        teacher = bench.teacher(name)
        loops, precision = training_loops(bench, teacher)
        turns = {key: partial(next, loops[key]) for key in ("stored", "online")}
        rounds = take_turns(turns, bench.rounds)
        found.append(
            {
                "teacher": name,
                "teacher_precision": teacher.precision,
                "student": bench.student.model,
                "student_precision": precision.model_dump(),
                "step_ms_an_image": {key: per_image(times, bench.batch_size) for key, times in rounds.items()},
                "online_to_stored": ratio(rounds["online"], rounds["stored"]),
                "rounds_s": rounds,
            }
        )
    return found


def price_of_prg(bench: Bench) -> dict[str, Any]:
    """(b): steps of PRG on stored targets against the same loop on hard labels, with no targets at all."""
    loops, precision = training_loops(bench, bench.teacher(bench.teachers[0]))
    rounds = take_turns({key: partial(next, loops[key]) for key in ("stored", "hard_labels")}, 4 * bench.rounds)
    return {
        "student": bench.student.model,
        "student_precision": precision.model_dump(),
        "batch": bench.batch_size,
        "step_ms_an_image": {key: per_image(times, bench.batch_size) for key, times in rounds.items()},
        "stored_to_hard_labels": ratio(rounds["stored"], rounds["hard_labels"]),
        "rounds_s": rounds,
    }


def training_loops(bench: Bench, teacher: Teacher) -> tuple[dict[str, Iterator[None]], PrecisionProbe]:
    """Return three trainings of one student, a step at a time, and the precision that is faster for them.

    The batches were decoded before, so that the steps alone are compared; every loop is otherwise prgkit's own.
    """
    dataset = stored_dataset(bench, teacher)
    batches = batches_of(bench, dataset, teacher)
    trial = build_student(bench.student, classes=CLASSES, teacher_width=8)
    precision = probe_precision(trial, bench.device, bench.batch_size)

    def stored(batch: Batch, _seen: Tensor) -> TeacherOutput:
        return dataset.teacher_output(batch.positions.numpy(), batch.views[:, 0].numpy(), bench.device)

    def online(batch: Batch, seen: Tensor) -> TeacherOutput:
        features = teacher.embed_images(seen)
        logits = dataset.classifier.logits(features)
        return TeacherOutput(features, logits, logits.argmax(dim=1), batch.positions)

    def hard_labels(batch: Batch, _seen: Tensor) -> TeacherOutput:
        labels = batch.positions.to(bench.device) % CLASSES
        return TeacherOutput(torch.empty(0), torch.empty(0), labels, batch.positions)

    train = partial(loop, bench, batches=batches, width=teacher.width, bf16=precision.chosen == "bf16")
    loops = {
        "stored": train(PRG(name="prg"), stored),
        "online": train(PRG(name="prg"), online),
        "hard_labels": train(CE(name="ce"), hard_labels),
    }
    return loops, precision


def loop(
    bench: Bench,
    config: CE | PRG,
    answer: Callable[[Batch, Tensor], TeacherOutput],
    *,
    batches: list[tuple[Batch, Tensor]],
    width: int,
    bf16: bool,
) -> Iterator[None]:
    """Train as `prgkit.training.distill.train` does, one step at a time."""
    training = Training()
    student = build_student(bench.student, classes=CLASSES, teacher_width=width).to(bench.device)
    objective = Objectives((config,), space(CLASSES, width)).to(bench.device)
    student.projector.requires_grad_(objective.uses_features)
    optimizer, average = build_optimizer(student, training), model_ema(student)
    average.decay = 0.99
    for batch, seen in cycle(batches):
        teacher = answer(batch, seen)
        student.train()
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
            said = student(batch.pixels[:, 0].to(bench.device))
        loss = torch.stack(list(objective(said, teacher).values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        average.update(student)
        loss.item()  # waits for a GPU
        yield


def stored_dataset(bench: Bench, teacher: Teacher) -> DistillationDataset:
    """Fill a store with made-up features of every photo, where they lie as real ones would."""
    folder = Path(tempfile.mkdtemp(dir=bench.scratch))
    recipe = recipe_for(bench)
    targets = open_store(recipe.teacher[0], recipe.views, folder, lambda _page: teacher)
    images = index_images(
        open_images(str(bench.photos)), workers=2, cache=DecodedImageCache(bench.scratch / "pictures")
    )
    generator = np.random.default_rng(0)
    features = generator.standard_normal((2, len(images), teacher.width)).astype(np.float16)
    targets.append(images.keys, features / np.linalg.norm(features.astype(np.float32), axis=2, keepdims=True))
    prompts = torch.nn.functional.normalize(torch.randn(TEMPLATES, CLASSES, teacher.width), dim=2)
    return DistillationDataset(
        image_index=images,
        store=targets,
        rows=targets.rows(images.keys, views=1),
        val_indices=np.arange(1),
        train_indices=np.arange(1, len(images)),
        sample_weights=None,
        classifier=ZeroShotClassifier(prompts.to(bench.device), teacher.logit_scale, "max", no_adjustment(CLASSES)),
    )


def recipe_for(bench: Bench) -> Recipe:
    """Return a recipe whose teacher is given by hand."""
    raw = {
        "data": {"images": str(bench.photos), "classes": [f"thing {number}" for number in range(CLASSES)]},
        "teacher": {"model": "demo:digits"},
        "student": {"model": bench.student.model, "image_size": bench.student.image_size},
        "objective": {"name": "prg"},
        "training": {"workers": 1},
        "views": {"count": 1},
    }
    return validate(raw, where="benchmark").resolved()


def batches_of(bench: Bench, dataset: DistillationDataset, teacher: Teacher) -> list[tuple[Batch, Tensor]]:
    """Return some batches in the student's size, and the same crops in the teacher's."""
    student = build_student(bench.student, classes=CLASSES, teacher_width=8)
    size, made = bench.batch_size, []
    for start in range(0, min(4 * size, len(dataset.train_indices) - size + 1), size):
        items = [(int(position), [1]) for position in dataset.train_indices[start : start + size]]
        batch = MultiViewDataset(dataset.image_index, student.preprocessing, Views()).batch(items)
        seen = MultiViewDataset(dataset.image_index, teacher.preprocessing, Views()).batch(items)
        made.append((batch, seen.pixels[:, 0]))
    return made


def space(classes: int, width: int) -> LossContext:
    """Return what an objective is made for here."""
    return LossContext(
        classes=classes,
        width=width,
        epochs=1,
        steps_per_epoch=1,
        images=1,
        class_means=lambda: torch.zeros(classes, width),
        class_vectors=torch.zeros(classes, width),
        logit_scale=100.0,
        stages=lambda: (),
        class_features=lambda: iter(()),
        words=(),
    )


def objective_share(bench: Bench) -> dict[str, Any]:
    """Return PRG's share of a step at C = 1000, B = 1024: forward, backward and the proxies' update."""
    classes, batch, width = 1000, 1024, 768
    student = build_student(bench.student, classes=classes, teacher_width=width).to(bench.device)
    objective = Objectives((PRG(name="prg"),), space(classes, width)).to(bench.device)
    features = torch.nn.functional.normalize(torch.randn(batch, width), dim=1).to(bench.device)
    prompts = torch.nn.functional.normalize(torch.randn(TEMPLATES, classes, width), dim=2).to(bench.device)
    answers = ZeroShotClassifier(prompts, 100.0, "max", no_adjustment(classes))
    pixels = torch.randint(0, 256, (32, bench.image_size, bench.image_size, 3), dtype=torch.uint8)
    precision = probe_precision(student, bench.device, 32)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=precision.chosen == "bf16"):
            said = student.train()(pixels.to(bench.device))
        (said.logits.float().square().mean() + said.features.float().square().mean()).backward()
        waited(bench)

    def prg() -> None:
        said = StudentOutput(
            torch.randn(batch, width, requires_grad=True), torch.randn(batch, classes, requires_grad=True)
        )
        logits = answers.logits(features)
        terms = objective(said, TeacherOutput(features, logits, logits.argmax(dim=1), torch.arange(batch)))
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        waited(bench)

    rounds = take_turns({"student_step_of_32": step, "prg_at_1024": prg}, bench.rounds)
    whole = [seconds * batch / 32 for seconds in rounds["student_step_of_32"]]
    return {
        "classes": classes,
        "batch": batch,
        "templates": TEMPLATES,
        "share_of_a_step": ratio(rounds["prg_at_1024"], whole),
        "rounds_s": rounds,
    }


def input_pipeline(bench: Bench) -> list[dict[str, Any]]:
    """(c): crops ready for training, against torchvision's ImageFolder, RandomResizedCrop, flip and DataLoader."""
    found = []
    for name, folder, size, count in (
        ("photos", bench.photos, bench.image_size, 1536),
        ("thumbnails", bench.thumbnails, 32, 12288),
    ):
        store = bench.scratch / f"pictures-{name}"
        started = time.perf_counter()
        kept = index_images(open_images(str(folder)), workers=1, cache=DecodedImageCache(store))
        listed = {
            "listing_and_keeping_images_per_s": round(len(kept) / (time.perf_counter() - started)),
            "kept_bytes_an_image": round((store / "pictures.u8").stat().st_size / len(kept)),
        }
        peer_root = bench.scratch / f"classes-{name}"
        peer_root.mkdir()
        (peer_root / "one").symlink_to(folder.resolve())
        for workers in (1, 2):
            peer = torchvision_loader(peer_root, size, workers, count)
            speeds = compare(bench, kept, peer, size, count)
            found.append({"images": name, "size": size, "workers": workers, **listed, **speeds})
    return found


def compare(bench: Bench, kept: ImageIndex, peer: DataLoader[Any], size: int, count: int) -> dict[str, Any]:
    """Let the loaders take turns at the same number of images, all with torchvision's default interpolation."""
    bare, workers = replace(kept, cache=None), peer.num_workers
    rounds = take_turns(
        {
            "prgkit": lambda: consume(prgkit_loader(kept, size, workers, count), count),
            "prgkit_decoding": lambda: consume(prgkit_loader(bare, size, workers, count), count),
            "torchvision": lambda: consume((batch[0] for batch in peer), count),
        },
        bench.rounds,
    )
    return {
        "images_per_s": {key: round(count / statistics.median(times)) for key, times in rounds.items()},
        "torchvision_to_prgkit": ratio(rounds["torchvision"], rounds["prgkit"]),
        "torchvision_to_prgkit_decoding": ratio(rounds["torchvision"], rounds["prgkit_decoding"]),
        "rounds_s": rounds,
    }


def prgkit_loader(images: ImageIndex, size: int, workers: int, count: int) -> Iterator[Tensor]:
    """Yield batches of crops as the training loop gets them."""
    preprocessing = Preprocessing(size, 1.0, "bilinear", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    rendered = MultiViewDataset(images, preprocessing, Views())
    order = np.random.default_rng(0).integers(0, len(images), count)
    plan = [[(int(position), [1]) for position in order[start : start + BATCH]] for start in range(0, count, BATCH)]
    for batch in make_dataloader(rendered, plan, workers=workers):
        yield batch.pixels[:, 0]


def torchvision_loader(root: Path, size: int, workers: int, count: int) -> DataLoader[Any]:
    """Build the usual loader; its pixels stay uint8, as prgkit's do."""
    steps = [
        transforms.RandomResizedCrop(size, scale=(0.4, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    images = ImageFolder(str(root), transforms.Compose(steps))
    return DataLoader(
        images,
        batch_size=BATCH,
        sampler=RandomSampler(images, replacement=True, num_samples=count),
        num_workers=workers,
        worker_init_fn=lambda _worker: torch.set_num_threads(1),
    )


def consume(batches: Iterable[Tensor], count: int) -> None:
    """Take all images of a pass."""
    seen = sum(len(batch) for batch in batches)
    assert seen == count, f"{seen} of {count} images came"


def teacher_pass(bench: Bench) -> dict[str, Any]:
    """The teacher's pass over photos, decoding and storing included, against open_clip's own loop over the same files.

    That loop is its zero-shot evaluation's: a DataLoader with the model's preprocessing, autocast, encode_image.
    """
    name = bench.teachers[0]
    teacher = bench.teacher(name)
    recipe = recipe_for(bench)
    whole = index_images(open_images(str(bench.photos)), workers=2)
    batch, count = teacher.batch_size, bench.teacher_images // teacher.batch_size * teacher.batch_size
    _, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=None)
    peer_root = bench.scratch / "classes-teacher"
    peer_root.mkdir()
    (peer_root / "one").symlink_to(bench.photos.resolve())
    files = ImageFolder(str(peer_root), preprocess)
    numbers = iter(range(10**6))

    def ours() -> None:
        part = replace(whole, indices=whole.indices[:count], keys=whole.keys[:count])
        store = bench.scratch / f"pass-{next(numbers)}"
        targets = open_store(recipe.teacher[0], recipe.views, store, lambda _page: teacher)
        views = np.ones(count, dtype=int)
        embed(targets.stores, part, views=views, recipe=recipe, teacher=lambda _page: teacher, progress=NullProgress())

    def open_clips() -> None:
        chosen = torch.utils.data.Subset(files, whole.indices[:count].tolist())
        precision = torch.autocast(bench.device.type, torch.bfloat16) if teacher.precision == "bf16" else nullcontext()
        with torch.inference_mode(), precision:
            for images, _ in DataLoader(chosen, batch_size=batch, num_workers=1):
                teacher.model.encode_image(images.to(bench.device)).float().cpu()

    rounds = take_turns({"prgkit": ours, "open_clip": open_clips}, max(3, bench.rounds // 2))
    return {
        "teacher": name,
        "precision": teacher.precision,
        "images": count,
        "images_per_s": {key: round(count / statistics.median(times), 2) for key, times in rounds.items()},
        "open_clip_to_prgkit": ratio(rounds["open_clip"], rounds["prgkit"]),
        "rounds_s": rounds,
    }


def take_turns(contenders: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round, after one that warms up; the order turns with the round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            seconds = timed(contenders[name])
            if number:
                times[name].append(round(seconds, 5))
    return times


def timed(work: Step, *, repeat: int = 1) -> float:
    """Return the seconds of the fastest of ``repeat`` calls."""
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def waited(bench: Bench) -> None:
    """Wait for a GPU."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Return the median ratio within a round, and the least and largest one."""
    ratios = sorted(one / other for one, other in zip(slower, faster, strict=True))
    return {"median": round(statistics.median(ratios), 4), "min": round(ratios[0], 4), "max": round(ratios[-1], 4)}


def per_image(times: list[float], images: int) -> float:
    """Return the median milliseconds an image."""
    return round(1000 * statistics.median(times) / images, 2)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
