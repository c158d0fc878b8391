"""What ``offcut tune`` leaves in a bundle: a schedule with its coefficients, and for what they were made.

schedules/<name>.json           the schedule, its key, and what was measured
schedules/<name>.safetensors    <call>.<feature>.scale, .slope and .shift: [channels], or [1] where one serves all;
                                <call>.correction.weight: [channels, inputs, size, size], .bias: [channels]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import BundleError, ScheduleError
from ..correction import Convolutions, Correction, Kernel
from ..forecast import Coefficients, Forecast
from ..schedule import Schedule

if TYPE_CHECKING:
    from ...engines.bundle import Bundle
    from ..stand_in import StandIn

VERSION = 2

_NAMES = ("scale", "slope", "shift")
_CORRECTION = "correction"
_OUTDATED = "was tuned by an earlier version of offcut, whose corrections saw less: tune it again"


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
    def used(self) -> tuple[str, ...]:
        """The cuts of its shallow calls, each once."""
        return tuple(dict.fromkeys(cut for cut in self.by_call if cut is not None))


@dataclass(frozen=True, repr=False)
class TunedSteps(Schedule):
    """Full calls that were chosen for a number of calls, and hold for no other.

    Attributes:
        full: their indices, 0 first.
        total: the number of calls.
        by_call: for each call its cut if it is shallow, None for the one that the schedule is set with; empty if all
            take that.

    Raises:
        ScheduleError: it has cuts for another number of calls.
    """

    full: tuple[int, ...]
    total: int
    by_call: tuple[str | None, ...] = ()
    kind: ClassVar[str] = "tuned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_call and len(self.by_call) != self.total:
            raise ScheduleError(f"{len(self.by_call)} cuts cannot serve {self.total} UNet calls: give one for each")

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
                f"this schedule was tuned for {self.total} UNet calls, and the generation has {calls}: tune for that, "
                "or set another schedule"
            )
        return max(each for each in self.full if each <= call)


@dataclass(frozen=True)
class Fitted(Forecast):
    """Coefficients for each call of one schedule.

    Attributes:
        coefficients: by call and feature; a call without reuses.
        full: the schedule's full calls, which the coefficients rely on.
        correction: of the answers.
    """

    coefficients: Mapping[int, Mapping[str, Coefficients]]
    full: tuple[int, ...]
    correction: Correction | None = None

    def __str__(self) -> str:
        return "tuned"

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        earlier = [each for each in self.full if each < call]
        if earlier[-1:] != [last] or (len(earlier) > 1 and earlier[-2] != before):
            return None  # a full call that the schedule did not ask for: other shapes, or features that were dropped
        return self.coefficients.get(call, {}).get(feature)


@dataclass(frozen=True)
class Tuned:
    """A schedule that was found for one model, sampler, number of steps and guidance.

    Attributes:
        name: of its files.
        document: all but the coefficients.
        coefficients: by call and feature.
        correction: of the answers; None for none.
    """

    name: str
    document: Document
    coefficients: Mapping[int, Mapping[str, Coefficients]] = field(repr=False)
    correction: Convolutions | None = field(default=None, repr=False)

    @classmethod
    def load(cls, bundle: str | Path | Bundle, name: str) -> Tuned:
        """A schedule of a bundle.

        Raises:
            ScheduleError: there is none of this name.
            BundleError: its files are damaged.
        """
        from safetensors.torch import load_file

        from ...engines.bundle import Bundle

        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        there = opened.manifest.schedules
        if name not in there:
            raise ScheduleError(
                f"{opened.path} has no schedule {name}; it has {', '.join(there) or 'none'}: make one with offcut tune"
            )
        entry = there[name]
        opened.verify_files(entry.files)
        try:
            document = Document.model_validate_json((opened.path / entry.document).read_bytes())
        except ValidationError as error:
            raise BundleError(f"{opened.path / entry.document} is damaged: {error.errors()[0]['msg']}") from error
        found: dict[int, dict[str, dict[str, Any]]] = {}
        kernels: dict[int, dict[str, Any]] = {}
        for key, tensor in load_file(opened.path / entry.coefficients).items():
            call, feature, which = key.split(".")
            if feature == _CORRECTION:
                kernels.setdefault(int(call), {})[which] = tensor
                continue
            value = float(tensor[0]) if len(tensor) == 1 else tensor
            found.setdefault(int(call), {}).setdefault(feature, {})[which] = value
        coefficients = {
            call: {feature: Coefficients(**values) for feature, values in features.items()}
            for call, features in found.items()
        }
        correction = None
        if kernels:
            by_call = {call: Kernel(**tensors) for call, tensors in kernels.items()}
            correction = Convolutions(by_call, document.full, document.correction_guidance)
        return cls(name, document, coefficients, correction)

    def with_correction(self, correction: Convolutions) -> Tuned:
        """The same, and answers are corrected."""
        calls = tuple(sorted(correction.kernels))
        said = {"corrected": calls, "correction_guidance": correction.guidance}
        return replace(self, document=self.document.model_copy(update=said), correction=correction)

    def without_correction(self) -> Tuned:
        """The same, and answers are not corrected."""
        said = {"corrected": (), "correction_guidance": None}
        return replace(self, document=self.document.model_copy(update=said), correction=None)

    @property
    def outdated(self) -> bool:
        """Whether its correction was fitted to other inputs than corrections have now."""
        return bool(self.document.corrected) and self.document.version != VERSION

    @property
    def schedule(self) -> TunedSteps:
        return self.document.schedule

    @property
    def forecast(self) -> Forecast | None:
        if not self.coefficients and self.correction is None:
            return None
        return Fitted(self.coefficients, self.document.full, self.correction)

    def apply(self, unet: StandIn) -> None:
        """Set it from the next generation on; see ``set_schedule`` for what it raises.

        Raises:
            ScheduleError: an earlier version of offcut fitted its correction to other inputs.
        """
        if self.outdated:
            raise ScheduleError(f"{self.name} {_OUTDATED}")
        unet.set_schedule(self.schedule, self.document.cut, self.forecast)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The coefficients and the correction as the file has them, fp32."""
        tensors = {
            f"{call}.{feature}.{name}": torch.as_tensor(getattr(made, name), dtype=torch.float32).reshape(-1).cpu()
            for call, features in self.coefficients.items()
            for feature, made in features.items()
            for name in _NAMES
        }
        for call, kernel in ({} if self.correction is None else self.correction.kernels).items():
            tensors |= {f"{call}.{_CORRECTION}.weight": kernel.weight, f"{call}.{_CORRECTION}.bias": kernel.bias}
        return tensors


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


def refusal(tuned: Tuned, key: Key) -> str | None:
    """Why a schedule does not fit what is about to be run; None if it does."""
    made = tuned.document.key
    if tuned.outdated:
        return f"it {_OUTDATED}"
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
    return None


def tuned_name(schedule: str | None) -> str | None:
    """The name in ``tuned:NAME``, an empty one for ``auto``; None for any other schedule."""
    if schedule == "auto":
        return ""
    return schedule.partition(":")[2] if schedule is not None and schedule.startswith("tuned:") else None


def choose(bundle: Bundle, key: Key, name: str | None = None) -> Tuned:
    """The schedule to use: the one named, or of those that fit the one with the best images.

    Raises:
        ScheduleError: none fits; the message has the reason for each.
    """
    names = list(bundle.manifest.schedules) if name is None else [name]
    return best([Tuned.load(bundle, each) for each in names], key, str(bundle.path))


def best(tuned: Sequence[Tuned], key: Key, where: str) -> Tuned:
    """Of those that fit the one with the best images.

    Args:
        where: they come from, in words.

    Raises:
        ScheduleError: none fits; the message has the reason for each.
    """
    reasons = {each.name: refusal(each, key) for each in tuned}
    fitting = [each for each in tuned if reasons[each.name] is None]
    if not fitting:
        why = "; ".join(f"{each}: {reason}" for each, reason in reasons.items()) or "it has none"
        raise ScheduleError(f"no schedule of {where} fits ({why}): make one with offcut tune, or set an interval")
    return max(fitting, key=lambda each: each.document.measured[0].psnr)


def save(bundle: Bundle, tuned: Tuned) -> None:
    """Add a schedule to a bundle, in the place of one of its name.

    Raises:
        BundleError: the bundle cannot be written; what is in it is unchanged.
    """
    from safetensors.torch import save as to_bytes

    from ...engines.manifest import FileEntry, Manifest, ScheduleEntry
    from ...engines.store import commit, staging

    text, tensors = (tuned.document.model_dump_json(indent=1) + "\n").encode(), to_bytes(tuned.tensors())
    # Files never change once written: another schedule of the same name has other ones.
    digest = hashlib.sha256(text + tensors).hexdigest()[:12]
    entry = ScheduleEntry(
        document=f"schedules/{tuned.name}-{digest}.json", coefficients=f"schedules/{tuned.name}-{digest}.safetensors"
    )

    def update(current: Manifest | None, entries: dict[str, FileEntry]) -> Manifest:
        assert current is not None
        gone = current.schedules.get(tuned.name)
        dropped = () if gone is None or gone == entry else gone.files
        files = {name: each for name, each in current.files.items() if name not in dropped} | entries
        return current.model_copy(update={"schedules": {**current.schedules, tuned.name: entry}, "files": files})

    with staging(bundle.path) as folder:
        (folder / "schedules").mkdir()
        (folder / entry.document).write_bytes(text)
        (folder / entry.coefficients).write_bytes(tensors)
        commit(bundle.path, folder, update)
