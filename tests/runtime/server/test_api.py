"""OpenAI's client gets the same images as a plain pipeline."""

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
def plain_pipe(tiny_bundle: Path) -> Iterator[Any]:
    """The same pipeline without a server."""
    pipe: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.advise = False
    yield pipe
    pipe.unet.close()


def generate(pipe: Any, seeds: list[int], schedule: Schedule | None, **arguments: Any) -> list[np.ndarray]:
    pipe.unet.set_schedule(schedule)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(generator=generators, num_images_per_prompt=len(seeds), **arguments).images
    return [np.asarray(image) for image in images]


def pixels(b64: str | None) -> np.ndarray:
    from PIL import Image

    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_an_image_equals_that_of_the_plain_pipeline(client: openai.OpenAI, plain_pipe: Any) -> None:
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
    expected = generate(
        plain_pipe,
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
    image = pixels(reply.data[0].b64_json)
    assert image.shape == (32, 64, 3)
    assert np.array_equal(image, expected[0])
    details = reply.model_extra["offcut"]  # type: ignore[index]
    assert details["seed"] == 5
    assert details["schedule"] == "quad:2:center=1"
    assert details["full_calls"] + details["shallow_calls"] == len(details["timeline"]) == 7
    assert details["seconds"] > 0
    assert details["queue_seconds"] >= 0


def test_each_image_of_a_request_has_its_own_seed(client: openai.OpenAI, plain_pipe: Any) -> None:
    """The request uses the server's default schedule and size."""
    reply = client.images.generate(prompt="a", n=2, extra_body={"seed": 8})
    expected = generate(plain_pipe, [8, 9], Uniform(3), prompt="a", num_inference_steps=6, guidance_scale=5.0)
    assert [
        np.array_equal(pixels(one.b64_json), other) for one, other in zip(reply.data or [], expected, strict=True)
    ] == [True] * 2
    assert not np.array_equal(*expected)
    assert reply.model_extra["offcut"]["timeline"] == "#..#.."  # type: ignore[index]


def test_without_a_seed_images_differ_and_the_reply_has_the_seed(client: openai.OpenAI) -> None:
    one, other = (client.images.generate(prompt="a", extra_body={"interval": 1}) for _ in range(2))
    assert one.model_extra["offcut"]["timeline"] == "######"  # type: ignore[index]
    assert one.model_extra["offcut"]["seed"] != other.model_extra["offcut"]["seed"]  # type: ignore[index]
    again = client.images.generate(prompt="a", extra_body={"seed": one.model_extra["offcut"]["seed"], "interval": 1})  # type: ignore[index]
    first, second, third = (pixels((reply.data or [])[0].b64_json) for reply in (one, other, again))
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)


def test_a_stream_has_every_step_and_previews(client: openai.OpenAI, plain_pipe: Any) -> None:
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
        preview = pixels(event.b64_json)
        assert preview.shape == (32, 32, 3)
        assert preview.std() > 1
        assert event.size == "32x32"
    expected = generate(plain_pipe, [3], Uniform(3), prompt="a", num_inference_steps=9, guidance_scale=5.0)
    assert np.array_equal(pixels(events[-1].b64_json), expected[0])  # previews do not change the image
    assert events[-1].offcut["timeline"] == "#..#..#.."
    assert 0 < sum(event.seconds for event in steps) <= events[-1].offcut["seconds"] + 1e-3


def test_a_stream_has_one_frame_for_each_event(server: Any) -> None:
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


def test_previews_remove_the_scale_of_the_noise(plain_pipe: Any) -> None:
    """Euler's latents have the scale of the noise, up to 15 times that of the autoencoder's latents."""
    steps: list[Any] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        steps.append(
            (float(pipe.scheduler.sigmas[step + 1]), latents, np.asarray(decode_preview(pipe, latents, timestep)))
        )
        return tensors

    scheduler = plain_pipe.scheduler
    plain_pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
    try:
        generate(plain_pipe, [1], None, prompt="a", num_inference_steps=4, callback_on_step_end=on_step_end)
    finally:
        plain_pipe.scheduler = scheduler
    sigma, latents, preview = steps[0]
    assert sigma > 1
    assert len(steps) == 4
    small = torch.nn.functional.avg_pool2d(latents / (sigma**2 + 1) ** 0.5, 2)
    with torch.no_grad():
        image = plain_pipe.vae.decode(small / plain_pipe.vae.config.scaling_factor).sample
    expected = plain_pipe.image_processor.postprocess(image, output_type="pil")[0]
    assert np.abs(np.asarray(expected).astype(int) - preview).max() <= 1


@pytest.mark.parametrize(("steps", "count", "chosen"), [(20, 3, [4, 9, 14]), (2, 3, [0]), (1, 3, []), (9, 0, [])])
def test_previews_are_evenly_spread_and_never_after_the_last_step(steps: int, count: int, chosen: list[int]) -> None:
    assert sorted(preview_steps(steps, count)) == chosen


def test_the_model_is_listed_with_its_size(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    assert model.model_extra["offcut"]["size"] == "64x64"  # type: ignore[index]
    assert model.model_extra["offcut"]["multiple"] == 32  # type: ignore[index]
    with pytest.raises(openai.NotFoundError, match="one model, 'tiny'"):
        client.models.retrieve("dall-e-3")
    with pytest.raises(openai.NotFoundError) as raised:
        client.images.generate(model="dall-e-3", prompt="a")
    assert raised.value.code == "model_not_found"


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        client.images.generate(prompt="a", response_format="url")
    assert "stores no images that a URL could lead to" in raised.value.message
    assert (raised.value.type, raised.value.param) == ("invalid_request_error", "response_format")


def samples(server: Any) -> dict[tuple[str, str], float]:
    """Return every metric sample by its name and labels."""
    reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_metrics_count_a_request_and_a_refusal(server: Any) -> None:
    before = samples(server)
    server.post({"prompt": "a", "num_inference_steps": 6}).raise_for_status()
    assert server.post({"prompt": "a", "n": 99}).status_code == 422
    after = samples(server)
    difference = {key: after[key] - before.get(key, 0) for key in after}
    assert difference["offcut_requests_total", "done"] == 1
    assert difference["offcut_request_seconds_count", "done"] == 1
    assert difference["offcut_queue_seconds_count", ""] == 1
    assert difference["offcut_step_seconds_count", "full"] == difference["offcut_batch_rows_count", "full"] == 2
    assert difference["offcut_step_seconds_count", "shallow"] == difference["offcut_batch_rows_count", "shallow"] == 4
    assert difference["offcut_batch_rows_bucket", "full,1.0"] == 0
    assert (
        difference["offcut_batch_rows_bucket", "full,2.0"] == difference["offcut_batch_rows_bucket", "full,+Inf"] == 2
    )
    assert difference["offcut_batch_rows_sum", "shallow"] == 8
    assert difference["offcut_engine_seconds_total", "full"] > 0
    assert difference["offcut_rejections_total", "invalid_request"] == 1
    assert after["offcut_healthy", ""] == 1
    assert after["offcut_cache_slots", ""] == after["offcut_queued_requests", ""] == 0
    assert after["offcut_cache_limit_bytes", ""] == 2**30
    assert {kind for name, kind in after if name == "offcut_engine_seconds_total"} == set(KINDS)
    assert {outcome for name, outcome in after if name == "offcut_requests_total"} == set(OUTCOMES)
    assert all(math.isfinite(value) for value in after.values())
