"""Distil: a student learns from what the teacher saw, without a label, and the teacher is not in the room.

Reads top to bottom: train on the stored targets, and keep the student that agrees most with the teacher on images it
has not learned from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available
from numpy.typing import NDArray
from torch import Tensor, nn

from prgkit.config.recipe import Recipe, Training
from prgkit.data.augment import Batch, MultiViewDataset, evaluation_views, make_dataloader
from prgkit.data.snapshot import anew, tell_changes
from prgkit.device import seed_everything
from prgkit.errors import BackendError, RunError, TeacherError
from prgkit.objectives import Objectives
from prgkit.outputs import LossContext, TeacherOutput
from prgkit.progress import NullProgress, Progress
from prgkit.storage.atomic import require_space
from prgkit.storage.locks import locked
from prgkit.storage.run import Interrupted, Run, differences, require_own_folder, start_run, stopping, undoing
from prgkit.storage.tensors import save_tensors
from prgkit.student.model import Student, build_student
from prgkit.teacher.ensemble import teacher_fingerprint
from prgkit.training.checkpoint import ModelEma, TrainingCounters, TrainingState, expected_bytes
from prgkit.training.dataset import DistillationDataset
from prgkit.training.distributed import first_goes_on, from_first, join_processes, probe_precision
from prgkit.training.few_shot import beside, tune_head_mixing
from prgkit.training.mixup import mixed
from prgkit.training.prepare import prepare
from prgkit.training.selection import systematic_sample


def distill(recipe: Recipe, folder: Path, targets_root: Path, progress: Progress) -> Run:
    """Distil ``recipe`` into the run at ``folder``, or go on where it was stopped.

    Under torchrun or ``accelerate launch`` every process calls this, and the first alone returns.

    Raises:
        Interrupted: SIGINT or SIGTERM came; everything up to it is saved.
        PrgkitError: for anything the user can mend.
    """
    check_trackers(recipe.training)
    accelerator = join_processes(recipe.training.trackers, Run(folder).trackers)
    with first_goes_on(accelerator):
        work(recipe, folder, targets_root, accelerator, progress if accelerator.is_main_process else NullProgress())
    return Run(folder)


def work(recipe: Recipe, folder: Path, targets_root: Path, accelerator: Accelerator, progress: Progress) -> None:
    """Do one process's part: the first reads the images and asks the teacher, all of them train."""
    run = Run(folder)
    if from_first(accelerator, lambda: already_finished(run, recipe, progress)):
        return
    with starting(run, recipe) if accelerator.is_main_process else nullcontext():
        trial = build_student(recipe.student, classes=len(recipe.classes), teacher_width=1)  # mistakes are told now
        if recipe.reads_stages:
            trial.stage_widths()
        dataset = from_first(accelerator, lambda: prepare(recipe, targets_root, progress, run))
        seed_everything(recipe.training.seed)
        student = build_student(recipe.student, classes=len(recipe.classes), teacher_width=dataset.store.width)
        if recipe.scores_by_text:
            student.score_by(dataset.class_vectors(), dataset.store.logit_scale)
        if recipe.learns_labels:
            student.grow_second_head()
        if accelerator.is_main_process:
            require_space(run.folder, expected_bytes(student, recipe.kept_floats * len(dataset.image_index)), "the run")
            run.update_card(student=student.facts(recipe.student))
        train(recipe, run, dataset, student, accelerator, progress)


def already_finished(run: Run, recipe: Recipe, progress: Progress) -> bool:
    """Tell whether a run is finished, and whether its images have changed since; or refuse it before it is touched."""
    require_own_folder(run.folder, recipe)
    if not (run.finished and run.weights.exists()) or differences(run, recipe):
        return False
    start_run(run.folder, recipe)
    progress.note(f"{run.folder} is finished already")
    tell_changes(run, recipe, progress)
    with suppress(TeacherError):  # it is gone, and needed no more
        if teacher_fingerprint(recipe) != run.card["teacher"]["fingerprint"]:
            progress.note(
                f"the teacher is not the one that it learned from any more; to learn from this one: {anew(run)}"
            )
    return True


@contextmanager
def starting(run: Run, recipe: Recipe) -> Iterator[None]:
    """Hold a folder as the run of ``recipe``; where it fails before anything was done, the folder is as it was."""
    undo = undoing(run)
    with locked(run.folder, "run"):
        try:
            start_run(run.folder, recipe)
            run.clear_leftovers()
            yield
        except Exception:
            undo()
            raise


def check_trackers(config: Training) -> None:
    """Refuse a tracker that is not installed before any work is done."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for tracker in config.trackers:
        if not available[tracker]():
            raise BackendError(
                f"training.trackers names {tracker}, which is not installed", fix=f"pip install {tracker}"
            )


def train(
    recipe: Recipe,
    run: Run,
    dataset: DistillationDataset,
    student: Student,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Train the student on the stored targets; every step is a function of (seed, epoch, step, process)."""
    config, device = recipe.training, accelerator.device
    batch_size = min(config.batch_size, dataset.images_an_epoch)
    if batch_size < accelerator.num_processes:
        raise RunError(
            f"a batch of {batch_size} images cannot be shared by {accelerator.num_processes} processes",
            fix="give more images, raise training.batch_size, or start fewer processes",
        )
    steps = dataset.images_an_epoch // batch_size  # in an epoch; the last, smaller batch is left out
    total = steps * config.epochs
    warmup = round(min(config.warmup_epochs * steps, 0.2 * total))  # a run of one epoch is more than its warm-up
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=decide_precision(run, student, config, accelerator)
    )

    student.to(device)
    dataset = replace(dataset, classifier=dataset.classifier.to(device))
    context = LossContext(
        classes=len(recipe.classes),
        width=dataset.store.width,
        epochs=config.epochs,
        steps_per_epoch=steps,
        images=len(dataset.image_index) + (len(dataset.labelled.labels) if dataset.labelled else 0),
        class_means=dataset.class_means,
        class_vectors=dataset.class_vectors(),
        logit_scale=dataset.store.logit_scale,
        stages=student.stage_widths,
    )
    seed_everything(config.seed)  # what an objective learns begins alike in every process, whatever was probed before
    objective = Objectives(recipe.objective, context).to(device)
    student.projector.requires_grad_(objective.uses_features)  # several processes wait for every gradient
    student.shows_stages = recipe.reads_stages
    learning = nn.ModuleList([student, objective])  # some objectives learn beside the student, and stay here
    optimizer = build_optimizer(learning, config)
    average = ModelEma(student)  # the weight EMA is what is judged and kept
    counters = TrainingCounters(made_from=dataset.fingerprint())
    state = TrainingState(student, average, optimizer, objective, counters)
    state.load(run)
    if accelerator.is_main_process:
        run.keep_metrics(counters.epoch)
    model, stepper = accelerator.prepare(torch.compile(student) if config.compile else student, optimizer)
    accelerator.init_trackers(run.name)

    first, rendered = counters.step, MultiViewDataset(dataset.image_index, student.preprocessing, recipe.views)
    progress.start("student", total * batch_size, "img")
    progress.advance(first * batch_size)
    clock = Clock(counters.seconds)

    def save() -> None:
        if accelerator.is_main_process and counters.step > first:
            counters.seconds = clock.seconds()
            state.save(run)

    with stopping() as signals:
        plan = batches(dataset, config, recipe.views.count, batch_size, range(first, total), accelerator)
        loaded = make_dataloader(rendered, plan, workers=config.workers, stop=signals)
        labelled = labelled_batches(dataset, student, recipe, range(first, total), accelerator, signals)
        if counters.steps_in_epoch == steps:  # what failed before was the judging
            finish_epoch(run, dataset, state, accelerator, config)
        fetched, failure = fetch(loaded, labelled) if first < total else None, None
        for step in range(first, total):
            if fetched is None:  # stopped while the first batch was waited for
                raise interrupted(run, counters, config)
            batch, few = fetched
            pixels = batch.pixels[:, 0].to(device, non_blocking=True)
            teacher = dataset.teacher_output(batch.positions.numpy(), batch.views[:, 0].numpy(), device)
            if config.mixup is not None:
                pixels, teacher = mixed(
                    pixels, teacher, config.mixup, seed=(config.seed, step, accelerator.process_index)
                )
            if few is not None:
                pixels, teacher = beside(pixels, teacher, *few)
            model.train()
            with autocast():
                answer = model(pixels)
            terms = objective(answer, teacher)
            loss = torch.stack(list(terms.values())).sum()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule(step, total, warmup)
            stepper.zero_grad()
            accelerator.backward(loss)
            for parameter in objective.parameters():  # the student's are averaged over the processes already
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
            if config.gradient_clip is not None:
                accelerator.clip_grad_norm_(learning.parameters(), config.gradient_clip)
            stepper.step()
            average.update(student, decay=min(config.ema, (1 + step) / (10 + step)))

            told = {name: term.detach() for name, term in {"loss": loss, **terms}.items()}
            counters.add(accelerator.reduce(told, "mean"))
            progress.advance(batch_size, describe(counters, config))
            epoch_ends = counters.steps_in_epoch == steps
            if epoch_ends:
                counters.seconds = clock.seconds()
                with saving_first(save):
                    finish_epoch(run, dataset, state, accelerator, config)
            if step + 1 < total:
                try:
                    fetched = fetch(loaded, labelled)
                except Exception as error:  # raised when all processes have stopped, and what they did is saved
                    fetched, failure = None, error
            stop = stop_requested(bool(signals) or fetched is None, accelerator)
            if epoch_ends or stop or clock.due(config.checkpoint_minutes):
                save()
            if stop:
                accelerator.wait_for_everyone()  # a launcher ends them all as soon as one has ended
                raise failure or interrupted(run, counters, config)
    accelerator.wait_for_everyone()
    if not run.weights.exists():  # deleted since, as it was damaged; the last average takes its place
        judge(run, dataset, state, accelerator, config, epoch=counters.epoch)
    if accelerator.is_main_process:
        rate = total * batch_size / max(counters.seconds, 1e-9)
        best = {"epoch": counters.best_epoch, "agreement": counters.best_agreement}
        run.update_card(best=best, images_per_s=round(rate, 1), seconds=round(counters.seconds, 1), finished=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def batches(
    dataset: DistillationDataset, config: Training, views: int, batch_size: int, steps: range, accelerator: Accelerator
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield this process's part of each batch: an image at most once an epoch, and each epoch its next view."""
    offsets = {int(position): int(dataset.image_index.keys[position][:8], 16) for position in dataset.train_indices}
    in_epoch = dataset.images_an_epoch // batch_size
    order = np.empty(0, dtype=np.int64)
    for step in steps:
        epoch, place = divmod(step, in_epoch)
        if place == 0 or not len(order):
            learned = learned_in(dataset, config, epoch, in_epoch * batch_size)
            order = np.random.default_rng((config.seed, epoch)).permutation(learned)
        chosen = order[place * batch_size : (place + 1) * batch_size]
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        yield [(int(position), [1 + (offsets[int(position)] + epoch) % views]) for position in mine]


def labelled_batches(
    dataset: DistillationDataset,
    student: Student,
    recipe: Recipe,
    steps: range,
    accelerator: Accelerator,
    stop: Sequence[int],
) -> Iterator[tuple[Tensor, TeacherOutput]] | None:
    """Return the labelled images of each step, where an objective of the recipe reads any."""
    if dataset.labelled is None:
        return None
    share = (accelerator.process_index, accelerator.num_processes)
    return dataset.labelled.shown(student.preprocessing, recipe.training, recipe.views, steps, *share, stop)


def fetch(
    loaded: Iterator[Batch], labelled: Iterator[tuple[Tensor, TeacherOutput]] | None
) -> tuple[Batch, tuple[Tensor, TeacherOutput] | None] | None:
    """Return what the next step learns from; None where a stop was asked for while it was waited for."""
    batch = next(loaded, None)
    few = next(labelled, None) if labelled is not None and batch is not None else None
    return None if batch is None or (few is None and labelled is not None) else (batch, few)


@contextmanager
def saving_first(save: Callable[[], None]) -> Iterator[None]:
    """Save what was learned before an error goes on its way."""
    try:
        yield
    except Exception:
        save()
        raise


def interrupted(run: Run, counters: TrainingCounters, config: Training) -> Interrupted:
    """Build the notice of a run that was stopped."""
    return Interrupted(
        f"stopped in epoch {min(counters.epoch + 1, config.epochs)} of {config.epochs}; everything up to here is saved",
        where=run.folder,
        fix="the same command goes on from here",
    )


def learned_in(dataset: DistillationDataset, config: Training, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the positions of an epoch: every learned image, or ``count`` of them drawn by their shares."""
    if dataset.sample_weights is None:
        return dataset.train_indices
    return dataset.train_indices[
        systematic_sample(dataset.sample_weights, count, epoch=epoch, epochs=config.epochs, seed=config.seed)
    ]


def schedule(step: int, total: int, warmup: int) -> float:
    """Return the learning rate's factor: linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build_optimizer(learning: nn.Module, config: Training) -> torch.optim.Optimizer:
    """Build the optimizer; biases and norms, which are vectors, do not decay."""
    matrices = [parameter for parameter in learning.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in learning.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)


def decide_precision(run: Run, student: Student, config: Training, accelerator: Accelerator) -> bool:
    """Return whether to train in bfloat16; what a probe decides is written down first, and read again on resume."""
    if config.precision != "auto":
        return config.precision == "bf16"
    with accelerator.main_process_first():
        if "precision" not in run.card:
            run.update_card(precision=probe_precision(student, accelerator.device, config.batch_size))
    return bool(run.card["precision"]["chosen"] == "bf16")


def finish_epoch(
    run: Run, dataset: DistillationDataset, state: TrainingState, accelerator: Accelerator, config: Training
) -> None:
    """Judge the student and write the epoch's metrics."""
    counters = state.counters
    epoch = counters.epoch + 1
    agreement = judge(run, dataset, state, accelerator, config, epoch=epoch)
    if accelerator.is_main_process:
        record = {"epoch": epoch, **counters.means(), "agreement": agreement, "seconds": round(counters.seconds, 1)}
        run.append_metrics(record)
        accelerator.log({name: value for name, value in record.items() if name != "epoch"}, step=epoch)
    counters.end_epoch()  # an epoch that could not be judged is not over


def judge(
    run: Run,
    dataset: DistillationDataset,
    state: TrainingState,
    accelerator: Accelerator,
    config: Training,
    *,
    epoch: int,
) -> float:
    """Judge the averaged student without labels and keep it if it is the best so far; of equals, the later one."""
    counters, average = state.counters, state.average.student
    if dataset.labelled is not None:
        tune_head_mixing(average, dataset.labelled, config)
    agreement = agreement_with_teacher(average, dataset, config, accelerator)
    if accelerator.is_main_process and (agreement >= counters.best_agreement or not run.weights.exists()):
        counters.best_epoch, counters.best_agreement = epoch, agreement
        save_tensors(run.weights, average.state_dict(), {"epoch": epoch, "agreement": agreement})
    return agreement


@torch.inference_mode()
def agreement_with_teacher(
    student: Student, dataset: DistillationDataset, config: Training, accelerator: Accelerator
) -> float:
    """Return the percentage of held-out images on which student and teacher name the same class."""
    mine = dataset.val_indices[accelerator.process_index :: accelerator.num_processes]
    counts = torch.zeros(2, device=accelerator.device)  # agreeing, all
    for batch in evaluation_views(dataset.image_index, student.preprocessing, mine, workers=config.workers):
        teacher = dataset.teacher_output(batch.positions.numpy(), batch.views[:, 0].numpy(), accelerator.device)
        logits = student(batch.pixels[:, 0].to(accelerator.device)).logits
        counts[0] += (logits.argmax(1) == teacher.labels).sum()
        counts[1] += len(logits)
    agreeing, images = accelerator.reduce(counts).tolist()
    return float(round(100 * agreeing / images, 4))


def stop_requested(asked: bool, accelerator: Accelerator) -> bool:
    """Return whether any process was asked to stop, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return asked
    if asked:
        accelerator.set_trigger()
    return bool(accelerator.check_trigger())


def describe(counters: TrainingCounters, config: Training) -> str:
    """Return the progress line: the epoch and the mean of each loss term in it."""
    terms = "  ".join(f"{name} {value:.3f}" for name, value in counters.means().items())
    best = f"  agreement {counters.best_agreement:.1f} %" if counters.best_epoch else ""
    return f"epoch {counters.epoch + 1}/{config.epochs}  {terms}{best}"


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
