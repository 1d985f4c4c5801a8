"""How far a bundle's files are from FP32's logits on processors that this machine is not, emulated by QEMU.

INT8 kernels differ between processors, and some saturate. `--python NAME=COMMAND` names what runs a Python with NumPy
and ONNX Runtime, as "Haswell=qemu-x86_64 -cpu Haswell python3.11"; the commands are in README.md. Prints JSON. An
emulator says nothing of latency.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def main() -> None:
    """Run every file natively and on each emulated processor, and compare the logits with FP32's native ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--images", type=int, default=48)
    asked = parser.parse_args()
    from prgkit.export.bundle.bundle import read_evaluation  # here, since an emulated Python has no prgkit

    artifacts = json.loads((asked.bundle / "manifest.json").read_text())["artifacts"]
    files = {one["name"]: one["file"] for one in artifacts if one["format"] == "onnx" and one["precision"] != "fp16"}
    processors = {"native": sys.executable, **dict(one.split("=", 1) for one in asked.python)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pixels, logits = Path(folder) / "pixels.npy", Path(folder) / "logits.npy"
        np.save(pixels, read_evaluation(asked.bundle, limit=asked.images).pixels)
        wanted = None
        for processor, python in processors.items():
            for name, file in files.items():
                command = [*shlex.split(python), __file__, "worker", asked.bundle / file, pixels, logits]
                print(f"{processor}: {file}", file=sys.stderr)
                subprocess.run(command, check=True)
                found = np.load(logits)
                wanted = found if wanted is None else wanted  # FP32 is a bundle's first, on this machine
                rows.append(
                    {
                        "processor": processor,
                        "artifact": name,
                        "mean_abs_difference": float(np.abs(found - wanted).mean()),
                        "max_abs_difference": float(np.abs(found - wanted).max()),
                        "agreement": 100 * float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
                    }
                )
    print(json.dumps({"command": shlex.join(sys.argv), "images": asked.images, "rows": rows}, indent=1))


def worker(file: str, pixels: str, logits: str) -> None:
    """Write the logits [n, classes] of an ONNX file for pixels [n, S, S, 3], one image a run."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    np.save(logits, np.concatenate([session.run(["logits"], {"pixels": one[None]})[0] for one in np.load(pixels)]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
