"""What a model can draw, told without drawing: facts that any process can hold, and the checks from them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engines.profiles import Profile
from ...errors import CutError, ScheduleError, ShapeError, UserError
from ...exporter.cut import canonical_name
from ...exporter.specs import Dim, TensorSpec
from ..generation.schedule import SKIP, Schedule
from ..tuning.artifact import Tuned
from ..tuning.choice import best, key_of_weights

_REMEMBERED = 256
"""Answers that a model keeps, of each kind."""


@dataclass(eq=False)
class Model:
    """Of one pipeline on its engines. It can be pickled, and then checks requests where there are no engines.

    Attributes:
        name: under which clients ask for it.
        takes: the arguments of the pipeline's call.
        cuts: of the engines.
        scale: image pixels a latent pixel.
        multiple: of an image's height and width, in pixels.
        previews: whether it shows what an image looks like while it is drawn.
        size: width and height in pixels for requests that name none.
        scheduler: of diffusers.
        profiles: the sizes that the engines take; none for all.
        outputs: of the full graph, by name.
        features: what each cut caches, by names of outputs.
        sample: shape of the engines' input, [batch, channels, height, width].
        weights: digest of the UNet's; None where no tuned schedule may be named.
        schedules: tuned ones, by name.
    """

    name: str
    takes: frozenset[str]
    cuts: tuple[str, ...]
    scale: int
    multiple: int
    previews: bool
    size: tuple[int, int]
    scheduler: Any
    profiles: Sequence[Profile]
    outputs: Mapping[str, TensorSpec]
    features: Mapping[str, tuple[str, ...]]
    sample: tuple[Dim, ...]
    weights: str | None = None
    schedules: Mapping[str, Tuned] = field(default_factory=dict)
    _calls: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _chosen: dict[tuple[str | None, int, float], Tuned] = field(default_factory=dict, init=False, repr=False)

    def calls(self, steps: int) -> int:
        """UNet calls of so many steps, which differ for schedulers of a higher order.

        Raises:
            UserError: the scheduler takes no such number.
        """
        if steps not in self._calls:
            scheduler = copy.deepcopy(self.scheduler)
            try:
                scheduler.set_timesteps(steps)
            except ValueError as error:
                raise UserError(
                    f"{type(scheduler).__name__} does not take {steps} steps: ask for another number"
                ) from error
            _remember(self._calls, steps, len(scheduler.timesteps))
        return self._calls[steps]

    def check_size(self, width: int, height: int) -> None:
        """Raise a ``ShapeError`` for an image that the engines cannot draw."""
        for side, pixels in (("width", width), ("height", height)):
            if pixels % self.multiple:
                nearest = max(self.multiple, round(pixels / self.multiple) * self.multiple)
                raise ShapeError(
                    f"the image's {side} is {pixels}, but this model needs a multiple of {self.multiple}: the nearest "
                    f"is {nearest}"
                )
        latent = {"height": height // self.scale, "width": width // self.scale}
        for name, fixed in zip(("height", "width"), self.sample[-2:], strict=True):
            if isinstance(fixed, int) and fixed != latent[name]:
                raise ShapeError(f"these engines draw images of one {name}, {fixed * self.scale} pixels: ask for that")
        if self.profiles and not any(_covers(profile, latent) for profile in self.profiles):
            raise ShapeError(f"no profile of these engines covers {width}x{height}: ask for another size")

    def check_cut(self, cut: str | None, wanted: bool) -> None:
        """Raise a ``CutError`` for a cut that is not there; ``wanted`` if some call is to be shallow."""
        there = ", ".join(self.cuts) or "none"
        if cut is not None and cut != SKIP and canonical_name(cut) not in self.cuts:
            raise CutError(f"this model was not built with that cut; it has {there}")
        if wanted and not self.cuts:
            raise CutError("this model was built without a cut, so every call is full: leave interval and schedule out")

    @property
    def tuned(self) -> tuple[str, ...]:
        """The names of the tuned schedules."""
        return tuple(self.schedules)

    def tuned_for(self, name: str | None, steps: int, guidance: float) -> Tuned:
        """The tuned schedule of this name, or the best of those that fit; refused where it was made for something else.

        Raises:
            ScheduleError: there is none, or none fits; the message has the reason and no path.
        """
        asked = (name, steps, max(guidance, 1.0))
        if asked not in self._chosen:
            _remember(self._chosen, asked, self._choose(*asked))
        return self._chosen[asked]

    def _choose(self, name: str | None, steps: int, guidance: float) -> Tuned:
        if self.weights is None or not self.schedules:
            raise ScheduleError("this model has no tuned schedule: give an interval")
        if name is not None and name not in self.schedules:
            raise ScheduleError(f"this model has no tuned schedule of that name; it has {', '.join(self.schedules)}")
        asked = list(self.schedules.values()) if name is None else [self.schedules[name]]
        key = key_of_weights(self.weights, copy.deepcopy(self.scheduler), steps, (guidance, guidance))
        return best(asked, key, "this model", self.cuts)

    def slot_bytes(
        self,
        cut: str | None,
        rows: int,
        width: int,
        height: int,
        *,
        schedule: Schedule | None = None,
        twice: bool = False,
    ) -> int:
        """Device memory that a request of so many rows keeps between its steps.

        Args:
            cut: of shallow calls to which the schedule gives none of their own.
            twice: with a forecast, which needs the features of two full calls.
        """
        if not self.cuts:
            return 0
        default = self.cuts[0] if cut is None else canonical_name(cut)
        used = [each or default for each in (schedule.cuts if schedule is not None else (None,))]
        features = dict.fromkeys(feature for each in used if each != SKIP for feature in self.features[each])
        dims = {"batch": rows, "height": height // self.scale, "width": width // self.scale, "sequence": 1, "frames": 1}
        specs = [self.outputs[feature] for feature in features]
        return (1 + twice) * sum(math.prod(spec.resolve(dims)) * spec.torch_dtype().itemsize for spec in specs)


def _covers(profile: Profile, latent: dict[str, int]) -> bool:
    sides = [name for name in latent if name in profile.min]
    return all(profile.min[name] <= latent[name] <= profile.max[name] for name in sides)


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= _REMEMBERED:
        memory.clear()
    memory[key] = value
