"""The facts of a machine: readable here without torch, honest where a system keeps silent."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prgkit.evaluate import sensors, system
from prgkit.evaluate.report.machine import RUNTIMES
from prgkit.evaluate.report.schema import Machine


def test_describe_is_json_and_names_the_processor() -> None:
    machine = system.describe()
    json.dumps(machine.model_dump(mode="json"), allow_nan=False)
    assert machine.cpu
    assert machine.cores is not None
    assert 1 <= machine.usable_cores <= machine.cores
    assert "numpy" in machine.versions
    assert {"ai-edge-litert", "executorch", "ncnn", "openvino", "tensorrt_rtx"} < set(RUNTIMES)
    assert machine.busy_cores is None or 0 <= machine.busy_cores <= machine.cores
    assert system.machine_folder().replace("-", "").isalnum()


def test_versions_are_read_without_importing_what_they_are_of() -> None:
    code = (
        "import sys; from prgkit.evaluate import system; system.describe(); "
        "print([name for name in ('torch', 'onnxruntime', 'tensorrt', 'tensorrt_rtx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cpu_names_lose_their_ornaments(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(text: str) -> None:
        monkeypatch.setattr(system, "read", lambda path: text if str(path) == "/proc/cpuinfo" else None)

    pretend("processor\t: 0\nmodel name\t: Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz\n")
    assert system.cpu_model() == "Intel Xeon E5-2690 v4"
    pretend("processor\t: 0\nmodel name\t: AMD EPYC 7B13 64-Core Processor\n")
    assert system.cpu_model() == "AMD EPYC 7B13 64-Core"
    pretend("processor\t: 0\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n")
    assert system.cpu_model() == "Raspberry Pi 4 Model B Rev 1.4"


ARM = """processor\t: 0
BogoMIPS\t: 108.00
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd08

Hardware\t: BCM2835
Model\t\t: Raspberry Pi 4 Model B Rev 1.2
"""
BOARD = "Model\t\t: Raspberry Pi 4 Model B Rev 1.2\n"
ARMV7 = "model name\t: ARMv7 Processor rev 4 (v7l)\n"
PHONE = "CPU implementer\t: 0x41\nCPU part\t: 0xd05\n\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"


@pytest.mark.parametrize(
    ("tree", "cpuinfo", "name"),
    [
        (None, ARM, "Raspberry Pi 4 Model B Rev 1.2"),
        (None, ARMV7 + ARM, "Raspberry Pi 4 Model B Rev 1.2"),
        ("Raspberry Pi 5 Model B Rev 1.0\0", ARM, "Raspberry Pi 5 Model B Rev 1.0"),
        ("linux,dummy-virt\0", ARM.replace(BOARD, ""), "BCM2835 0x41 0xd08"),
        (None, ARM.partition("Hardware")[0], "aarch64 0x41 0xd08"),
        (None, ARM.partition("Hardware")[0].replace("0xd08", "0xd40"), "aarch64 0x41 0xd40"),
        (None, ARM.replace(BOARD, "").replace("BCM2835", "Qualcomm SM8350"), "Qualcomm SM8350 0x41 0xd08"),
        (None, ARMV7 + PHONE, "ARMv7 rev 4 (v7l) 0x41 0xd05 0xd0b"),
        (None, "model\t\t: 85\nmodel name\t: AMD EPYC 7B13\n", "AMD EPYC 7B13"),
        (None, "", "aarch64"),
    ],
)
def test_machines_with_arm_cores_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tree: str | None, cpuinfo: str, name: str
) -> None:
    files = {"/proc/cpuinfo": cpuinfo, "/proc/device-tree/model": tree}
    monkeypatch.setattr(system, "read", lambda path: files.get(str(path)))
    monkeypatch.setattr(
        system, "platform", SimpleNamespace(system=lambda: "Linux", processor=str, machine=lambda: "aarch64")
    )
    assert system.cpu_model() == name


def test_gpus_come_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        system, "output", lambda *command: "Orin (nvgpu), 540.4.0, [N/A], [N/A], [N/A], 41, 0\nbroken line"
    )
    assert [gpu.model_dump() for gpu in system.gpus()] == [
        {
            "name": "Orin (nvgpu)",
            "driver": "540.4.0",
            "memory_mib": None,
            "clock_mhz": None,
            "power_limit_w": None,
            "temperature_c": 41.0,
            "busy_percent": 0.0,
        }
    ]
    monkeypatch.setattr(system, "output", lambda *command: None)
    assert system.gpus() == []


def test_clocks_are_read_where_linux_shows_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index, clock in enumerate((2_000_000, 3_000_000)):
        policy = tmp_path / f"policy{index}"
        policy.mkdir()
        (policy / "scaling_cur_freq").write_text(f"{clock}\n")
        (policy / "scaling_min_freq").write_text("800000\n")
        (policy / "scaling_max_freq").write_text("3500000\n")
        (policy / "scaling_governor").write_text("schedutil\n")
    monkeypatch.setattr(system, "CPUFREQ", tmp_path)
    assert system.clock_mhz() == 2500
    assert system.clock_range_mhz() == (800, 3500)
    assert system.clocks_locked() is False
    assert system.governor() == "schedutil"
    (tmp_path / "policy0" / "scaling_min_freq").write_text("3500000\n")
    assert system.clocks_locked() is True


def notes_on(facts: dict[str, Any]) -> list[str]:
    return system.machine_notes(Machine.model_validate(facts))


def test_notes_name_what_spoils_a_measurement() -> None:
    quiet: dict[str, Any] = {
        **dict.fromkeys(("cpu", "os", "kernel", "architecture", "python"), "x"),
        **{"cores": 2, "virtual": False, "versions": {}},
        "busy_cores": 0.1,
        "usable_cores": 2,
        "clocks_locked": True,
        "clocks_mhz": [3000, 3010],
        "stolen_percent": 0.0,
    }
    assert notes_on(quiet) == []
    assert notes_on({**quiet, "cores": 32, "busy_cores": 2.0}) == []  # of others, elsewhere
    assert notes_on({**quiet, "cores": 4, "usable_cores": 1, "busy_cores": 2.0}) == [
        "Machine busy before the measurement: 2.0 of 4 cores."
    ]
    loud = {**quiet, "busy_cores": 1.9, "stolen_percent": 3.2, "clocks_locked": False, "clock_range_mhz": [800, 3500]}
    loud["gpus"] = [
        {"name": "Orin", "driver": "1", "busy_percent": 0.0},
        {"name": "L4", "driver": "1", "busy_percent": 97.0},
    ]
    loud |= {"governor": "powersave", "clocks_mhz": [1500, 3000], "throttling": ["GPU power cap", "GPU too hot"]}
    assert notes_on(loud) == [
        "Machine busy before the measurement: 1.9 of 2 cores.",
        "L4 busy before the measurement: 97 % of the time.",
        "The hypervisor took 3.2 % of the processor time during the measurement.",
        "Clocks unlocked (800 to 3500 MHz, governor powersave): latency moves with temperature and load; root can hold "
        "them: cpupower frequency-set --governor performance, nvidia-smi --lock-gpu-clocks=MHZ.",
        "The clock moved between 1500 and 3000 MHz during the measurement.",
        "The device held itself back during the measurement: GPU power cap, GPU too hot.",
    ]
    assert system.how_to_lock(Machine.model_validate({**quiet, "power_mode": "15W"})) == "jetson_clocks"
    assert notes_on({**quiet, "clocks_locked": None, "virtual": True}) == [
        "Clocks cannot be read or locked here (virtual machine)."
    ]


def test_a_monitor_reports_what_was_stolen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[0] * 8, [50, 0, 0, 40, 0, 0, 0, 10]])
    monkeypatch.setattr(system, "cpu_times", lambda: next(times))
    assert system.SystemMonitor().stolen_percent() == 10.0


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device of which the folders under the test's own show everything."""
    for name in ("RAPL", "INA3221", "THERMAL", "CPU"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(sensors, name, tmp_path / name)
    monkeypatch.setattr(sensors, "RASPBERRY", tmp_path / "get_throttled")
    monkeypatch.setattr(sensors, "nvml", lambda: None)
    return tmp_path


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_a_device_that_shows_nothing_has_no_power_and_no_throttling(bare: Path) -> None:
    meter = sensors.Meter("cuda")
    assert meter.read() == (None, [])
    assert sensors.power_source("cuda") is sensors.power_source("cpu") is None


def test_power_is_what_the_packages_counters_grew_by(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bare / "RAPL/intel-rapl:0", name="package-0", energy_uj="9000000")
    put(bare / "RAPL/intel-rapl:0:0", name="core", energy_uj="5000000")  # a part of the package
    put(bare / "RAPL/intel-rapl:1", name="package-1", energy_uj="1000000")
    put(bare / "RAPL/intel-rapl-mmio:0", name="package-0", energy_uj="9000000")  # the same package once more
    times = iter([100.0, 104.0, 200.0, 204.0])
    monkeypatch.setattr(sensors.time, "perf_counter", lambda: next(times))
    meter = sensors.Meter("cpu")
    put(bare / "RAPL/intel-rapl:0", energy_uj="29000000")
    put(bare / "RAPL/intel-rapl:1", energy_uj="21000000")
    assert meter.read().power_w == 10.0  # 20 J and 20 J in 4 s
    assert sensors.power_source("cpu") == "processor package, by RAPL"
    meter = sensors.Meter("cpu")
    put(bare / "RAPL/intel-rapl:0", energy_uj="5")
    assert meter.read().power_w is None  # the counter began again
    (bare / "RAPL/intel-rapl:1/energy_uj").unlink()  # for root alone
    assert sensors.energy_j(gpu=False) is None


def test_a_jetson_shows_the_power_of_its_board(bare: Path) -> None:
    rails = bare / "INA3221/1-0040/hwmon/hwmon3"
    put(rails, in1_label="VDD_IN", in1_input="5000", curr1_input="2000", in2_label="VDD_CPU_GPU_CV", in2_input="5000")
    put(rails, curr2_input="800", in3_label="VDD_SOC", in3_input="5000", curr3_input="400", in7_label="sum of shunts")
    meter = sensors.Meter("cuda")
    put(rails, curr1_input="3000")
    meter.sample()
    put(rails, curr1_input="2000")
    assert meter.read().power_w == 15  # the look under load; at rest again it draws 10 W
    assert sensors.Meter("cuda").read().power_w == 10  # where there was none, what it draws at the end
    assert sensors.power_source("cuda") == "whole board, by INA3221"
    (rails / "in1_label").unlink()
    assert sensors.board_power_w() == pytest.approx(6.0)  # without the rail that feeds the others, their sum


def test_a_device_that_holds_itself_back_says_why(bare: Path) -> None:
    put(bare, get_throttled="50000")  # it has been too hot since the start, and is not now
    put(bare / "THERMAL/cooling_device0", type="cpufreq-cpu0", cur_state="0")
    put(bare / "THERMAL/cooling_device1", type="pwm-fan", cur_state="3")
    put(bare / "CPU/cpu0/thermal_throttle", core_throttle_count="7")
    meter = sensors.Meter("cpu")
    assert meter.read().throttling == []
    put(bare, get_throttled="5000d")
    put(bare / "THERMAL/cooling_device2", type="devfreq-17000000.gpu", cur_state="2")
    put(bare / "CPU/cpu0/thermal_throttle", core_throttle_count="8")
    assert meter.read().throttling == [
        "GPU too hot", "processor too hot", "throttled", "too hot", "voltage too low"
    ]  # fmt: skip


class Driver:
    """Stands for NVIDIA's library: it fills in what it is asked for, and knows nothing of temperatures."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def nvmlDeviceGetClockInfo(self, gpu: Any, which: Any, value: Any) -> int:  # noqa: N802
        self.asked.append((gpu, which.value))
        value._obj.value = 1980
        return 0

    def nvmlDeviceGetTemperature(self, gpu: Any, which: Any, value: Any) -> int:  # noqa: N802
        return 3  # not supported

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = 1 << 40  # millijoules, more than 32 bits hold
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = 0x01 | 0x04 | 0x20  # idle, which is no strain, and two that are
        return 0


def test_a_gpu_is_asked_through_its_driver(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, gpu = Driver(), ctypes.c_void_p(7)
    monkeypatch.setattr(sensors, "nvml", lambda: (driver, gpu))
    monkeypatch.setattr(system, "temperature_c", lambda: 41.0)
    assert system.device_state("cuda") == (1980, 41.0)  # the board's, where the GPU has none
    assert driver.asked == [(gpu, 1)]
    assert sensors.energy_j(gpu=True) == (1 << 40) / 1e3
    assert sensors.throttling(gpu=True) == {"GPU power cap", "GPU too hot"}
    assert sensors.throttling(gpu=False) == set()
