"""Several processes train one student: one run folder, one report, and a stop that loses nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prgkit.config.recipe import load_recipe
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.progress import NullProgress
from prgkit.storage.run import Run
from prgkit.teacher.ensemble import existing_targets
from prgkit.training.prepare import prepare

EPOCHS = 2
DISTILL = ["distill", "recipe.yaml", "--run"]
# `--` ends torchrun's own options: it would take --run for its --run-path.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "prgkit"]
# The same two processes in a third of the time: torch is imported once.
FORK = ["-c", """
import os, sys
from prgkit.cli import main
from prgkit.training import distill
rank = "0" if (other := os.fork()) else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
main.main()
if rank == "1":
    assert "targets" in sys.argv, "the second process reported, too"
    sys.exit()
assert os.waitpid(other, 0)[1] == 0
"""]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "photos").mkdir()
    for number, image in enumerate(load_digits("train")[0][:72]):
        image.save(folder / "photos" / f"{number:03}.png")
    page = {
        "data": {"images": "photos", "classes": list(CLASSES), "prompts": ["the digit {}", "a {}"], "held_out": 0.1},
        "teacher": {"model": "demo:digits", "batch_size": 16},
        "views": {"count": 2, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"epochs": EPOCHS, "batch_size": 16, "workers": 0, "precision": "fp32"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(page))
    return folder


@contextmanager
def launched(launcher: list[str], folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``prgkit`` in two processes; without a GPU they meet over gloo. None is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, *launcher, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": port},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def told(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in run.metrics()]


def test_two_processes_train_one_student_and_a_stop_loses_nothing(folder: Path) -> None:
    run, whole = Run(folder / "stopped"), Run(folder / "whole")
    with launched(TORCHRUN, folder, *DISTILL, "stopped", "--set", "training.checkpoint_minutes=0.0001") as process:
        while not run.state.exists() and process.poll() is None:
            time.sleep(0.005)
        process.terminate()  # torchrun hands it on to both
        _, err = process.communicate(timeout=60)
    assert err.count("everything up to here is saved") == 1, err
    assert not run.finished, "the run had ended before the signal came"

    for name in ("stopped", "whole"):
        with launched(FORK, folder, *DISTILL, name) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.count("agrees with its teacher") == 1
        assert err.count("student: ") == 1
    assert whole.card.to_json().keys() >= {"images", "teacher", "student", "best", "images_per_s", "origin", "finished"}
    assert [record["epoch"] for record in whole.metrics()] == [1, 2]
    assert told(run) == told(whole)
    weights, expected = load_file(run.weights), load_file(whole.weights)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_two_processes_share_the_teachers_pass(folder: Path) -> None:
    with launched(FORK, folder, "targets", "recipe.yaml", "--targets", "shared") as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("72 images") == 1
    assert err.count("teacher: 72 img") == 0  # of 36 each
    recipe = load_recipe(str(folder / "recipe.yaml"), images=str(folder / "photos"))
    shared = existing_targets(recipe, folder / "shared")
    assert shared is not None
    assert len(list(shared.stores[0].folder.glob("shards/*-of-00002/view-002.f16"))) == 2
    assert list(shared.stores[0].folder.glob("view-*")) == []
    dataset = prepare(recipe, folder / "alone", NullProgress())
    rows = shared.rows(dataset.image_index.keys, views=1)
    for view in range(3):
        images = dataset.train_indices if view else np.arange(72)
        views = np.full(len(images), view)
        assert torch.equal(shared.features(rows[images], views), dataset.store.features(dataset.rows[images], views))
