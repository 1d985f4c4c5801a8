"""A teacher's pass on Ray: its scheduler hands out shard numbers, and the workers read, embed and write.

Workers write into the target store themselves, so they need a folder that they share with the driver; features never
pass through Ray. What is finished is known from the shards' manifests: a driver that died goes on from them.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prgkit.config.recipe import Recipe, validate
from prgkit.config.shard import NOTHING, Shard
from prgkit.data.sources import open_images
from prgkit.errors import BackendError, PrgkitError, WorkerError, one_line
from prgkit.progress import NullProgress, Progress
from prgkit.teacher.clip import teacher_loader
from prgkit.teacher.ensemble import open_targets
from prgkit.teacher.shards import embed_shard, is_finished, shard_counts

IMAGES_A_SHARD = 4096  # of which a worker that dies loses some blocks
ATTEMPTS = 3  # at a shard whose worker dies


class WorkerCount(NamedTuple):
    """How many workers have to be there before the work begins, and how many may join."""

    least: int
    most: int


def embed_on_ray(recipe: Recipe, targets_root: Path, workers: WorkerCount, progress: Progress) -> int:
    """Embed all shards on the Ray cluster of ``RAY_ADDRESS``, or on one started here; return how many those are.

    Raises:
        BackendError: Ray is not installed.
        WorkerError: workers died again and again at one shard.
        PrgkitError: what went wrong in a worker.
    """
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
    try:
        shards = shards_to_embed(recipe, targets_root, workers, progress)
        progress.start("shards", len(shards), "shard")
        work_off(ray, actors_of(ray, recipe, targets_root), deque(shards), workers, progress)
    finally:
        if started:
            ray.shutdown()
    return len(shards)


def import_ray() -> Any:
    """Return the library."""
    try:
        import ray
    except ImportError as error:
        raise BackendError("--engine ray needs Ray, which is not installed", fix="pip install 'prgkit[ray]'") from error
    return ray


def shards_to_embed(recipe: Recipe, targets_root: Path, workers: WorkerCount, progress: Progress) -> list[Shard]:
    """Return the shards that are not finished, of the division that an earlier driver began or of a new one."""
    targets = open_targets(recipe, targets_root, teacher_loader(progress))  # before the workers would all create it
    begun = [total for total in shard_counts(targets.stores[0].folder) if total > 1]
    source = open_images(recipe.data.image_spec, note=progress.note, shard=NOTHING)
    count, listing = source.listing()  # of tars or of images
    even = (
        max(count, 2 * workers.most) if source.tars else max(-(-count // IMAGES_A_SHARD), min(count, 2 * workers.most))
    )
    total = max(begun, default=even)
    shards = [Shard(number, total) for number in range(total)]
    return [shard for shard in shards if not all(is_finished(store, shard, listing) for store in targets.stores)]


class ShardWorker:
    """What runs in a worker: it keeps the teacher that it has loaded for the next shard."""

    def __init__(self, page: dict[str, Any], targets_root: str, folder: str, threads: int) -> None:
        os.chdir(folder)  # what a recipe names, it names from there
        torch.set_num_threads(threads)  # the last bits of a feature depend on it
        self.recipe = validate(page, where="Ray").resolved()
        self.targets_root = Path(targets_root)
        self.load = teacher_loader(NullProgress())

    def ready(self) -> None:
        """Answer, once this worker is there."""

    def embed(self, number: int, total: int) -> dict[str, Any] | None:
        """Embed one shard; return what a user can mend, if anything is wrong."""
        try:
            embed_shard(self.recipe, self.targets_root, Shard(number, total), NullProgress(), self.load)
        except PrgkitError as error:
            return {"what": error.what, "where": str(error.where or "") or None, "fix": error.fix}
        return None


def actors_of(ray: Any, recipe: Recipe, targets_root: Path) -> Any:
    """Return what starts a worker: with a GPU each where the cluster has any, else with the driver's threads."""
    gpus, threads = ray.cluster_resources().get("GPU", 0), torch.get_num_threads()
    needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    actor = ray.remote(**needs)(ShardWorker)
    page = recipe.model_dump(mode="json")
    return lambda: actor.remote(page, str(targets_root.resolve()), os.getcwd(), threads)


def work_off(ray: Any, start: Any, waiting: deque[Shard], workers: WorkerCount, progress: Progress) -> None:
    """Let workers take shard after shard until none is left; the shard of one that dies goes back to the others."""
    failures: dict[Shard, int] = {}
    team = [start() for _ in range(min(workers.most, max(workers.least, len(waiting))))]
    starting = {actor.ready.remote(): actor for actor in team}
    if waiting:  # the others join as the cluster finds room for them
        ray.wait(list(starting), num_returns=min(workers.least, len(starting)))
    doing: dict[Any, tuple[Any, Shard]] = {}
    while waiting or doing:
        done, _ = ray.wait([*starting, *doing], num_returns=1)
        actor, shard = doing.pop(done[0]) if done[0] in doing else (starting.pop(done[0]), None)
        try:
            mistake = ray.get(done[0])
        except ray.exceptions.RayActorError as error:
            if shard is not None:
                failures[shard] = failures.get(shard, 0) + 1
                waiting.append(shard)
                progress.note(f"a worker died at shard {shard}; another takes it")
            if shard is None or failures[shard] >= ATTEMPTS:
                told = f"workers died {ATTEMPTS} times at shard {shard}" if shard else "a worker did not start"
                raise WorkerError(
                    f"{told}: {one_line(error)[:300]}", fix="the same command goes on from what is finished"
                ) from error
            actor = start()
            starting[actor.ready.remote()] = actor
            continue
        if mistake is not None:
            raise PrgkitError(mistake["what"], where=mistake["where"], fix=mistake["fix"])
        if shard is not None:
            progress.advance(1)
        if waiting:
            following = waiting.popleft()
            doing[actor.embed.remote(*following)] = (actor, following)
