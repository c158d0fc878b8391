"""JSON file of a tuned schedule: the schedule, the conditions it was tuned for, and the measurements."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from .steps import TunedSteps

VERSION = 2
MOST_CALLS = 10_000
"""Most UNet calls of a generation that a schedule is tuned for."""

_TUNED_ROWS = ("tuned", "one cut only")
"""Prefixes of the names of report rows that have a tuned schedule."""

_EQUAL_SPEED = 0.98
"""Smallest share of the tuned speed-up that counts as equal. Fewer steps can only match a speed-up approximately."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TuningKey(_Frozen):
    """Conditions that a schedule was tuned for; the schedule is refused under other conditions."""

    weights: str = Field(description="digest of the UNet's weights")
    scheduler: str = Field(description="class of the scheduler in diffusers")
    settings: str = Field(description="SHA-256 of the scheduler's config")
    steps: int = Field(ge=1, le=MOST_CALLS)
    calls: int = Field(
        ge=1, le=MOST_CALLS, description="number of UNet calls, which some schedulers make more of than steps"
    )
    guidance: tuple[float, float] = Field(description="lowest and highest guidance scale")
    precision: str | None = Field(
        default=None, description="precision of the engine, if the predictions correct its error towards a reference"
    )


class ReportRow(_Frozen):
    """Row of the report: one schedule's images compared with uncached ones, on prompts and seeds unused by tuning."""

    name: str
    full_calls: int
    shallow_calls: int
    skipped_calls: int = Field(default=0, description="calls that ran no engine")
    speed_up: float = Field(description="speed-up of the UNet, from the engine's times")
    psnr: float = Field(description="mean PSNR of the images in dB")
    worst: float = Field(description="lowest PSNR of the images in dB")
    full: tuple[int, ...] = Field(default=(), description="indices of the full calls")


class TunedDocument(_Frozen):
    """Contents of the JSON file of a tuned schedule."""

    version: int = Field(default=VERSION, description="format; in version 1 corrections had fewer inputs")
    key: TuningKey
    cut: str = Field(description="cut of shallow calls that have no entry in cuts")
    cuts: tuple[str | None, ...] = Field(
        default=(), description="cut of each call: null for a full call, skip for a skipped one; empty if all use cut"
    )
    full: tuple[int, ...] = Field(description="indices of the full calls")
    predictors: tuple[str, ...] = Field(description="prediction of each call: full, reuse, forecast..., fit... or skip")
    corrected: tuple[int, ...] = Field(default=(), description="calls whose noise predictions are corrected")
    correction_guidance: float | None = Field(default=None, description="guidance scale that a correction assumes")
    engine: str = Field(description="engine that was timed")
    shallow_over_full: float = Field(description="time of a shallow call at cut, divided by a full call's")
    ratios: dict[str, float] = Field(default={}, description="shallow_over_full of each cut, if there are several")
    measured_ratios: dict[str, float] = Field(
        default={}, description="ratios measured on the tuning machine, by cut, if the user gave others"
    )
    reference: str | None = Field(default=None, description="engine and precision of the reference")
    samples: dict[str, int] = Field(description="number of images in the fit, selection and test sets")
    measured: tuple[ReportRow, ...]
    pareto: tuple[ReportRow, ...] = ()

    def fault(self) -> str | None:
        """Return what does not fit together in a document that was read; None if all does."""
        calls = self.key.calls
        if not self.full or self.full[0] != 0 or list(self.full) != sorted(set(self.full)) or self.full[-1] >= calls:
            return "its full calls are not in order, from 0 to the last call"
        if len(self.cuts) not in (0, calls) or len(self.predictors) != calls:
            return "it has no entry for each call"
        if not self.measured:
            return "it has no measurement"
        if not set(self.corrected) <= set(range(calls)):
            return "it corrects calls that a generation does not have"
        return None

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
    def used_cuts(self) -> tuple[str, ...]:
        """Cuts of the shallow calls, without repetition."""
        return tuple(dict.fromkeys(cut for cut in self.by_call if cut is not None))

    @property
    def better_untuned(self) -> ReportRow | None:
        """Untuned row of the same speed with the highest PSNR, if that exceeds the tuned schedule's; otherwise None."""
        tuned, *rows = self.measured
        rivals = [
            row
            for row in rows
            if not row.name.startswith(_TUNED_ROWS) and row.speed_up >= _EQUAL_SPEED * tuned.speed_up
        ]
        best = max(rivals, key=lambda row: row.psnr, default=tuned)
        return best if best.psnr > tuned.psnr else None
