"""Distil: a student learns from what the teacher saw, without a label, and the teacher is not in the room.

Reads top to bottom: prepare the images and targets, train, and keep the student that agrees most with the teacher on
images it has not learned from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available
from numpy.typing import NDArray
from torch import Tensor

from prgkit.checkpoint import Average, Progress, TrainingState, expected_bytes, save_tensors
from prgkit.devices import best_device, probe_precision, seed_everything
from prgkit.errors import BackendError, ImagesError
from prgkit.files import require_space
from prgkit.images import Catalogue, catalogue, match_labels, open_images
from prgkit.objectives import Objectives, TeacherSide
from prgkit.objectives.prg import prompt_logits, weighted_logits
from prgkit.recipe import Recipe, Training, Views
from prgkit.run import Interrupted, Run, locked, start_run, stopping
from prgkit.student import Student, build_student
from prgkit.targets import Targets, embed, open_targets
from prgkit.teacher import Teacher, load_teacher
from prgkit.views import Rendered, default_workers, load_batches
from prgkit.watch import Watch


@dataclass(frozen=True)
class Lesson:
    """What there is to learn from: the images, and the teacher's answers to them."""

    catalogue: Catalogue
    targets: Targets
    rows: NDArray[np.int64]  # [images], in the target store
    held_out: NDArray[np.int64]  # positions that select the checkpoint
    learned: NDArray[np.int64]  # positions that the student learns from
    prompts: Tensor  # T [M, C, D]
    prompt_weighting: str

    def answer(self, positions: NDArray[np.int64], views: NDArray[np.int64], device: torch.device) -> TeacherSide:
        """Return the teacher's side (I, W, y) of these views."""
        features = self.targets.features(self.rows[positions], views).to(device)  # I [B, D]
        per_prompt = prompt_logits(features, self.prompts.to(device), self.targets.logit_scale)  # W_m [B, M, C]
        logits = weighted_logits(per_prompt, self.prompt_weighting)  # W [B, C]
        return TeacherSide(features, logits, logits.argmax(dim=1))


def distill(recipe: Recipe, folder: Path, targets_root: Path, watch: Watch) -> Run:
    """Distil ``recipe`` into the run at ``folder``, or go on where it was stopped.

    Raises:
        Interrupted: SIGINT or SIGTERM came; everything up to it is saved.
        PrgkitError: for anything the user can mend.
    """
    check_trackers(recipe.training)
    accelerator = Accelerator(log_with=list(recipe.training.trackers) or None, project_dir=str(folder / "trackers"))
    with accelerator.main_process_first():
        run = start_run(folder, recipe)
    if run.finished:
        watch.note(f"{run.folder} is finished already")
        return run
    with locked(run.folder, "run") if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            lesson = prepare(recipe, targets_root, watch, run)
        seed_everything(recipe.training.seed)
        student = build_student(recipe.student, classes=len(recipe.classes), teacher_width=lesson.targets.width)
        if accelerator.is_main_process:
            require_space(run.folder, expected_bytes(student), "the run")
            run.update_card(teacher=lesson.targets.facts(), student=student.facts(recipe.student))
        train(recipe, run, lesson, student, accelerator, watch)
    return run


def prepare(recipe: Recipe, targets_root: Path, watch: Watch, run: Run | None = None) -> Lesson:
    """Read the images, split off the held-out ones, and have the teacher see what it has not seen yet."""

    @cache
    def teacher() -> Teacher:  # loaded once, and only if something is missing
        watch.note(f"loading the teacher {recipe.teacher.model}")
        return load_teacher(recipe.teacher, best_device())

    images = read_catalogue(recipe.data.images, recipe, watch)
    if run is not None:
        run.update_card(images=facts_of(images))
    targets = open_targets(recipe, targets_root, teacher)
    for place in targets.damaged:
        watch.note(f"damaged block in {targets.folder}: {place}; its images are embedded again")
    evaluation = read_evaluation(recipe, images, watch) if recipe.data.evaluation else None
    held_out = hold_out(images.keys, recipe.data.held_out)
    views = np.full(len(images), 1 + recipe.views.count)
    views[held_out] = 1  # the evaluation view alone
    embed(targets, images, views=views, recipe=recipe, teacher=teacher, watch=watch)
    if evaluation is not None:
        embed(targets, evaluation, views=np.ones(len(evaluation), int), recipe=recipe, teacher=teacher, watch=watch)
    prompts = targets.prompts(recipe.classes, recipe.templates, teacher)
    return Lesson(
        catalogue=images,
        targets=targets,
        rows=targets.rows(images.keys, views=1),
        held_out=held_out,
        learned=np.setdiff1d(np.arange(len(images)), held_out),
        prompts=prompts,
        prompt_weighting=recipe.prompt_weighting,
    )


def read_catalogue(spec: str, recipe: Recipe, watch: Watch) -> Catalogue:
    """Read every image of ``spec`` once: which are readable, which are the same, and the content key of each."""
    labels = recipe.data.evaluation_labels if spec == recipe.data.evaluation else None
    images = open_images(spec, labels=Path(labels) if labels else None)
    watch.start("images", len(images), "img")
    found = catalogue(images, workers=default_workers(), progress=watch.advance)
    if found.unreadable:
        first = found.unreadable[0]
        watch.note(f"{len(found.unreadable)} of {len(images)} images are unreadable, e.g. {first.name}: {first.reason}")
    return found


def read_evaluation(recipe: Recipe, learned: Catalogue, watch: Watch) -> Catalogue:
    """Read the labelled images, and say now rather than after training if their labels fit no class.

    Nothing of a label goes any further: the teacher will see these images, and the student only when it is measured.
    """
    evaluation = read_catalogue(recipe.data.evaluation or "", recipe, watch)
    match_labels(evaluation, recipe.classes)
    if shared := len(set(evaluation.keys) & set(learned.keys)):
        watch.note(f"{shared} evaluation images are also among those to learn from: accuracy on them flatters")
    return evaluation


def facts_of(images: Catalogue) -> dict[str, Any]:
    """Return what a run's card says of its images: how many, and each unreadable one with its reason."""
    unreadable = [{"name": file.name, "reason": file.reason} for file in images.unreadable]
    return {
        "source": images.images.spec,
        "used": len(images),
        "duplicates": images.duplicates,
        "unreadable": unreadable,
    }


def check_trackers(page: Training) -> None:
    """Refuse a tracker that is not installed before any work is done."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for tracker in page.trackers:
        if not available[tracker]():
            raise BackendError(
                f"training.trackers names {tracker}, which is not installed", fix=f"pip install {tracker}"
            )


def train(recipe: Recipe, run: Run, lesson: Lesson, student: Student, accelerator: Accelerator, watch: Watch) -> None:
    """Train the student on the stored targets; every step is a function of (seed, epoch, step, process)."""
    page, device = recipe.training, accelerator.device
    batch_size = min(page.batch_size, len(lesson.learned))
    steps = len(lesson.learned) // batch_size  # in an epoch; the last, smaller batch is left out
    total, warmup = steps * page.epochs, round(page.warmup_epochs * steps)
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=decide_precision(run, student, page, device)
    )

    student.to(device)
    lesson = replace(lesson, prompts=lesson.prompts.to(device))
    objective = Objectives(recipe.objective, len(recipe.classes), lesson.targets.width).to(device)
    optimizer = build_optimizer(student, page)
    average = Average(student)  # the weight EMA is what is judged and kept
    progress = Progress()
    state = TrainingState(student, average, optimizer, objective, progress)
    state.load(run)
    run.keep_metrics(progress.epoch)
    model, stepper = accelerator.prepare(torch.compile(student) if page.compile else student, optimizer)
    accelerator.init_trackers(run.name)

    plan = batches(lesson, page, recipe.views.count, batch_size, range(progress.step, total), accelerator)
    loaded = load_batches(Rendered(lesson.catalogue, student.preprocessing, recipe.views), plan, workers=page.workers)
    watch.start("student", total * batch_size, "img")
    watch.advance(progress.step * batch_size)
    clock = Clock(progress.seconds)

    with stopping() as signals:
        for step in range(progress.step, total):
            batch = next(loaded)
            teacher = lesson.answer(batch.positions.numpy(), batch.views[:, 0].numpy(), device)
            model.train()
            with autocast():
                answer = model(batch.pixels[:, 0].to(device, non_blocking=True))
            terms = objective(answer, teacher)
            loss = torch.stack(list(terms.values())).sum()
            for group in optimizer.param_groups:
                group["lr"] = page.learning_rate * schedule(step, total, warmup)
            stepper.zero_grad()
            accelerator.backward(loss)
            if page.gradient_clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), page.gradient_clip)
            stepper.step()
            average.update(student, decay=min(page.ema, (1 + step) / (10 + step)))

            progress.add({"loss": loss, **terms})
            watch.advance(batch_size, describe(progress, page))
            epoch_ends = progress.steps_in_epoch == steps
            if epoch_ends:
                progress.seconds = clock.seconds()
                finish_epoch(run, lesson, state, accelerator, page)
            stop = stop_requested(signals, accelerator)
            if accelerator.is_main_process and (epoch_ends or stop or clock.due(page.checkpoint_minutes)):
                progress.seconds = clock.seconds()
                state.save(run)
            if stop:
                raise Interrupted(
                    f"stopped in epoch {progress.epoch + 1} of {page.epochs}; everything up to here is saved",
                    where=run.folder,
                    fix="the same command goes on from here",
                )
    accelerator.end_training()
    if accelerator.is_main_process:
        rate = total * batch_size / max(progress.seconds, 1e-9)
        best = {"epoch": progress.best_epoch, "agreement": progress.best_agreement}
        run.update_card(best=best, images_per_s=round(rate, 1), seconds=round(progress.seconds, 1), finished=True)


def batches(
    lesson: Lesson, page: Training, views: int, batch_size: int, steps: range, accelerator: Accelerator
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield this process's part of each batch: every image once an epoch, and every view of it once in ``views``."""
    offsets = {int(position): int(lesson.catalogue.keys[position][:8], 16) for position in lesson.learned}
    in_epoch = len(lesson.learned) // batch_size
    order = np.empty(0, dtype=np.int64)
    for step in steps:
        epoch, place = divmod(step, in_epoch)
        if place == 0 or not len(order):
            order = np.random.default_rng((page.seed, epoch)).permutation(lesson.learned)
        chosen = order[place * batch_size : (place + 1) * batch_size]
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        yield [(int(position), [1 + (offsets[int(position)] + epoch) % views]) for position in mine]


def schedule(step: int, total: int, warmup: int) -> float:
    """Return the learning rate's factor: linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build_optimizer(student: Student, page: Training) -> torch.optim.Optimizer:
    """Build the optimizer; biases and norms, which are vectors, do not decay."""
    matrices = [parameter for parameter in student.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in student.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": page.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if page.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=page.learning_rate)
    return torch.optim.SGD(groups, lr=page.learning_rate, momentum=0.9, nesterov=True)


def decide_precision(run: Run, student: Student, page: Training, device: torch.device) -> bool:
    """Return whether to train in bfloat16; what a probe decides is written down first, and read again on resume."""
    if page.precision != "auto":
        return page.precision == "bf16"
    if "precision" not in run.card:
        run.update_card(precision=probe_precision(student, device, page.batch_size))
    return bool(run.card["precision"]["chosen"] == "bf16")


def finish_epoch(run: Run, lesson: Lesson, state: TrainingState, accelerator: Accelerator, page: Training) -> None:
    """Judge the averaged student without labels, keep it if it is the best so far, and write the epoch's metrics."""
    progress, average = state.progress, state.average.student
    means = progress.means()
    progress.end_epoch()
    agreement = agreement_with_teacher(average, lesson, page, accelerator)
    if not accelerator.is_main_process:
        return
    if agreement >= progress.best_agreement:  # of equals the later, which has seen more and moves less
        progress.best_epoch, progress.best_agreement = progress.epoch, agreement
        save_tensors(run.weights, average.state_dict(), {"epoch": progress.epoch, "agreement": agreement})
    record = {"epoch": progress.epoch, **means, "agreement": agreement, "seconds": round(progress.seconds, 1)}
    run.append_metrics(record)
    accelerator.log({name: value for name, value in record.items() if name != "epoch"}, step=progress.epoch)


@torch.inference_mode()
def agreement_with_teacher(student: Student, lesson: Lesson, page: Training, accelerator: Accelerator) -> float:
    """Return the percentage of held-out images on which student and teacher name the same class."""
    mine = lesson.held_out[accelerator.process_index :: accelerator.num_processes]
    plan = [[(int(position), [0]) for position in mine[start : start + 256]] for start in range(0, len(mine), 256)]
    counts = torch.zeros(2, device=accelerator.device)  # agreeing, all
    for batch in load_batches(Rendered(lesson.catalogue, student.preprocessing, Views()), plan, workers=page.workers):
        teacher = lesson.answer(batch.positions.numpy(), batch.views[:, 0].numpy(), accelerator.device)
        logits = student(batch.pixels[:, 0].to(accelerator.device)).logits
        counts += torch.stack([(logits.argmax(1) == teacher.labels).sum(), torch.tensor(len(logits))])
    agreeing, images = accelerator.reduce(counts).tolist()
    return float(round(100 * agreeing / images, 4))


def hold_out(keys: Sequence[str], share: float) -> NDArray[np.int64]:
    """Return the positions of the images that select the checkpoint, chosen by their content alone."""
    places = np.array([int(key[-8:], 16) / 2**32 for key in keys])
    chosen = np.flatnonzero(places < share)
    if len(keys) < 4:
        raise ImagesError(
            f"{len(keys)} images are too few to learn from", fix="give at least four, better some hundreds"
        )
    return chosen if 0 < len(chosen) < len(keys) - 1 else np.argsort(places)[:1]


def stop_requested(signals: list[int], accelerator: Accelerator) -> bool:
    """Return whether any process was asked to stop, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return bool(signals)
    if signals:
        accelerator.set_trigger()
    return bool(accelerator.check_trigger())


def describe(progress: Progress, page: Training) -> str:
    """Return the progress line: the epoch and the mean of each loss term in it."""
    terms = "  ".join(f"{name} {value:.3f}" for name, value in progress.means().items())
    best = f"  agreement {progress.best_agreement:.1f} %" if progress.best_epoch else ""
    return f"epoch {progress.epoch + 1}/{page.epochs}  {terms}{best}"


class Clock:
    """The seconds a run has trained, over all its resumptions, and when the next checkpoint is due."""

    def __init__(self, seconds_before: float) -> None:
        self.started = self.saved = time.monotonic()
        self.seconds_before = seconds_before

    def seconds(self) -> float:
        """Return the seconds trained so far."""
        return self.seconds_before + time.monotonic() - self.started

    def due(self, minutes: float) -> bool:
        """Return whether ``minutes`` have passed since this was last true."""
        if time.monotonic() - self.saved < 60 * minutes:
            return False
        self.saved = time.monotonic()
        return True
