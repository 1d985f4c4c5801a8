"""Locks: the second is told who holds it, and a kill leaves nothing locked."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from prgkit.config.recipe import load_recipe
from prgkit.errors import RunError
from prgkit.storage.locks import locked
from prgkit.storage.run import require_own_folder, start_run


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


def refuse_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_disk_without_locks_is_locked_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse_flock(monkeypatch, number)
    with locked(tmp_path, "run"):
        told = rf"another process \({os.getpid()}\) is working on this run"
        with pytest.raises(RunError, match=told), locked(tmp_path, "run"):
            pytest.fail("it was let in")
    with locked(tmp_path, "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_on_a_disk_without_locks_a_kill_leaves_nothing_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_flock(monkeypatch, errno.ENOLCK)
    if (holder := os.fork()) == 0:
        with locked(tmp_path, "run"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(holder, 0)
    assert str(holder) in (tmp_path / ".lock.held").read_text()
    with locked(tmp_path, "run"):
        pass


def test_a_process_on_another_machine_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_flock(monkeypatch, errno.ENOLCK)
    note = tmp_path / ".lock.held"
    note.write_text(json.dumps({"machine": "far pid:[1]", "process": 1 << 22, "began": "7"}))
    with pytest.raises(RunError, match=rf"another process \({1 << 22} on far\)") as caught, locked(tmp_path, "run"):
        pytest.fail("it was let in")
    assert caught.value.fix == f"wait for it, or stop it first; if none is running, delete {note}"
    said: list[str] = []

    def wait(text: str) -> None:
        said.append(text)
        note.unlink()

    with locked(tmp_path, "target store", wait=wait):
        pass
    assert [text.count("waiting until it has done its part") for text in said] == [1]


def test_a_folder_that_is_removed_while_one_waits_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    holder = locked(folder, "target store")
    holder.__enter__()

    def wait(_: str) -> None:
        shutil.rmtree(folder)
        holder.__exit__(None, None, None)

    with locked(folder, "target store", wait=wait):
        assert (folder / ".lock").read_text().strip() == str(os.getpid())
