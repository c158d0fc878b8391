"""What ``offcut bench growth`` measured: sweeps over one quantity each, builds of growing models, and power laws."""

from __future__ import annotations

import statistics
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

Axis = Literal["steps", "images", "pixels", "interval"]


class Fit(BaseModel):
    """A power law ``y = c * x ** exponent``, by least squares on the logarithms."""

    model_config = ConfigDict(extra="forbid")

    of: str = Field(description="what grows: loop, full call, shallow call, memory, export..., build...")
    exponent: float
    error: float | None = Field(description="standard error of the exponent; None with fewer than three points")
    points: int


class Point(BaseModel):
    """One setting, in a process of its own; seconds and bytes."""

    model_config = ConfigDict(extra="ignore")  # the derived figure is written beside the measured ones

    value: int = Field(description="of the sweep's quantity")
    loops: list[float] = Field(description="a denoising loop a round; see Latency.clock")
    full: list[float] = Field(description="full UNet calls in those loops")
    shallow: list[float]
    host_peak_bytes: int | None = None
    device_peak_bytes: int | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loop(self) -> float:
        return statistics.median(self.loops)


class Sweep(BaseModel):
    """One quantity varied, all others as in ``Growth.base``."""

    model_config = ConfigDict(extra="forbid")

    axis: Axis
    points: list[Point]
    fits: list[Fit]


class Made(BaseModel):
    """A command of offcut that ran on a model, in a process of its own."""

    model_config = ConfigDict(extra="forbid")

    model: str
    parameters: int = Field(description="of the UNet")
    command: Literal["export", "build"]
    seconds: float
    host_peak_bytes: int = Field(description="largest resident memory of the process; files it maps count")
    size_bytes: int = Field(description="of what it wrote")


class Growth(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="forbid")

    model: str
    contestant: str = Field(description="the bundle's engine and precision that ran, as offcut bench latency has it")
    base: dict[str, int | float | str] = Field(description="the setting that every sweep goes through")
    rounds: int
    clock: str
    sweeps: list[Sweep]
    drift: float | None = Field(description="the base's loop at the end of the run over that at its beginning")
    made: list[Made] = []
    made_with: str = Field(default="", description="engine and precision of the builds")
    made_fits: list[Fit] = []
    not_made: dict[str, str] = Field(default_factory=dict, description="model: the reason")
