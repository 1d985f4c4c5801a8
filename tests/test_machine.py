"""The facts of a machine: readable here without torch, honest where a system keeps silent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prgkit.evaluate import machine


def test_describe_is_json_and_names_the_processor() -> None:
    facts = machine.describe()
    json.dumps(facts, allow_nan=False)
    assert facts["cpu"]
    assert 1 <= facts["usable_cores"] <= facts["cores"]
    assert "numpy" in facts["versions"]
    assert facts["busy_cores"] is None or 0 <= facts["busy_cores"] <= facts["cores"]
    assert machine.slug(facts).replace("-", "").isalnum()


def test_versions_are_read_without_importing_what_they_are_of() -> None:
    code = (
        "import sys; from prgkit.evaluate import machine; machine.describe(); "
        "print([name for name in ('torch', 'onnxruntime', 'tensorrt', 'tensorrt_rtx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cpu_names_lose_their_ornaments(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(text: str) -> None:
        monkeypatch.setattr(machine, "read", lambda path: text if str(path) == "/proc/cpuinfo" else None)

    pretend("processor\t: 0\nmodel name\t: Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz\n")
    assert machine.cpu_model() == "Intel Xeon E5-2690 v4"
    pretend("processor\t: 0\nmodel name\t: AMD EPYC 7B13 64-Core Processor\n")
    assert machine.cpu_model() == "AMD EPYC 7B13 64-Core"
    pretend("processor\t: 0\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n")
    assert machine.cpu_model() == "Raspberry Pi 4 Model B Rev 1.4"


def test_gpus_come_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine, "output", lambda *command: "Orin (nvgpu), 540.4.0, [N/A], [N/A], [N/A], 41\nbroken line"
    )
    assert machine.gpus() == [
        {
            "name": "Orin (nvgpu)",
            "driver": "540.4.0",
            "memory_mib": None,
            "clock_mhz": None,
            "power_limit_w": None,
            "temperature_c": 41.0,
        }
    ]
    monkeypatch.setattr(machine, "output", lambda *command: None)
    assert machine.gpus() == []


def test_clocks_are_read_where_linux_shows_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index, clock in enumerate((2_000_000, 3_000_000)):
        policy = tmp_path / f"policy{index}"
        policy.mkdir()
        (policy / "scaling_cur_freq").write_text(f"{clock}\n")
        (policy / "scaling_min_freq").write_text("800000\n")
        (policy / "scaling_max_freq").write_text("3500000\n")
        (policy / "scaling_governor").write_text("schedutil\n")
    monkeypatch.setattr(machine, "CPUFREQ", tmp_path)
    assert machine.clock_mhz() == 2500
    assert machine.clock_range_mhz() == [800, 3500]
    assert machine.clocks_locked() is False
    assert machine.governor() == "schedutil"
    (tmp_path / "policy0" / "scaling_min_freq").write_text("3500000\n")
    assert machine.clocks_locked() is True


def test_remarks_name_what_spoils_a_measurement() -> None:
    quiet: dict[str, Any] = {
        "busy_cores": 0.1,
        "usable_cores": 2,
        "clocks_locked": True,
        "clocks_mhz": [3000, 3010],
        "stolen_percent": 0.0,
    }
    assert machine.remarks(quiet) == []
    loud = {**quiet, "busy_cores": 1.9, "stolen_percent": 3.2, "clocks_locked": False, "clock_range_mhz": [800, 3500]}
    loud |= {"governor": "powersave", "clocks_mhz": [1500, 3000]}
    assert machine.remarks(loud) == [
        "Machine busy before the measurement: 1.9 of 2 cores.",
        "The hypervisor took 3.2 % of the processor time during the measurement.",
        "Clocks unlocked (800 to 3500 MHz, governor powersave): latency moves with temperature and load.",
        "The clock moved between 1500 and 3000 MHz during the measurement.",
    ]
    assert machine.remarks({**quiet, "clocks_locked": None, "virtual": True}) == [
        "Clocks cannot be read or locked here (virtual machine)."
    ]


def test_a_watch_reports_what_was_stolen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[0] * 8, [50, 0, 0, 40, 0, 0, 0, 10]])
    monkeypatch.setattr(machine, "cpu_times", lambda: next(times))
    assert machine.Watch().facts()["stolen_percent"] == 10.0
