"""The JSON file of a tuned schedule: the schedule, its key, and the measurements."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from .steps import TunedSteps

VERSION = 2

_TUNED_ROWS = ("tuned", "one cut only")
"""Prefixes of the names of rows with a tuned schedule."""

_AS_FAST = 0.98
"""Share of the speed-up that counts as equal, since a smaller number of steps is a whole number."""


class TuningKey(BaseModel):
    """Conditions that a schedule was tuned for; it is refused for others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = Field(description="digest of the UNet's weights")
    scheduler: str = Field(description="class of the scheduler in diffusers")
    settings: str = Field(description="SHA-256 of the scheduler's config")
    steps: int
    calls: int = Field(description="UNet calls, which are more than the steps with some schedulers")
    guidance: tuple[float, float] = Field(description="range of guidance scales")
    precision: str | None = Field(
        default=None, description="precision of the engine whose own error the predictions correct; None if none do"
    )


class ReportRow(BaseModel):
    """One schedule in the report: images of prompts and seeds that tuning did not use, compared with uncached ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    full_calls: int
    shallow_calls: int
    skipped_calls: int = Field(default=0, description="calls that ran no engine")
    speed_up: float = Field(description="speed-up of the UNet's time, from the engine's own times")
    psnr: float = Field(description="mean PSNR of the images in dB")
    worst: float = Field(description="lowest PSNR of an image in dB")
    full: tuple[int, ...] = Field(default=(), description="indices of the full calls")


class TunedDocument(BaseModel):
    """Contents of the JSON file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(
        default=VERSION, description="2 since corrections see both halves of a guided noise prediction separately"
    )
    key: TuningKey
    cut: str = Field(description="cut of the shallow calls for which cuts has none")
    cuts: tuple[str | None, ...] = Field(
        default=(), description="cut of each call; null if full, skip if no engine runs; empty if all calls have cut"
    )
    full: tuple[int, ...] = Field(description="indices of the full calls")
    predictors: tuple[str, ...] = Field(description="prediction of each call: full, reuse, forecast..., fit... or skip")
    corrected: tuple[int, ...] = Field(default=(), description="calls whose noise predictions are corrected")
    correction_guidance: float | None = Field(default=None, description="guidance scale that a correction assumes")
    engine: str = Field(description="engine that was timed")
    shallow_over_full: float = Field(description="time of a shallow call at cut over a full call")
    ratios: dict[str, float] = Field(default={}, description="the same for each cut, if several were searched")
    measured_ratios: dict[str, float] = Field(
        default={}, description="ratios of the engine on the tuning machine, by cut, if the user gave others"
    )
    reference: str | None = Field(default=None, description="engine and precision at which the predictions aim")
    samples: dict[str, int] = Field(description="number of images to fit, to select and to test")
    measured: tuple[ReportRow, ...]
    pareto: tuple[ReportRow, ...] = ()

    @property
    def schedule(self) -> TunedSteps:
        """Schedule for the runtime.

        Raises:
            ScheduleError: the number of cuts is not the number of calls.
        """
        return TunedSteps(self.full, self.key.calls, self.cuts)

    @property
    def by_call(self) -> tuple[str | None, ...]:
        """Cut of each call; None for a full call."""
        schedule = self.schedule
        return tuple(None if call in self.full else schedule.cut_of(call) or self.cut for call in range(self.key.calls))

    @property
    def used(self) -> tuple[str, ...]:
        """Cuts of the shallow calls, without repetition."""
        return tuple(dict.fromkeys(cut for cut in self.by_call if cut is not None))

    @property
    def better_untuned(self) -> ReportRow | None:
        """The best row without tuning that is as fast as the tuned schedule and has a higher PSNR; None if none has."""
        tuned, *rows = self.measured
        rivals = [
            row for row in rows if not row.name.startswith(_TUNED_ROWS) and row.speed_up >= _AS_FAST * tuned.speed_up
        ]
        best = max(rivals, key=lambda row: row.psnr, default=tuned)
        return best if best.psnr > tuned.psnr else None
