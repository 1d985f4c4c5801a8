"""Does OpenVINO open a saved IR faster than the ONNX file that it is made of?

Each round opens both, in a random order, in a process of its own: reads the file, sets the batch to 1 and compiles
for one thread. Prints JSON: the ratio of medians (IR to ONNX) with a 95 % bootstrap interval over rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

OPEN = """
import sys, time, openvino
core = openvino.Core()
start = time.perf_counter()
model = core.read_model(sys.argv[1])
read = time.perf_counter()
model.reshape([1, *list(model.inputs[0].partial_shape)[1:]])
core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"})
print(1000 * (read - start), 1000 * (time.perf_counter() - start))
"""


def main() -> None:
    """Compare the two files of each bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="model.onnx")
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    import openvino

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(asked.files):
            saved = Path(folder) / f"{number}.xml"
            openvino.save_model(openvino.Core().read_model(str(file)), str(saved), compress_to_fp16=False)
            times: dict[str, list[list[float]]] = {str(file): [], str(saved): []}
            for _ in range(asked.rounds):
                for path in random.sample(list(times), 2):
                    done = subprocess.run(
                        [sys.executable, "-c", OPEN, path], capture_output=True, text=True, check=True
                    )
                    times[path].append([float(value) for value in done.stdout.split()])
            onnx, ir = (np.array(values) for values in times.values())  # [rounds, 2] ms: read, read and compiled
            drawn = np.random.default_rng(0).integers(asked.rounds, size=(1000, asked.rounds))
            ratios = np.median(ir[:, 1][drawn], axis=1) / np.median(onnx[:, 1][drawn], axis=1)
            rows.append(
                {
                    "file": file.name,
                    "folder": file.parent.name,
                    "onnx_ms": np.median(onnx, axis=0).tolist(),
                    "ir_ms": np.median(ir, axis=0).tolist(),
                    "ratio": float(np.median(ir[:, 1]) / np.median(onnx[:, 1])),
                    "interval": np.percentile(ratios, [2.5, 97.5]).tolist(),
                }
            )
    print(json.dumps({"command": shlex.join(sys.argv), "openvino": openvino.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
