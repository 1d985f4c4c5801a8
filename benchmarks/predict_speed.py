"""How many pictures a second `prgkit predict FOLDER` names, against what `prgkit bench` says of the same file.

    python benchmarks/predict_speed.py --bundle bundles/repvit_m0_9 --photos photos/ > results/predict_speed.json

Bench runs the network alone, on pixels that are ready; predict reads, decodes and resizes each picture as well, and
writes its answer to a file. Both use the same batch size and every core, and take turns in random order, bench in a
process of its own. The photographs are written anew as JPEGs (quality 90) with each shorter side. A ratio is the median
over rounds of the ratio within a round, with its 95 % bootstrap interval; the aim is 0.85. Where every core runs the
network already, decoding must take its time from it: ``cpu_bound`` is the ratio that the CPU times of the two allow, if
nothing else cost any.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from prgkit.data.preprocessing import load_image
from prgkit.evaluate import system
from prgkit.evaluate.answers import open_answers
from prgkit.evaluate.bench.latency import SETTLE_S
from prgkit.evaluate.bench.worker import Spec, Worker
from prgkit.evaluate.predict import Model
from prgkit.export.bundle.bundle import read_evaluation
from prgkit.export.runtimes import first_setup

EVALUATED = 64  # images that bench takes in turn


@dataclass(frozen=True)
class Case:
    """Pictures of one size, asked about in batches of one size."""

    side: int  # pixels of the JPEGs' shorter side
    batch: int


@click.command()
@click.option("--bundle", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--photos", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sides", default="256,400,1600", show_default=True, help="Pixels of the JPEGs' shorter side.")
@click.option("--batches", default="1,8", show_default=True)
@click.option("--rounds", default=8, show_default=True)
@click.option("--count", default=96, show_default=True, help="Pictures that predict names in a turn.")
def main(bundle: Path, photos: Path, sides: str, batches: str, rounds: int, count: int) -> None:
    """Print one JSON document of ratios, with the figures of every round beside them."""
    cases = [Case(int(side), int(batch)) for side in sides.split(",") for batch in batches.split(",")]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = stack.enter_context(Model(bundle))
        folders = {side: resized(photos, scratch / str(side), side, count) for side in {case.side for case in cases}}
        setup = first_setup(bundle, [model.artifact])
        spec = Spec(model.artifact.name, setup.variant.backend, setup.variant.device, setup=setup)
        worker = stack.enter_context(Worker(spec, read_evaluation(bundle, limit=EVALUATED).pixels))
        rows = [measure(case, model, worker, folders[case.side], rounds) for case in cases]
    kept = {"cpu", "cores", "os", "load_average", "versions"}
    here = system.describe().model_dump(mode="json", include=kept)
    options = {"rounds": rounds, "count": count, "image_size": model.bundle.preprocessing.image_size}
    click.echo(json.dumps({"options": options, "machine": here, "cases": rows}, indent=2))


def resized(photos: Path, folder: Path, side: int, count: int) -> Path:
    """Write the first photographs anew, with a shorter side of ``side`` pixels; from the first again where too few."""
    folder.mkdir()
    found = sorted(path for path in photos.iterdir() if path.is_file())
    for place in range(count):
        photo = load_image(found[place % len(found)])
        factor = side / min(photo.size)
        scaled = photo.resize((round(factor * photo.width), round(factor * photo.height)), Image.Resampling.LANCZOS)
        scaled.save(folder / f"{place:04}.jpg", quality=90)
    return folder


def measure(case: Case, model: Model, worker: Worker, folder: Path, rounds: int) -> dict[str, Any]:
    """Let bench and predict take turns on one case, and return their pictures a second and what bounds them."""
    click.echo(f"shorter side {case.side}, batch {case.batch}", err=True)
    turns: dict[str, Callable[[], float]] = {
        "bench": lambda: bench_rate(worker, case.batch),
        "predict": lambda: predict_rate(model, folder, case.batch),
    }
    rates = take_turns(turns, rounds)
    decode_ms, network_ms = cpu_ms(model, folder, case.batch)
    return {
        "side": case.side,
        "batch": case.batch,
        "bytes": round(float(np.mean([path.stat().st_size for path in folder.iterdir()]))),
        "images_a_second": {key: round(float(np.median(values)), 2) for key, values in rates.items()},
        "predict_to_bench": ratio(rates["predict"], rates["bench"]),
        "cpu_ms": {"decode_and_resize": round(decode_ms, 3), "network": round(network_ms, 3)},
        "cpu_bound": round(network_ms / (network_ms + decode_ms), 4),
        "rounds": rates,
    }


def bench_rate(worker: Worker, batch: int) -> float:
    """Return the images a second of bench's throughput sweep."""
    return 1e9 * batch / float(np.median(worker.measure(batch=batch, seconds=1, at_least=5, settle_s=SETTLE_S)))


def predict_rate(model: Model, folder: Path, batch: int) -> float:
    """Return the pictures a second from opening a folder to its last answer on the disk."""
    with tempfile.TemporaryDirectory() as scratch:
        kept, count = open_answers(Path(scratch) / "answers.jsonl"), 0
        start = time.perf_counter()
        for answer in model.stream(folder, batch_size=batch):
            assert answer.error is None, answer.error
            kept.add(answer)
            count += 1
        return count / (time.perf_counter() - start)


def cpu_ms(model: Model, folder: Path, batch: int) -> tuple[float, float]:
    """Return the CPU time that one picture takes to be made ready, and to go through the network."""
    files = [path.read_bytes() for path in sorted(folder.iterdir())[:32]]
    prepare = model.bundle.preprocessing.prepare
    pixels = np.stack([prepare(load_image(file)) for file in files])
    start = time.process_time()
    for file in files:
        prepare(load_image(file))
    between = time.process_time()
    for place in range(0, len(files), batch):
        model.logits(pixels[place : place + batch])
    end = time.process_time()
    return 1e3 * (between - start) / len(files), 1e3 * (end - between) / len(files)


def take_turns(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return what each says in each round, after a round that warms up; the order is random."""
    generator = random.Random(0)
    found: dict[str, list[float]] = {key: [] for key in turns}
    for number in range(rounds + 1):
        for key in generator.sample(list(turns), len(turns)):
            rate = turns[key]()
            if number:
                found[key].append(round(rate, 3))
    return found


def ratio(ones: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the median over rounds of the ratio within a round, and its 95 % interval, drawing rounds."""
    ratios = np.asarray(ones) / np.asarray(others)  # [rounds]
    drawn = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return {"median": round(float(np.median(ratios)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


if __name__ == "__main__":
    main()
