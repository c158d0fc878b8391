"""What ``offcut tune`` leaves in a bundle: a schedule with its coefficients, and for what they were made.

schedules/<name>.json           the schedule, its key, and what was measured
schedules/<name>.safetensors    <call>.<feature>.scale, .slope and .shift: [channels], or [1] where one serves all;
                                <call>.correction.weight: [channels, inputs, size, size], .bias: [channels]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from ...errors import BundleError, ScheduleError
from ..generation.correction import Convolutions, Kernel
from ..generation.forecast import Coefficients, Forecast
from .document import VERSION, Document
from .steps import Fitted, TunedSteps

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle
    from ..base_unet import BaseUNet

OUTDATED = "was tuned by an earlier version of offcut, whose corrections saw less: tune it again"

_NAMES = ("scale", "slope", "shift")
_CORRECTION = "correction"


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

        from ...engines.bundle.bundle import Bundle

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
        if self.correction is None:
            return self
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

    def apply(self, unet: BaseUNet) -> None:
        """Set it from the next generation on; see ``set_schedule`` for what it raises.

        Raises:
            ScheduleError: an earlier version of offcut fitted its correction to other inputs.
        """
        if self.outdated:
            raise ScheduleError(f"{self.name} {OUTDATED}")
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


def save(bundle: Bundle, tuned: Tuned) -> None:
    """Add a schedule to a bundle, in the place of one of its name.

    Raises:
        BundleError: the bundle cannot be written; what is in it is unchanged.
    """
    from safetensors.torch import save as to_bytes

    from ...engines.bundle.manifest import FileEntry, Manifest, ScheduleEntry
    from ...engines.bundle.store import commit, staging

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
