"""How long `prgkit --help` takes, as a multiple of a bare `python -c "import click"`: python benchmarks/help_time.py

The two are started in turn, so that what else the machine does falls on both; CPU time counts, since a busy machine
stretches the rest. The aim is at most 4.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

COMMANDS = {
    "import click": [sys.executable, "-c", "import click"],
    "prgkit --help": [sys.executable, "-m", "prgkit", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    runs: int = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            seconds[name].append(cpu_seconds(command))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<14} {1000 * median:6.0f} ms of CPU time, the median of {runs} runs")
    print(f"ratio          {medians['prgkit --help'] / medians['import click']:6.2f}")


def cpu_seconds(command: list[str]) -> float:
    """Run a command and return the CPU time of its process."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
