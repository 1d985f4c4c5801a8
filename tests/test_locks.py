"""Locks: the second is told who holds it, and a kill leaves nothing locked."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from prgkit.errors import RunError
from prgkit.locks import locked
from prgkit.recipe import load_recipe
from prgkit.run import require_own_folder, start_run


def test_the_holder_is_named(tmp_path: Path) -> None:
    told = f"another process ({os.getpid()}) is working on this run"
    with locked(tmp_path, "run"):
        with pytest.raises(RunError) as caught, locked(tmp_path, "run"):
            pytest.fail("it was let in")
        assert (caught.value.what, caught.value.where) == (told, tmp_path)
    with locked(tmp_path, "run"):
        pass


def test_a_worker_that_outlives_its_killed_parent_holds_nothing(tmp_path: Path) -> None:
    """A kill -9 of the process alone leaves its forks for a while: the same command must not wait for them."""
    ready, tell = os.pipe()
    if (holder := os.fork()) == 0:
        with locked(tmp_path, "run"):
            if os.fork() == 0:  # a worker, as the loader of batches starts them
                os.close(ready)
                os.write(tell, f"{os.getpid()}\n".encode())
                signal.pause()
            signal.pause()
    os.close(tell)
    worker = int(os.read(ready, 20))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        os.kill(worker, 0)  # it is there
        with locked(tmp_path, "run"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(ready)


def test_what_a_killed_start_leaves_does_not_stop_the_next(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    (tmp_path / ".recipe.yaml.123.part").write_text("half a pa")
    (tmp_path / ".lock").touch()
    start_run(tmp_path, recipe)
    (tmp_path / "recipe.yaml").unlink()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="the folder is not empty and holds no run"):
        require_own_folder(tmp_path, recipe)
