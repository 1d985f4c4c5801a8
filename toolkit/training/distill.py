"""Distillation: a student learns from what the teacher saw of unlabelled images; the teacher itself is not loaded.

Reads top to bottom: train on the stored features, and keep the student whose answers to held-out images are nearest to
the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from prgkit.config.recipe import Recipe
from prgkit.config.sections import Training
from prgkit.data.augment import evaluation_views
from prgkit.data.snapshot import report_changes, restart_command
from prgkit.device import seed_everything, seed_step
from prgkit.errors import CameApartError, TeacherError
from prgkit.interrupt import Interrupted, stopping
from prgkit.objectives import Objectives
from prgkit.outputs import LossContext, TeacherOutput, kl_divergence
from prgkit.progress import NullProgress, Progress
from prgkit.storage.atomic import require_space
from prgkit.storage.locks import locked
from prgkit.storage.run import Run, differences, require_own_folder, start_run, undoing
from prgkit.storage.tensors import save_tensors
from prgkit.student.model import Student, build_student, start_student, student_facts
from prgkit.teacher.ensemble import as_learned, teacher_fingerprint
from prgkit.training.batches import StepBatch, StepPlan, load_batches, mixup, plan_steps
from prgkit.training.checkpoint import (
    Clock,
    HeldOutScores,
    TrainingCounters,
    TrainingState,
    came_apart,
    expected_bytes,
    held_bytes,
    model_ema,
)
from prgkit.training.dataset import DistillationDataset
from prgkit.training.distributed import (
    any_process,
    check_trackers,
    decide_precision,
    first_goes_on,
    from_first,
    join_processes,
    share_buffers,
    share_teacher_pass,
)
from prgkit.training.few_shot import append_labelled, tune_head_mixing
from prgkit.training.optimizer import build_optimizer, schedule
from prgkit.training.prepare import prepare


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
        distill_one_rank(
            recipe, folder, targets_root, accelerator, progress if accelerator.is_main_process else NullProgress()
        )
    return Run(folder)


def distill_one_rank(
    recipe: Recipe, folder: Path, targets_root: Path, accelerator: Accelerator, progress: Progress
) -> None:
    """Do what each process does: each embeds its part of the images, the first prepares the data set, all train."""
    run = Run(folder)
    if from_first(accelerator, lambda: already_finished(run, recipe, targets_root, progress)):
        return
    with locked_run(run, recipe) if accelerator.is_main_process else nullcontext():
        trained = run if run.state.exists() and run.card.student is not None else None
        unused_student = build_student(recipe.student, classes=len(recipe.classes), teacher_width=1, trained=trained)
        if recipe.reads_stages:  # what is wrong with the student is said before the teacher sees an image
            unused_student.stage_widths()
        if not run.begun:
            share_teacher_pass(recipe, targets_root, accelerator, progress)
        dataset = from_first(accelerator, lambda: prepare(recipe, targets_root, progress, run))
        seed_everything(recipe.training.seed)
        student = start_student(recipe, dataset.store.facts(), dataset.classifier.scoring(), trained=trained)
        if accelerator.is_main_process:
            whole = expected_bytes(student, recipe.kept_floats * len(dataset.image_index))
            require_space(run.folder, whole - held_bytes(run), "the run")
            if trained is None:
                run.update_card(student=student.facts(recipe.student))
            if run.student_facts.origin:
                progress.note(f"the student begins with {run.student_facts.origin}")
        train(recipe, run, dataset, student, accelerator, progress)


def already_finished(run: Run, recipe: Recipe, targets_root: Path, progress: Progress) -> bool:
    """Tell whether a run is finished, and say what has changed since; or refuse it before it is touched."""
    require_own_folder(run.folder, recipe)
    if not (run.finished and run.weights.exists()) or differences(run, recipe):
        return False
    start_run(run.folder, recipe)
    progress.note(f"{run.folder} is finished already")
    report_changes(run, recipe, progress)
    with suppress(TeacherError):  # it is gone, and needed no more
        learned = as_learned(recipe, run, targets_root)
        if teacher_fingerprint(learned, targets_root) != run.teacher_facts.fingerprint:
            again = restart_command(run)
            progress.note(f"the teacher is not the one that it learned from any more; to learn from this one: {again}")
    return True


@contextmanager
def locked_run(run: Run, recipe: Recipe) -> Iterator[None]:
    """Lock the folder and write the recipe into it; an error before training has begun puts the folder back."""
    undo = undoing(run)
    with locked(run.folder, "run"):
        try:
            start_run(run.folder, recipe)
            run.clear_leftovers()
            yield
        except Exception:
            undo()
            raise


def train(
    recipe: Recipe,
    run: Run,
    dataset: DistillationDataset,
    student: Student,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Train the student on the stored features; every step is a function of (seed, epoch, step, process)."""
    trainer = set_up(recipe, run, dataset, student, accelerator)
    plan, counters = trainer.plan, trainer.state.counters
    progress.start("student", plan.steps * plan.batch_size, "img")
    progress.advance(counters.step * plan.batch_size)
    with stopping() as signals:
        if counters.steps_in_epoch == plan.steps_per_epoch:  # its evaluation failed, and the run was resumed
            end_epoch(trainer)
        steps = range(counters.step, plan.steps)
        batches = load_batches(trainer.dataset, student.preprocessing, recipe, plan, steps, accelerator, stop=signals)
        for step in steps:
            batch, error = fetch(batches)
            stop = any_process(bool(signals) or batch is None, accelerator)  # all stop before the same step
            if batch is None or stop:
                if counters.steps_in_epoch:  # the end of an epoch is saved already
                    save_checkpoint(trainer)
                raise stopped(trainer, error)
            terms = train_step(trainer, batch, step)
            counters.add(accelerator.reduce(terms, "mean"))
            progress.advance(plan.batch_size, describe(counters, recipe.training))
            if epoch_ends := counters.steps_in_epoch == plan.steps_per_epoch:
                end_epoch(trainer)
            if epoch_ends or trainer.clock.due(recipe.training.checkpoint_minutes):
                save_checkpoint(trainer)
        if any_process(bool(signals), accelerator):
            raise stopped(trainer)
    finish(trainer)


@dataclass(frozen=True)
class Trainer:
    """What the steps of a training share."""

    config: Training
    run: Run
    dataset: DistillationDataset
    plan: StepPlan
    state: TrainingState
    # The same weights as state.student, in accelerate's and torch.compile's wrappers: batches go through this one.
    wrapped_student: nn.Module
    wrapped_optimizer: torch.optim.Optimizer
    autocast: Callable[[], torch.autocast]
    accelerator: Accelerator
    clock: Clock


def set_up(
    recipe: Recipe, run: Run, dataset: DistillationDataset, student: Student, accelerator: Accelerator
) -> Trainer:
    """Build everything that a training needs, and bring it to where the run's checkpoint is, if there is one."""
    config, device = recipe.training, accelerator.device
    plan = plan_steps(dataset, config, accelerator)
    bf16 = decide_precision(run, student, config, accelerator)
    student.to(device)
    dataset = replace(dataset, classifier=dataset.classifier.to(device))
    seed_everything(config.seed)  # what an objective learns begins alike in every process, whatever was probed before
    objective = Objectives(recipe.objective, loss_context(recipe, dataset, student, plan)).to(device)
    student.projector.requires_grad_(objective.uses_features)  # several processes wait for every gradient
    student.returns_stages = recipe.reads_stages
    optimizer = build_optimizer(nn.ModuleList([student, objective]), config)
    counters = TrainingCounters(made_from=dataset.fingerprint())
    state = TrainingState(student, model_ema(student), optimizer, objective, counters)
    state.load(run)
    if accelerator.is_main_process:
        run.keep_metrics(state.counters.epoch)
    wrapped_student, wrapped_optimizer = accelerator.prepare(
        torch.compile(student) if config.compile else student, optimizer
    )
    accelerator.init_trackers(run.name)
    return Trainer(
        config=config,
        run=run,
        dataset=dataset,
        plan=plan,
        state=state,
        wrapped_student=wrapped_student,
        wrapped_optimizer=wrapped_optimizer,
        autocast=partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16),
        accelerator=accelerator,
        clock=Clock(state.counters.seconds),
    )


def train_step(trainer: Trainer, batch: StepBatch, step: int) -> dict[str, Tensor]:
    """Learn from one batch, and return its loss and the terms of it, each a scalar without gradient."""
    config, state, accelerator = trainer.config, trainer.state, trainer.accelerator
    pixels, teacher = inputs_of(trainer, batch, step)
    trainer.wrapped_student.train()
    seed_step(accelerator.device, config.seed, step, accelerator.process_index)
    with trainer.autocast():
        output = trainer.wrapped_student(pixels)
    terms = state.objective(output, teacher)
    loss = torch.stack(list(terms.values())).sum()

    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * schedule(step, trainer.plan.steps, trainer.plan.warmup_steps)
    trainer.wrapped_optimizer.zero_grad()
    accelerator.backward(loss)
    for parameter in state.objective.parameters():  # the student's are averaged over the processes already
        parameter.grad = accelerator.reduce(parameter.grad, "mean")
    if config.gradient_clip is not None:
        accelerator.clip_grad_norm_([*state.student.parameters(), *state.objective.parameters()], config.gradient_clip)
    trainer.wrapped_optimizer.step()
    state.average.decay = min(config.ema, (1 + step) / (10 + step))
    state.average.update(state.student)
    return {name: term.detach() for name, term in {"loss": loss, **terms}.items()}


def inputs_of(trainer: Trainer, batch: StepBatch, step: int) -> tuple[Tensor, TeacherOutput]:
    """Return a step's pixels [B, S, S, 3] and what the teacher says of them; mixed, labelled, weighted if asked for."""
    config, device = trainer.config, trainer.accelerator.device
    positions, views = batch.unlabelled.positions.numpy(), batch.unlabelled.views[:, 0].numpy()
    pixels = batch.unlabelled.pixels[:, 0].to(device, non_blocking=True)
    teacher = trainer.dataset.teacher_output(positions, views, device)
    if config.mixup is not None:
        seed = (config.seed, step, trainer.accelerator.process_index)
        pixels, teacher = mixup(pixels, teacher, config.mixup, seed=seed)
    if batch.labelled is not None:
        pixels, teacher = append_labelled(pixels, teacher, *batch.labelled)
    return pixels, trainer.dataset.weighted(teacher)


def end_epoch(trainer: Trainer) -> None:
    """Evaluate the student and write the epoch's metrics.

    An epoch whose evaluation fails is not over, but what it learned is saved.
    """
    counters, accelerator = trainer.state.counters, trainer.accelerator
    counters.read()
    counters.seconds = trainer.clock.seconds()
    epoch = counters.epoch + 1
    try:
        scores = evaluate(trainer, epoch)
    except CameApartError:  # nothing goes on from there
        raise
    except Exception:
        save_checkpoint(trainer)
        raise
    if accelerator.is_main_process:
        record = {"epoch": epoch, **counters.means(), **scores._asdict(), "seconds": round(counters.seconds, 1)}
        trainer.run.append_metrics(record)
        accelerator.log({name: value for name, value in record.items() if name != "epoch"}, step=epoch)
    counters.end_epoch()


def evaluate(trainer: Trainer, epoch: int) -> HeldOutScores:
    """Evaluate the averaged student without labels and keep it if it is the best so far; of equals, the later one.

    The divergence decides, as a moving average over epochs: of some tens of held-out images, one that changes sides
    moves the agreement by more than an epoch does (docs/results.md compares them).

    Raises:
        CameApartError: the averaged student's answers are no numbers; a batch norm's loss in training can be one still.
    """
    counters, average, dataset = trainer.state.counters, trainer.state.average.module, trainer.dataset
    if dataset.labelled is not None:
        tune_head_mixing(average, dataset.labelled, trainer.config)
    share_buffers(average, trainer.accelerator)  # or the processes would judge different students
    scores = held_out_scores(average, dataset, trainer.config, trainer.accelerator)
    if not math.isfinite(scores.held_out_kl):
        raise came_apart(f"the divergence on held-out images is {scores.held_out_kl} after epoch {epoch}")
    best = counters.is_best(scores.held_out_kl)
    if trainer.accelerator.is_main_process and (best or not trainer.run.weights.exists()):
        counters.best_epoch, counters.best_agreement = epoch, scores.agreement
        counters.best_kl_average = counters.kl_average
        save_tensors(trainer.run.weights, average.state_dict(), {"epoch": epoch, **scores._asdict()})
    return scores


def save_checkpoint(trainer: Trainer) -> None:
    """Write how far the training is, in the first process."""
    if trainer.accelerator.is_main_process:
        trainer.state.counters.seconds = trainer.clock.seconds()
        trainer.state.save(trainer.run)


def stopped(trainer: Trainer, error: Exception | None = None) -> Exception:
    """Wait until every process is here, and return why: the error of this one, or the notice that it was stopped."""
    trainer.accelerator.wait_for_everyone()  # a launcher ends them all as soon as one has ended
    epochs = trainer.config.epochs
    return error or Interrupted(
        f"stopped in epoch {min(trainer.state.counters.epoch + 1, epochs)} of {epochs}; everything up to here is saved",
        where=trainer.run.folder,
        fix="the same command goes on from here",
    )


def finish(trainer: Trainer) -> None:
    """Write into the run's card that it is finished, and which epoch was the best."""
    counters, accelerator, run = trainer.state.counters, trainer.accelerator, trainer.run
    accelerator.wait_for_everyone()
    if not run.weights.exists():  # deleted since, as it was damaged; the last average takes its place
        evaluate(trainer, counters.epoch)
    if accelerator.is_main_process:
        rate = trainer.plan.steps * trainer.plan.batch_size / max(counters.seconds, 1e-9)
        best, seconds = student_facts(run.weights), round(counters.seconds, 1)
        run.update_card(best=best, images_per_s=round(rate, 1), seconds=seconds, finished=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def loss_context(recipe: Recipe, dataset: DistillationDataset, student: Student, plan: StepPlan) -> LossContext:
    """Return what the objectives are made for."""
    class_vectors, logit_scale = dataset.classifier.scoring()
    return LossContext(
        classes=len(recipe.classes),
        width=dataset.store.width,
        epochs=recipe.training.epochs,
        steps_per_epoch=plan.steps_per_epoch,
        images=len(dataset.image_index) + (len(dataset.labelled.labels) if dataset.labelled else 0),
        class_means=dataset.class_means,
        class_vectors=class_vectors,
        logit_scale=logit_scale,
        stages=student.stage_widths,
        class_features=dataset.class_features,
        words=dataset.words,
    )


def fetch(batches: Iterator[StepBatch]) -> tuple[StepBatch | None, Exception | None]:
    """Return the next batch; None where a stop was asked for while it was waited for, or with what went wrong."""
    try:
        return next(batches, None), None
    except Exception as error:  # raised when all processes have stopped, and what they did is saved
        return None, error


@torch.inference_mode()
def held_out_scores(
    student: Student, dataset: DistillationDataset, config: Training, accelerator: Accelerator
) -> HeldOutScores:
    """Return how near the student is to its teacher on the held-out images."""
    mine = dataset.val_indices[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(3, device=accelerator.device, dtype=torch.float64)  # agreeing, divergence, all
    for batch in evaluation_views(dataset.image_index, student.preprocessing, mine, workers=config.workers):
        teacher = dataset.teacher_output(batch.positions.numpy(), batch.views[:, 0].numpy(), accelerator.device)
        logits = student(batch.pixels[:, 0].to(accelerator.device)).logits.float()
        sums[0] += (logits.argmax(1) == teacher.labels).sum()
        sums[1] += len(logits) * kl_divergence(logits, teacher.logits)
        sums[2] += len(logits)
    agreeing, divergence, images = accelerator.reduce(sums).tolist()
    return HeldOutScores(round(100 * agreeing / images, 4), round(divergence / images, 6))


def describe(counters: TrainingCounters, config: Training) -> str:
    """Return the progress line: the epoch and the mean of each loss term in it."""
    terms = "  ".join(f"{name} {value:.3f}" for name, value in counters.means().items())
    best = f"  agreement {counters.best_agreement:.1f} %" if counters.best_epoch else ""
    return f"epoch {counters.epoch + 1}/{config.epochs}  {terms}{best}"
