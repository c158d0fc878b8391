"""Recipes of the survey: small pipelines of diffusers with a UNet, and a call of each.

A new recipe is one entry in ``RECIPES``. ``REFUSED`` holds the recipes that offcut refuses, with a part of the message.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image

from .models import LATENT_UNET as TEXT
from .models import PIXEL_UNET as PIXELS

STEPS = 7
IMAGE = Image.linear_gradient("L").convert("RGB").resize((32, 32))
MASK = Image.new("L", (32, 32), 0)
MASK.paste(255, (8, 8, 24, 24))


@dataclass(frozen=True)
class Recipe:
    """A small pipeline and one call of it.

    Attributes:
        unet: config of its UNet.
        call: arguments of the call besides the steps, the generator and the output type.
        scheduler: function that returns its scheduler.
        components: names of components that are not those of Stable Diffusion, with their values.
        output: the call's ``output_type``.
        one_call_a_step: whether the UNet is called once a step, so that the timeline is that of the schedule.
    """

    unet: Mapping[str, Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Callable[[], Any] = lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    components: Mapping[str, Any] = field(default_factory=dict)
    output: str = "latent"
    one_call_a_step: bool = True


def _scheduler(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        kind = getattr(diffusers, name, None)
        if kind is None:
            kind = getattr(importlib.import_module("diffusers.schedulers.deprecated"), name)
        return kind(**settings)

    return make


_SIZE = {"height": 32, "width": 32}
_TO_IMAGE = {"prompt": "a", **_SIZE}
_FROM_IMAGE = {"prompt": "a", "image": IMAGE, "strength": 0.9}

RECIPES: dict[str, Recipe] = {
    "StableDiffusionPipeline": Recipe(TEXT, _TO_IMAGE),
    "StableDiffusionImg2ImgPipeline": Recipe(TEXT, _FROM_IMAGE),
    "StableDiffusionInpaintPipeline": Recipe(
        TEXT | {"in_channels": 9}, {"prompt": "a", "image": IMAGE, "mask_image": MASK, **_SIZE}
    ),
    "StableDiffusionInstructPix2PixPipeline": Recipe(
        TEXT | {"in_channels": 8}, {"prompt": "a", "image": IMAGE, "image_guidance_scale": 1.5}
    ),
    "StableDiffusionUpscalePipeline": Recipe(
        TEXT | {"in_channels": 7, "num_class_embeds": 50},
        {"prompt": "a", "image": IMAGE.resize((16, 16))},
        components={"low_res_scheduler": diffusers.DDPMScheduler()},
    ),
    "SemanticStableDiffusionPipeline": Recipe(TEXT, {**_TO_IMAGE, "editing_prompt": ["b"]}),
    "StableDiffusionModelEditingPipeline": Recipe(TEXT, _TO_IMAGE),
    "StableDiffusionAttendAndExcitePipeline": Recipe(TEXT, {**_TO_IMAGE, "token_indices": [1]}),
    "LEditsPPPipelineStableDiffusion": Recipe(TEXT, scheduler=_scheduler("DDIMScheduler", clip_sample=False)),
    "StableDiffusionParadigmsPipeline": Recipe(
        TEXT,
        {**_TO_IMAGE, "parallel": 3},
        _scheduler("DDIMParallelScheduler", clip_sample=False),
        one_call_a_step=False,
    ),
    "LatentConsistencyModelPipeline": Recipe(TEXT | {"time_cond_proj_dim": 16}, _TO_IMAGE, _scheduler("LCMScheduler")),
    "StableDiffusionGLIGENPipeline": Recipe(
        TEXT | {"attention_type": "gated"},
        {**_TO_IMAGE, "gligen_phrases": ["b"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]]},
    ),
    "StableDiffusionPAGPipeline": Recipe(TEXT, _TO_IMAGE),
    "StableDiffusionSAGPipeline": Recipe(TEXT, _TO_IMAGE),
    "MarigoldDepthPipeline": Recipe(
        TEXT | {"in_channels": 8}, {"image": IMAGE, "processing_resolution": 32}, output="np"
    ),
    "DDPMPipeline": Recipe(PIXELS, scheduler=_scheduler("DDPMScheduler"), output="np"),
    "DDIMPipeline": Recipe(PIXELS, output="np"),
    "PNDMPipeline": Recipe(PIXELS, scheduler=_scheduler("PNDMScheduler"), output="np"),
    "ConsistencyModelPipeline": Recipe(PIXELS, scheduler=_scheduler("CMStochasticIterativeScheduler"), output="np"),
    "ScoreSdeVePipeline": Recipe(
        PIXELS | {"time_embedding_type": "fourier"},
        scheduler=lambda: diffusers.schedulers.ScoreSdeVeScheduler(),
        output="np",
        one_call_a_step=False,
    ),
    "KarrasVePipeline": Recipe(PIXELS, scheduler=_scheduler("KarrasVeScheduler"), output="np", one_call_a_step=False),
}

REFUSED = {
    "LEditsPPPipelineStableDiffusion": "reads the UNet's attention maps",
    "StableDiffusionAttendAndExcitePipeline": "computes gradients through the UNet",
    "StableDiffusionModelEditingPipeline": "edits the weights of the UNet's attention",
    "StableDiffusionGLIGENPipeline": "cross_attention_kwargs={'gligen'",
    "StableDiffusionPAGPipeline": "pag_scale=0",
    "StableDiffusionSAGPipeline": "reads the UNet's attention maps",
}


def pipelines_with_a_unet() -> dict[str, Any]:
    """Return every pipeline class of the installed diffusers that takes a UNet of offcut's families, by name."""
    from offcut.exporter.families import FAMILIES

    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        if "onnx" in module.name or "flax" in module.name:
            continue
        try:
            contents = vars(importlib.import_module(module.name))
        except (ImportError, RuntimeError, AttributeError):
            continue  # needs a package that is not installed
        for name, kind in contents.items():
            if not inspect.isclass(kind) or not issubclass(kind, diffusers.DiffusionPipeline):
                continue
            unet = inspect.signature(kind.__init__).parameters.get("unet")
            if kind.__module__ == module.name and unet and any(family in str(unet.annotation) for family in FAMILIES):
                found[name] = kind
    return found


def new_pipeline(kind: Any, recipe: Recipe, parts: Mapping[str, Any], unet: Any) -> Any:
    """Return a pipeline with this UNet; components of Stable Diffusion come from ``parts``."""
    scheduler = recipe.scheduler()
    components: dict[str, Any] = {"unet": unet, "scheduler": scheduler, **recipe.components}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name == "requires_safety_checker":
            components[name] = False
        elif name in parts and name not in components:
            components[name] = parts[name]
        elif name not in components and name != "self" and parameter.default is inspect.Parameter.empty:
            components[name] = None
    pipe = kind(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, recipe: Recipe) -> torch.Tensor:
    """Call a pipeline, and return its images."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments = {
        "num_inference_steps": STEPS,
        "output_type": recipe.output,
        "generator": torch.Generator().manual_seed(0),
        **recipe.call,
    }
    output = pipe(**{name: value for name, value in arguments.items() if name in parameters})
    return torch.as_tensor(output.prediction if hasattr(output, "prediction") else output.images)
