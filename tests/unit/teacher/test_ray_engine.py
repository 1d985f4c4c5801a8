"""A pass on Ray, started here and ended again: the same bits, and a worker that dies costs no more than its shard."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from prgkit.cli.values import worker_count
from prgkit.progress import NullProgress
from prgkit.teacher import ray_engine
from prgkit.teacher.ray_engine import ShardWorker, WorkerCount, embed_on_ray
from prgkit.teacher.shards import join_shards
from tests.unit.teacher.test_shards import IMAGES, recipe_for, stored

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prgkit.demo.digits import load_digits

    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(load_digits("train")[0][:IMAGES]):
        image.save(folder / f"{number:03}.png")
    return folder


class DiesOnce(ShardWorker):
    """Its process ends at the second shard, once."""

    def embed(self, number: int, total: int) -> object:  # type: ignore[override]
        died = self.targets_root / "died"
        if number == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(number, total)


def test_workers_embed_the_shards_and_one_that_dies_costs_its_own(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, said = recipe_for(photos), []
    expected = stored(recipe, tmp_path / "alone")

    class Told(NullProgress):
        def note(self, text: str) -> None:
            said.append(text)

    monkeypatch.setattr(ray_engine, "ShardWorker", DiesOnce)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert embed_on_ray(recipe, tmp_path / "shared", WorkerCount(1, 2), Told()) == 4
        assert any("a worker died at shard 1/4" in line for line in said)
        assert embed_on_ray(recipe, tmp_path / "shared", WorkerCount(1, 2), Told()) == 0  # goes on from the manifests
    finally:
        ray.shutdown()
    (joined,) = join_shards(recipe, tmp_path / "shared", NullProgress())
    assert (joined.shards, joined.images) == (4, IMAGES)
    assert stored(recipe, tmp_path / "shared") == expected


def test_how_many_workers_is_one_number_or_two() -> None:
    assert (worker_count("2:8"), worker_count("3")) == ((2, 8), (3, 3))
    for wrong in ("0", "8:2", "1:2:3", "many"):
        with pytest.raises(Exception, match="write the least and the most workers as 2:8"):
            worker_count(wrong)
