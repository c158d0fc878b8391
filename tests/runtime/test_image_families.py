"""Each kind of image pipeline at interval 3, compared with eager reuse of the same feature in diffusers' own class.

The reference computes the whole UNet at every call and replaces one tensor by hook; see ``_CachingReference``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from support.families import UNETS
from support.unets import run as run_graph

import offcut
from offcut.engines.bundle.bundle import onnx_of
from offcut.exporter.cut import find_cuts, split_all
from offcut.exporter.families import example_inputs
from offcut.exporter.load import locate
from offcut.runtime.generation.schedule import Uniform

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' use of NumPy
]

SAME = 100.0
"""PSNR in dB from which two results count as equal."""


@pytest.fixture(scope="module")
def pair_of(
    family_model: Callable[[str], Path], family_bundle: Callable[[str], Path]
) -> Iterator[Callable[[str], tuple[Any, offcut.UNet]]]:
    """Return a function that returns a family's eager UNet and its compiled UNet, each loaded once."""
    made: dict[str, tuple[Any, offcut.UNet]] = {}

    def make(name: str) -> tuple[Any, offcut.UNet]:
        if name not in made:
            folder, bundle = family_model(name), family_bundle(name)
            kind = diffusers.UNet2DConditionModel if name in UNETS else diffusers.UNet2DModel
            unet = offcut.UNet.load(bundle, threads=1)
            unet.advise = False
            source = folder / "unet" if name == "sd" else folder
            made[name] = kind.from_pretrained(source).eval(), unet
        return made[name]

    yield make
    for _, unet in made.values():
        unet.close()


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
MASK = torch.zeros(1, 1, 64, 64)
MASK[..., 16:48, 8:40] = 1
EMBEDS = {"prompt_embeds": noise(1, 7, 16), "negative_prompt_embeds": noise(1, 7, 16, seed=5)}


def pooled(width: int) -> dict[str, torch.Tensor]:
    return EMBEDS | {
        "pooled_prompt_embeds": noise(1, width, seed=6),
        "negative_pooled_prompt_embeds": noise(1, width, seed=7),
    }


SD, SD2 = ("sd", "StableDiffusionPipeline"), ("sd2", "StableDiffusionPipeline")
IMG2IMG = ("sd", "StableDiffusionImg2ImgPipeline")
INPAINT = ("inpaint", "StableDiffusionInpaintPipeline")
XL, XL_IMG2IMG = ("sdxl", "StableDiffusionXLPipeline"), ("sdxl", "StableDiffusionXLImg2ImgPipeline")
XL_INPAINT = ("sdxl-inpaint", "StableDiffusionXLInpaintPipeline")
REFINER = ("refiner", "StableDiffusionXLImg2ImgPipeline")
V_PREDICTION = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TEXT = {"prompt": "a red square", "negative_prompt": "blue"}
FILL = {"image": PICTURE, "mask_image": MASK, "height": 64, "width": 64}

# Family and pipeline class, arguments of the call, number of UNet calls, settings of the scheduler.
CASES: dict[str, tuple[tuple[str, str], dict[str, Any], int, dict[str, Any]]] = {
    "text2img": (SD, TEXT, 10, {}),
    "no guidance": (SD, TEXT | {"guidance_scale": 1.0}, 10, {}),
    "guidance rescaled": (SD, TEXT | {"guidance_rescale": 0.7}, 10, {}),
    "clip skip": (SD, TEXT | {"clip_skip": 1}, 10, {}),
    "prompt embeddings": (SD, {"prompt_embeds": noise(1, 9, 32), "negative_prompt_embeds": noise(1, 9, 32)}, 10, {}),
    "three images of a prompt": (SD, TEXT | {"num_images_per_prompt": 3}, 10, {}),
    "two prompts, landscape": (SD, {"prompt": ["a cat", "a dog"], "height": 48, "width": 96}, 10, {}),
    "large portrait": (SD, TEXT | {"height": 128, "width": 72}, 10, {}),
    "SD 2 v-prediction": (SD2, TEXT, 10, V_PREDICTION),
    "img2img 0.3": (IMG2IMG, TEXT | {"image": PICTURE, "strength": 0.3}, 3, {}),
    "img2img 0.75": (IMG2IMG, TEXT | {"image": PICTURE, "strength": 0.75}, 7, {}),
    "img2img 1.0": (IMG2IMG, TEXT | {"image": PICTURE, "strength": 1.0}, 10, {}),
    "inpaint": (INPAINT, EMBEDS | FILL, 10, {}),
    "inpaint 0.6": (INPAINT, EMBEDS | FILL | {"strength": 0.6}, 6, {}),
    "SDXL": (XL, pooled(10), 10, {}),
    "SDXL sizes and crops": (
        XL,
        pooled(10) | {"original_size": (99, 77), "crops_coords_top_left": (3, 5), "target_size": (64, 48)},
        10,
        {},
    ),
    "SDXL base to refiner": (XL, pooled(10) | {"denoising_end": 0.8}, 8, {}),
    "SDXL img2img": (XL_IMG2IMG, pooled(10) | {"image": PICTURE, "strength": 0.5}, 5, {}),
    "SDXL refiner": (REFINER, pooled(1280) | {"image": PICTURE, "strength": 0.5, "aesthetic_score": 5.0}, 5, {}),
    "SDXL refiner of latents": (REFINER, pooled(1280) | {"image": noise(1, 4, 16, 16), "denoising_start": 0.4}, 6, {}),
    "SDXL inpaint": (XL_INPAINT, pooled(10) | FILL | {"strength": 0.9999}, 9, {}),
}


def pipeline(kind: str, unet: Any, parts: dict[str, Any], scheduler: Any) -> Any:
    vae = parts["vae"]
    if kind.startswith("StableDiffusionXL"):
        more = {"requires_aesthetics_score": unet.config["projection_class_embeddings_input_dim"] == 5 * 4 + 1280}
        pipe = getattr(diffusers, kind)(
            vae=vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=scheduler,
            **({} if kind == "StableDiffusionXLPipeline" else more),
        )
    else:
        names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        settings = {name: parts[name] for name in names} | {"unet": unet, "scheduler": scheduler}
        pipe = getattr(diffusers, kind)(**settings, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_equals_deepcache_in_eager_pytorch(
    name: str,
    pair_of: Callable[[str], tuple[Any, offcut.UNet]],
    parts: dict[str, Any],
    generate: Callable[..., torch.Tensor],
    cached_by_call: Callable[..., Any],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    (family, kind), given, calls, settings = CASES[name]
    if "clip_skip" in given and not hasattr(parts["text_encoder"], "text_model"):
        pytest.skip("this version of diffusers cannot skip layers of this version of transformers' CLIP")
    network, unet = pair_of(family)
    scheduler = EulerDiscreteScheduler if "XL" in kind else DDIMScheduler
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    config = base | ({} if "XL" in kind else {"clip_sample": False}) | settings
    arguments = {"prompt": None, "guidance": given.get("guidance_scale", 5.0), **given}
    arguments.pop("guidance_scale", None)

    def run(module: Any) -> torch.Tensor:
        pipe = pipeline(kind, module, parts, scheduler(**config))
        return generate(offcut.attach(pipe, unet) if module is unet else pipe, **arguments)

    with cached_by_call(network, 0, range(calls)) as counting:
        uncached = run(network)
    assert counting.calls == calls
    with cached_by_call(network, 0, Uniform(3).full_calls(calls)):
        expected = run(network)
    for schedule, reference in ((None, uncached), (Uniform(3), expected)):
        unet.set_schedule(schedule)
        latents = run(unet)
        assert unet.last_run is not None
        assert unet.last_run.calls == calls
        assert unet.last_run.timeline == "".join("#" if not schedule or i % 3 == 0 else "." for i in range(calls))
        assert decibels(latents, reference) > SAME
    assert decibels(expected, uncached) < SAME - 10
    unet.set_schedule(None)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["sd2", "refiner", "class", "ldm-class"])
def test_every_cut_with_fresh_features_equals_the_full_graph_bit_for_bit(
    name: str,
    engine: str,
    family_model: Callable[[str], Path],
    family_bundle: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """``exporter/test_cut`` tests the cuts of the other families."""
    graph = onnx_of(family_bundle(name))
    cuts = find_cuts(graph)
    assert len([cut for cut in cuts if cut.name.startswith("deepcache:")]) == (4 if name in ("refiner", "class") else 6)
    source = locate(family_model(name))
    specs = source.family.specs(source.config, "float32")
    inputs = example_inputs(specs, {"batch": 2, "height": 8, "width": 12, "sequence": 7})
    for pair in split_all(graph, cuts, tmp_path):
        features = run_graph(engine, pair.full, inputs)
        noise_pred = features.pop("noise_pred")
        assert torch.equal(run_graph(engine, pair.shallow, {**inputs, **features})["noise_pred"], noise_pred)
        stale = {name: -value for name, value in features.items()}
        assert not torch.equal(run_graph(engine, pair.shallow, {**inputs, **stale})["noise_pred"], noise_pred)


@pytest.mark.parametrize("kind", ["DDIMPipeline", "DDPMPipeline"])
@pytest.mark.parametrize("batch", [1, 3])
def test_unconditional_pipelines(
    kind: str,
    batch: int,
    pair_of: Callable[[str], tuple[Any, offcut.UNet]],
    cached_by_call: Callable[..., Any],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    network, unet = pair_of("unconditional")
    steps = 12

    def run(module: Any) -> torch.Tensor:
        scheduler = DDIMScheduler() if kind == "DDIMPipeline" else DDPMScheduler()
        pipe = getattr(diffusers, kind)(unet=module, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        pipe = offcut.attach(pipe, unet) if module is unet else pipe
        generator = torch.Generator().manual_seed(0)
        images = pipe(batch_size=batch, generator=generator, num_inference_steps=steps, output_type="np").images
        assert images.shape == (batch, 8, 8, 3)
        return torch.from_numpy(images)

    unet.set_schedule(Uniform(3))
    cached = run(unet)
    assert unet.last_run is not None
    assert unet.last_run.timeline == "#.." * 4
    with cached_by_call(network, 0, range(0, steps, 3)):
        expected = run(network)
    assert decibels(cached, expected) > SAME
    unet.set_schedule(None)
    uncached = run(network)
    assert decibels(run(unet), uncached) > SAME
    assert decibels(expected, uncached) < SAME - 10


def _classes(labels: torch.Tensor, guided: bool) -> dict[str, Any]:
    return {"class_labels": labels}


def _embedded_class(labels: torch.Tensor, guided: bool) -> dict[str, Any]:
    """One token per image, as in latent diffusion on ImageNet; index 5 is the token for no class."""
    table = noise(6, 1, 24, seed=9)
    return {"encoder_hidden_states": table[torch.cat([torch.full_like(labels, 5), labels]) if guided else labels]}


@pytest.mark.parametrize(
    ("family", "condition", "guided"),
    [("class", _classes, False), ("ldm-class", _embedded_class, True), ("ldm-class", _embedded_class, False)],
    ids=["UNet2DModel", "LDM with guidance", "LDM"],
)
def test_class_conditional_models_in_a_custom_loop(
    family: str,
    condition: Callable[[torch.Tensor, bool], dict[str, Any]],
    guided: bool,
    pair_of: Callable[[str], tuple[Any, offcut.UNet]],
    cached_by_call: Callable[..., Any],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    network, unet = pair_of(family)
    steps = 10

    def denoise(module: Any, labels: tuple[int, ...] = (1, 4)) -> torch.Tensor:
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(steps)
        given = condition(torch.tensor(labels), guided)
        latents = noise(2, 3, 8, 16)
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                sample = torch.cat([latents] * 2) if guided else latents
                predicted = module(sample, timestep, **given).sample
                if guided:
                    unconditional, conditional = predicted.chunk(2)
                    predicted = unconditional + 3.0 * (conditional - unconditional)
                latents = scheduler.step(predicted, timestep, latents).prev_sample
        return latents

    with cached_by_call(network, 0, range(0, steps, 3)):
        expected = denoise(network)
    unet.set_schedule(Uniform(3))
    with unet.generation(calls=steps):
        cached = denoise(unet)
    assert unet.last_run is not None
    assert unet.last_run.timeline == "#..#..#..#"
    assert decibels(cached, expected) > SAME
    with unet.generation(calls=steps):
        assert decibels(denoise(unet, (2, 0)), expected) < 60  # the class has an effect
    unet.set_schedule(None)
    uncached = denoise(network)
    assert decibels(denoise(unet), uncached) > SAME
    assert decibels(expected, uncached) < SAME - 10


def test_a_bundle_carries_the_safety_checker(family_bundle: Callable[[str], Path]) -> None:
    bundle = family_bundle("sd")
    for given, flagged in (({}, True), ({"safety_checker": None, "requires_safety_checker": False}, False)):
        loaded = offcut.load(bundle, "onnxruntime", threads=1, **given)
        loaded.set_progress_bar_config(disable=True)
        loaded.unet.set_schedule(Uniform(3))
        output = loaded("a cat", num_inference_steps=3, output_type="np")
        assert output.nsfw_content_detected == ([True] if flagged else None)
        assert output.images.any() != flagged
        loaded.unet.close()
