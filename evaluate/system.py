"""What this device is and did: processor, clocks, temperature, versions; and whether it was quiet enough."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from prgkit.evaluate import sensors
from prgkit.evaluate.sensors import read

RUNTIMES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "openvino"),
    *("torch", "tensorrt", "tensorrt_rtx", "numpy"),
)
CPUFREQ = Path("/sys/devices/system/cpu/cpufreq")


def describe() -> dict[str, Any]:
    """Return the facts of this machine as they are now, before anything is measured."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "busy_cores": busy_cores(),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "governor": governor(),
        "clock_range_mhz": clock_range_mhz(),
        "clocks_locked": clocks_locked(),
        "temperature_c": temperature_c(),
        "power_mode": power_mode(),
        "memory_gib": memory_gib(),
        "os": operating_system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "virtual": is_virtual(),
        "python": platform.python_version(),
        "versions": versions(),
        "gpus": gpus(),
    }


class SystemMonitor:
    """Samples clocks, temperature and throttling while something is measured, and what the hypervisor took of it."""

    def __init__(self, device: str = "cpu") -> None:
        self.meter = sensors.Meter(device)
        self.clocks_mhz: list[float] = []
        self.temperatures_c: list[float] = []
        self.before = cpu_times()

    def sample(self) -> None:
        """Look once; called between rounds, never while a run is timed."""
        self.meter.look()
        clock, warmth = clock_mhz(), temperature_c()
        if clock is not None:
            self.clocks_mhz.append(clock)
        if warmth is not None:
            self.temperatures_c.append(warmth)

    def facts(self) -> dict[str, Any]:
        """Return what was seen, as additions to ``describe``'s facts."""
        after = cpu_times()
        stolen = None
        if self.before and after and sum(after) > sum(self.before) and len(after) > 7:
            stolen = round(100 * (after[7] - self.before[7]) / (sum(after) - sum(self.before)), 2)
        return {
            "clocks_mhz": [round(value) for value in self.clocks_mhz],
            "temperatures_c": self.temperatures_c,
            "stolen_percent": stolen,
            "throttling": self.meter.facts()["throttling"],
        }


def look(device: str) -> dict[str, float | None]:
    """Return the clock and the temperature, now, of what works on ``device``: the GPU, or the processor."""
    clock, warmth = (sensors.gpu_clock_mhz(), sensors.gpu_temperature_c()) if device == "cuda" else (clock_mhz(), None)
    warmth = temperature_c() if warmth is None else warmth
    return {"clock_mhz": None if clock is None else round(clock, 1), "temperature_c": warmth}


def remarks(facts: dict[str, Any]) -> list[str]:
    """Return what a reader of the latencies must know about the machine."""
    found = []
    busy, cores = facts.get("busy_cores"), facts.get("usable_cores") or 1
    if busy is not None and busy > 0.15 * cores:
        found.append(f"Machine busy before the measurement: {busy:.1f} of {cores} cores.")
    for gpu in facts.get("gpus") or []:
        if (gpu.get("busy_percent") or 0) > 15:
            found.append(f"{gpu['name']} busy before the measurement: {gpu['busy_percent']:.0f} % of the time.")
    if (facts.get("stolen_percent") or 0) >= 1:
        found.append(
            f"The hypervisor took {facts['stolen_percent']:.1f} % of the processor time during the measurement."
        )
    if facts.get("clocks_locked") is False:
        low, high = facts["clock_range_mhz"]
        rule = f", governor {facts['governor']}" if facts.get("governor") else ""
        found.append(
            f"Clocks unlocked ({low:.0f} to {high:.0f} MHz{rule}): latency moves with temperature and load; root can "
            f"hold them: {how_to_lock(facts)}."
        )
    elif facts.get("clocks_locked") is None:
        found.append("Clocks cannot be read or locked here" + (" (virtual machine)." if facts.get("virtual") else "."))
    clocks = facts.get("clocks_mhz") or []
    if clocks and max(clocks) > 1.1 * min(clocks):
        found.append(f"The clock moved between {min(clocks)} and {max(clocks)} MHz during the measurement.")
    if facts.get("throttling"):
        found.append(f"The device held itself back during the measurement: {', '.join(facts['throttling'])}.")
    return found


def how_to_lock(facts: dict[str, Any]) -> str:
    """Return the commands that hold the clocks where they are."""
    if facts.get("power_mode"):
        return "jetson_clocks"
    more = ", nvidia-smi --lock-gpu-clocks=MHZ" if facts.get("gpus") else ""
    return f"cpupower frequency-set --governor performance{more}"


def slug(facts: dict[str, Any]) -> str:
    """Return a folder name for this machine: ``amd-epyc-2-cores``, with the GPU where there is one."""
    parts = [facts["cpu"], f"{facts['usable_cores']} cores", *(gpu["name"] for gpu in facts["gpus"][:1])]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def slug_here() -> str:
    """Return this machine's folder name without looking at what it does now, which takes a moment."""
    return slug({"cpu": cpu_model(), "usable_cores": usable_cores(), "gpus": gpus()})


def cpu_model() -> str:
    """Return the processor's name without its trademark signs and its clock."""
    text = read("/proc/cpuinfo") or ""
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    # Boards with ARM cores name the board in the device tree, and no model in cpuinfo.
    name = match.group(1) if match else read("/proc/device-tree/model") or mac_cpu() or platform.processor()
    name = re.sub(r"\((?:R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*$|\x00", "", name or platform.machine())
    return " ".join(name.split())


def mac_cpu() -> str | None:
    """Return the processor's name on macOS."""
    return output("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None


def usable_cores() -> int:
    """Return the cores that this process may use; a container or taskset can make them fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy_cores(window_s: float = 0.3) -> float | None:
    """Return how many cores are at work now; the load average would still count the training that just ended."""
    before = cpu_times()
    time.sleep(window_s)
    after = cpu_times()
    if before is None or after is None or sum(after) <= sum(before):
        return None
    idle = (after[3] + after[4]) - (before[3] + before[4])
    return round(max(0.0, (1 - idle / (sum(after) - sum(before)))) * (os.cpu_count() or 1), 2)


def cpu_times() -> list[int] | None:
    """Return the first eight fields of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal."""
    text = read("/proc/stat")
    return [int(value) for value in text.split("\n", 1)[0].split()[1:9]] if text else None


def governor() -> str | None:
    """Return the rule by which Linux chooses the clock: performance, powersave, schedutil, ..."""
    return read(CPUFREQ / "policy0" / "scaling_governor")


def clock_range_mhz() -> list[float] | None:
    """Return the lowest and the highest clock that the governor may choose."""
    low, high = read(CPUFREQ / "policy0" / "scaling_min_freq"), read(CPUFREQ / "policy0" / "scaling_max_freq")
    return [int(low) / 1000, int(high) / 1000] if low and high else None


def clocks_locked() -> bool | None:
    """Return whether the clock can move, or None where the system does not say."""
    bounds = clock_range_mhz()
    return None if bounds is None else bounds[0] == bounds[1]


def power_mode() -> str | None:
    """Return a Jetson's power mode: ``15W``, ``MAXN``, ..."""
    match = re.search(r"NV Power Mode:\s*(\S+)", output("nvpmodel", "-q") or "")
    return match.group(1) if match else None


def clock_mhz() -> float | None:
    """Return the mean clock over the cores now."""
    values = [int(text) / 1000 for path in CPUFREQ.glob("policy*/scaling_cur_freq") if (text := read(path))]
    if not values:  # a virtual machine's cpuinfo repeats the nominal clock, which says nothing
        if is_virtual():
            return None
        values = [
            float(text) for text in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", read("/proc/cpuinfo") or "", re.MULTILINE)
        ]
    return sum(values) / len(values) if values else None


def temperature_c() -> float | None:
    """Return the hottest thermal zone."""
    values = []
    for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        text = read(path)
        if text and text.lstrip("-").isdigit():
            values.append(int(text) / 1000)
    return round(max(values), 1) if values else None


def memory_gib() -> float | None:
    """Return the machine's memory."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", read("/proc/meminfo") or "", re.MULTILINE)
    if match:
        return round(int(match.group(1)) / (1 << 20), 1)
    total = output("sysctl", "-n", "hw.memsize") if platform.system() == "Darwin" else None
    return round(int(total) / (1 << 30), 1) if total else None


def operating_system() -> str:
    """Return the distribution and its version."""
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', read("/etc/os-release") or "", re.MULTILINE)
    return match.group(1) if match else f"{platform.system()} {platform.release()}"


def is_virtual() -> bool:
    """Return whether a hypervisor runs this machine."""
    return bool(re.search(r"^flags\s*:.*\bhypervisor\b", read("/proc/cpuinfo") or "", re.MULTILINE))


def versions() -> dict[str, str]:
    """Return the versions of the installed runtimes, without importing any."""
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[dict[str, Any]]:
    """Return the NVIDIA GPUs that nvidia-smi names, with the driver's version."""
    fields = (
        "name",
        "driver_version",
        "memory.total",
        "clocks.sm",
        "power.limit",
        "temperature.gpu",
        "utilization.gpu",
    )
    text = output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[value.strip() for value in line.split(",")] for line in (text or "").splitlines()]
    keys = ("name", "driver", "memory_mib", "clock_mhz", "power_limit_w", "temperature_c", "busy_percent")
    return [
        {key: number_or_text(value) for key, value in zip(keys, row, strict=True)}
        for row in rows
        if len(row) == len(keys)
    ]


def number_or_text(value: str) -> float | str | None:
    """Return a number where nvidia-smi printed one, None for its "[N/A]"."""
    if value.startswith("["):
        return None
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) and value.count(".") < 2 else value


def output(*command: str) -> str | None:
    """Return what a command printed, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
