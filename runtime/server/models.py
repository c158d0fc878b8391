"""Models of a server: ``ModelInfo`` checks requests without engines, ``ServedModel`` adds the pipeline."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ...engines.profiles import Profile
from ...errors import CutError, ScheduleError, ShapeError, UserError
from ...exporter.cut import canonical_name
from ...exporter.specs import Dim, TensorSpec
from ...exporter.trace.export import SAMPLE
from ..generation.schedule import SKIP, Schedule, Steps
from ..text_to_image import check_multiple, count_calls, is_text_to_image
from ..tuning.artifact import Tuned, best_match, make_key
from ..unet import UNet

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle

_CACHE_ENTRIES = 256
"""Entries in each cache of a model: calls by number of steps, and tuned schedules."""

_PIPELINE_MULTIPLE = 8
"""Every Stable Diffusion pipeline needs a height and width that are multiples of 8, whatever its autoencoder."""


@dataclass(eq=False)
class ModelInfo:
    """Properties of a model and its engines, and the checks of a request against them.

    The object can be pickled, so that a process without engines can check requests.

    Attributes:
        name: model name for clients.
        arguments: names of the arguments that the pipeline's call accepts.
        cuts: names of the engines' cuts, the default first.
        scale: image pixels per latent pixel.
        multiple: an image's height and width must be multiples of this number of pixels.
        previews: whether previews can be decoded from unfinished latents.
        size: default width and height in pixels.
        scheduler: the diffusers scheduler.
        profiles: shape profiles of the engines; empty if the engines take any size.
        outputs: outputs of the full graph, by name.
        features: names of the outputs that each cut caches, by cut.
        sample: shape of the engines' latent input, [batch, channels, height, width].
        timed_call: duration in seconds of a full UNet call, and its number of rows, at the default size; None before
            the warm-up.
        weights_digest: digest of the UNet's weights; None if requests cannot name tuned schedules.
        schedules: tuned schedules by name.
    """

    name: str
    arguments: frozenset[str]
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
    timed_call: tuple[float, int] | None = None
    weights_digest: str | None = None
    schedules: Mapping[str, Tuned] = field(default_factory=dict)
    _calls: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _tuned: dict[tuple[str | None, int, float], Tuned] = field(default_factory=dict, init=False, repr=False)

    def calls(self, steps: int) -> int:
        """Return the number of UNet calls for a number of steps; higher-order schedulers make several per step.

        Raises:
            UserError: the scheduler does not support this number of steps.
        """
        if steps not in self._calls:
            _store(self._calls, steps, count_calls(self.scheduler, steps))
        return self._calls[steps]

    def call_seconds(self, rows: int, width: int, height: int) -> float:
        """Return the expected duration of one full UNet call; 0 before the warm-up.

        Convolutions grow with the pixels, and attention grows with their square, which is the cautious estimate.
        """
        if self.timed_call is None:
            return 0.0
        seconds, timed_rows = self.timed_call
        pixels = width * height / (self.size[0] * self.size[1])
        return seconds * max(rows / timed_rows, 1.0) * max(pixels, pixels**2)

    def check_size(self, width: int, height: int) -> None:
        """Check that the engines can generate an image of this size in pixels.

        Raises:
            ShapeError: a side is not a valid multiple, or no engine profile covers the size.
        """
        check_multiple(height, width, self.multiple)
        latent = {"height": height // self.scale, "width": width // self.scale}
        for side, fixed in zip(("height", "width"), self.sample[-2:], strict=True):
            if isinstance(fixed, int) and fixed != latent[side]:
                raise ShapeError(
                    f"these engines support one {side} only, {fixed * self.scale} pixels: ask for that {side}"
                )
        if self.profiles and not any(_covers(profile, latent) for profile in self.profiles):
            raise ShapeError(f"no profile of these engines covers {width}x{height}: ask for another size")

    def check_cut(self, cut: str | None, *, shallow: bool) -> None:
        """Check that the engines have a cut.

        Args:
            cut: name of the cut; None for the default.
            shallow: whether some call of the request is shallow.

        Raises:
            CutError: the engines do not have this cut, or have none although a shallow call needs one.
        """
        if cut is not None and cut != SKIP and canonical_name(cut) not in self.cuts:
            raise CutError(f"this model was not built with that cut; it has {', '.join(self.cuts) or 'none'}")
        if shallow and not self.cuts:
            raise CutError("this model was built without a cut, so every call is full: leave interval and schedule out")

    def tuned_for(self, name: str | None, steps: int, guidance: float) -> Tuned:
        """Return a tuned schedule that fits the request.

        Args:
            name: name of the schedule; None for the best of those that fit.

        Raises:
            ScheduleError: there is no such schedule, or none fits the request. The message contains no path.
        """
        key = (name, steps, max(guidance, 1.0))
        if key not in self._tuned:
            _store(self._tuned, key, self._find_tuned(*key))
        return self._tuned[key]

    def _find_tuned(self, name: str | None, steps: int, guidance: float) -> Tuned:
        if self.weights_digest is None or not self.schedules:
            raise ScheduleError("this model has no tuned schedule: give an interval")
        if name is not None and name not in self.schedules:
            raise ScheduleError(f"this model has no tuned schedule of that name; it has {', '.join(self.schedules)}")
        candidates = list(self.schedules.values()) if name is None else [self.schedules[name]]
        key = make_key(self.weights_digest, copy.deepcopy(self.scheduler), steps, (guidance, guidance))
        return best_match(candidates, key, "this model", self.cuts)

    def feature_bytes(
        self,
        cut: str | None,
        rows: int,
        width: int,
        height: int,
        *,
        schedule: Schedule | None = None,
        forecast: bool = False,
    ) -> int:
        """Return the device memory, in bytes, for the features that a request caches between its steps.

        Args:
            cut: cut of the shallow calls for which the schedule sets no cut; None for the model's first cut.
            rows: rows of the UNet's batch.
            width, height: image size in pixels.
            schedule: None if all shallow calls use ``cut``.
            forecast: whether features are extrapolated, which needs the features of two full calls.
        """
        if not self.cuts:
            return 0
        default_cut = self.cuts[0] if cut is None else canonical_name(cut)
        cuts = [name or default_cut for name in (schedule.cuts if schedule is not None else (None,))]
        features = dict.fromkeys(feature for name in cuts if name != SKIP for feature in self.features[name])
        dims = {"batch": rows, "height": height // self.scale, "width": width // self.scale, "sequence": 1, "frames": 1}
        specs = [self.outputs[feature] for feature in features]
        return (1 + forecast) * sum(math.prod(spec.resolve(dims)) * spec.torch_dtype().itemsize for spec in specs)


class ServedModel(ModelInfo):
    """A model together with its pipeline, which a worker then takes over.

    Args:
        pipe: a pipeline of ``offcut.load`` or ``offcut.attach``.
        name: model name for clients.
        multiple: the UNet needs a latent height and width that are multiples of this number.
        profiles: shape profiles of the engines; empty if the engines take any size.
        bundle: bundle whose tuned schedules requests may name; with None they cannot name any.

    Raises:
        UserError: the pipeline needs more than a prompt, generates videos, or has no ``offcut.UNet``.
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
        arguments = inspect.signature(pipe.__call__).parameters
        if not is_text_to_image(pipe.__call__) or not arguments.keys().isdisjoint(("num_frames", "video_length")):
            raise UserError(
                f"{type(pipe).__name__} does not generate images from prompts alone, and offcut serve supports "
                "nothing else: use it from Python"
            )
        if not isinstance(pipe.unet, UNet):
            raise UserError("a server needs a pipeline with an offcut.UNet: make it with offcut.load(bundle)")
        side = pipe.unet.config["sample_size"] or 64
        height, width = (side, side) if isinstance(side, int) else side
        scale: int = pipe.vae_scale_factor
        super().__init__(
            name=name,
            arguments=frozenset(arguments),
            cuts=pipe.unet.cuts,
            scale=scale,
            multiple=math.lcm(multiple * scale, _PIPELINE_MULTIPLE),
            previews="callback_on_step_end" in arguments and can_preview(pipe),
            size=(width * scale, height * scale),
            scheduler=pipe.scheduler,
            profiles=tuple(profiles),
            outputs=dict(pipe.unet.output_specs),
            features=dict(pipe.unet.cut_features),
            sample=pipe.unet.input_specs[SAMPLE].shape,
            weights_digest=None if bundle is None else bundle.manifest.source.weights_digest,
            schedules={} if bundle is None else {key: Tuned.load(bundle, key) for key in bundle.manifest.schedules},
        )
        self.pipe = pipe

    @classmethod
    def from_bundle(cls, pipe: Any, bundle: Bundle, engine: str, device: str, name: str) -> ServedModel:
        """Return the model of a pipeline that ``offcut.load`` opened from ``bundle`` with this engine and device."""
        entry = bundle.find(engine, device=device)
        profiles = bundle.graphs(entry).profiles if entry.compiled else ()
        multiple = bundle.manifest.variants[entry.variant].multiple
        return cls(pipe, name, multiple=multiple, profiles=profiles, bundle=bundle)

    def info(self) -> ModelInfo:
        """Return the model without its pipeline, for another process."""
        return ModelInfo(**{info.name: getattr(self, info.name) for info in fields(ModelInfo) if info.init})

    def warm_up(self, guidance: float) -> None:
        """Generate one image with full and shallow calls: engines prepare their kernels, and faults show.

        Sets ``timed_call``.

        Raises:
            Exception: any exception that the pipeline raises.
        """
        width, height = self.size
        self.pipe.set_progress_bar_config(disable=True)
        advise, self.pipe.unet.advise = self.pipe.unet.advise, False  # the user did not choose this schedule
        record_times, self.pipe.unet.record_times = self.pipe.unet.record_times, True
        self.pipe.unet.set_schedule(Steps([0, 1]) if self.cuts else None)
        arguments = {"num_inference_steps": 3, "guidance_scale": guidance, "width": width, "height": height}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the image is thrown away
                self.pipe(prompt="a", **{key: value for key, value in arguments.items() if key in self.arguments})
            run = self.pipe.unet.last_run
            self.timed_call = run.seconds[1], 2 if guidance > 1 else 1  # the first call also prepares kernels
        finally:
            self.pipe.unet.record_times = record_times
            self.pipe.unet.set_schedule(None)
            self.pipe.unet.advise = advise


def can_preview(pipe: Any) -> bool:
    """Return whether the autoencoder can decode in the latents' precision; SDXL's overflows in fp16."""
    import torch

    vae = getattr(pipe, "vae", None)
    overflows = hasattr(pipe, "upcast_vae") and vae is not None and vae.dtype == torch.float16
    return vae is not None and not (overflows and vae.config.force_upcast)


def _covers(profile: Profile, latent: dict[str, int]) -> bool:
    sides = [side for side in latent if side in profile.min]
    return all(profile.min[side] <= latent[side] <= profile.max[side] for side in sides)


def _store(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _CACHE_ENTRIES:
        cache.clear()
    cache[key] = value
