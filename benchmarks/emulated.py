"""How far a bundle's files are from FP32's logits on processors that this machine is not, emulated by QEMU.

Kernels differ between processors, and some of INT8 saturate. `--python NAME=COMMAND` names what runs a Python with
NumPy and the runtimes of the bundle's files (ONNX Runtime, ncnn, LiteRT), as "Cortex-A76=qemu-aarch64 -cpu cortex-a76
python3.11"; the commands are in README.md. Prints JSON, and exits 1 where an FP32 or FP16 file's logits are not those
of this machine's ONNX file. An emulator says nothing of latency.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Run every file natively and on each emulated processor, and compare the logits with FP32's native ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--images", type=int, default=48)
    asked = parser.parse_args()
    from prgkit.export.bundle.bundle import read_evaluation  # here, since an emulated Python has no prgkit
    from prgkit.export.runtimes.parity import GOLDEN_TOLERANCE

    artifacts = json.loads((asked.bundle / "manifest.json").read_text())["artifacts"]
    files = [one for one in artifacts if one["format"] in OPENERS and (one["format"], one["precision"]) != FP16_ONNX]
    processors = {"native": sys.executable, **dict(one.split("=", 1) for one in asked.python)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pixels, logits = Path(folder) / "pixels.npy", Path(folder) / "logits.npy"
        np.save(pixels, read_evaluation(asked.bundle, limit=asked.images).pixels)
        wanted = None
        for processor, python in processors.items():
            for one in files:
                command = [*shlex.split(python), __file__, "worker", one["format"], one["precision"]]
                print(f"{processor}: {one['file']}", file=sys.stderr)
                subprocess.run([*command, asked.bundle / one["file"], pixels, logits], check=True)
                found = np.load(logits)
                wanted = found if wanted is None else wanted  # FP32 is a bundle's first, on this machine
                difference = np.abs(found - wanted)
                rows.append(
                    {
                        "processor": processor,
                        "artifact": one["name"],
                        "mean_abs_difference": float(difference.mean()),
                        "max_abs_difference": float(difference.max()),
                        "of_the_largest_logit": float(difference.max() / max(1.0, np.abs(wanted).max())),
                        "tolerance": GOLDEN_TOLERANCE.get(one["precision"]),
                        "agreement": 100 * float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
                    }
                )
    print(json.dumps({"command": shlex.join(sys.argv), "images": asked.images, "rows": rows}, indent=1))
    sys.exit(any(row["tolerance"] and row["of_the_largest_logit"] > row["tolerance"] for row in rows))


FP16_ONNX = ("onnx", "fp16")  # ONNX Runtime's CPU provider computes it in float32


def worker(kind: str, precision: str, file: str, pixels: str, logits: str) -> None:
    """Write the logits [n, classes] of a file for pixels [n, S, S, 3], one image a run."""
    run = OPENERS[kind](file, precision)
    np.save(logits, np.stack([run(one) for one in np.load(pixels)]))


def open_onnx(file: str, precision: str) -> Callable[[Any], Any]:
    """Return what maps pixels [S, S, 3] to logits [classes] in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"pixels": image[None]})[0][0]


def open_ncnn(folder: str, precision: str) -> Callable[[Any], Any]:
    """Return the same in ncnn, in the precision of the files."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = 1  # several wait busily for each other, in an emulator for ever
    net.opt.use_fp16_arithmetic = False
    if precision == "fp32":
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = False
    assert net.load_param(f"{folder}/model.ncnn.param") == 0
    assert net.load_model(f"{folder}/model.ncnn.bin") == 0

    def run(image: Any) -> Any:
        extractor = net.create_extractor()
        height, width, _ = image.shape
        extractor.input("in0", ncnn.Mat.from_pixels(image, ncnn.Mat.PixelType.PIXEL_RGB, width, height))
        return np.array(extractor.extract("out0")[1])

    return run


def open_litert(file: str, precision: str) -> Callable[[Any], Any]:
    """Return the same in LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(file)
    model.allocate_tensors()
    given, found = model.get_input_details()[0]["index"], model.get_output_details()[0]["index"]

    def run(image: Any) -> Any:
        model.set_tensor(given, image[None])
        model.invoke()
        return model.get_tensor(found)[0]

    return run


OPENERS = {"onnx": open_onnx, "ncnn": open_ncnn, "litert": open_litert}


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
