"""Pipelines for the tests of the runtime: with offcut's engines, eager, and eager with cached features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.reuse import EagerReuse

import offcut

PROMPT = "a red square"


ENGINES = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)]
"""Engines of the runtime's tests, with OpenVINO in the slow tier only, because the runtime treats all engines alike.

In the default tier, ``engines/test_pairs.py`` tests both engines, and ``test_pipeline.py`` generates whole images with
both."""


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def opened(tiny_bundle: Path) -> Iterator[Callable[[str], offcut.UNet]]:
    """Return a function that opens one UNet for each engine; opening takes a second."""
    unets: dict[str, offcut.UNet] = {}

    def open_once(engine: str) -> offcut.UNet:
        if engine not in unets:
            unets[engine] = offcut.UNet.load(tiny_bundle, engine, threads=1)
        return unets[engine]

    yield open_once
    for unet in unets.values():
        unet.close()


@pytest.fixture(scope="module", params=ENGINES)
def unet(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[offcut.UNet]:
    """A UNet to call without a pipeline, with each engine."""
    opened = offcut.UNet.load(tiny_bundle, request.param, threads=1)
    opened.advise = False
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def parts(tiny_pipeline_dir: Path) -> dict[str, Any]:
    """The components of the eager pipeline."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    return dict(pipe.components)


@pytest.fixture
def eager(parts: dict[str, Any]) -> StableDiffusionPipeline:
    """The eager diffusers pipeline with a scheduler of its own."""
    return _pipeline(parts)


@pytest.fixture
def pipe(parts: dict[str, Any], opened: Callable[[str], offcut.UNet], engine: str) -> Iterator[Any]:
    """The same pipeline with the bundle's engines attached, every call full."""
    unet = opened(engine)
    yield offcut.attach(_pipeline(parts), unet)
    unet.set_schedule(None)
    unet.reset()
    unet.record_times = False


@pytest.fixture
def generate() -> Callable[..., torch.Tensor]:
    """Return a function that runs a pipeline and returns its latents, [1, 4, 16, 16] by default."""

    def run(pipe: Any, *, guidance: float = 5.0, steps: int = 10, seed: int = 1, **settings: Any) -> torch.Tensor:
        settings = {"prompt": PROMPT, **settings}
        latents = pipe(
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **settings,
        ).images
        assert isinstance(latents, torch.Tensor)
        assert torch.isfinite(latents).all()
        return latents

    return run


@pytest.fixture
def decibels() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Return a function that compares latents with a reference: PSNR in dB, relative to the reference's range."""

    def measure(latents: torch.Tensor, reference: torch.Tensor) -> float:
        error = (latents - reference).double().square().mean().sqrt().item()
        span = float(reference.max() - reference.min())
        return math.inf if error == 0 else 20 * math.log10(span / error)

    return measure


@pytest.fixture
def cached_by_call() -> Callable[[Any, int, tuple[int, ...]], EagerReuse]:
    """DeepCache in eager PyTorch for any list of full calls, which DeepCache's own helper does not support."""
    return lambda unet, branch, full_calls: EagerReuse(unet, lambda call: (0, call in full_calls), branch)


def _pipeline(parts: dict[str, Any]) -> StableDiffusionPipeline:
    scheduler = type(parts["scheduler"]).from_config(parts["scheduler"].config)
    pipe = StableDiffusionPipeline(**{**parts, "scheduler": scheduler}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
