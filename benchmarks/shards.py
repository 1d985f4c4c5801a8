"""A teacher's pass in one process and in several: the same bits, wall time, work; a store of ten million images.

python benchmarks/shards.py --images 'shards-{000..004}.tar' --teacher local-dir:PATH --take 1000
python benchmarks/shards.py --simulate 10000000
python benchmarks/shards.py --teacher local-dir:PATH --towers
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prgkit.config.recipe import Recipe, load_recipe
from prgkit.config.sections import TeacherConfig
from prgkit.config.shard import Shard
from prgkit.data.archives import expand_braces
from prgkit.data.index import index_images
from prgkit.data.sources import open_images
from prgkit.teacher.clip import load_teacher
from prgkit.teacher.ensemble import existing_targets
from prgkit.teacher.feature_files import Block, BlockJournal, KeyTable

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PRGKIT = [sys.executable, "-m", "prgkit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="tar shards")
    parser.add_argument("--teacher", default="demo:digits")
    parser.add_argument("--take", type=int, default=1000, help="so many of the images")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--ways", nargs="*", default=["2 shards", "4 shards", "torchrun, 2", "Ray, 2"])
    parser.add_argument("--simulate", type=int, metavar="IMAGES")
    parser.add_argument("--towers", action="store_true", help="the image tower eager, compiled, and on OpenVINO")
    given = parser.parse_args()
    if given.simulate:
        report = simulate(given.simulate, 1000)
    elif given.towers:
        report = towers(given.teacher)
    else:
        report = compare(given.images, given.teacher, given.take, given.views, given.ways)
    print(json.dumps(report, indent=2))


def compare(images: str, teacher: str, take: int, views: int, chosen: list[str]) -> dict[str, Any]:
    """Embed the same images in one process, in shards, by torchrun and by Ray."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photos = unpacked(images, folder / "photos", take)
        page = {
            "data": {"images": str(photos), "classes": "cifar100", "prompts": ["a photo of a {}."]},
            "teacher": {"model": teacher},
            "views": {"count": views},
            "student": {"model": "test_efficientnet", "image_size": 32},
            "objective": {"name": "prg"},
            "training": {"workers": 1},
        }
        (folder / "recipe.yaml").write_text(json.dumps(page))
        recipe = load_recipe(str(folder / "recipe.yaml"))
        command = ["targets", "recipe.yaml", "--targets"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
        ways = {"1 process": [[*PRGKIT, *command, "one"]]}
        for total in (2, 4):
            parts = [[*PRGKIT, *command, f"of-{total}", "--shard", f"{number}/{total}"] for number in range(total)]
            ways[f"{total} shards"] = [*parts, [*PRGKIT, *command, f"of-{total}", "--join"]]
        ways["torchrun, 2"] = [[*torchrun, "prgkit", *command, "torchrun"]]
        ways["Ray, 2"] = [[*PRGKIT, *command, "ray", "--engine", "ray", "--workers", "2:2"]]
        expected: dict[Any, bytes] = {}
        for name in ("1 process", *chosen):
            commands = ways[name]
            wall, work = timed(commands, folder)
            found = stored(recipe, folder / commands[0][commands[0].index("--targets") + 1])
            expected = expected or found
            report[name] = {"wall_s": wall, "work_s": work, "features": len(found), "same_bits": found == expected}
            report[name]["work_of_one"] = round(work / report["1 process"]["work_s"], 3)
            print(name, report[name], file=sys.stderr)
    return report


def unpacked(images: str, folder: Path, take: int) -> Path:
    folder.mkdir()
    left = take
    for shard in expand_braces(images):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith((".png", ".jpg")) and left:
                    file = tar.extractfile(member)
                    assert file is not None
                    (folder / Path(member.name).name).write_bytes(file.read())
                    left -= 1
    return folder


def timed(commands: list[list[str]], folder: Path) -> tuple[float, float]:
    """Run commands one after the other: wall time, and processor time of all their processes [s].

    Ray does not wait for its workers, so their time is in no parent's: every process is looked at until it ends.
    """
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    seen: dict[int, float] = {}
    for command in commands:
        process = subprocess.Popen(command, cwd=folder, env=ONE_THREAD, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            seen |= work_below(os.getpid())
            time.sleep(0.2)
        if process.returncode:
            raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(time.monotonic() - started, 1), round(max(work, sum(seen.values())), 1)


def work_below(ancestor: int) -> dict[int, float]:
    """Return the processor time so far of each process that descends from one [s]."""
    parents, work = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number] = int(fields[1])
            work[number] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    below = {ancestor}
    while found := {number for number, parent in parents.items() if parent in below} - below:
        below |= found
    return {number: work[number] for number in below - {ancestor}}


def stored(recipe: Recipe, root: Path) -> dict[tuple[str, int], bytes]:
    """Return every feature by image and view."""
    images, targets = index_images(open_images(recipe.data.images), workers=1), existing_targets(recipe, root)
    assert targets is not None
    (store,) = targets.stores
    found = {}
    for key, views in zip(images.keys, store.stored_views(images.keys).tolist(), strict=True):
        for view, feature in enumerate(store.stored_features(store.rows([key], views=views), views)):
            found[key, view] = feature.tobytes()
    return found


def simulate(images: int, shards: int) -> dict[str, Any]:
    """Write the indexes of a store of so many images in so many shards; join them, and open the store."""
    generator, each = np.random.default_rng(0), images // shards
    with tempfile.TemporaryDirectory() as place:
        parts = []
        for number in range(shards):
            rows = range(0, each, 256)
            keys = generator.integers(0, 256, (each, 16), dtype=np.uint8)
            blocks = (Block(row, keys[row : row + 256], (bytes(16),) * 9, Shard(number, shards)) for row in rows)
            parts.append(Path(place, f"{number}.bin"))
            parts[-1].write_bytes(b"".join(block.packed() for block in blocks))
        whole = Path(place, "index.bin")
        with ProcessPoolExecutor(1) as pool:  # or its memory would be among what opening takes
            joined = pool.submit(join, parts, whole).result()
        before, work = memory(), time.process_time()
        started, table = time.monotonic(), KeyTable()
        for block in BlockJournal(whole).new_blocks():
            places = np.arange(block.row, block.row + len(block.keys)) + (block.shard.number << 40)
            table.add(block.keys, places, len(block.digests))
        count = len(table)
        return {
            "images": count,
            "shards": shards,
            "index_bytes_an_image": round(whole.stat().st_size / count, 1),
            **joined,
            "open_s": round(time.monotonic() - started, 1),
            "open_work_s": round(time.process_time() - work, 1),
            "resident_bytes_an_image": round((memory() - before) / count, 1),
            "peak_bytes_an_image": round(
                (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / count, 1
            ),
        }


def join(parts: list[Path], whole: Path) -> dict[str, Any]:
    """Take the records of all parts into one index, and count the distinct images, as `join_shards` does."""
    started, work, distinct = time.monotonic(), time.process_time(), KeyTable()
    with open(whole, "wb") as file:
        for part in parts:
            for block in BlockJournal(part).new_blocks():
                distinct.add(block.keys, np.zeros(len(block.keys), np.int64), len(block.digests))
                file.write(block.packed())
    return {
        "joined": len(distinct),
        "join_s": round(time.monotonic() - started, 1),
        "join_work_s": round(time.process_time() - work, 1),
    }


def memory() -> int:
    """Return what this process has in memory [bytes]."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def towers(model: str) -> dict[str, Any]:
    """Time the image tower of a teacher as it is, compiled, and on OpenVINO, in turns on one thread."""
    import openvino

    torch.set_num_threads(1)
    teacher = load_teacher(TeacherConfig(model=model), torch.device("cpu"))
    height, width, _ = teacher.shape
    images = torch.randn(teacher.batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))

    class Tower(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = teacher.model.encode_image(pixels)
            return features

    tower = Tower().eval()
    compiled = torch.compile(tower) if shutil.which("g++") else tower
    with torch.inference_mode():
        converted = openvino.convert_model(tower, example_input=images)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    on_openvino = openvino.compile_model(converted, "CPU", settings)
    ways: dict[str, Any] = {
        "eager": lambda: tower(images),
        "compiled": lambda: compiled(images),
        "openvino": lambda: torch.from_numpy(on_openvino(images.numpy())[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(tower(images), dim=1)
        cosines = {
            name: float((expected * torch.nn.functional.normalize(run(), dim=1)).sum(1).min())
            for name, run in ways.items()
        }
        for _ in range(7):
            for name, run in ways.items():
                started = time.process_time()
                run()
                times[name].append(time.process_time() - started)
    eager = float(np.median(times["eager"]))
    return {
        name: {
            "images_a_core_s": round(len(images) / float(np.median(taken)), 1),
            "times_eager": round(eager / float(np.median(taken)), 2),
            "least_cosine": round(cosines[name], 7),
        }
        for name, taken in times.items()
    }


if __name__ == "__main__":
    main()
