"""Schedule and forecast that a tuned schedule sets at runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...errors import ScheduleError
from ..generation.correction import Correction
from ..generation.forecast import Coefficients, Forecast
from ..generation.schedule import Schedule


@dataclass(frozen=True, repr=False)
class TunedSteps(Schedule):
    """Schedule with full calls and cuts for one number of calls; it raises an error for other numbers.

    Attributes:
        full: indices of the full calls, 0 first.
        total: number of calls.
        by_call: cut of each call if it is shallow; None for the cut given to ``set_schedule``. Empty if all shallow
            calls have that cut.

    Raises:
        ScheduleError: the number of cuts is not the number of calls.
    """

    full: tuple[int, ...]
    total: int
    by_call: tuple[str | None, ...] = ()
    kind: ClassVar[str] = "tuned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_call and len(self.by_call) != self.total:
            raise ScheduleError(f"{len(self.by_call)} cuts were given for {self.total} UNet calls: give one for each")

    @property
    def needs_calls(self) -> bool:
        return True

    @property
    def cuts(self) -> tuple[str | None, ...]:
        return tuple(dict.fromkeys(self.cut_of(call) for call in range(self.total) if call not in self.full))

    def cut_of(self, call: int) -> str | None:
        return self.by_call[call] if call < len(self.by_call) else None

    def _last_on_grid(self, call: int, calls: int | None) -> int:
        if calls != self.total:
            raise ScheduleError(
                f"this schedule was tuned for {self.total} UNet calls, and the generation has {calls}: tune for "
                "this number, or set another schedule"
            )
        return max(full for full in self.full if full <= call)


@dataclass(frozen=True)
class FittedForecast(Forecast):
    """Forecast with fitted coefficients for each call of one schedule.

    Attributes:
        coefficients: coefficients by call and feature; calls without coefficients reuse the features.
        full: full calls of the schedule that the coefficients were fitted for.
        correction: correction of the noise predictions; None if they are not corrected.
    """

    coefficients: Mapping[int, Mapping[str, Coefficients]]
    full: tuple[int, ...]
    correction: Correction | None = None

    def __str__(self) -> str:
        return "tuned"

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        earlier = [full for full in self.full if full < call]
        if earlier[-1:] != [last] or (len(earlier) > 1 and earlier[-2] != before):
            return None  # there was an unplanned full call, after other shapes or dropped features
        return self.coefficients.get(call, {}).get(feature)
