"""Which calls of a request are shallow, where they are cut, and how their features are predicted."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import LimitError, ScheduleError, UserError
from ..generation.forecast import Extrapolate, Forecast
from ..generation.schedule import Schedule, Uniform, parse
from ..tuning.choice import tuned_name
from .model import Model
from .schemas import GenerationRequest
from .settings import Settings


@dataclass(frozen=True)
class Caching:
    """As a worker takes it.

    Attributes:
        schedule: None if every call is full.
        named: the same in words, for the reply.
        cut: of shallow calls to which the schedule gives none of their own; None for the model's first.
        forecast: None reuses features as they are.
    """

    schedule: Schedule | None
    named: str | None
    cut: str | None
    forecast: Forecast | None


def caching(body: GenerationRequest, served: Model, settings: Settings, steps: int, guidance: float) -> Caching:
    """What a request asks for, or the server's own.

    Raises:
        LimitError: it does not fit the request or the model; the message has the reason.
    """
    try:
        calls = served.calls(steps)
    except UserError as error:
        raise LimitError("num_inference_steps", str(error)) from error
    text = body.schedule
    if text is None and body.interval is None and served.cuts:
        text = settings.schedule
    if text is not None and (name := tuned_name(text)) is not None:
        return _tuned(body, served, name, steps, guidance)
    field = "schedule" if text is not None else "interval"
    try:
        made = _plain(body, served, settings, text)
        if made is not None:
            made.full_calls(calls)
    except ScheduleError as error:
        raise LimitError(field, str(error)) from error
    try:
        served.check_cut(body.cut, made is not None)
    except UserError as error:
        raise LimitError("cut" if body.cut is not None else field, str(error)) from error
    if body.forecast and made is None:
        raise LimitError("forecast", "every call of this request is full, so nothing is forecast: leave forecast out")
    damping = settings.forecast if body.forecast is None else body.forecast
    forecast = Extrapolate(damping) if damping and made is not None else None
    return Caching(made, None if made is None else str(made), body.cut, forecast)


def _plain(body: GenerationRequest, served: Model, settings: Settings, text: str | None) -> Schedule | None:
    if text is not None:
        return parse(text, warmup=body.warmup)
    interval = body.interval or (settings.interval if served.cuts else 1)
    warmup = settings.warmup if body.warmup is None else body.warmup
    return Uniform(interval, warmup=warmup) if interval > 1 else None


def _tuned(body: GenerationRequest, served: Model, name: str, steps: int, guidance: float) -> Caching:
    own = {"warmup": body.warmup, "cut": body.cut, "forecast": body.forecast}
    for field, value in own.items():
        if value is not None:
            raise LimitError(field, f"a tuned schedule has a {field} of its own: leave it out, or give an interval")
    try:
        tuned = served.tuned_for(name or None, steps, guidance)
    except ScheduleError as error:
        raise LimitError("schedule", str(error)) from error
    try:
        for cut in tuned.document.used:
            served.check_cut(cut, wanted=True)
    except UserError as error:
        raise LimitError("schedule", f"the schedule {tuned.name} does not fit: {error}") from error
    return Caching(tuned.schedule, f"tuned:{tuned.name}", tuned.document.cut, tuned.forecast)
