"""SIGKILL at any moment, then the same command: features, weights and metrics end bit for bit as without it.

Three points belong to `make test`; `make soak` runs them all, and prints what each one met.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prgkit.demo.digits import CLASSES, load_digits
from prgkit.storage.run import Run
from prgkit.teacher.feature_files import BlockJournal
from prgkit.workers import available_cores

pytest.importorskip("torch")

DISTILL = "distill recipe.yaml --run run --targets store"
TARGETS = "targets recipe.yaml --targets store"

# What a trap kills, of which command, and where: a function, which of its calls, and before, after or within it.
Trap = tuple[str, int, str]
POINTS: dict[str, tuple[str, Trap]] = {
    "targets: the card is not there yet": (TARGETS, ("prgkit.teacher.feature_store:write_sealed", 1, "before")),
    "targets: while embedding": (TARGETS, ("prgkit.teacher.clip:Teacher.embed_images", 6, "before")),
    "targets: block written, not journalled": (
        TARGETS,
        ("prgkit.teacher.feature_store:BlockJournal.append", 2, "before"),
    ),
    "targets: half a record of the index": (TARGETS, ("prgkit.teacher.feature_store:BlockJournal.append", 2, "within")),
    "targets: block journalled": (TARGETS, ("prgkit.teacher.feature_store:BlockJournal.append", 3, "after")),
    "targets: prompts not written": (TARGETS, ("prgkit.teacher.feature_store:FeatureStore.prompts", 1, "before")),
    "distill: recipe written, no card": (DISTILL, ("prgkit.storage.run:write_sealed", 1, "before")),
    "distill: recipe written, not renamed": (DISTILL, ("prgkit.storage.atomic:os.replace", 1, "before")),
    "distill: block written, not journalled": (
        DISTILL,
        ("prgkit.teacher.feature_store:BlockJournal.append", 2, "before"),
    ),
    "distill: during the quality stage": (DISTILL, ("prgkit.training.statistics:compute_statistics", 1, "before")),
    "distill: quality told, not written": (DISTILL, ("prgkit.training.statistics:summarise", 1, "after")),
    "distill: before the first step": (DISTILL, ("prgkit.training.distill:train", 1, "before")),
    "distill: within an epoch": (DISTILL, ("prgkit.training.checkpoint:ModelEmaV3.update", 6, "after")),
    "distill: in the middle of a checkpoint": (DISTILL, ("prgkit.storage.tensors:save_file", 3, "within")),
    "distill: checkpoint written, not renamed": (DISTILL, ("prgkit.training.checkpoint:save_tensors", 3, "before")),
    "distill: best student written, no metrics": (DISTILL, ("prgkit.training.distill:evaluate", 1, "after")),
    "distill: half a line of metrics": (DISTILL, ("prgkit.storage.run:Journal.append", 2, "within")),
    "distill: an epoch's end, metrics but no checkpoint": (
        DISTILL,
        ("prgkit.training.distill:end_epoch", 2, "after"),
    ),
    "distill: trained, not yet said to be": (DISTILL, ("prgkit.training.distill:end_epoch", 3, "after")),
}
QUICK = [
    "targets: block written, not journalled",
    "distill: in the middle of a checkpoint",
    "distill: an epoch's end, metrics but no checkpoint",
]


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int
    said: str
    seconds: float


class Launcher:
    """One process that has imported everything, whose forks run commands."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "said.txt"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("launch.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, line: str, cwd: Path, trap: Trap | None = None) -> int:
        self.out.write_text("")
        order = {"cwd": str(cwd), "line": shlex.split(line), "trap": trap, "out": str(self.out)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.line())

    def run(self, line: str, cwd: Path, trap: Trap | None = None, *, kill_after_s: float | None = None) -> End:
        started = time.monotonic()
        process = self.start(line, cwd, trap)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # the one process: its workers have to notice
        code = int(self.line())
        return End(code, self.out.read_text(), time.monotonic() - started)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@dataclass
class Place:
    """A folder to work in, and what an uninterrupted run left in another like it."""

    folder: Path
    launcher: Launcher
    durations_s: dict[str, float] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)

    def fresh(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        (folder / "recipe.yaml").symlink_to(self.folder / "recipe.yaml")
        (folder / "photos").symlink_to(self.folder / "photos")
        return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "photos").mkdir()
    for number, image in enumerate(load_digits("train")[0][:600]):
        image.save(folder / "photos" / f"{number:03}.png")
    page = {
        "data": {"images": "photos", "classes": list(CLASSES), "prompts": ["the digit {}", "a {}"], "held_out": 0.1},
        "teacher": {"model": "demo:digits", "batch_size": 64},
        "views": {"count": 2, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {
            "epochs": 3,
            "batch_size": 64,
            "workers": 1,
            "precision": "fp32",
            "checkpoint_minutes": 0.0001,  # one after nearly every step
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(page))
    launcher = Launcher(folder)
    place = Place(folder, launcher)
    whole = place.fresh("whole")
    for line in (TARGETS, DISTILL):
        end = launcher.run(line, whole)
        assert end.code == 0, end.said
        place.durations_s[line] = end.seconds
    place.expected = outcome(whole)
    yield place
    launcher.close()


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that has to be the same: every stored feature by image and view, prompts, weights and metrics."""
    (store,) = (path.parent for path in (folder / "store").glob("*/card.json"))
    blocks = list(BlockJournal(store / "index.bin").new_blocks())
    width = json.loads((store / "card.json").read_text())["width"]
    features: dict[tuple[str, int], bytes] = {}
    for block in blocks:
        for view in range(len(block.digests)):
            content = (store / f"view-{view:03}.f16").read_bytes()
            for row, key in enumerate(block.keys, block.row):
                features[key.tobytes().hex(), view] = content[2 * width * row : 2 * width * (row + 1)]
    found: dict[str, Any] = {
        "views": {path.name: path.read_bytes() for path in sorted(store.glob("view-*.f16"))},
        "index": (store / "index.bin").read_bytes(),
        "card": (store / "card.json").read_bytes(),
        "prompts": {path.name: path.read_bytes() for path in sorted(store.glob("prompts-*"))},
        "features": features,
    }
    run = Run(folder / "run")
    if run.finished:
        timing = ("seconds", "images_per_s")
        found["metrics"] = [{key: value for key, value in one.items() if key not in timing} for one in run.metrics()]
        found["weights"] = run.weights.read_bytes()
        found["quality"] = run.quality_file.read_bytes()
        found["card of the run"] = run.card.model_dump(exclude={*timing, "created"})
    return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [name for name in expected if found.get(name) != expected[name]]


def on_disk(folder: Path) -> str:
    """Say what is there, in a few words."""
    blocks = sum(len(list(BlockJournal(path).new_blocks())) for path in (folder / "store").glob("*/index.bin"))
    run = Run(folder / "run")
    parts = [f"{blocks} blocks"]
    if run.metrics_file.exists():
        parts.append(f"{run.metrics_file.read_bytes().count(b'epoch')} epochs")
    parts += [name for name, file in (("checkpoint", run.state), ("student", run.weights)) if file.exists()]
    torn = list(folder.rglob(".*.part"))
    return ", ".join([*parts, *([f"{len(torn)} half-written"] if torn else [])])


def stage(said: str) -> str:
    """Return the last stage that a command announced."""
    named = re.findall(r"^(images|teacher|student|pictures|loading)\b", said, re.M)
    return named[-1] if named else "start"


def is_finished(folder: Path, line: str) -> bool:
    if line == DISTILL:
        return Run(folder / "run").finished
    blocks = [block for path in (folder / "store").glob("*/index.bin") for block in BlockJournal(path).new_blocks()]
    return len({key.tobytes() for block in blocks for key in block.keys}) == 600


def killed_then_repeated(place: Place, name: str, line: str, **how: Any) -> tuple[str, str]:
    """Kill, repeat, compare; return the stage that it was in and what was on the disk."""
    folder = place.fresh(re.sub(r"\W+", "-", name))
    end = place.launcher.run(line, folder, **how)
    assert end.code == -signal.SIGKILL, end
    assert not is_finished(folder, line), "it had finished before it was killed"
    met = stage(end.said), on_disk(folder)
    for again in dict.fromkeys((line, DISTILL)):
        end = place.launcher.run(again, folder)
        assert end.code == 0, end.said
        assert "Traceback" not in end.said
    assert differing(outcome(folder), place.expected) == []
    # A start that was killed may leave a page of text; what is large is cleared away by the next one.
    left = [path.name for path in (folder / "run").rglob(".*.part")]
    assert all(name.startswith((".recipe.yaml.", ".card.json.")) for name in left), left
    shutil.rmtree(folder)
    return met


@pytest.mark.parametrize("name", QUICK)
def test_a_kill_at_a_bad_moment_loses_nothing(place: Place, name: str) -> None:
    line, trap = POINTS[name]
    killed_then_repeated(place, name, line, trap=trap)


def test_a_teacher_that_is_asked_to_stop_says_how_to_go_on(place: Place) -> None:
    folder = place.fresh("asked")
    end = place.launcher.run(TARGETS, folder, ("prgkit.teacher.clip:Teacher.embed_images", 18, "stop"))
    assert end.code == 130, end.said
    assert end.said.splitlines()[-1] == "Stopped. What was finished is kept; the same command goes on from there."
    assert on_disk(folder).startswith(("1 blocks", "2 blocks")), on_disk(folder)
    end = place.launcher.run(TARGETS, folder)
    assert end.code == 0, end.said
    found = outcome(folder)
    assert [name for name in found if found[name] != place.expected[name]] == []


@pytest.mark.soak
def test_every_point_at_which_a_kill_could_hurt(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for name, (line, trap) in POINTS.items():
        rows.append((name, *killed_then_repeated(place, name, line, trap=trap), "yes"))
    print_table(capsys, "killed at a chosen point", rows)


@pytest.mark.soak
def test_kills_spread_over_the_whole_duration(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Kill by the clock, up to three times in a row, and go on until it is done."""
    rows = []
    for line, count in ((TARGETS, 8), (DISTILL, 16)):
        command = line.split()[0]
        for number in range(count):
            after_s = place.durations_s[line] * (number + 0.5) / count
            folder = place.fresh(f"{command}-{number}")
            for kill in range(1, 4):
                end = place.launcher.run(line, folder, kill_after_s=after_s)
                if end.code == 0:
                    break
                assert end.code == -signal.SIGKILL, end.said
                met = stage(end.said), on_disk(folder), "finished" if is_finished(folder, line) else "unfinished"
                rows.append((f"{command} after {after_s:.2f} s, kill {kill}", *met))
            for again in dict.fromkeys((line, DISTILL)):
                end = place.launcher.run(again, folder)
                assert end.code == 0, end.said
            assert differing(outcome(folder), place.expected) == []
            shutil.rmtree(folder)
    print_table(capsys, "killed by the clock; all resumed, bit for bit", rows)
    assert sum(row[3] == "unfinished" and row[1] != "start" for row in rows) >= 20


@pytest.mark.soak
def test_the_forks_do_what_the_command_does(place: Place) -> None:
    """The launcher's forks stand for the real command, so it has to give the same."""
    folder = place.fresh("command")
    for line in (TARGETS, DISTILL):
        done = subprocess.run(
            [sys.executable, "-m", "prgkit", *shlex.split(line)],
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert differing(outcome(folder), place.expected) == []


EXPORT = "export --run run --fp16"
BENCH = "bench --run run --seconds 2 --batches 1,4 --threads 1"
LONGER = f"{BENCH} --sweep-threads 1,2 --fps 50 --soak 0.05"
LATER: dict[str, tuple[str, Trap]] = {
    "export: no artifact finished": (
        EXPORT,
        ("prgkit.export.formats.student_export:StudentExport.describe", 1, "before"),
    ),
    "export: fp32 finished, fp16 not": (EXPORT, ("prgkit.export.formats.student_export:write_fp16", 1, "after")),
    "export: fp32 finished, no images": (EXPORT, ("prgkit.export.pipeline:write_evaluation", 1, "before")),
    "export: both finished, no manifest": (EXPORT, ("prgkit.export.pipeline:checksums", 1, "before")),
    "export: manifest written, not renamed": (EXPORT, ("prgkit.export.pipeline:write_manifest", 1, "after")),
    "bench: warming up": (BENCH, ("prgkit.evaluate.bench.worker:Worker.warm_up", 2, "after")),
    "bench: in the third round": (BENCH, ("prgkit.evaluate.bench.worker:Worker.measure", 8, "after")),
    "bench: swept, nothing predicted": (BENCH, ("prgkit.evaluate.bench.worker:Worker.predict", 1, "before")),
    "bench: in the second latency stage": (BENCH, ("prgkit.evaluate.bench.worker:Worker.measure_stage", 2, "after")),
    # Three artifacts take ten rounds and two batch sizes (36 calls), the sweep's four go on from there.
    "bench: in the thread sweep": (LONGER, ("prgkit.evaluate.bench.worker:Worker.measure", 50, "after")),
    "bench: in the fixed-rate part": (LONGER, ("prgkit.evaluate.bench.worker:Worker.fixed_rate", 5, "after")),
    "bench: in the soak": (LONGER, ("prgkit.evaluate.bench.soak:percentiles_ms", 5, "after")),
    "bench: the report is half written": (BENCH, ("prgkit.evaluate.report.bench_report:markdown", 1, "before")),
}


@pytest.mark.soak
def test_kills_of_export_and_bench(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for name, (line, trap) in LATER.items():
        if line is LONGER and available_cores() < 2:  # its threads would be refused
            continue
        folder = place.folder / re.sub(r"\W+", "-", name)
        shutil.copytree(place.folder / "whole", folder, symlinks=True)
        if line in (BENCH, LONGER):
            end = place.launcher.run(EXPORT, folder)
            assert end.code == 0, end.said
        end = place.launcher.run(line, folder, trap)
        assert end.code == -signal.SIGKILL, end
        kept = [
            f"{path.parent.name}: {path.read_bytes().count(b'name') if 'finished' in path.name else path.read_bytes().count(b'kind')}"
            for pattern in ("finished.jsonl", "journal.jsonl")
            for path in (folder / "run").rglob(pattern)
        ]
        end = place.launcher.run(line, folder)
        assert end.code == 0, end.said
        assert "Traceback" not in end.said
        if "fp32 finished" in name:
            assert "model.onnx: finished before, and made from the same; it is kept" in end.said
        if line in (BENCH, LONGER) and "warming" not in name:
            assert "Measured in 2 sittings" in end.said
        assert ("A soak was stopped after " in end.said) == ("soak" in name)
        rows.append((name, stage(end.said), ", ".join(kept) or "nothing", "yes"))
        if line == EXPORT:
            manifest = json.loads((folder / "run/bundle/manifest.json").read_text())
            assert [entry["name"] for entry in manifest["artifacts"]] == ["onnx-fp32", "onnx-fp16"]
            assert not list((folder / "run").glob(".bundle*"))
        else:
            (report,) = (folder / "run/bench").glob("*/report.json")
            assert {row["status"] for row in json.loads(report.read_text())["rows"]} == {"measured"}
            assert not (report.parent / "unfinished").exists()
    print_table(capsys, "export and bench", rows)


def print_table(capsys: pytest.CaptureFixture[str], title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    with capsys.disabled():
        print(f"\n{title}: point, stage, on the disk, resumed")
        for row in rows:
            print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
