"""Result of ``offcut bench latency``, with a row for each contestant."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, computed_field

from ..stats import percentile

TIMES = ("loops", "full", "shallow", "full_alone", "shallow_alone", "forecast_alone")
"""Names of the lists of times in a row."""


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
    family: str = Field(description="'offcut', or the peer: diffusers, DeepCache, torch.compile, optimum...")
    engine: str = Field(description="engine that computes: pytorch, onnxruntime, openvino, inductor, tensorrt...")
    precision: str = Field(description="precision of the computation: fp32, bf16...")
    caching: str | None = Field(default=None, description="schedule and cut as text; None where every call is full")
    settings: dict[str, str] = Field(default_factory=dict, description="settings that were fixed before the run")
    not_run: str | None = Field(default=None, description="why the contestant could not be measured; None if it was")
    loops: list[float] = []
    full: list[float] = []
    shallow: list[float] = []
    full_alone: list[float] = []
    shallow_alone: list[float] = []
    forecast_alone: list[float] = []
    full_calls: int = Field(default=0, description="full calls in one loop")
    shallow_calls: int = 0
    load_seconds: float | None = Field(
        default=None, description="seconds to open the contestant, before its first call"
    )
    warm_up_seconds: float | None = Field(
        default=None, description="seconds of the calls before the first measured loop, with compilation"
    )
    host_peak_bytes: int | None = Field(default=None, description="largest resident memory of the process")
    device_peak_bytes: int | None = None
    size_bytes: int | None = Field(default=None, description="size of the files that the contestant reads")
    difference: float | None = Field(
        default=None,
        description="difference between the final latents and those of Latency.reference, relative to their norm",
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loop(self) -> float | None:
        """Median seconds of a denoising loop."""
        return statistics.median(self.loops) if self.loops else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def wall_over_ideal(self) -> float | None:
        """Ratio of the loop to the sum of its engine calls, by medians inside the loop; 1 is the limit."""
        return self._over(self.full, self.shallow)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def wall_over_ideal_alone(self) -> float | None:
        """The same ratio with the times of the calls back to back."""
        return self._over(self.full_alone, self.shallow_alone)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def forecast_over_shallow(self) -> float | None:
        """Time of a forecast as a share of a shallow call, by medians of the calls back to back."""
        if not self.forecast_alone or not self.shallow_alone:
            return None
        return statistics.median(self.forecast_alone) / statistics.median(self.shallow_alone)

    def withdraw(self, reason: str) -> None:
        """Delete all times and record the reason why the contestant could not be measured."""
        self.not_run = reason
        for name in TIMES:
            getattr(self, name).clear()

    def cut_short(self, rounds: int) -> None:
        """Delete the times after this number of rounds."""
        del self.loops[rounds:]
        del self.full[rounds * self.full_calls :]
        del self.shallow[rounds * self.shallow_calls :]

    def percentiles(self, percents: Sequence[float] = (50, 90, 99)) -> Mapping[float, float]:
        """Return these percentiles of the loops' seconds; empty where nothing was measured."""
        return {percent: percentile(self.loops, percent) for percent in percents} if self.loops else {}

    def ideal(self, full: Sequence[float], shallow: Sequence[float]) -> float | None:
        """Return ``full_calls * t_full + shallow_calls * t_shallow`` by these times' medians; None without times."""
        if not full or (self.shallow_calls and not shallow):
            return None
        shallow_seconds = self.shallow_calls * statistics.median(shallow) if self.shallow_calls else 0.0
        return self.full_calls * statistics.median(full) + shallow_seconds

    def _over(self, full: Sequence[float], shallow: Sequence[float]) -> float | None:
        ideal = self.ideal(full, shallow)
        return None if ideal is None or self.loop is None else self.loop / ideal


class Latency(BaseModel):
    """The result of a run, in which several contestants with one model took turns."""

    model_config = ConfigDict(extra="forbid")

    model: str
    steps: int
    height: int = Field(description="image height in pixels")
    width: int
    images_per_call: int = Field(description="images in one pipeline call, or videos")
    frames: int | None = Field(default=None, description="frames of each video; None for images")
    guidance: float = Field(description="guidance scale; for a video that of the last frame, while the first has 1")
    scheduler: str
    rounds: int = Field(description="rounds, each of which runs every contestant once")
    interrupted: bool = Field(default=False, description="whether an interrupt ended the run early")
    threads: int | None = None
    clock: str = Field(description="the clock, and the work between its two readings")
    contestants: list[Contestant]
    reference: str | None = Field(default=None, description="contestant with whose latents the others are compared")
    warm_up: int | None = Field(
        default=None, description="loops before the first measured one, each ended once all graphs had run"
    )
    idle_cpu_share: float | None = Field(
        default=None,
        description="largest share of a core that all waiting processes used during a measured loop",
    )
    reopened: int | None = Field(
        default=None, description="how often a process was opened again after it was closed for lack of memory"
    )

    work: dict[str, int] = Field(
        default_factory=dict,
        description="floating-point operations of a full and a shallow call: two for each multiply-add of "
        "convolutions, matrix products and attention",
    )
    products: dict[str, float] = Field(
        default_factory=dict,
        description="FLOP/s of PyTorch's product of two large matrices with the same threads, by precision, before the "
        "first round; about the limit of the machine",
    )

    def rate(self, row: Contestant) -> float | None:
        """Return the FLOP/s of a contestant's full calls in its loops; None if they were not counted or timed."""
        return self.work["full"] / statistics.median(row.full) if row.full and "full" in self.work else None

    def of_product(self, row: Contestant) -> float | None:
        """Return a contestant's FLOP/s divided by those of a large matrix product in its precision; None if unknown."""
        rate, product = self.rate(row), self.products.get(row.precision)
        return rate / product if rate and product else None
