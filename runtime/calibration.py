"""``Calibration``: images that are generated to calibrate a graph in low precision.

With caching, the shallow graph reads features of an earlier step, and the latents drift from those of an uncached run.
Therefore the calibration runs the pipeline itself, with the graphs in place of its UNet and a cached schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..exporter.components import load_component
from ..exporter.families import downsampling, example_inputs
from ..exporter.load import ModelSource, read_index
from ..exporter.quantize.histogram import METHODS
from .generation.schedule import Uniform
from .prompts import prompts_for
from .text_to_image import generate_from_prompt, is_text_to_image

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..engines.base import EnginePair
    from .unet import UNet

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """Settings of a calibration: the images to denoise, and how the observed tensors decide what is rounded.

    Attributes:
        prompts: prompts, used in turn; empty for the model's own, see ``prompts.prompts_for``.
        samples: number of images; each one uses the next cut of the bundle.
        steps: number of scheduler steps for each image.
        interval: interval of the cached schedule, ``Uniform(interval, warmup=warmup)``.
        warmup: number of first calls that are always full.
        guidance: guidance scale, for pipelines that take one.
        size: the image's height and width in pixels; None is the model's own.
        seed: seed of the first image's noise.
        method: method that chooses the ranges from the observations: ``minmax``, ``percentile`` or ``mse``.
        keep: patterns of layers to leave unrounded, e.g. ``"mid_block*"``; some other layers are never rounded.
        sensitive: limit in dB; a layer also stays unrounded if its signal-to-quantisation-noise ratio is more than this
            below the median layer's.

    Raises:
        UserError: a number is out of its range, or the method is unknown.
    """

    prompts: tuple[str, ...] = ()
    samples: int = 4
    steps: int = 20
    interval: int = 3
    warmup: int = 1
    guidance: float = 7.5
    size: int | None = None
    seed: int = 0
    method: str = "minmax"
    keep: tuple[str, ...] = ()
    sensitive: float = 8.0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("steps", 1), ("interval", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"the calibration's {name} is {getattr(self, name)}: give at least {least}")
        if self.method not in METHODS:
            raise UserError(f"there is no method {self.method!r} to choose ranges: choose {', '.join(METHODS)}")

    def record(self, source: ModelSource) -> dict[str, str | int | float | bool | tuple[str, ...] | None]:
        """Return the values that decide which inputs are observed; the prompts as the SHA-256 of their lines."""
        names = ("samples", "steps", "interval", "warmup", "guidance", "size", "seed", "keep")
        digest = hashlib.sha256("\n".join(self._prompts(source)).encode()).hexdigest()
        return {"prompts_sha256": digest, **{name: getattr(self, name) for name in names}}

    def run(self, pair: EnginePair, source: ModelSource, progress: Progress) -> None:
        """Denoise with this pair of engines as the UNet; see ``engines.builder.request.Calibrator``."""
        from .unet import UNet

        unet = UNet(pair, source.config, attention=source.attention)
        unet.advise = False  # caching serves the calibration here, not speed
        pipe = _text_to_image(source, unet)
        if pipe is None:
            progress("no text-to-image pipeline: calibrate on latents denoised from noise, with random conditioning")
        prompts = self._prompts(source)
        for sample in range(self.samples):
            cut = unet.cuts[sample % len(unet.cuts)]
            progress(f"  image {sample + 1} of {self.samples}, {cut}")
            unet.set_schedule(Uniform(self.interval, warmup=self.warmup), cut=cut)
            if pipe is None:
                self._denoise_noise(unet, pair, source, sample)
            else:
                self._generate(pipe, prompts[sample % len(prompts)], self.seed + sample)

    def _prompts(self, source: ModelSource) -> tuple[str, ...]:
        return self.prompts or prompts_for(source.root, None)

    def _generate(self, pipe: Any, prompt: str, seed: int) -> None:
        generate_from_prompt(
            pipe, prompt, steps=self.steps, guidance=self.guidance, seed=seed, size=self.size, output="latent"
        )

    def _denoise_noise(self, unet: UNet, pair: EnginePair, source: ModelSource, sample: int) -> None:
        import torch

        scheduler = _ddim(source)
        scheduler.set_timesteps(self.steps)
        inputs = example_inputs(tuple(pair.inputs.values()), self._dims(source), seed=self.seed + sample)
        latents = inputs.pop("sample")
        others = source.family.arguments({name: value for name, value in inputs.items() if name != "timestep"})
        channels = next(iter(pair.outputs.values())).shape[1]
        with torch.no_grad(), unet.generation(calls=self.steps):
            for timestep in scheduler.timesteps:
                # The predicted noise may have fewer channels than the input (inpainting), or more (its variance).
                sample_in = scheduler.scale_model_input(latents, timestep)
                noise = unet(sample_in, timestep, **others).sample
                assert isinstance(channels, int)
                width = min(channels, latents.shape[1])
                stepped = scheduler.step(noise[:, :width].float(), timestep, latents[:, :width].float()).prev_sample
                latents = torch.cat([stepped.to(latents.dtype), latents[:, width:]], dim=1)

    def _dims(self, source: ModelSource) -> dict[str, int]:
        """Return the dimensions of a batch of two latents, by default of the size that the model was trained on."""
        from ..engines.profiles import VAE_SCALE, trained_side

        multiple = downsampling(source.config)
        pixels = self.size or trained_side(source.config.get("sample_size"))
        side = max(multiple, pixels // VAE_SCALE // multiple * multiple)
        return {"batch": 2, "height": side, "width": side, "sequence": 77}


def _text_to_image(source: ModelSource, unet: UNet) -> DiffusionPipeline | None:
    """Return the model's pipeline around this UNet if it is a text-to-image pipeline, else None."""
    import diffusers
    import transformers

    from .pipeline import attach, dtype_argument, without_type_warnings

    if not source.is_pipeline:
        return None
    name = diffusers.DiffusionPipeline.load_config(source.root)["_class_name"]
    if not is_text_to_image(getattr(diffusers, name).__call__):
        return None
    index = read_index(source.root)
    components = {
        component: load_component(transformers, folder, index[component][1], "fp32", source.variant).to(unet.dtype)
        for component, folder in source.components.items()
    }
    with without_type_warnings():
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            source.root,
            unet=unet,
            **components,
            local_files_only=True,
            variant=source.variant,
            **dtype_argument(unet.dtype),
        )
    pipe.set_progress_bar_config(disable=True)
    return attach(pipe, unet)


def _ddim(source: ModelSource) -> Any:
    """Return DDIM with the noise schedule of the model's own scheduler, or with that of Stable Diffusion."""
    from diffusers import DDIMScheduler

    folder = source.root / "scheduler"
    if source.is_pipeline and (folder / "scheduler_config.json").is_file():
        return DDIMScheduler.from_pretrained(folder)
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
