"""How many pictures a second `prgkit predict FOLDER` names, against what `prgkit bench` says of the same file.

    python benchmarks/predict_speed.py --bundle bundles/repvit_m0_9 --photos photos/ > results/predict_speed.json

Bench runs the network alone, on pixels that are ready; predict reads, decodes and resizes each picture as well, and
writes its answer to a file. Both use the same batch size and every core, and take turns in random order in one process.
The photographs are written anew as JPEGs (quality 90) with each shorter side. A ratio is the median over rounds of the
ratio within a round, with its 95 % bootstrap interval; the aim is 0.85. Where every core runs the network already,
decoding takes its time from it: of the ratio by CPU time, ``bound`` is what it could be at most, if nothing but the
network and the decoding of a picture in one thread took any.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from PIL import Image

from prgkit.data.preprocessing import load_image
from prgkit.evaluate import system
from prgkit.evaluate.answers import open_answers
from prgkit.evaluate.bench.latency import SETTLE_S
from prgkit.evaluate.bench.worker import Resident, Spec
from prgkit.evaluate.predict import Model
from prgkit.export.bundle.bundle import read_evaluation
from prgkit.export.runtimes import first_setup

EVALUATED = 64  # images that bench takes in turn
DECODED = 16  # pictures whose decoding is timed by itself


class Turn(NamedTuple):
    """What a contender did in a round."""

    images: int
    wall_s: float
    cpu_s: float  # of all threads

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.wall_s

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of CPU time an image."""
        return 1e3 * self.cpu_s / self.images


@dataclass(frozen=True)
class Subject:
    """A bundle, opened as predict opens it and as bench does."""

    model: Model
    resident: Resident

    def bench(self, batch: int, seconds: float) -> Turn:
        """Run batches of ready pixels, as bench's throughput sweep does."""
        self.resident.measure(batch=batch, seconds=SETTLE_S)
        cpu = time.process_time()
        runs_ns = self.resident.measure(batch=batch, seconds=seconds, at_least=5)
        return Turn(batch * len(runs_ns), sum(runs_ns) / 1e9, time.process_time() - cpu)

    def predict(self, folder: Path, batch: int) -> Turn:
        """Name the pictures of a folder, from opening it to the last answer on the disk."""
        with tempfile.TemporaryDirectory() as scratch:
            kept, count = open_answers(Path(scratch) / "answers.jsonl"), 0
            start, cpu = time.perf_counter(), time.process_time()
            for answer in self.model.stream(folder, batch_size=batch):
                assert answer.error is None, answer.error
                kept.add(answer)
                count += 1
            return Turn(count, time.perf_counter() - start, time.process_time() - cpu)

    def decode(self, folder: Path) -> Turn:
        """Make some pictures ready, in one thread."""
        files = sorted(folder.iterdir())[:DECODED]
        start, cpu = time.perf_counter(), time.process_time()
        for file in files:
            self.model.bundle.preprocessing.prepare(load_image(file))
        return Turn(len(files), time.perf_counter() - start, time.process_time() - cpu)


@click.command()
@click.option("--bundle", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--photos", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sides", default="256,400,1600", show_default=True, help="Pixels of the JPEGs' shorter side.")
@click.option("--batches", default="1,8", show_default=True)
@click.option("--rounds", default=8, show_default=True)
@click.option("--count", default=96, show_default=True, help="Pictures that predict names in a turn.")
@click.option("--slice", "slice_s", default=1.0, show_default=True, help="Timed seconds of bench in a round.")
def main(bundle: Path, photos: Path, sides: str, batches: str, **how: Any) -> None:
    """Print one JSON document of ratios, with the figures of every round beside them."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch, Model(bundle) as model:
        setup = first_setup(bundle, [model.artifact])
        resident = Resident(Spec(model.artifact.name, setup.variant.backend, setup.variant.device, setup=setup))
        resident.open(read_evaluation(bundle, limit=EVALUATED).pixels)
        subject = Subject(model, resident)
        for side in sides.split(","):
            folder = resized(photos, Path(scratch) / side, int(side), how["count"])
            for batch in batches.split(","):
                click.echo(f"shorter side {side}, batch {batch}", err=True)
                rows.append({"side": int(side), **measure(subject, folder, int(batch), how["rounds"], how["slice_s"])})
        options = {**how, "image_size": model.bundle.preprocessing.image_size}
    kept = {"cpu", "cores", "os", "load_average", "versions"}
    here = system.describe().model_dump(mode="json", include=kept)
    click.echo(json.dumps({"options": options, "machine": here, "cases": rows}, indent=2))


def resized(photos: Path, folder: Path, side: int, count: int) -> Path:
    """Write the first photographs anew, with a shorter side of ``side`` pixels; from the first again where too few."""
    folder.mkdir()
    found = sorted(path for path in photos.iterdir() if path.is_file())
    for place in range(count):
        photo = load_image(found[place % len(found)])
        factor = side / min(photo.size)
        scaled = photo.resize((round(factor * photo.width), round(factor * photo.height)), Image.Resampling.BICUBIC)
        scaled.save(folder / f"{place:04}.jpg", quality=90)
    return folder


def measure(subject: Subject, folder: Path, batch: int, rounds: int, slice_s: float) -> dict[str, Any]:
    """Let bench, predict and the decoding alone take turns, and return their figures and ratios."""
    turns: dict[str, Callable[[], Turn]] = {
        "bench": lambda: subject.bench(batch, slice_s),
        "predict": lambda: subject.predict(folder, batch),
        "decode": lambda: subject.decode(folder),
    }
    found = take_turns(turns, rounds)
    rates = {key: [turn.rate for turn in found[key]] for key in ("bench", "predict")}
    cpu_ms = {key: [turn.cpu_ms for turn in turns] for key, turns in found.items()}
    both = [network + decode for network, decode in zip(cpu_ms["bench"], cpu_ms["decode"], strict=True)]
    return {
        "batch": batch,
        "bytes": round(float(np.mean([path.stat().st_size for path in folder.iterdir()]))),
        "images_a_second": medians(rates),
        "predict_to_bench": ratio(rates["predict"], rates["bench"]),
        "cpu_ms_an_image": medians(cpu_ms),
        "predict_to_bench_by_cpu_time": ratio(cpu_ms["bench"], cpu_ms["predict"]),
        "bound": ratio(cpu_ms["bench"], both),
        "rounds": {key: [[round(value, 4) for value in turn] for turn in turns] for key, turns in found.items()},
    }


def take_turns(turns: dict[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Return what each did in each round, after a round that warms up; the order is random."""
    generator = random.Random(0)
    found: dict[str, list[Turn]] = {key: [] for key in turns}
    for number in range(rounds + 1):
        for key in generator.sample(list(turns), len(turns)):
            turn = turns[key]()
            if number:
                found[key].append(turn)
    return found


def medians(values: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each."""
    return {key: round(float(np.median(some)), 3) for key, some in values.items()}


def ratio(ones: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the median over rounds of the ratio within a round, and its 95 % interval, drawing rounds."""
    ratios = np.asarray(ones) / np.asarray(others)  # [rounds]
    drawn = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return {"median": round(float(np.median(ratios)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


if __name__ == "__main__":
    main()
