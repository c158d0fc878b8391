"""What ``offcut bench latency`` measured: a row for each contestant, and the ratios between them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, computed_field

from ..stats import percentile

TIMES = ("loops", "full", "shallow", "full_alone", "shallow_alone", "forecast_alone")
"""The lists of times that a row has."""


class Contestant(BaseModel):
    """One row: an engine or a peer, with or without caching.

    Times are in seconds. ``loops`` are the denoising loops (scheduler, guidance and UNet calls; text encoder and VAE
    outside), one for each round. ``full`` and ``shallow`` are the engine's own calls inside those loops; ``full_alone``
    and ``shallow_alone`` are the same calls back to back, outside of the loops. ``forecast_alone`` is an upper bound of
    what a forecast adds to a full and a shallow call: to store the features of the full call, and to predict those of
    the shallow call with coefficients for each channel. The loops themselves make no forecast.
    """

    model_config = ConfigDict(extra="ignore")  # derived figures are in the file too

    name: str = Field(description="unique in a run, e.g. 'offcut openvino fp32' or 'diffusers eager bf16'")
    family: str = Field(description="'offcut' for ours, else the peer: diffusers, DeepCache, torch.compile, optimum...")
    engine: str = Field(description="what computes: pytorch, onnxruntime, openvino, inductor, tensorrt...")
    precision: str = Field(description="fp32, bf16..., as computed")
    caching: str | None = Field(
        default=None, description="the schedule and cut in words; None where every call is full"
    )
    settings: dict[str, str] = Field(default_factory=dict, description="fixed before the run, one entry each")
    not_run: str | None = Field(default=None, description="the exact reason, where it could not be measured")
    loops: list[float] = []
    full: list[float] = []
    shallow: list[float] = []
    full_alone: list[float] = []
    shallow_alone: list[float] = []
    forecast_alone: list[float] = []
    full_calls: int = Field(default=0, description="of one loop")
    shallow_calls: int = 0
    load_seconds: float | None = Field(default=None, description="to open it, before the first call")
    warm_up_seconds: float | None = Field(
        default=None, description="the calls that were not measured, compilation included"
    )
    host_peak_bytes: int | None = Field(default=None, description="largest resident memory of its process")
    device_peak_bytes: int | None = None
    size_bytes: int | None = Field(default=None, description="of what it reads from disk")
    difference: float | None = Field(
        default=None,
        description="of its final latents from Latency.reference's: the norm of the difference over the norm",
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loop(self) -> float | None:
        """Median seconds of a denoising loop."""
        return statistics.median(self.loops) if self.loops else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def wall_over_ideal(self) -> float | None:
        """The loop over the sum of its engine calls, medians inside the loop; 1 is the limit."""
        return self._over(self.full, self.shallow)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def wall_over_ideal_alone(self) -> float | None:
        """The same with the calls' times alone."""
        return self._over(self.full_alone, self.shallow_alone)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def forecast_over_shallow(self) -> float | None:
        """What a forecast adds to a shallow call, as a share of it; medians alone."""
        if not self.forecast_alone or not self.shallow_alone:
            return None
        return statistics.median(self.forecast_alone) / statistics.median(self.shallow_alone)

    def withdraw(self, reason: str) -> None:
        """It could not be measured after all: what was is no longer there."""
        self.not_run = reason
        for name in TIMES:
            getattr(self, name).clear()

    def cut_short(self, rounds: int) -> None:
        """Forget what was measured after so many rounds."""
        del self.loops[rounds:]
        del self.full[rounds * self.full_calls :]
        del self.shallow[rounds * self.shallow_calls :]

    def percentiles(self, percents: Sequence[float] = (50, 90, 99)) -> Mapping[float, float]:
        """Of the loops' seconds; empty where nothing was measured."""
        return {percent: percentile(self.loops, percent) for percent in percents} if self.loops else {}

    def ideal(self, full: Sequence[float], shallow: Sequence[float]) -> float | None:
        """``full_calls * t_full + shallow_calls * t_shallow`` with the medians of these; None where one is missing."""
        if not full or (self.shallow_calls and not shallow):
            return None
        cheap = self.shallow_calls * statistics.median(shallow) if self.shallow_calls else 0.0
        return self.full_calls * statistics.median(full) + cheap

    def _over(self, full: Sequence[float], shallow: Sequence[float]) -> float | None:
        ideal = self.ideal(full, shallow)
        return None if ideal is None or self.loop is None else self.loop / ideal


class Latency(BaseModel):
    """One interleaved run of several contestants on one model."""

    model_config = ConfigDict(extra="forbid")

    model: str
    steps: int
    height: int = Field(description="of the image, in pixels")
    width: int
    images_per_call: int = Field(description="or videos, where there are frames")
    frames: int | None = Field(default=None, description="of each video; None for images")
    guidance: float = Field(description="scale; of a video that of the last frame, and 1 of the first")
    scheduler: str
    rounds: int = Field(description="each round runs every contestant once, in turn")
    interrupted: bool = Field(default=False, description="there were to be more rounds")
    threads: int | None = None
    clock: str = Field(description="what was read, and what lies between its two readings")
    contestants: list[Contestant]
    reference: str | None = Field(default=None, description="the contestant whose latents the others' are held against")
    warm_up: int | None = Field(
        default=None, description="loops before the first measured one, cut short once all graphs ran"
    )
    idle_cpu_share: float | None = Field(
        default=None,
        description="of a core: the most that waiting processes used together during another's measured loop",
    )
    reopened: int | None = Field(
        default=None, description="how often a process was closed for want of memory, and came back"
    )

    work: dict[str, int] = Field(
        default_factory=dict,
        description="floating-point operations of a full and a shallow call: two for each multiply-add of "
        "convolutions, matrix products and attention",
    )
    products: dict[str, float] = Field(
        default_factory=dict,
        description="FLOP/s of PyTorch's product of two large matrices with the same threads, by precision, before the "
        "first round: about what the machine can do",
    )

    def rate(self, row: Contestant) -> float | None:
        """FLOP/s of a contestant's full calls in its loops; None where they were not counted or timed."""
        return self.work["full"] / statistics.median(row.full) if row.full and "full" in self.work else None

    def of_product(self, row: Contestant) -> float | None:
        """The same as a share of the matrix product's in that precision: 1 is about the limit."""
        rate, product = self.rate(row), self.products.get(row.precision)
        return rate / product if rate and product else None
