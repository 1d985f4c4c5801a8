"""What a device shows of its own strain while it works: the power that it draws, and whether it holds itself back.

Energy counters give a mean over any time: RAPL (a processor's package) and NVML (a GPU). Where there is none, the
INA3221 of a Jetson gives the whole board's power at a moment. Everything is read without root; a system that keeps
something to itself gives None.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

RAPL = Path("/sys/class/powercap")
INA3221 = Path("/sys/bus/i2c/drivers/ina3221")
THERMAL = Path("/sys/class/thermal")
CPU = Path("/sys/devices/system/cpu")
RASPBERRY = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
# NVML: which clock and which sensor are meant, and what its bits of a throttled clock say.
SM_CLOCK, GPU_SENSOR = 1, 0
GPU_REASONS = {
    0x04: "GPU power cap",
    0x08: "GPU hardware slowdown",
    0x20: "GPU too hot",
    0x40: "GPU too hot",
    0x80: "GPU power brake",
}
RASPBERRY_REASONS = {0x1: "voltage too low", 0x2: "clock capped", 0x4: "throttled", 0x8: "too hot"}


class MeterReading(NamedTuple):
    """The mean power over a stretch of time, or None, and the reasons for which the device was throttled in it."""

    power_w: float | None
    throttling: list[str]


class Meter:
    """What a device drew, and how it held itself back, from the making of the meter to its ``read``."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.powers_w: list[float] = []
        self.reasons: set[str] = set()
        self.throttles = processor_throttles()
        self.joules, self.began = energy_j(gpu=self.gpu), time.perf_counter()

    def sample(self) -> None:
        """Read what can only be seen at a moment; takes less than a millisecond."""
        self.reasons |= throttling(gpu=self.gpu)
        if self.joules is None and (watts := power_w(gpu=self.gpu)) is not None:
            self.powers_w.append(watts)

    def read(self) -> MeterReading:
        """Return what was seen since the meter was made."""
        if not self.powers_w:  # else it was sampled under load, and what it draws now is that of a device at rest
            self.sample()
        after, seconds = energy_j(gpu=self.gpu), time.perf_counter() - self.began
        power = sum(self.powers_w) / len(self.powers_w) if self.powers_w else None
        # A counter that starts again, every hour or so of full load, says nothing about this stretch.
        if self.joules is not None and after is not None and after >= self.joules and seconds > 0:
            power = (after - self.joules) / seconds
        hot = {"processor too hot"} if processor_throttles() > self.throttles else set()
        return MeterReading(None if power is None else round(power, 3), sorted(self.reasons | hot))


@contextmanager
def midway(sample: Callable[[], None], *, after_s: float) -> Iterator[None]:
    """Call ``sample`` once, from another thread, in the midst of the block: after it, the device is at rest again."""
    timer = threading.Timer(after_s, sample)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def power_source(device: str) -> str | None:
    """Return what `Meter` measures the power of, or None where nothing shows it."""
    if device == "cuda" and nvml_value("nvmlDeviceGetPowerUsage") is not None:
        return "GPU, by NVML"
    if device != "cuda" and energy_j(gpu=False) is not None:
        return "processor package, by RAPL"
    return None if board_power_w() is None else "whole board, by INA3221"


def energy_j(*, gpu: bool) -> float | None:
    """Return a counter of energy: the GPU's, or that of all processor packages; since 2020 often for root alone."""
    if gpu:
        millijoules = nvml_value("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong)
        return None if millijoules is None else millijoules / 1e3
    zones = [zone for zone in RAPL.glob("intel-rapl:*") if (read(zone / "name") or "").startswith("package")]
    counts = [number(zone / "energy_uj") for zone in zones]
    known = [count for count in counts if count is not None]
    return sum(known) / 1e6 if known and len(known) == len(counts) else None


def power_w(*, gpu: bool) -> float | None:
    """Return the power at this moment: the GPU's, or the board's."""
    milliwatts = nvml_value("nvmlDeviceGetPowerUsage") if gpu else None
    return board_power_w() if milliwatts is None else milliwatts / 1e3


def board_power_w() -> float | None:
    """Return the sum over an INA3221's rails, or its VDD_IN alone where there is one: that rail feeds the others."""
    rails = {}
    for label in INA3221.glob("*/hwmon/hwmon*/in*_label"):
        place = label.name[2:-6]  # in1_label
        millivolts, milliamperes = (number(label.with_name(f"{what}{place}_input")) for what in ("in", "curr"))
        if millivolts is not None and milliamperes is not None:
            rails[read(label) or ""] = millivolts * milliamperes / 1e6
    return rails.get("VDD_IN", sum(rails.values())) if rails else None


def throttling(*, gpu: bool) -> set[str]:
    """Return why the device holds itself back at this moment."""
    reasons: set[str] = set()
    if gpu:
        bits = nvml_value("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong) or 0
        reasons |= {reason for bit, reason in GPU_REASONS.items() if bits & bit}
    bits = int(text, 16) if (text := read(RASPBERRY)) else 0
    reasons |= {reason for bit, reason in RASPBERRY_REASONS.items() if bits & bit}
    for cooler in THERMAL.glob("cooling_device*"):  # Linux holds a clock down as it would turn a fan up
        kind = read(cooler / "type") or ""
        if ("cpufreq" in kind or "devfreq" in kind) and (number(cooler / "cur_state") or 0) > 0:
            reasons.add("GPU too hot" if "devfreq" in kind else "processor too hot")
    return reasons


def processor_throttles() -> int:
    """Return how often an Intel processor has throttled itself for its temperature since the start of the system."""
    return sum(number(path) or 0 for path in CPU.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))


@functools.cache
def nvml() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """Return the driver's library and its first GPU, or None where there is no driver."""
    try:
        library, gpu = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        loaded = library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu)) == 0
    except (OSError, AttributeError):
        return None
    return (library, gpu) if loaded else None


def nvml_value(function: str, *which: int, kind: Any = ctypes.c_uint) -> int | None:
    """Return what one of NVML's functions says of the GPU, or None where it does not know."""
    loaded = nvml()
    if loaded is None or not hasattr(loaded[0], function):
        return None
    library, gpu = loaded
    value = kind()
    code = getattr(library, function)(gpu, *map(ctypes.c_uint, which), ctypes.byref(value))
    return int(value.value) if code == 0 else None


def number(path: Path) -> int | None:
    """Return the whole number in a file, or None where there is none."""
    text = read(path) or ""
    return int(text) if text.removeprefix("-").isdecimal() else None


def read(path: str | Path) -> str | None:
    """Return a file's text, stripped, or None where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None
