"""What this device is and did: processor, clocks, temperature, versions; and whether it was quiet enough."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from prgkit.evaluate import sensors
from prgkit.evaluate.report.machine import RUNTIMES
from prgkit.evaluate.report.schema import Gpu, Machine
from prgkit.evaluate.sensors import read
from prgkit.storage.run import Run
from prgkit.workers import available_cores

LIBRARIES = ("torch", "numpy")  # what bench works with besides the runtimes
CPUFREQ = Path("/sys/devices/system/cpu/cpufreq")
DEVICE_TREE_MODEL = "/proc/device-tree/model"  # the board, as those with ARM cores name it


def describe() -> Machine:
    """Return what this machine is and does now, before anything is measured."""
    return Machine(
        cpu=cpu_model(),
        cores=os.cpu_count(),
        usable_cores=available_cores(),
        busy_cores=busy_cores(),
        load_average=[round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        governor=governor(),
        clock_range_mhz=clock_range_mhz(),
        clocks_locked=clocks_locked(),
        temperature_c=temperature_c(),
        power_mode=power_mode(),
        memory_gib=memory_gib(),
        os=operating_system(),
        kernel=platform.release(),
        architecture=platform.machine(),
        virtual=is_virtual(),
        python=platform.python_version(),
        versions=versions(),
        gpus=gpus(),
    )


class SystemMonitor:
    """Samples clocks, temperature and throttling while something is measured, and what the hypervisor took of it."""

    def __init__(self, device: str = "cpu") -> None:
        self.meter = sensors.Meter(device)
        self.clocks_mhz: list[float] = []
        self.temperatures_c: list[float] = []
        self.before = cpu_times()

    def sample(self) -> None:
        """Read the sensors once; called between rounds, never while a run is timed."""
        self.meter.sample()
        clock, temperature = clock_mhz(), temperature_c()
        if clock is not None:
            self.clocks_mhz.append(clock)
        if temperature is not None:
            self.temperatures_c.append(temperature)

    def stolen_percent(self) -> float | None:
        """Return the processor time since the start that the hypervisor took."""
        after = cpu_times()
        if not (self.before and after and sum(after) > sum(self.before) and len(after) > 7):
            return None
        return round(100 * (after[7] - self.before[7]) / (sum(after) - sum(self.before)), 2)

    def add_to(self, machine: Machine) -> Machine:
        """Return the machine with what was seen of it."""
        return machine.model_copy(
            update={
                "clocks_mhz": [round(value) for value in self.clocks_mhz],
                "temperatures_c": self.temperatures_c,
                "stolen_percent": self.stolen_percent(),
                "throttling": self.meter.read().throttling,
            }
        )


class DeviceState(NamedTuple):
    """The clock and the temperature of a device at a moment."""

    clock_mhz: float | None = None
    temperature_c: float | None = None


def device_state(device: str) -> DeviceState:
    """Return the clock and the temperature, now, of what works on ``device``: the GPU, or the processor."""
    gpu = device == "cuda"
    clock = sensors.nvml_value("nvmlDeviceGetClockInfo", sensors.SM_CLOCK) if gpu else clock_mhz()
    temperature = sensors.nvml_value("nvmlDeviceGetTemperature", sensors.GPU_SENSOR) if gpu else None
    return DeviceState(
        None if clock is None else round(clock, 1), temperature_c() if temperature is None else temperature
    )


def machine_notes(machine: Machine) -> list[str]:
    """Return what a reader of the latencies must know about the machine."""
    notes = []
    busy, cores = machine.busy_cores, machine.cores or machine.usable_cores  # all that run, not this process's alone
    if busy is not None and busy > 0.15 * cores:
        notes.append(f"Machine busy before the measurement: {busy:.1f} of {cores} cores.")
    for gpu in machine.gpus:
        if (gpu.busy_percent or 0) > 15:
            notes.append(f"{gpu.name} busy before the measurement: {gpu.busy_percent:.0f} % of the time.")
    if (machine.stolen_percent or 0) >= 1:
        notes.append(
            f"The hypervisor took {machine.stolen_percent:.1f} % of the processor time during the measurement."
        )
    if machine.clocks_locked is False and machine.clock_range_mhz:
        low, high = machine.clock_range_mhz
        rule = f", governor {machine.governor}" if machine.governor else ""
        notes.append(
            f"Clocks unlocked ({low:.0f} to {high:.0f} MHz{rule}): latency moves with temperature and load; root can "
            f"hold them: {how_to_lock(machine)}."
        )
    elif machine.clocks_locked is None:
        notes.append("Clocks cannot be read or locked here" + (" (virtual machine)." if machine.virtual else "."))
    clocks = machine.clocks_mhz
    if clocks and max(clocks) > 1.1 * min(clocks):
        notes.append(f"The clock moved between {min(clocks)} and {max(clocks)} MHz during the measurement.")
    if machine.throttling:
        notes.append(f"The device held itself back during the measurement: {', '.join(machine.throttling)}.")
    return notes


def how_to_lock(machine: Machine) -> str:
    """Return the commands that hold the clocks where they are."""
    if machine.power_mode:
        return "jetson_clocks"
    more = ", nvidia-smi --lock-gpu-clocks=MHZ" if machine.gpus else ""
    return f"cpupower frequency-set --governor performance{more}"


def bench_folder(bundle: Path, run: Run | None) -> Path:
    """Return where this machine's measurements of a bundle lie: in the run that it lies in, else in the bundle."""
    return (run.folder if run else bundle) / "bench" / machine_folder()


def machine_folder() -> str:
    """Return the name of this machine's folder: ``amd-epyc-2-cores``, with the GPU where there is one."""
    parts = [cpu_model(), f"{available_cores()} cores", *(gpu.name for gpu in gpus()[:1])]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def cpu_model() -> str:
    """Return the board's name, or the processor's without its trademark signs and its clock."""
    text = read("/proc/cpuinfo") or ""

    def said(key: str) -> list[str]:
        return re.findall(rf"^{key}[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)

    board = [name for name in (read(DEVICE_TREE_MODEL), *said("Model")) if name and "dummy-virt" not in name]
    if board:
        name = board[0]
    else:  # what ARM's cores are called is common to many; of the two kinds in a phone, both are told
        on_mac = output("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None
        named = [*said("model name"), *said("Hardware"), on_mac, platform.processor(), platform.machine()]
        parts = dict.fromkeys(said("CPU implementer") + said("CPU part"))
        name = " ".join([next(filter(None, named), ""), *parts])
    return " ".join(re.sub(r"\((?:R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*$|\x00", "", name).split())


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


def clock_range_mhz() -> tuple[float, float] | None:
    """Return the lowest and the highest clock that the governor may choose."""
    low, high = read(CPUFREQ / "policy0" / "scaling_min_freq"), read(CPUFREQ / "policy0" / "scaling_max_freq")
    return (int(low) / 1000, int(high) / 1000) if low and high else None


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
    values = [
        value for path in sensors.THERMAL.glob("thermal_zone*/temp") if (value := sensors.number(path)) is not None
    ]
    return round(max(values) / 1000, 1) if values else None


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
    """Return the versions of the installed runtimes and libraries, without importing any."""
    installed = {}
    for name in (*RUNTIMES, *LIBRARIES):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that nvidia-smi names, with the driver's version."""
    fields = {
        "name": "name",
        "driver": "driver_version",
        "memory_mib": "memory.total",
        "clock_mhz": "clocks.sm",
        "power_limit_w": "power.limit",
        "temperature_c": "temperature.gpu",
        "busy_percent": "utilization.gpu",
    }
    text = output("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits")
    rows = [[value.strip() for value in line.split(",")] for line in (text or "").splitlines()]
    # It prints [N/A] for what a GPU does not show.
    return [
        Gpu.model_validate(dict(zip(fields, [None if value.startswith("[") else value for value in row], strict=True)))
        for row in rows
        if len(row) == len(fields)
    ]


def output(*command: str) -> str | None:
    """Return what a command printed, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
