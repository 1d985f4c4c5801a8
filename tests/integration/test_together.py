"""Two processes on one store or one run, and a disk that fills up: nothing is corrupted, and what stops says why."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from prgkit.demo.digits import CLASSES, load_digits
from prgkit.storage.run import Run

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
# A user's own mount of a small disk, in a name space that ends with the command; not every system lets one.
SMALL_DISK = ["unshare", "-rm", "sh", "-c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    (folder / "photos").mkdir()
    for number, image in enumerate(load_digits("train")[0][:700]):
        image.save(folder / "photos" / f"{number:03}.png")
    page: dict[str, Any] = {
        "data": {"images": "photos", "classes": list(CLASSES), "prompts": ["the digit {}"], "held_out": 0.1},
        "teacher": {"model": "demo:digits", "batch_size": 16},
        "views": {"count": 4, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"epochs": 2, "batch_size": 64, "workers": 0, "precision": "fp32", "checkpoint_minutes": 0.0001},
    }
    (folder / "recipe.yaml").write_text(json.dumps(page))
    done = prgkit("targets recipe.yaml --targets alone", folder)
    assert done.wait(120) == 0
    return folder


def prgkit(line: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "prgkit", *shlex.split(line)],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def store(root: Path) -> Path:
    (card,) = (path for path in root.glob("*/card.json"))
    return card.parent


def content(root: Path) -> dict[str, bytes]:
    hidden = (".lock",)
    return {path.name: path.read_bytes() for path in store(root).iterdir() if path.name not in hidden}


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def test_two_processes_fill_one_store(folder: Path) -> None:
    """Whichever comes first, the other waits, goes on with what is there, and both end well."""
    both = [prgkit("targets recipe.yaml --targets shared", folder) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    waited = sum("is working on this target store; waiting until it has done its part" in text for text in said)
    assert waited <= 1, said
    assert content(folder / "shared") == content(folder / "alone")  # and no image is in it twice


def test_a_run_has_one_process_at_a_time(folder: Path) -> None:
    shutil.copytree(folder / "alone", folder / "mine")
    first = prgkit("distill recipe.yaml --run run --targets mine", folder)
    run = Run(folder / "run")
    wait_for(run.state, first)
    os.kill(first.pid, 19)  # SIGSTOP: it stays in the middle of its work for as long as this takes
    try:
        before = {path: path.read_bytes() for path in (run.state, run.card_file, run.metrics_file) if path.exists()}
        for line in ("distill recipe.yaml --run run --targets mine", "export --run run"):
            second = prgkit(line, folder)
            said, _ = second.communicate(timeout=120)
            assert second.returncode == 1, said
            told = f"Error: another process ({first.pid}) is working on this run\n  where: run\n"
            assert told + "  fix: wait for it, or stop it first\n" in said
        assert {path: path.read_bytes() for path in before} == before
    finally:
        os.kill(first.pid, 18)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert run.finished


def small_disk() -> bool:
    done = (
        subprocess.run([*SMALL_DISK, "mount -t tmpfs -o size=1m none /mnt"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    return done is not None and done.returncode == 0


@pytest.mark.soak
@pytest.mark.skipif(not small_disk(), reason="a small disk cannot be mounted here")
def test_a_store_on_a_disk_that_fills_up_goes_on_when_there_is_space(folder: Path) -> None:
    """The disk is a real one of 400 KiB with a file that takes most of it, which is then removed."""
    expected = sum(len(data) for data in content(folder / "alone").values())
    assert expected > 300_000, "the store has to be larger than what is free"
    script = f"""
        mkdir -p disk && mount -t tmpfs -o size={expected + 200_000} none disk || exit 99
        prgkit() {{ {shlex.quote(sys.executable)} -m prgkit "$@"; }}
        head -c 400000 /dev/zero > disk/ballast
        prgkit targets recipe.yaml --targets disk/store; echo "ended with $?"
        head -c 100000 /dev/zero > disk/ballast
        {shlex.quote(sys.executable)} fill.py disk/store
        rm disk/ballast
        prgkit targets recipe.yaml --targets disk/store; echo "ended with $?"
        cp -r disk/store after
    """
    # Between the check of the space and the last block, something else takes it: the check cannot see that.
    (folder / "fill.py").write_text(
        "import sys, prgkit.teacher.feature_store, prgkit.cli.main\n"
        "prgkit.teacher.feature_store.require_space = lambda *_, **__: None\n"
        "block = open('disk/more', 'wb')\n"
        "append = prgkit.teacher.feature_store.FeatureStore.append\n"
        "def filling(self, *arguments):\n"
        "    if self._end:\n"
        "        try: block.write(bytes(10_000_000)); block.flush()\n"
        "        except OSError: pass\n"
        "    append(self, *arguments)\n"
        "prgkit.teacher.feature_store.FeatureStore.append = filling\n"
        "sys.argv = ['prgkit', 'targets', 'recipe.yaml', '--targets', sys.argv[1]]\n"
        "try: prgkit.cli.main.main()\n"
        "except SystemExit as end: print('ended with', end.code)\n"
        "finally: block.close(); __import__('os').unlink('disk/more')\n"
    )
    done = subprocess.run(
        [*SMALL_DISK, script], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False
    )
    said = done.stdout + done.stderr
    assert "Error: the target store needs" in done.stderr, said  # before the work
    assert "Error: no disk space left for view-0" in done.stderr, said  # at a block
    assert "fix: free some space and run the same command again: finished work is kept" in done.stderr
    assert [line for line in done.stdout.splitlines() if "ended with" in line] == [
        "ended with 1", "ended with 1", "ended with 0"
    ], said  # fmt: skip
    assert content(folder / "after") == content(folder / "alone")
