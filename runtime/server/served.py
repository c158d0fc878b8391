"""The model that a server serves: what it can draw, told without drawing."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ...engines.profiles import Profile
from ...errors import CutError, ScheduleError, ShapeError, UserError
from ...exporter.cut import canonical_name
from ...exporter.trace import SAMPLE
from ..draw import draws_from_prompts
from ..schedule import Schedule, Steps
from ..tuning.artifact import Tuned, best, key_of
from ..unet import UNet
from .previews import can_preview

if TYPE_CHECKING:
    from ...engines.bundle import Bundle

_PIPELINES_NEED = 8
"""Every pipeline of Stable Diffusion wants its height and width to be a multiple of it, whatever the autoencoder."""


class Served:
    """A pipeline of ``offcut.load`` or ``attach``, before a worker has it.

    Args:
        pipe: the pipeline.
        name: under which clients ask for it.
        multiple: of the latent's height and width, as the UNet needs it.
        profiles: the sizes that its engines take; none for all.
        bundle: whose tuned schedules requests may name; None for none.

    Raises:
        UserError: the pipeline needs more than a prompt, or makes videos.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        *,
        multiple: int = 1,
        profiles: Sequence[Profile] = (),
        bundle: Bundle | None = None,
    ) -> None:
        taken = inspect.signature(pipe.__call__).parameters
        if not draws_from_prompts(pipe.__call__) or not taken.keys().isdisjoint(("num_frames", "video_length")):
            raise UserError(
                f"{type(pipe).__name__} does not draw images from prompts alone, which is all that offcut serve does: "
                "use it from Python"
            )
        if not isinstance(pipe.unet, UNet):
            raise UserError("a server needs a pipeline with an offcut.UNet: make it with offcut.load(bundle)")
        self.pipe = pipe
        self.name = name
        self.takes = frozenset(taken)
        self.cuts: tuple[str, ...] = pipe.unet.cuts
        self.scale: int = pipe.vae_scale_factor
        """Image pixels a latent pixel."""
        self.multiple = math.lcm(multiple * self.scale, _PIPELINES_NEED)
        """Of an image's height and width, in pixels."""
        self.previews = "callback_on_step_end" in taken and can_preview(pipe)
        self._profiles = profiles
        side = pipe.unet.config["sample_size"] or 64
        height, width = (side, side) if isinstance(side, int) else side
        self.size: tuple[int, int] = (width * self.scale, height * self.scale)
        """Width and height in pixels for requests that name none."""
        pair = pipe.unet._opened()
        self._outputs, self._features = pair.outputs, pair.cuts
        self._sample = pair.inputs[SAMPLE].shape  # [batch, channels, height, width]
        self._bundle = bundle
        self._tuned = {} if bundle is None else {each: Tuned.load(bundle, each) for each in bundle.manifest.schedules}
        self.calls = lru_cache(maxsize=256)(self._calls)
        self._chosen = lru_cache(maxsize=256)(self._choose)

    @classmethod
    def of(cls, pipe: Any, bundle: Bundle, engine: str, device: str, name: str) -> Served:
        """Of a pipeline that ``load`` made from this bundle with this engine."""
        entry = bundle.find(engine, device=device)
        profiles = bundle.graphs(entry).profiles if entry.compiled else ()
        multiple = bundle.manifest.variants[entry.variant].multiple
        return cls(pipe, name, multiple=multiple, profiles=profiles, bundle=bundle)

    def _calls(self, steps: int) -> int:
        """UNet calls of so many steps, which differ for schedulers of a higher order.

        Raises:
            UserError: the scheduler takes no such number.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)
        try:
            scheduler.set_timesteps(steps)
        except ValueError as error:
            raise UserError(
                f"{type(scheduler).__name__} does not take {steps} steps: ask for another number"
            ) from error
        return len(scheduler.timesteps)

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
        for name, fixed in zip(("height", "width"), self._sample[-2:], strict=True):
            if isinstance(fixed, int) and fixed != latent[name]:
                raise ShapeError(f"these engines draw images of one {name}, {fixed * self.scale} pixels: ask for that")
        if self._profiles and not any(_covers(profile, latent) for profile in self._profiles):
            raise ShapeError(f"no profile of these engines covers {width}x{height}: ask for another size")

    def check_cut(self, cut: str | None, wanted: bool) -> None:
        """Raise a ``CutError`` for a cut that is not there; ``wanted`` if some call is to be shallow."""
        there = ", ".join(self.cuts) or "none"
        if cut is not None and canonical_name(cut) not in self.cuts:
            raise CutError(f"this model was not built with that cut; it has {there}")
        if wanted and not self.cuts:
            raise CutError("this model was built without a cut, so every call is full: leave interval and schedule out")

    @property
    def tuned(self) -> tuple[str, ...]:
        """The names of the bundle's tuned schedules."""
        return tuple(self._tuned)

    def tuned_for(self, name: str | None, steps: int, guidance: float) -> Tuned:
        """The tuned schedule of this name, or the best of those that fit; refused where it was made for something else.

        Raises:
            ScheduleError: there is none, or none fits; the message has the reason and no path.
        """
        return self._chosen(name, steps, max(guidance, 1.0))

    def _choose(self, name: str | None, steps: int, guidance: float) -> Tuned:
        if self._bundle is None or not self._tuned:
            raise ScheduleError("this model has no tuned schedule: give an interval")
        if name is not None and name not in self._tuned:
            raise ScheduleError(f"this model has no tuned schedule of that name; it has {', '.join(self._tuned)}")
        asked = list(self._tuned.values()) if name is None else [self._tuned[name]]
        key = key_of(self._bundle, copy.deepcopy(self.pipe.scheduler), steps, (guidance, guidance))
        return best(asked, key, "this model")

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
        features = dict.fromkeys(feature for each in used for feature in self._features[each])
        dims = {"batch": rows, "height": height // self.scale, "width": width // self.scale, "sequence": 1, "frames": 1}
        specs = [self._outputs[feature] for feature in features]
        return (1 + twice) * sum(math.prod(spec.resolve(dims)) * spec.torch_dtype().itemsize for spec in specs)

    def warm_up(self, guidance: float) -> None:
        """Draw once, with a full and a shallow call: engines prepare their kernels, and it is seen that they work.

        Raises:
            Exception: whatever the pipeline raises.
        """
        width, height = self.size
        self.pipe.set_progress_bar_config(disable=True)
        advises, self.pipe.unet.advise = self.pipe.unet.advise, False  # nobody chose so few steps
        self.pipe.unet.set_schedule(Steps([0]) if self.cuts else None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pictures that nobody sees
                sizes = {"width": width, "height": height}
                asked = {"num_inference_steps": 2, "guidance_scale": guidance, **sizes}
                self.pipe(prompt="a", **{name: value for name, value in asked.items() if name in self.takes})
        finally:
            self.pipe.unet.set_schedule(None)
            self.pipe.unet.advise = advises


def _covers(profile: Profile, latent: dict[str, int]) -> bool:
    sides = [name for name in latent if name in profile.min]
    return all(profile.min[name] <= latent[name] <= profile.max[name] for name in sides)
