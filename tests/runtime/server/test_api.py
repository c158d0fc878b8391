"""OpenAI's own client gets the images that the pipeline itself draws."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from prometheus_client.parser import text_string_to_metric_families

import offcut
from offcut.runtime.generation.schedule import Quad, Schedule, Uniform
from offcut.runtime.server.jobs import decode_preview, preview_steps
from offcut.runtime.server.metrics import KINDS, OUTCOMES


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Iterator[Any]:
    """The same pipeline in nobody's worker."""
    pipe: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.advise = False
    yield pipe
    pipe.unet.close()


def drawn(pipe: Any, seeds: list[int], schedule: Schedule | None, **arguments: Any) -> list[np.ndarray]:
    pipe.unet.set_schedule(schedule)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = pipe(generator=generators, num_images_per_prompt=len(seeds), **arguments).images
    return [np.asarray(image) for image in made]


def pixels(b64: str | None) -> np.ndarray:
    from PIL import Image

    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_an_image_is_the_one_that_the_pipeline_draws(client: openai.OpenAI, alone: Any) -> None:
    reply = client.images.generate(
        model="tiny",
        prompt="a red square",
        size="64x32",
        response_format="b64_json",
        user="somebody",
        extra_body={
            "negative_prompt": "blue",
            "num_inference_steps": 7,
            "guidance_scale": 3,
            "seed": 5,
            "schedule": "quad:2:center=1",
        },
    )
    expected = drawn(
        alone,
        [5],
        Quad(2, center=1),
        prompt="a red square",
        negative_prompt="blue",
        num_inference_steps=7,
        guidance_scale=3.0,
        width=64,
        height=32,
    )
    assert reply.data is not None
    assert len(reply.data) == 1
    got = pixels(reply.data[0].b64_json)
    assert got.shape == (32, 64, 3)
    assert np.array_equal(got, expected[0])
    how = reply.model_extra["offcut"]  # type: ignore[index]
    assert how["seed"] == 5
    assert how["schedule"] == "quad:2:center=1"
    assert how["full_calls"] + how["shallow_calls"] == len(how["timeline"]) == 7
    assert how["seconds"] > 0
    assert how["queue_seconds"] >= 0


def test_several_images_have_seeds_of_their_own(client: openai.OpenAI, alone: Any) -> None:
    """The server's own schedule and size, and an image a seed."""
    reply = client.images.generate(prompt="a", n=2, extra_body={"seed": 8})
    expected = drawn(alone, [8, 9], Uniform(3), prompt="a", num_inference_steps=6, guidance_scale=5.0)
    assert [
        np.array_equal(pixels(one.b64_json), other) for one, other in zip(reply.data or [], expected, strict=True)
    ] == [True] * 2
    assert not np.array_equal(*expected)
    assert reply.model_extra["offcut"]["timeline"] == "#..#.."  # type: ignore[index]


def test_without_a_seed_images_differ_and_the_seed_is_told(client: openai.OpenAI) -> None:
    one, other = (client.images.generate(prompt="a", extra_body={"interval": 1}) for _ in range(2))
    assert one.model_extra["offcut"]["timeline"] == "######"  # type: ignore[index]
    assert one.model_extra["offcut"]["seed"] != other.model_extra["offcut"]["seed"]  # type: ignore[index]
    again = client.images.generate(prompt="a", extra_body={"seed": one.model_extra["offcut"]["seed"], "interval": 1})  # type: ignore[index]
    first, second, third = (pixels((reply.data or [])[0].b64_json) for reply in (one, other, again))
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)


def test_a_stream_tells_every_step_and_shows_previews(client: openai.OpenAI, alone: Any) -> None:
    stream = client.images.generate(
        prompt="a", stream=True, partial_images=2, extra_body={"seed": 3, "num_inference_steps": 9}
    )
    events: list[Any] = list(stream)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds[-1] == "completed"
    assert [kind for kind in kinds if kind != "partial_image"] == ["progress"] * 9 + ["completed"]
    steps = [event for event in events if event.type == "image_generation.progress"]
    assert [event.step for event in steps] == list(range(1, 10))
    assert {event.total for event in steps} == {9}
    assert "".join("#" if event.kind == "full" else "." for event in steps) == "#..#..#.."
    assert all(event.seconds > 0 for event in steps)
    previews = [(place, event) for place, event in enumerate(events) if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for _, event in previews] == [0, 1]
    assert [event.step for _, event in previews] == [3, 6]
    assert [events[place - 1].step for place, _ in previews] == [3, 6]
    for _, event in previews:
        shown = pixels(event.b64_json)
        assert shown.shape == (32, 32, 3)
        assert shown.std() > 1
        assert event.size == "32x32"
    expected = drawn(alone, [3], Uniform(3), prompt="a", num_inference_steps=9, guidance_scale=5.0)
    assert np.array_equal(pixels(events[-1].b64_json), expected[0])  # previews change nothing
    assert events[-1].offcut["timeline"] == "#..#..#.."
    assert 0 < sum(event.seconds for event in steps) <= events[-1].offcut["seconds"] + 1e-3


def test_the_frames_of_a_stream(server: Any) -> None:
    import httpx

    body = {"prompt": "a", "stream": True, "num_inference_steps": 3}
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body, timeout=60) as reply:
        text = reply.read().decode()
    assert reply.headers["content-type"].startswith("text/event-stream")
    frames = text.split("\n\n")
    assert [frame.splitlines()[0] for frame in frames[:-2]] == [
        *["event: image_generation.progress"] * 3,
        "event: image_generation.completed",
    ]
    assert frames[-2:] == ["data: [DONE]", ""]


def test_previews_take_the_noises_own_scale_out(alone: Any) -> None:
    """Euler's latents are as large as the noise, up to 15 times what the autoencoder knows."""
    seen: list[Any] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        seen.append(
            (float(pipe.scheduler.sigmas[step + 1]), latents, np.asarray(decode_preview(pipe, latents, timestep)))
        )
        return tensors

    kept = alone.scheduler
    alone.scheduler = EulerDiscreteScheduler.from_config(kept.config)
    try:
        drawn(alone, [1], None, prompt="a", num_inference_steps=4, callback_on_step_end=look)
    finally:
        alone.scheduler = kept
    sigma, latents, shown = seen[0]
    assert sigma > 1
    assert len(seen) == 4
    small = torch.nn.functional.avg_pool2d(latents / (sigma**2 + 1) ** 0.5, 2)
    with torch.no_grad():
        image = alone.vae.decode(small / alone.vae.config.scaling_factor).sample
    expected = alone.image_processor.postprocess(image, output_type="pil")[0]
    assert np.abs(np.asarray(expected).astype(int) - shown).max() <= 1


@pytest.mark.parametrize(("steps", "count", "places"), [(20, 3, [4, 9, 14]), (2, 3, [0]), (1, 3, []), (9, 0, [])])
def test_previews_are_spread_and_never_the_last_step(steps: int, count: int, places: list[int]) -> None:
    assert sorted(preview_steps(steps, count)) == places


def test_the_model_is_listed_with_its_limits(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    assert model.model_extra["offcut"]["size"] == "64x64"  # type: ignore[index]
    assert model.model_extra["offcut"]["multiple"] == 32  # type: ignore[index]
    with pytest.raises(openai.NotFoundError, match="one model, 'tiny'"):
        client.models.retrieve("dall-e-3")
    with pytest.raises(openai.NotFoundError) as raised:
        client.images.generate(model="dall-e-3", prompt="a")
    assert raised.value.code == "model_not_found"


def test_errors_are_those_of_openais_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        client.images.generate(prompt="a", response_format="url")
    assert "stores no images that a URL could lead to" in raised.value.message
    assert (raised.value.type, raised.value.param) == ("invalid_request_error", "response_format")


def samples(server: Any) -> dict[tuple[str, str], float]:
    """Every sample by its name and labels."""
    reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_metrics_move(server: Any) -> None:
    before = samples(server)
    server.post({"prompt": "a", "num_inference_steps": 6}).raise_for_status()
    assert server.post({"prompt": "a", "n": 99}).status_code == 422
    after = samples(server)
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown["offcut_requests_total", "done"] == 1
    assert grown["offcut_request_seconds_count", "done"] == 1
    assert grown["offcut_queue_seconds_count", ""] == 1
    assert grown["offcut_step_seconds_count", "full"] == grown["offcut_batch_rows_count", "full"] == 2
    assert grown["offcut_step_seconds_count", "shallow"] == grown["offcut_batch_rows_count", "shallow"] == 4
    assert grown["offcut_batch_rows_bucket", "full,1.0"] == 0
    assert grown["offcut_batch_rows_bucket", "full,2.0"] == grown["offcut_batch_rows_bucket", "full,+Inf"] == 2
    assert grown["offcut_batch_rows_sum", "shallow"] == 8
    assert grown["offcut_engine_seconds_total", "full"] > 0
    assert grown["offcut_rejections_total", "invalid_request"] == 1
    assert after["offcut_healthy", ""] == 1
    assert after["offcut_cache_slots", ""] == after["offcut_queued_requests", ""] == 0
    assert after["offcut_cache_limit_bytes", ""] == 2**30
    assert {kind for name, kind in after if name == "offcut_engine_seconds_total"} == set(KINDS)
    assert {outcome for name, outcome in after if name == "offcut_requests_total"} == set(OUTCOMES)
    assert all(math.isfinite(value) for value in after.values())
