"""Which of the tuned schedules there are fits what is about to be run, and why the others do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ScheduleError
from ..generation.schedule import SKIP
from .artifact import OUTDATED, Tuned
from .document import Key

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle


def key_of(
    bundle: Bundle, scheduler: Any, steps: int, guidance: tuple[float, float], precision: str | None = None
) -> Key:
    """The key of what is about to be run.

    Args:
        scheduler: of the pipeline; its timesteps are set.
        precision: of the engine, ``UNet.precision``.
    """
    return key_of_weights(bundle.manifest.source.weights_digest, scheduler, steps, guidance, precision)


def key_of_weights(
    weights: str, scheduler: Any, steps: int, guidance: tuple[float, float], precision: str | None = None
) -> Key:
    """The same where there is no bundle, but the digest of its weights."""
    scheduler.set_timesteps(steps)
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=repr)
    return Key(
        weights=weights,
        scheduler=type(scheduler).__name__,
        settings=hashlib.sha256(text.encode()).hexdigest(),
        steps=steps,
        calls=len(scheduler.timesteps),
        guidance=guidance,
        precision=precision,
    )


def refusal(tuned: Tuned, key: Key, cuts: Sequence[str] | None = None) -> str | None:
    """Why a schedule does not fit what is about to be run; None if it does.

    Args:
        cuts: of the engines that are to run it; None leaves that to ``set_schedule``.
    """
    made = tuned.document.key
    if tuned.outdated:
        return f"it {OUTDATED}"
    if made.weights != key.weights:
        return "it was tuned for other weights"
    if made.precision is not None and made.precision != key.precision:
        return f"it corrects the error of {made.precision}, and this engine is in {key.precision or 'another'}"
    if made.scheduler != key.scheduler:
        return f"it was tuned for {made.scheduler}, not {key.scheduler}"
    if made.settings != key.settings:
        return f"it was tuned for another configuration of {made.scheduler}"
    if (made.steps, made.calls) != (key.steps, key.calls):
        return f"it was tuned for {made.steps} steps, not {key.steps}"
    low, high = made.guidance
    if not (low <= key.guidance[0] and key.guidance[1] <= high):
        return f"it was tuned for guidance {low:g} to {high:g}, not {key.guidance[0]:g}"
    missing = [] if cuts is None else [cut for cut in tuned.document.used if cut not in (SKIP, *cuts)]
    if missing:
        return f"it needs {', '.join(missing)}, and these engines have {', '.join(cuts or ())}"
    return None


def tuned_name(schedule: str | None) -> str | None:
    """The name in ``tuned:NAME``, an empty one for ``auto``; None for any other schedule."""
    if schedule == "auto":
        return ""
    return schedule.partition(":")[2] if schedule is not None and schedule.startswith("tuned:") else None


def choose(bundle: Bundle, key: Key, name: str | None = None, cuts: Sequence[str] | None = None) -> Tuned:
    """The schedule to use: the one named, or of those that fit the one with the best images.

    Args:
        cuts: as for ``refusal``.

    Raises:
        ScheduleError: none fits; the message has the reason for each.
    """
    names = list(bundle.manifest.schedules) if name is None else [name]
    return best([Tuned.load(bundle, each) for each in names], key, str(bundle.path), cuts)


def best(tuned: Sequence[Tuned], key: Key, where: str, cuts: Sequence[str] | None = None) -> Tuned:
    """Of those that fit the one with the best images.

    Args:
        where: they come from, in words.
        cuts: as for ``refusal``.

    Raises:
        ScheduleError: none fits; the message has the reason for each.
    """
    reasons = {each.name: refusal(each, key, cuts) for each in tuned}
    fitting = [each for each in tuned if reasons[each.name] is None]
    if not fitting:
        why = "; ".join(f"{each}: {reason}" for each, reason in reasons.items()) or "it has none"
        raise ScheduleError(f"no schedule of {where} fits ({why}): make one with offcut tune, or set an interval")
    return max(fitting, key=lambda each: each.document.measured[0].psnr)
