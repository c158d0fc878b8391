"""The model that a server serves: a pipeline, and what it can draw."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...engines.profiles import Profile
from ...errors import UserError
from ...exporter.trace.export import SAMPLE
from ..draw import draws_from_prompts
from ..generation.schedule import Steps
from ..tuning.artifact import Tuned
from ..unet import UNet
from .model import Model
from .previews import can_preview

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle

_PIPELINES_NEED = 8
"""Every pipeline of Stable Diffusion wants its height and width to be a multiple of it, whatever the autoencoder."""


class Served(Model):
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
        side = pipe.unet.config["sample_size"] or 64
        height, width = (side, side) if isinstance(side, int) else side
        scale: int = pipe.vae_scale_factor
        pair = pipe.unet._opened()
        super().__init__(
            name=name,
            takes=frozenset(taken),
            cuts=pipe.unet.cuts,
            scale=scale,
            multiple=math.lcm(multiple * scale, _PIPELINES_NEED),
            previews="callback_on_step_end" in taken and can_preview(pipe),
            size=(width * scale, height * scale),
            scheduler=pipe.scheduler,
            profiles=tuple(profiles),
            outputs=dict(pair.outputs),
            features=dict(pair.cuts),
            sample=pair.inputs[SAMPLE].shape,
            weights=None if bundle is None else bundle.manifest.source.weights_digest,
            schedules={} if bundle is None else {each: Tuned.load(bundle, each) for each in bundle.manifest.schedules},
        )
        self.pipe = pipe

    @classmethod
    def of(cls, pipe: Any, bundle: Bundle, engine: str, device: str, name: str) -> Served:
        """Of a pipeline that ``load`` made from this bundle with this engine."""
        entry = bundle.find(engine, device=device)
        profiles = bundle.graphs(entry).profiles if entry.compiled else ()
        multiple = bundle.manifest.variants[entry.variant].multiple
        return cls(pipe, name, multiple=multiple, profiles=profiles, bundle=bundle)

    def model(self) -> Model:
        """The same without the pipeline, for another process."""
        return Model(**{each.name: getattr(self, each.name) for each in fields(Model) if each.init})

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
