"""The peers compute the same: the hand-written cache, DeepCache's helper, and the compiled functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offcut.benchmarks.gpu import models, peers
from offcut.benchmarks.gpu.peers import DenoisingLoop, decibels
from offcut.runtime.generation.schedule import Uniform

SAME = 110.0
"""PSNR in dB from which two trajectories count as equal."""

XL = {
    "sample_size": 16,
    "layers_per_block": 2,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}


@pytest.fixture(scope="module", params=["small", "xl"])
def unet(request: pytest.FixtureRequest) -> Any:
    """Return a UNet with attention in its outermost layer, or one without and with SDXL's conditioning."""
    if request.param == "small":
        return models.small_unet()
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**XL).eval()


@pytest.fixture
def setting(unet: Any) -> tuple[DenoisingLoop, peers.Conditioning]:
    noise = models.noise(unet.config, 1, 16, torch.float32, "cpu")
    return DenoisingLoop(noise, 6), models.conditioning(unet.config, 2, torch.float32, "cpu")


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_hand_written_cache_computes_what_deepcaches_helper_computes(
    unet: Any, setting: Any, interval: int
) -> None:
    loop, inputs = setting
    theirs = peers.HelperDenoiser(loop, unet, inputs, interval).generate()
    ours = peers.CachedDenoiser(loop, peers.CachedUNet(unet), inputs, Uniform(interval)).generate()
    assert decibels(ours, theirs) >= SAME
    uncached = peers.CachedDenoiser(loop, peers.CachedUNet(unet), inputs, None).generate()
    assert decibels(uncached, ours) >= SAME if interval == 1 else decibels(uncached, ours) < 80


def test_the_full_function_computes_what_diffusers_forward_computes(unet: Any, setting: Any) -> None:
    loop, inputs = setting
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = unet(sample, loop.timesteps[2], return_dict=False, **inputs)[0]
        full_output, feature = peers.CachedUNet(unet).full(sample, loop.timesteps[2], inputs)
        shallow_output = peers.CachedUNet(unet).shallow(sample, loop.timesteps[2], inputs, feature)
    assert torch.equal(full_output, expected)
    assert torch.equal(shallow_output, expected)


def test_the_helper_leaves_the_unet_as_it_was(unet: Any, setting: Any) -> None:
    loop, inputs = setting
    forward = unet.forward
    with peers.HelperDenoiser(loop, unet, inputs, 2).turn():
        assert unet.forward is not forward
    assert unet.forward == forward


def test_the_shallow_weights_are_those_that_the_shallow_function_reads(unet: Any, setting: Any) -> None:
    loop, inputs = setting
    cached = peers.CachedUNet(unet)
    sample = torch.zeros(2, 4, 16, 16)
    with torch.no_grad():
        feature = cached.full(sample, loop.timesteps[0], inputs)[1]
    unet.requires_grad_(True)
    cached.shallow(sample, loop.timesteps[0], inputs, feature).sum().backward()
    read = {id(parameter) for parameter in unet.parameters() if parameter.grad is not None}
    unet.zero_grad(set_to_none=True)
    unet.requires_grad_(False)
    assert {id(parameter) for parameter in cached.shallow_parameters()} == read


@pytest.mark.slow
def test_both_functions_compile_without_graph_breaks(unet: Any, setting: Any) -> None:
    loop, inputs = setting
    cached = peers.CachedUNet(unet)

    def compile(half: Any) -> Any:
        return torch.compile(half, backend="eager", fullgraph=True, dynamic=False)

    eager = peers.CachedDenoiser(loop, cached, inputs, Uniform(2)).generate()
    through = peers.CachedDenoiser(loop, cached, inputs, Uniform(2), compile).generate()
    assert decibels(through, eager) >= SAME


def test_the_trajectory_bound_separates_cached_from_uncached_half_precision() -> None:
    """Eager PyTorch in half precision must meet the bound, and a loop without the cache must not."""
    from offcut.benchmarks.gpu.correctness import SCHEDULE, STEPS, TRAJECTORY

    def latents(dtype: torch.dtype, cached: bool) -> torch.Tensor:
        unet = models.small_unet().to(dtype)
        loop = DenoisingLoop(models.noise(unet.config, 1, 16, dtype, "cpu"), STEPS)
        inputs = models.conditioning(unet.config, 2, dtype, "cpu")
        schedule = SCHEDULE if cached else None
        return peers.CachedDenoiser(loop, peers.CachedUNet(unet), inputs, schedule).generate()

    exact = latents(torch.float32, True)
    uncached = decibels(latents(torch.float32, False), exact)
    for precision in ("fp16", "bf16"):
        rounded = decibels(latents(getattr(torch, models.DTYPES[precision]), True), exact)
        assert rounded > TRAJECTORY[precision] > uncached
