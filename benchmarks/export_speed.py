"""How fast the exported students are, as ratios against named peers' files with the same weights in the same process.

    python benchmarks/export_speed.py --runs runs/ > results/export_speed.json

``runs`` holds a run folder for each student, named after its timm model and with a bundle of
``prgkit export --int8 --float-input``; README.md says the commands that make them. The peers' files are made here from
the weights of the same run. What is compared takes turns in random order, at batch 1; a ratio is the median over rounds
of the ratio within a round, with its 95 % bootstrap interval, and below 1 where the first is faster.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch
from timm.utils.onnx import onnx_export

from prgkit.config.image_size import sides
from prgkit.evaluate import system
from prgkit.evaluate.bench.latency import SETTLE_S
from prgkit.evaluate.bench.timing import timed_runs
from prgkit.evaluate.bench.worker import Spec, Worker
from prgkit.export.bundle.bundle import Bundle, open_bundle, read_evaluation
from prgkit.export.bundle.fidelity import int8_sentence
from prgkit.export.bundle.manifest import NotKept, Quantization
from prgkit.export.runtimes import setups
from prgkit.export.runtimes.onnxruntime import OnnxRunner, normalised
from prgkit.export.runtimes.parity import compare, require_agreement
from prgkit.storage.run import Run
from prgkit.student.model import load_student, reparameterised

PEERS = ("timm", "timm_reparam", "timm_reparam_dynamo", "onnxslim", "onnxslim_reparam")
OURS, FLOAT = "prgkit", "prgkit_float"
INT8 = {"prgkit_int8": "onnx-int8"}  # and its name in a bundle
RUNTIMES = ("onnxruntime", "openvino", "torch")
HERE: dict[str, Contender] = {}  # of a process that runs the bare loop
Call = Callable[[Any], Any]  # one input [1, ...] to logits [1, classes]


@dataclass(frozen=True)
class Contender:
    """Something that takes turns: what one run is, and the inputs that runs take in turn."""

    run: Call
    inputs: Sequence[Any]

    def logits(self) -> np.ndarray:
        """Return what it says of every input, [images, classes]."""
        return np.concatenate([np.array(self.run(given), dtype=np.float32) for given in self.inputs])

    def median_ms(self, seconds: float) -> float:
        """Return the median of a slice's runs, after untimed ones that outlast the threads of whoever ran before."""
        timed_runs(self.run, self.inputs, SETTLE_S, 2, 0)
        _, samples_ns = timed_runs(self.run, self.inputs, seconds, 5, 0)
        return float(np.median(samples_ns)) / 1e6


@dataclass(frozen=True)
class Student:
    """A trained student, its bundle, the peers' files of the same weights, and real images in both layouts."""

    bundle: Bundle
    files: dict[str, Path]
    network: torch.nn.Module  # the timm model: normalised images in, logits out
    pixels: list[np.ndarray]  # each [1, S, S, 3] uint8
    images: list[np.ndarray]  # each [1, 3, S, S] float32, normalised

    def inputs(self, file: str) -> list[np.ndarray]:
        """Return the images as a file takes them: ours as they are, all others normalised beforehand."""
        return self.pixels if file in (OURS, *INT8) else self.images


@click.command()
@click.option("--runs", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--students", help="Folders of --runs, with commas between them; all by default.")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--runtimes", default=",".join(RUNTIMES), show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--slice", "slice_s", default=0.3, show_default=True, help="Timed seconds of a contender in a round.")
@click.option("--images", default=64, show_default=True, help="Evaluation images that runs take in turn.")
@click.option("--only", default="files,harness", show_default=True)
def main(runs: Path, students: str | None, only: str, **options: Any) -> None:
    """Print one JSON document of ratios, with the median of every round beside them."""
    runtimes, threads = options["runtimes"].split(","), [int(count) for count in options["threads"].split(",")]
    how = {key: options[key] for key in ("runtimes", "rounds", "slice_s")}
    require_peers(runtimes)
    names = students.split(",") if students else sorted(path.name for path in runs.iterdir() if path.is_dir())
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            student = open_student(runs / name, Path(scratch), images=options["images"])
            row: dict[str, Any] = {"student": name, "image_size": student.bundle.preprocessing.image_size}
            row["contents"] = {file: file_facts(path) for file, path in student.files.items()}
            row["int8"] = int8_facts(student.bundle)
            for part in only.split(","):
                row[part] = []
                for count in threads:
                    click.echo(f"{name}: {part}, threads: {count}", err=True)
                    row[part].append(PARTS[part](student, count, **how))
            rows.append(row)
    kept = {"cpu", "cores", "os", "load_average", "versions"}
    here = system.describe().model_dump(mode="json", include=kept)
    here["versions"] |= {peer: metadata.version(peer) for peer in ("timm", "onnxslim", "openvino") if installed(peer)}
    click.echo(json.dumps({"options": options, "machine": here, "students": rows}, indent=2))


def require_peers(runtimes: Sequence[str]) -> None:
    """Refuse to begin without a peer that is asked for: nothing of prgkit needs them."""
    needed = ["onnxslim", *(["openvino"] if "openvino" in runtimes else [])]
    if missing := [peer for peer in needed if not installed(peer)]:
        raise click.ClickException(f"the peers {', '.join(missing)} are missing: pip install {' '.join(missing)}")


def installed(package: str) -> bool:
    """Return whether a package is there."""
    return importlib.util.find_spec(package) is not None


def open_student(folder: Path, scratch: Path, *, images: int) -> Student:
    """Open a run and its bundle, and make the peers' files of its weights in ``scratch``."""
    run = Run(folder)
    bundle = open_bundle(run.bundle)
    here = {entry.name: run.bundle / entry.file for entry in bundle.artifacts}
    if "onnx-nchw" not in here:
        raise click.ClickException(f"{run.bundle} has no float file: prgkit export --int8 --float-input --run {folder}")
    files = {OURS: here["onnx-fp32"], FLOAT: here["onnx-nchw"]}
    files |= {file: here[name] for file, name in INT8.items() if name in here}
    network = load_student(run).inference_model().model
    files |= peer_files(network, sides(bundle.preprocessing.image_size), scratch)
    pixels = read_evaluation(run.bundle, limit=images).pixels[:, None]  # [n, 1, S, S, 3]
    floats = [normalised(one, bundle.preprocessing) for one in pixels]
    return Student(bundle, files, network, list(pixels), floats)


def peer_files(network: torch.nn.Module, size: tuple[int, int], folder: Path) -> dict[str, Path]:
    """Write what timm's onnx_export.py writes with no option, with --reparam and with both exporters, and slim them."""
    files = {name: folder / f"{name}.onnx" for name in PEERS}
    plain = network.to(memory_format=torch.contiguous_format)
    fused = reparameterised(plain)
    export = {"input_size": (3, *size), "batch_size": 1}
    with contextlib.redirect_stdout(None):
        onnx_export(plain, str(files["timm"]), **export)
        onnx_export(fused, str(files["timm_reparam"]), **export)
        onnx_export(fused, str(files["timm_reparam_dynamo"]), use_dynamo=True, **export)
        slim = importlib.import_module("onnxslim").slim
        slim(str(files["timm"]), str(files["onnxslim"]))
        slim(str(files["timm_reparam"]), str(files["onnxslim_reparam"]))
    return files


def file_facts(path: Path) -> dict[str, int]:
    """Return what a file holds, before a runtime has fused anything."""
    return {"bytes": path.stat().st_size, "nodes": len(onnx.load(str(path)).graph.node)}


def int8_facts(bundle: Bundle) -> list[dict[str, Any]]:
    """Return what the export found of each INT8 file, and that in a sentence; ``kept`` is false where it missed."""
    found: list[Quantization | NotKept] = [
        one.quantization for one in bundle.artifacts if one.quantization and one.name in INT8.values()
    ]
    found += [facts for facts in bundle.manifest.not_kept if facts.name in INT8.values()]
    return [{**one.to_json(), "told": int8_sentence(one)} for one in found]


def compare_files(student: Student, threads: int, *, runtimes: str, rounds: int, slice_s: float) -> dict[str, Any]:
    """Let all files and PyTorch take turns in this process, once all are known to say the same."""
    contenders: dict[str, Contender] = {}
    for runtime in runtimes.split(","):
        opened = {"onnxruntime": in_onnxruntime, "openvino": in_openvino, "torch": in_torch}[runtime](student, threads)
        contenders |= {f"{runtime}/{name}": contender for name, contender in opened.items()}
    agreements = check(contenders)
    rounds_ms = take_turns({key: one.median_ms for key, one in contenders.items()}, rounds, slice_s)
    p50_ms = {key: float(np.median(medians)) for key, medians in rounds_ms.items()}
    return {
        "threads": threads,
        "agreement_with_torch": agreements,
        "p50_ms": {key: round(value, 4) for key, value in p50_ms.items()},
        "ratios": {runtime: ratios_of(runtime, rounds_ms, p50_ms) for runtime in runtimes.split(",")},
        "rounds_ms": rounds_ms,
    }


def in_onnxruntime(student: Student, threads: int) -> dict[str, Contender]:
    """Open every file in ONNX Runtime, all with prgkit's options: threads that stop spinning when a run ends."""
    found = {}
    for name, path in student.files.items():
        found[name] = Contender(OnnxRunner(path, threads=threads).run, student.inputs(name))
    run: Call = OnnxRunner(student.files["timm_reparam"], threads=threads).run
    preprocessing = student.bundle.preprocessing
    prepared = Contender(lambda pixels: run(normalised(pixels, preprocessing)), student.pixels)
    return found | {"timm_reparam_from_pixels": prepared}


def in_openvino(student: Student, threads: int) -> dict[str, Contender]:
    """Open every file in OpenVINO for latency, in float32 (it would choose bfloat16 where there is), at batch 1."""
    openvino = importlib.import_module("openvino")
    core, found = openvino.Core(), {}
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    for name, path in student.files.items():
        model = core.read_model(str(path))
        inputs = student.inputs(name)
        model.reshape(list(inputs[0].shape))
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        found[name] = Contender(partial(infer, request), inputs)
    return found


def infer(request: Any, given: np.ndarray) -> Any:
    """Run an OpenVINO request."""
    return request.infer([given], share_inputs=True, share_outputs=True)[0]


def in_torch(student: Student, threads: int) -> dict[str, Contender]:
    """Return PyTorch as the student was trained, fused as timm does it, and that compiled; all channels-last."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    torch._inductor.config.cpp.threads = threads  # it is compiled into the code
    images = [torch.from_numpy(image).contiguous(memory_format=torch.channels_last) for image in student.images]
    plain = student.network.to(memory_format=torch.channels_last)
    fused = reparameterised(plain).to(memory_format=torch.channels_last)
    modules = {"eager": plain, "eager_reparam": fused, "compiled_reparam": torch.compile(fused)}

    def run(module: Any, image: torch.Tensor) -> Any:
        with torch.inference_mode():
            return module(image).numpy()

    return {name: Contender(partial(run, module), images) for name, module in modules.items()}


def check(contenders: dict[str, Contender]) -> dict[str, Any]:
    """Return how each agrees with PyTorch on the images it is timed on, or with the first where PyTorch is left out.

    Raises:
        ParityError: a float32 file says something else than the weights that it was made of.
    """
    first = "torch/eager" if "torch/eager" in contenders else next(iter(contenders))
    reference, found = contenders[first].logits(), {}
    for key, contender in contenders.items():
        if key.endswith(tuple(INT8)):
            parity = compare(reference, contender.logits(), precision="int8")
        else:
            parity = require_agreement(reference, contender.logits(), precision="fp32", names=(first, key))
        found[key] = {"max_abs_difference": parity.max_abs_difference, "top1_agreement": parity.top1_agreement}
    return found


def compare_harness(student: Student, threads: int, *, rounds: int, slice_s: float, **_how: Any) -> dict[str, Any]:
    """Compare what bench measures in its worker with a bare session.run loop on the same file, all else as it comes."""
    path, pixels = str(student.files[OURS]), np.concatenate(student.pixels)
    artifact = next(one for one in student.bundle.artifacts if one.name == "onnx-fp32")
    setup = next(iter(setups(artifact, student.bundle.folder, [artifact])))  # ONNX Runtime's CPU provider
    spec = Spec(artifact.name, setup.variant.backend, setup.variant.device, threads=threads, setup=setup)
    bare = ProcessPoolExecutor(1, get_context("spawn"), initializer=open_bare, initargs=(path, threads, pixels))
    with Worker(spec, pixels) as worker, bare:

        def bench_ms(seconds: float) -> float:
            return float(np.median(worker.measure(batch=1, seconds=seconds, at_least=5, settle_s=SETTLE_S))) / 1e6

        def bare_ms(seconds: float) -> float:
            return bare.submit(run_bare, seconds).result()

        rounds_ms = take_turns({"bench": bench_ms, "bare_loop": bare_ms}, rounds, slice_s)
    return {
        "threads": threads,
        "bench_to_bare_loop": ratio(rounds_ms["bench"], rounds_ms["bare_loop"]),
        "rounds_ms": rounds_ms,
    }


def open_bare(path: str, threads: int, pixels: np.ndarray) -> None:
    """Open a file in a process of its own, as bench does, with nothing between the loop and ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    HERE["bare"] = Contender(lambda image: session.run(None, {"pixels": image}), list(pixels[:, None]))


def run_bare(seconds: float) -> float:
    """Return the median ms of the loop in the process that `open_bare` made ready."""
    return HERE["bare"].median_ms(seconds)


def take_turns(turns: dict[str, Callable[[float], float]], rounds: int, slice_s: float) -> dict[str, list[float]]:
    """Return the median of each contender's runs in each round, after a round that warms up; the order is random."""
    generator = random.Random(0)
    medians: dict[str, list[float]] = {key: [] for key in turns}
    for number in range(rounds + 1):
        for key in generator.sample(list(turns), len(turns)):
            median_ms = turns[key](slice_s)
            if number:
                medians[key].append(round(median_ms, 5))
    return medians


def ratios_of(runtime: str, rounds_ms: dict[str, list[float]], p50_ms: dict[str, float]) -> dict[str, Any]:
    """Return the ratios of our files to the peers of a runtime, to the fastest peer file, and of FP32 to INT8.

    PyTorch runs no file: ours in ONNX Runtime are compared with it.
    """
    ours_in = "onnxruntime" if runtime == "torch" else runtime
    mine = (OURS, FLOAT, *INT8)
    peers = [key for key in rounds_ms if key.startswith(f"{runtime}/") and key.split("/")[1] not in mine]
    files = [key for key in peers if key.split("/")[1] in PEERS] or peers
    best = min(files, key=lambda key: p50_ms[key])
    found: dict[str, Any] = {}
    for ours in (FLOAT, OURS, *INT8):
        if (key := f"{ours_in}/{ours}") in rounds_ms:
            found[f"{ours} to best, {best.split('/')[1]}"] = ratio(rounds_ms[key], rounds_ms[best])
            found |= {f"{ours} to {peer.split('/')[1]}": ratio(rounds_ms[key], rounds_ms[peer]) for peer in peers}
    for file, name in INT8.items() if runtime == ours_in else ():
        if f"{runtime}/{file}" in rounds_ms:
            found[f"fp32 to {name}"] = ratio(rounds_ms[f"{runtime}/{OURS}"], rounds_ms[f"{runtime}/{file}"])
    return found


def ratio(ones: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the median over rounds of the ratio within a round, and its 95 % interval, drawing rounds."""
    ratios = np.asarray(ones) / np.asarray(others)  # [rounds]
    drawn = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return {"median": round(float(np.median(ratios)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"files": compare_files, "harness": compare_harness}

if __name__ == "__main__":
    main()
