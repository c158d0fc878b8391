"""Reused guidance: shallow calls compute half of the batch, as in a plain implementation; off without guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offcut
from offcut.engines.bundle.bundle import Bundle
from offcut.errors import ScheduleError

FEATURE, CUT, CALLS = "deep_feature_0", "deepcache:0", 7
SCHEDULE = offcut.Uniform(3)


def inputs(unet: offcut.UNet, call: int, images: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inputs of a call: the latents twice, the timestep, and text embeddings."""
    made = torch.Generator().manual_seed(call)
    latent = torch.randn(images, 4, 8, 8, generator=made)
    width = unet.config["cross_attention_dim"]
    text = torch.randn(2 * images, 77, width, generator=torch.Generator().manual_seed(99))
    return torch.cat([latent, latent]), torch.tensor(900.0 - 50 * call), text


def run(unet: offcut.UNet, reuse: bool, guided: bool = True) -> list[torch.Tensor]:
    unet.set_schedule(SCHEDULE, CUT, reuse_guidance=reuse)
    with unet.generation(CALLS, guided=guided):
        return [unet(*inputs(unet, call)).sample for call in range(CALLS)]


def plain_implementation(unet: offcut.UNet) -> list[torch.Tensor]:
    """Return the outputs from direct engine calls."""
    pair = unet._pair
    assert pair is not None
    bounds = {}
    for rows in (2, 4):
        shapes = {"sample": (rows, 4, 8, 8), "timestep": (rows,)}
        shapes["encoder_hidden_states"] = (rows, 77, unet.config["cross_attention_dim"])
        bounds[rows] = pair.prepare(shapes)
    made = []
    feature = difference = torch.empty(0)
    for call in range(CALLS):
        sample, timestep, text = inputs(unet, call)
        whole = call % 3 == 0
        bound = bounds[4 if whole else 2]
        bound.buffers["sample"].copy_(sample if whole else sample[2:])
        bound.buffers["timestep"].fill_(float(timestep))
        bound.buffers["encoder_hidden_states"].copy_(text if whole else text[2:])
        if whole:
            bound.full()
            noise = bound.buffers["noise_pred"].clone()
            feature, difference = bound.buffers[FEATURE].clone(), noise[2:] - noise[:2]
        else:
            bound.buffers[FEATURE].copy_(feature[2:])
            bound.shallow(CUT)
            prompted = bound.buffers["noise_pred"]
            noise = torch.cat([prompted - difference, prompted])
        made.append(noise)
    for bound in bounds.values():
        bound.close()
    return made


def test_outputs_equal_a_plain_implementation(unet: offcut.UNet) -> None:
    for expected, actual in zip(plain_implementation(unet), run(unet, reuse=True), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_half_with_the_prompt_is_the_same_without_reuse(unet: offcut.UNet) -> None:
    """Only the difference between the halves is approximated."""
    plain, reused = run(unet, reuse=False), run(unet, reuse=True)
    for call in range(CALLS):
        torch.testing.assert_close(reused[call][2:], plain[call][2:], rtol=1e-4, atol=1e-5)
        if call % 3 == 0:
            assert torch.equal(reused[call], plain[call])
        else:
            assert not torch.allclose(reused[call][:2], plain[call][:2], rtol=1e-3, atol=1e-4)


def test_buffers_for_one_shape_are_enough(unet: offcut.UNet, tiny_bundle: Path) -> None:
    """The buffers of the whole batch hold the features that the half reads."""
    expected = run(unet, reuse=True)
    bundle = Bundle.open(tiny_bundle)
    pair = bundle.pair(bundle.find(unet.engine, device="cpu"), device="cpu", threads=1)
    one = offcut.UNet(pair, bundle.unet_config, bound_shapes=1)
    for actual, other in zip(run(one, reuse=True), expected, strict=True):
        assert torch.equal(actual, other)
    one.close()


def test_without_guidance_nothing_changes(unet: offcut.UNet) -> None:
    plain = run(unet, reuse=False)
    for expected, actual in zip(plain, run(unet, reuse=True, guided=False), strict=True):
        assert torch.equal(expected, actual)


def test_unannounced_calls_compute_the_whole_batch(unet: offcut.UNet) -> None:
    unet.set_schedule(SCHEDULE, CUT, reuse_guidance=True)
    unet.reset()
    unannounced = [unet(*inputs(unet, call)).sample for call in range(CALLS)]
    for expected, actual in zip(run(unet, reuse=False), unannounced, strict=True):
        assert torch.equal(expected, actual)


def test_another_kind_of_guidance_is_refused(unet: offcut.UNet) -> None:
    unet.set_schedule(SCHEDULE, CUT, reuse_guidance=True)
    sample, timestep, text = inputs(unet, 0)
    for bad_sample, texts in ((torch.randn(4, 4, 8, 8), text), (sample[:3], text[:3])):
        with pytest.raises(ScheduleError, match="the same latents twice"), unet.generation(CALLS, guided=True):
            unet(bad_sample, timestep, texts)


def test_guidance_may_end_within_a_generation(unet: offcut.UNet) -> None:
    """Call 3 has half the batch, so it is full; later calls compute their whole batch, which is half as large."""

    def end_guidance_early(reuse: bool) -> list[torch.Tensor]:
        unet.set_schedule(SCHEDULE, CUT, reuse_guidance=reuse)
        made = []
        with unet.generation(CALLS, guided=True):
            for call in range(CALLS):
                sample, timestep, text = inputs(unet, call)
                made.append(unet(*((sample, timestep, text) if call < 3 else (sample[2:], timestep, text[2:]))).sample)
        return made

    for call, (expected, actual) in enumerate(zip(end_guidance_early(False), end_guidance_early(True), strict=True)):
        if call >= 3 or call == 0:
            assert torch.equal(expected, actual)


def test_a_pipeline_reports_whether_it_is_guided(tiny_bundle: Path) -> None:
    pipe = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    pipe.unet.advise = False
    pipe.set_progress_bar_config(disable=True)
    made = {}
    for scale in (1.0, 7.5):
        for reuse in (False, True):
            pipe.unet.set_schedule(SCHEDULE, CUT, reuse_guidance=reuse)
            made[scale, reuse] = pipe(
                "a red circle",
                num_inference_steps=6,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images
    assert torch.equal(made[1.0, False], made[1.0, True])
    assert not torch.equal(made[7.5, False], made[7.5, True])
    difference = (made[7.5, False] - made[7.5, True]).norm() / made[7.5, False].norm()
    assert difference < 0.5
    pipe.unet.close()
