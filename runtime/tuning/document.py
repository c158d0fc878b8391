"""The JSON file of a tuned schedule: the schedule, what it was made for, and what was measured."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from .steps import TunedSteps

VERSION = 2

_OURS = ("tuned", "one cut only")
"""How the names of rows begin that are of what tuning found, or would have with less to choose from."""

_AS_FAST = 0.98
"""Fewer steps are a whole number of them, and so not quite as fast at times."""


class Key(BaseModel):
    """For what a schedule was made; it is refused for anything else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = Field(description="digest of the UNet's weights")
    scheduler: str = Field(description="its class in diffusers")
    settings: str = Field(description="SHA-256 of the scheduler's config")
    steps: int
    calls: int = Field(description="of the UNet, which some schedulers make more of than steps")
    guidance: tuple[float, float] = Field(description="the range of scales")
    precision: str | None = Field(
        default=None, description="of the engine whose own error the predictions correct; None if they correct none"
    )


class Measured(BaseModel):
    """A row of the report: images of prompts and seeds that had no part in the tuning, against uncached ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    full_calls: int
    shallow_calls: int
    skipped_calls: int = Field(default=0, description="that ran no engine")
    speed_up: float = Field(description="of the UNet's time, by the engine's own times")
    psnr: float = Field(description="mean over the images, in dB")
    worst: float
    full: tuple[int, ...] = Field(default=(), description="the full calls")


class Document(BaseModel):
    """The JSON file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(default=VERSION, description="2 since corrections see both halves of a guided answer apart")
    key: Key
    cut: str = Field(description="of shallow calls for which cuts has none")
    cuts: tuple[str | None, ...] = Field(
        default=(), description="of each call, none if full and skip if no engine runs; empty if all have cut"
    )
    full: tuple[int, ...] = Field(description="the full calls")
    predictors: tuple[str, ...] = Field(description="of each call: full, reuse, forecast..., fit... or skip")
    corrected: tuple[int, ...] = Field(default=(), description="the calls whose answers are corrected")
    correction_guidance: float | None = Field(default=None, description="scale that a correction reckons with")
    engine: str = Field(description="that the times are of")
    shallow_over_full: float = Field(description="time of a shallow call at cut")
    ratios: dict[str, float] = Field(default={}, description="the same of every cut that was searched, if several were")
    measured_ratios: dict[str, float] = Field(
        default={}, description="the engine's own where it was tuned, by cut, if others were given to tune for"
    )
    reference: str | None = Field(default=None, description="engine and precision that the predictions aim at")
    samples: dict[str, int] = Field(description="images to fit, to select and to test")
    measured: tuple[Measured, ...]
    pareto: tuple[Measured, ...] = ()

    @property
    def schedule(self) -> TunedSteps:
        """What the runtime takes.

        Raises:
            ScheduleError: it has cuts for another number of calls than its own.
        """
        return TunedSteps(self.full, self.key.calls, self.cuts)

    @property
    def by_call(self) -> tuple[str | None, ...]:
        """The cut of each call; None for full ones."""
        schedule = self.schedule
        return tuple(None if call in self.full else schedule.cut_of(call) or self.cut for call in range(self.key.calls))

    @property
    def nearer(self) -> Measured | None:
        """The nearest of the ways that need no tuning and are as fast, if it is nearer than what was found."""
        ours, *rows = self.measured
        plain = [row for row in rows if not row.name.startswith(_OURS) and row.speed_up >= _AS_FAST * ours.speed_up]
        best = max(plain, key=lambda row: row.psnr, default=ours)
        return best if best.psnr > ours.psnr else None

    @property
    def used(self) -> tuple[str, ...]:
        """The cuts of its shallow calls, each once."""
        return tuple(dict.fromkeys(cut for cut in self.by_call if cut is not None))
