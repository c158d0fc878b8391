"""A tuned schedule: its files in a bundle, and the choice of a schedule that fits the conditions of a generation.

schedules/<name>.json           the schedule, its tuning key and the measurements
schedules/<name>.safetensors    <call>.<feature>.scale, .slope and .shift: [channels], or [1] for one value for all;
                                <call>.correction.weight: [channels, inputs, size, size], .bias: [channels]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ScheduleError
from ..generation.correction import Convolutions
from ..generation.forecast import Coefficients, Forecast
from ..generation.schedule import SKIP
from .document import VERSION, TunedDocument, TuningKey
from .steps import FittedForecast, TunedSteps
from .tuned_files import CORRECTION, NAMES, read_coefficients, read_document

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle
    from ..base_unet import BaseUNet

_OUTDATED = "was tuned by an earlier version of offcut, whose corrections have fewer inputs: tune it again"


@dataclass(frozen=True)
class Tuned:
    """A schedule tuned for one model, sampler, number of steps and range of guidance.

    Attributes:
        name: name of the schedule and of its files.
        document: contents of the JSON file.
        coefficients: coefficients of the predictions, by call and feature.
        correction: correction of the noise predictions; None if they are not corrected.
    """

    name: str
    document: TunedDocument
    coefficients: Mapping[int, Mapping[str, Coefficients]] = field(repr=False)
    correction: Convolutions | None = field(default=None, repr=False)

    @classmethod
    def load(cls, bundle: str | Path | Bundle, name: str) -> Tuned:
        """Load a schedule from a bundle.

        Raises:
            ScheduleError: the bundle has no schedule of this name.
            BundleError: the files are damaged.
        """
        from ...engines.bundle.bundle import Bundle

        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        schedules = opened.manifest.schedules
        if name not in schedules:
            names = ", ".join(schedules) or "none"
            raise ScheduleError(f"{opened.path} has no schedule {name}; it has {names}: add one with offcut tune")
        entry = schedules[name]
        opened.verify_files(entry.files)
        document = read_document(opened.path / entry.document)
        cached = [
            tensor for variant in opened.manifest.variants.values() for cut in variant.cuts for tensor in cut.cached
        ]
        channels = {tensor.name: size if isinstance(size := tensor.shape[1], int) else None for tensor in cached}
        coefficients, kernels = read_coefficients(opened.path / entry.coefficients, document, channels)
        correction = None
        if kernels:
            correction = Convolutions(kernels, document.full, document.correction_guidance)
        return cls(name, document, coefficients, correction)

    def with_correction(self, correction: Convolutions) -> Tuned:
        """Return the same schedule with this correction of the noise predictions."""
        calls = tuple(sorted(correction.kernels))
        update = {"corrected": calls, "correction_guidance": correction.guidance}
        return replace(self, document=self.document.model_copy(update=update), correction=correction)

    def without_correction(self) -> Tuned:
        """Return the same schedule without a correction of the noise predictions."""
        if self.correction is None:
            return self
        update = {"corrected": (), "correction_guidance": None}
        return replace(self, document=self.document.model_copy(update=update), correction=None)

    @property
    def outdated(self) -> bool:
        """Whether the correction was fitted by an earlier version, to other inputs than corrections have now."""
        return bool(self.document.corrected) and self.document.version != VERSION

    @property
    def schedule(self) -> TunedSteps:
        return self.document.schedule

    @property
    def forecast(self) -> Forecast | None:
        if not self.coefficients and self.correction is None:
            return None
        return FittedForecast(self.coefficients, self.document.full, self.correction)

    def apply(self, unet: BaseUNet) -> None:
        """Set the schedule of a UNet from the next generation on; raises the errors of ``set_schedule``, too.

        Raises:
            ScheduleError: an earlier version of offcut fitted the correction to other inputs.
        """
        if self.outdated:
            raise ScheduleError(f"{self.name} {_OUTDATED}")
        unet.set_schedule(self.schedule, self.document.cut, self.forecast)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the contents of the safetensors file: coefficients and correction, fp32."""
        tensors = {
            f"{call}.{feature}.{name}": torch.as_tensor(getattr(value, name), dtype=torch.float32).reshape(-1).cpu()
            for call, features in self.coefficients.items()
            for feature, value in features.items()
            for name in NAMES
        }
        for call, kernel in ({} if self.correction is None else self.correction.kernels).items():
            tensors |= {f"{call}.{CORRECTION}.weight": kernel.weight, f"{call}.{CORRECTION}.bias": kernel.bias}
        return tensors


def save(bundle: Bundle, tuned: Tuned) -> None:
    """Add a schedule to a bundle; it replaces a schedule of the same name.

    Raises:
        BundleError: the bundle cannot be written; its contents are unchanged.
    """
    from safetensors.torch import save as to_bytes

    from ...engines.bundle.manifest import FileEntry, Manifest, ScheduleEntry
    from ...engines.bundle.store import commit, staging

    text, tensors = (tuned.document.model_dump_json(indent=1) + "\n").encode(), to_bytes(tuned.tensors())
    # Files in a bundle never change, so a new schedule of the same name needs new file names.
    digest = hashlib.sha256(text + tensors).hexdigest()[:12]
    entry = ScheduleEntry(
        document=f"schedules/{tuned.name}-{digest}.json", coefficients=f"schedules/{tuned.name}-{digest}.safetensors"
    )

    def update(current: Manifest | None, entries: dict[str, FileEntry]) -> Manifest:
        assert current is not None
        replaced = current.schedules.get(tuned.name)
        dropped = () if replaced is None or replaced == entry else replaced.files
        files = {name: file for name, file in current.files.items() if name not in dropped} | entries
        return current.model_copy(update={"schedules": {**current.schedules, tuned.name: entry}, "files": files})

    with staging(bundle.path) as folder:
        (folder / "schedules").mkdir()
        (folder / entry.document).write_bytes(text)
        (folder / entry.coefficients).write_bytes(tensors)
        commit(bundle.path, folder, update)


def tuned_name(schedule: str | None) -> str | None:
    """Return NAME of the text ``tuned:NAME``, an empty name for ``auto``, and None for other schedules."""
    if schedule == "auto":
        return ""
    return schedule.partition(":")[2] if schedule is not None and schedule.startswith("tuned:") else None


def make_key(
    weights: Bundle | str, scheduler: Any, steps: int, guidance: tuple[float, float], precision: str | None = None
) -> TuningKey:
    """Return the key of a generation's conditions.

    Args:
        weights: the bundle, or the digest of its weights.
        scheduler: scheduler of the pipeline; this function sets its timesteps.
        steps: number of scheduler steps.
        guidance: lowest and highest guidance scale.
        precision: precision of the engine, ``UNet.precision``.
    """
    scheduler.set_timesteps(steps)
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=repr)
    return TuningKey(
        weights=weights if isinstance(weights, str) else weights.manifest.source.weights_digest,
        scheduler=type(scheduler).__name__,
        settings=hashlib.sha256(text.encode()).hexdigest(),
        steps=steps,
        calls=len(scheduler.timesteps),
        guidance=guidance,
        precision=precision,
    )


def mismatch(tuned: Tuned, key: TuningKey, cuts: Sequence[str] | None = None) -> str | None:
    """Return the reason why a schedule does not fit a generation's conditions; None if it fits.

    Args:
        tuned: the schedule.
        key: key of the generation.
        cuts: cuts of the engines; None leaves the check of cuts to ``set_schedule``.
    """
    tuned_for = tuned.document.key
    if tuned.outdated:
        return f"it {_OUTDATED}"
    if tuned_for.weights != key.weights:
        return "it was tuned for other weights"
    if tuned_for.precision is not None and tuned_for.precision != key.precision:
        precision = key.precision or "another precision"
        return f"it corrects the error of {tuned_for.precision}, and this engine is in {precision}"
    if tuned_for.scheduler != key.scheduler:
        return f"it was tuned for {tuned_for.scheduler}, not {key.scheduler}"
    if tuned_for.settings != key.settings:
        return f"it was tuned for another configuration of {tuned_for.scheduler}"
    if (tuned_for.steps, tuned_for.calls) != (key.steps, key.calls):
        return f"it was tuned for {tuned_for.steps} steps, not {key.steps}"
    low, high = tuned_for.guidance
    if not (low <= key.guidance[0] and key.guidance[1] <= high):
        return f"it was tuned for guidance {low:g} to {high:g}, not {key.guidance[0]:g}"
    missing = [] if cuts is None else [cut for cut in tuned.document.used_cuts if cut not in (SKIP, *cuts)]
    if missing:
        return f"it needs the cuts {', '.join(missing)}, and these engines have {', '.join(cuts or ())}"
    return None


def choose(bundle: Bundle, key: TuningKey, name: str | None = None, cuts: Sequence[str] | None = None) -> Tuned:
    """Return a schedule of a bundle that fits a generation: the named one, or else the one with the highest PSNR.

    Args:
        bundle: the bundle.
        key: key of the generation.
        name: name of a schedule; None to choose among all schedules.
        cuts: cuts of the engines, as for ``mismatch``.

    Raises:
        ScheduleError: no schedule fits; the message has the reason for each schedule.
    """
    names = list(bundle.manifest.schedules) if name is None else [name]
    return best_match([Tuned.load(bundle, name) for name in names], key, str(bundle.path), cuts)


def best_match(tuned: Sequence[Tuned], key: TuningKey, source: str, cuts: Sequence[str] | None = None) -> Tuned:
    """Return the schedule with the highest PSNR among those that fit a generation.

    Args:
        tuned: schedules to choose from.
        key: key of the generation.
        source: name of the place that the schedules come from, for the message.
        cuts: cuts of the engines, as for ``mismatch``.

    Raises:
        ScheduleError: no schedule fits; the message has the reason for each schedule.
    """
    reasons = {schedule.name: mismatch(schedule, key, cuts) for schedule in tuned}
    fitting = [schedule for schedule in tuned if reasons[schedule.name] is None]
    if not fitting:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has none"
        raise ScheduleError(f"no schedule of {source} fits ({why}): make one with offcut tune, or set an interval")
    return max(fitting, key=lambda schedule: schedule.document.measured[0].psnr)
