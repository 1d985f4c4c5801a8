"""What a report says of the machine that measured, and what all models of a report have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Interval = Annotated[tuple[float, float], Field(description="Lower and upper bound of a 95 % interval.")]


# The packages that run artifacts.
RUNTIMES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "openvino", "tensorrt", "tensorrt_rtx"),
    *("ai-edge-litert", "executorch", "ncnn"),
)


class Model(BaseModel):
    """What all of these have in common: nothing changes after it was made, and no key is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, serialize_by_alias=True)


class Gpu(Model):
    """One NVIDIA GPU as nvidia-smi describes it before the measurement."""

    name: str
    driver: str
    memory_mib: float | None = None
    clock_mhz: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    busy_percent: float | None = None


class Machine(Model):
    """The machine before the measurement, and from clocks_mhz on, what was seen of it meanwhile."""

    cpu: str
    cores: int | None
    usable_cores: int = Field(description="Cores that the process may use.")
    busy_cores: float | None = Field(None, description="How many cores were at work before the measurement.")
    load_average: list[float] | None = None
    governor: str | None = Field(None, description="The rule by which Linux chooses the clock.")
    clock_range_mhz: Interval | None = Field(None, description="Lowest and highest clock that may be chosen.")
    clocks_locked: bool | None = None
    temperature_c: float | None = None
    power_mode: str | None = Field(None, description="A Jetson's power mode.")
    memory_gib: float | None = None
    os: str
    kernel: str
    architecture: str
    virtual: bool
    python: str
    versions: dict[str, str] = Field(description="Installed runtimes.")
    gpus: list[Gpu] = []
    clocks_mhz: list[int] = Field([], description="Mean clock over the cores, before each round.")
    temperatures_c: list[float] = Field([], description="Hottest sensor, before each round.")
    stolen_percent: float | None = Field(None, description="Processor time that the hypervisor took.")
    throttling: list[str] = Field([], description="Why the device held itself back, in words.")
