"""Bundles of bare UNets run in a diffusers pipeline, also in SDXL's, with several images at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.worker_processes import latents_in_fp32

from offcut.benchmarks.latency.case import LatencyRequest
from offcut.benchmarks.latency.loop import INPUTS
from offcut.benchmarks.latency.pipelines import pipeline_name
from offcut.benchmarks.latency.resolve import resolve
from offcut.benchmarks.latency.rounds import relative_difference
from offcut.benchmarks.latency.worker import LatencyWorker
from offcut.engines.bundle.bundle import Bundle
from offcut.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_bare_unet_is_measured_in_the_pipeline_of_its_family(
    pipeline: str, unet_bundle: Path, family_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = Bundle.open(family_bundle("sdxl") if "XL" in pipeline else unet_bundle)
    assert pipeline_name(bundle) == pipeline
    request = LatencyRequest(
        steps=4,
        schedule="uniform:2",
        images=2,
        threads=1,
        guidance=5,
        engines=("onnxruntime",),
        peers=("diffusers", "engine"),
    )
    case, entrants = resolve(bundle, request, tmp_path)
    worker = LatencyWorker()
    worker.inputs(case=case.as_json())
    assert load_file(tmp_path / INPUTS)["latents"].shape[0] == 2
    latents = latents_in_fp32(case, entrants)
    assert relative_difference(latents["onnxruntime"], latents["diffusers"]) < 1e-4
    assert relative_difference(latents["offcut"], latents["diffusers"]) > 1e-4


@pytest.mark.slow
def test_a_unet_without_prompts_is_refused(family_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = Bundle.open(family_bundle("unconditional"))
    with pytest.raises(UserError, match=r"gets only latents and embeddings, and .* has UNet2DModel"):
        resolve(bundle, LatencyRequest(), tmp_path)
