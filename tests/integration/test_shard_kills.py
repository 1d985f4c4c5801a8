"""A teacher's pass in shards and its join, killed, doubled, mixed up, without space: the same store, or a clear refusal.

Some belong to `make test`; `make soak` runs a hundred, and prints how each one ended.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from prgkit.config.recipe import load_recipe
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.teacher.ensemble import existing_targets
from tests.integration.test_kills import End, Launcher, Trap
from tests.integration.test_together import SMALL_DISK, small_disk

IMAGES = 1200
WHOLE = "targets recipe.yaml --targets store"
SHARDS = [f"{WHOLE} --shard {number}/2" for number in range(2)]
JOIN = f"{WHOLE} --join"
FIRST = "store/*/shards/00000-of-00002"
SECOND = "store/*/shards/00001-of-00002"
ENGINES = {
    "torchrun": [
        *shlex.split("-m torch.distributed.run --standalone --nproc-per-node 2 -m -- prgkit"),
        *shlex.split(WHOLE),
    ],
    "Ray": ["-m", "prgkit", *shlex.split(WHOLE), "--engine", "ray", "--workers", "2:2"],
}
NAMED = {"torchrun": "--targets", "Ray": "ray::ShardWorker"}  # what the workers' commands hold
Features = dict[tuple[str, int], bytes]


@dataclass
class Place:
    """A folder with two finished shards, and what one process makes of the same images."""

    folder: Path
    launchers: list[Launcher]
    durations_s: dict[str, float] = field(default_factory=dict)
    expected: Features = field(default_factory=dict)

    def fresh(self, *finished: int) -> Path:
        """Return a folder in which nothing is done but these shards."""
        folder = self.folder / "tried"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "parts" / "photos", folder / "photos", copy_function=os.link)
        shutil.copy(self.folder / "parts" / "recipe.yaml", folder)
        if finished:
            shutil.copytree(self.folder / "parts" / "store", folder / "store")
        for number in {0, 1} - set(finished):
            for part in folder.glob(f"store/*/shards/0000{number}-of-00002"):
                shutil.rmtree(part)
        return folder

    def run(self, line: str, folder: Path, trap: Trap | None = None, *, kill_after_s: float | None = None) -> End:
        return self.launchers[0].run(line, folder, trap, kill_after_s=kill_after_s)

    def check(self, folder: Path) -> None:
        """Finish what is not finished, and compare."""
        for line in (*SHARDS, JOIN):
            end = self.run(line, folder)
            assert end.code == 0, end.said
        assert wrong(folder, self.expected) == []


def write_recipe(folder: Path, **changed: dict[str, Any]) -> None:
    page: dict[str, dict[str, Any]] = {
        "data": {"images": "photos", "classes": list(CLASSES), "prompts": ["the digit {}"], "held_out": 0.1},
        "teacher": {"model": "demo:digits", "batch_size": 64},
        "views": {"count": 2, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"workers": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps({key: {**page[key], **changed.get(key, {})} for key in page}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("shard-kills")
    place = Place(folder, [Launcher(folder)])
    parts = folder / "parts"
    (parts / "photos").mkdir(parents=True)
    for number, image in enumerate(load_digits("train")[0][:IMAGES]):
        image.save(parts / "photos" / f"{number:04}.png")
    write_recipe(parts)
    assert place.run(WHOLE, parts).code == 0
    place.expected = stored(parts)
    shutil.rmtree(parts / "store")
    for line in SHARDS:
        end = place.run(line, parts)
        assert end.code == 0, end.said
        place.durations_s[line] = end.seconds
    yield place
    for launcher in place.launchers:
        launcher.close()


def stored(folder: Path, like: Features | None = None) -> Features:
    """Return every feature by image and view."""
    recipe = load_recipe(str(folder / "recipe.yaml"), images=str(folder / "photos"))
    targets = existing_targets(recipe, folder / "store")
    assert targets is not None
    (store,) = targets.stores
    assert store.damaged == []
    keys = sorted({key for key, _ in like} if like else keys_of(store.folder))
    found: Features = {}
    for count in (1, 2, 3):
        some = [key for key, views in zip(keys, store.stored_views(keys), strict=True) if views == count]
        features = store.stored_features(store.rows(some, views=count), count)
        found |= {(key, view): features[view, n].tobytes() for n, key in enumerate(some) for view in range(count)}
    return found


def wrong(folder: Path, expected: Features) -> list[tuple[str, int]]:
    """Return the features, by image and view, that are not there or others."""
    found = stored(folder, expected)
    return sorted(key for key in expected | found if found.get(key) != expected.get(key))


def keys_of(folder: Path) -> set[str]:
    from prgkit.teacher.feature_files import BlockJournal

    return {key for block in BlockJournal(folder / "index.bin").new_blocks() for key in block.hex_keys()}


@dataclass(frozen=True)
class Case:
    """One of the hundred."""

    name: str
    act: Callable[[Place], End]


def trapped(line: str, place: str, call: int, when: str, *finished: int, code: int | None = -signal.SIGKILL) -> Case:
    """Let a command die, or meet something, at one call of a function."""

    def act(here: Place) -> End:
        folder = here.fresh(*finished)
        end = here.run(line, folder, (place, call, when))
        assert code in (None, end.code), end
        return judged(here, folder, line, end)

    return Case(f"{'join' if line == JOIN else 'shard'}: {place.rpartition(':')[2]} {call}, {when}", act)


def judged(here: Place, folder: Path, line: str, end: End) -> End:
    """See that a command that ended by itself said why, or has done its part; that it can be repeated; compare."""
    assert "Traceback" not in end.said, end.said
    if end.code > 0:
        assert re.search(r"^Error: .*\n(  .*\n)*  fix: ", end.said, re.M), end.said
    if end.code == 0 and line == JOIN:
        assert wrong(folder, here.expected) == []
    restore(here, folder)
    here.check(folder)
    return end


def restore(here: Place, folder: Path) -> None:
    """Put back the pictures that were removed."""
    for photo in (here.folder / "parts" / "photos").iterdir():
        if not (folder / "photos" / photo.name).exists():
            os.link(photo, folder / "photos" / photo.name)


def by_the_clock(line: str, share: float, *finished: int) -> Case:
    def act(here: Place) -> End:
        if line not in here.durations_s:
            here.durations_s[line] = here.run(line, here.fresh(*finished)).seconds
        folder = here.fresh(*finished)
        end = here.run(line, folder, kill_after_s=share * here.durations_s[line])
        assert end.code in (0, -signal.SIGKILL), end.said
        return judged(here, folder, line, end)

    return Case(f"{'join' if line == JOIN else 'shard'}: killed after {share:.0%} of its time", act)


def two_at_once(line: str, killed: int | None, share: float) -> Case:
    """Start a worker of shard 0 and, beside it, ``line``; kill one of them, or none."""

    def act(here: Place) -> End:
        folder = here.fresh(1)
        if len(here.launchers) == 1:
            (here.folder / "second").mkdir()
            here.launchers.append(Launcher(here.folder / "second"))
        processes = [here.launchers[n].start(one, folder) for n, one in enumerate((SHARDS[0], line))]
        if killed is not None:
            time.sleep(share * here.durations_s[SHARDS[0]])
            with suppress(ProcessLookupError):
                os.kill(processes[killed], signal.SIGKILL)
        ends = [End(int(one.line()), one.out.read_text(), 0.0) for one in here.launchers[:2]]
        for number, end in enumerate(ends):
            assert end.code in (0, 1 if line == JOIN and number else 0, -signal.SIGKILL if number == killed else 0), end
            assert "Traceback" not in end.said
        if killed is None and line != JOIN:
            end = here.run(JOIN, folder)
            assert end.code == 0, end.said
            assert wrong(folder, here.expected) == []
        return judged(here, folder, line, ends[1])

    who = "neither killed" if killed is None else f"the {('first', 'second')[killed]} killed after {share:.0%}"
    return Case(f"{'a join beside a worker' if line == JOIN else 'two workers on one shard'}: {who}", act)


def stranger(what: str, why: str, *, delete: bool = True, **changed: dict[str, Any]) -> Case:
    """Put a shard among the others that was made by another recipe."""

    def act(here: Place) -> End:
        folder = here.fresh(1)
        other = here.folder / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other, ignore=shutil.ignore_patterns("store"))
        if what == "other weights":
            changed["teacher"] = {"model": f"local-dir:{other_teacher(other)}"}
        if what == "other images":
            (other / "photos" / "0007.png").unlink()
        write_recipe(other, **changed)
        end = here.run(SHARDS[what == "another number"], other)
        assert end.code == 0, end.said
        (part,), (store,) = other.glob(SECOND if what == "another number" else FIRST), folder.glob("store/*")
        part = part.rename(part.with_name("00000-of-00002"))
        shutil.copytree(part, store / "shards" / part.name)
        end = here.run(JOIN, folder)
        assert end.code == 1, end.said
        assert re.search(rf"[12] of 2 shards cannot be joined: 0/2 {why}", " ".join(end.said.split())), end.said
        if delete:
            shutil.rmtree(store / "shards" / part.name)
        return judged(here, folder, JOIN, end)

    return Case(f"a shard of {what}", act)


def other_teacher(folder: Path) -> Path:
    """Return a copy of the demo's teacher, one of whose weights is another."""
    from safetensors.torch import load_file, save_file

    import prgkit.demo

    copy = shutil.copytree(Path(prgkit.demo.__file__).parent / "teacher", folder / "teacher")
    weights = load_file(copy / "open_clip_model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "open_clip_model.safetensors")
    return Path(copy)


def on_a_small_disk(share: float, *, checked: bool) -> Case:
    """Give a worker a real disk that has room for a part of its features alone."""

    def act(here: Place) -> End:
        if not small_disk():
            pytest.skip("a small disk cannot be mounted here")
        folder = here.fresh(1)
        size = sum(path.stat().st_size for path in (here.folder / "parts").glob(f"{FIRST}/*"))
        files = [path.stat().st_size for path in folder.rglob("store/**/*") if path.is_file()]
        kept = sum(4096 * (-(-each // 4096)) for each in (*files, *range(1, 9)))  # in pages; eight for small files
        order = {"cwd": str(folder), "line": shlex.split(SHARDS[0]), "trap": None, "out": str(folder / "said.txt")}
        if not checked:
            order["trap"] = ("prgkit.teacher.feature_store:require_space", 1, "skip")
        script = f"""
            mount -t tmpfs -o size={int(kept + share * size)} none /mnt && cp -r store/. /mnt && mount --bind /mnt store || exit 99
            {shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name("launch.py")))} > ended.txt < order.json
            cp -r store after
        """
        (folder / "order.json").write_text(json.dumps(order) + "\n")
        done = subprocess.run([*SMALL_DISK, script], cwd=folder, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0
        end = End(int((folder / "ended.txt").read_text().split()[-1]), (folder / "said.txt").read_text(), 0.0)
        assert end.code == 1, end
        assert "no disk space left for " in end.said or "the target store needs " in end.said
        shutil.rmtree(folder / "store")
        (folder / "after").rename(folder / "store")
        return judged(here, folder, SHARDS[0], end)

    return Case(f"shard: a disk with room for {share:.0%}{'' if checked else ', filled meanwhile'}", act)


def launched(engine: str, victim: str, ready: str) -> Case:
    """Start several processes by torchrun or Ray, and kill the driver or a worker once a file is there."""

    def act(here: Place) -> End:
        if engine == "Ray":
            pytest.importorskip("ray")
        folder = here.fresh()
        with session(ENGINES[engine], folder) as process:
            deadline = time.monotonic() + 300
            while not any(folder.glob(ready)) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            workers = [number for number in processes_in(folder, NAMED[engine]) if number != process.pid]
            os.kill(process.pid if victim == "driver" else workers[0], signal.SIGKILL)
            end = End(process.wait(300), (folder / "said.txt").read_text(), 0.0)
            with session(ENGINES[engine], folder) as again:
                assert again.wait(600) == 0, (folder / "said.txt").read_text()
        assert wrong(folder, here.expected) == []
        return end

    return Case(f"{engine}: the {victim} killed at {ready}", act)


@contextmanager
def session(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a folder; all that works there ends with it."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    with open(folder / "said.txt", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    try:
        yield process
    finally:
        for number in processes_in(folder, ""):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()


def processes_in(folder: Path, name: str) -> list[int]:
    """Return the processes that work in a folder and whose command holds ``name``, oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (path / "cwd").resolve() == folder and name.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return sorted(found)


WORKER = [
    ("prgkit.teacher.shards:write_sealed", 1, "before"),
    ("prgkit.teacher.shards:write_sealed", 1, "after"),
    ("prgkit.storage.atomic:os.replace", 1, "before"),
    ("prgkit.teacher.clip:Teacher.embed_images", 6, "before"),
    ("prgkit.teacher.feature_files:FeatureFiles.write", 2, "after"),
    ("prgkit.teacher.feature_store:BlockJournal.append", 1, "before"),
    ("prgkit.teacher.feature_store:BlockJournal.append", 1, "within"),
    ("prgkit.teacher.feature_store:BlockJournal.append", 2, "within"),
    ("prgkit.teacher.feature_store:BlockJournal.append", 2, "after"),
    ("prgkit.teacher.shards:index_digest", 1, "after"),
    ("prgkit.storage.atomic:os.replace", 2, "before"),
    ("prgkit.teacher.shards:write_sealed", 2, "after"),
]
JOINING = [
    ("prgkit.teacher.shards:examine", 1, "before"),
    ("prgkit.teacher.shards:damaged_blocks", 1, "after"),
    ("prgkit.teacher.shards:join_set", 1, "before"),
    ("prgkit.teacher.feature_files:Block.packed", 1, "before"),
    ("prgkit.teacher.feature_files:Block.packed", 3, "after"),
    ("prgkit.storage.atomic:flush", 1, "before"),
    ("prgkit.storage.atomic:os.replace", 1, "before"),
    ("prgkit.storage.atomic:os.replace", 1, "after"),
]
FULL = [(SHARDS[0], "prgkit.teacher.feature_files:flush", call, (1,)) for call in (1, 2, 4, 5, 8)] + [
    (SHARDS[0], "prgkit.storage.atomic:flush", 1, (1,)),
    (SHARDS[0], "prgkit.storage.atomic:flush", 2, (1,)),
    (JOIN, "prgkit.storage.atomic:flush", 1, (0, 1)),
]
GONE = [
    (SHARDS[0], "prgkit.teacher.clip:Teacher.embed_images", 2, "remove photos/0[0-3]*.png", (1,)),
    (SHARDS[0], "prgkit.teacher.clip:Teacher.embed_images", 12, "remove photos/*5.png", (1,)),
    (SHARDS[0], "prgkit.data.sources:ImageSource.share", 1, "remove photos/0007.png", (1,)),
    (SHARDS[0], "prgkit.data.sources:ImageSource.listing", 1, "remove photos/0003.png", (1,)),
    (SHARDS[0], "prgkit.teacher.feature_store:BlockJournal.append", 2, f"remove {FIRST}/view-001.f16", (1,)),
    (SHARDS[0], "prgkit.teacher.feature_store:BlockJournal.append", 2, f"remove {FIRST}/index.bin", (1,)),
    (JOIN, "prgkit.teacher.shards:examine", 1, f"remove {SECOND}/view-001.f16", (0, 1)),
    (JOIN, "prgkit.teacher.shards:examine", 1, f"remove {FIRST}/index.bin", (0, 1)),
    (JOIN, "prgkit.teacher.shards:join_set", 1, f"remove {SECOND}/index.bin", (0, 1)),
    (JOIN, "prgkit.teacher.shards:examine", 1, f"remove {SECOND}/manifest.json", (0, 1)),
]
CASES = [
    *(trapped(SHARDS[0], *one, 1) for one in WORKER),
    trapped(SHARDS[0], "prgkit.teacher.feature_store:write_sealed", 1, "before"),
    *(trapped(JOIN, *one, 0, 1) for one in JOINING),
    *(by_the_clock(SHARDS[0], (n + 0.5) / 19, 1) for n in range(19)),
    *(by_the_clock(JOIN, (n + 0.5) / 9, 0, 1) for n in range(9)),
    *(two_at_once(SHARDS[0], None, 0) for _ in range(3)),
    *(two_at_once(SHARDS[0], killed, share) for killed in (0, 1) for share in (0.2, 0.4, 0.6, 0.8, 0.95)),
    *(two_at_once(JOIN, killed, share) for killed, share in ((None, 0), (0, 0.6), (1, 0.1))),
    stranger("another batch size", "is from another batch size: 32, not 64", teacher={"batch_size": 32}),
    stranger("another precision", "is from another precision: bf16, not fp32", teacher={"precision": "bf16"}),
    stranger("other weights", "is from another teacher"),
    stranger("other views", "is from other views", views={"seed": 7}),
    stranger("other images", "saw other images than the others in .*: 1,199, not 1,200", delete=False),
    stranger("another number", "holds shard 1/2"),
    stranger("fewer views", "has 2 views of an image and not 3", delete=False, views={"count": 1}),
    *(trapped(line, where, call, "full", *finished, code=1) for line, where, call, finished in FULL),
    *(on_a_small_disk(share, checked=False) for share in (0.05, 0.3, 0.5, 0.7)),
    on_a_small_disk(0.5, checked=True),
    *(trapped(line, where, call, what, *finished, code=None) for line, where, call, what, finished in GONE),
    launched("torchrun", "driver", f"{SECOND}/index.bin"),
    launched("torchrun", "worker", f"{SECOND}/index.bin"),
    launched("torchrun", "worker", f"{FIRST}/manifest.json"),
    launched("Ray", "driver", "store/*/shards/*/index.bin"),
    launched("Ray", "worker", "store/*/shards/*/index.bin"),
]  # fmt: skip
QUICK = [
    "shard: BlockJournal.append 2, within",
    "join: os.replace 1, before",
    f"join: join_set 1, remove {SECOND}/index.bin",
    "shard: flush 5, full",
    "two workers on one shard: the first killed after 60%",
]


@pytest.mark.parametrize("name", QUICK)
def test_a_pass_in_shards_ends_in_the_same_store(place: Place, name: str) -> None:
    next(case for case in CASES if case.name == name).act(place)


@pytest.mark.soak
def test_a_hundred_ends_of_a_pass_in_shards(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    failed = 0
    with capsys.disabled():
        for number, case in enumerate(CASES, start=1):
            try:
                end = case.act(place)
                last = end.said.strip().splitlines()[-2:] if end.code > 0 else []
                told = f"ended with {end.code}; the same store" + "".join(f" | {line.strip()}" for line in last)
            except pytest.skip.Exception as reason:
                told = f"skipped: {reason}"
            except Exception as error:
                failed, told = failed + 1, f"FAILED: {error}"
            print(f"{number:3} {case.name}: {told}", flush=True)
        print(f"{len(CASES) - failed} of {len(CASES)} ended in the same store or a clear refusal")
    assert failed == 0
    assert len(CASES) == 100
