"""Ray Serve with two replicas: images, limits, lost replicas, clients that disconnect, an update, and the shutdown.

The tests share one cluster, since its start takes longest. Each leaves the cluster working, and the last one ends it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from support.clusters import KEY, LIMIT, Cluster, serving, until

pytest.importorskip("ray", reason="needs the extra ray")

import offcut
from offcut.runtime.generation.schedule import Uniform

pytestmark = pytest.mark.slow

STEPS = 6
OPTIONS = ["--engine", "onnxruntime", "--threads", "1", "--steps", str(STEPS), "--interval", "3", "--warmup", "0"]
LOAD = ["--max-in-flight", "3", "--max-queue", "6", "--max-steps", "900"]
LONG = {"prompt": "a", "num_inference_steps": 900, "interval": 1}


@pytest.fixture(scope="module")
def cluster(one_bundle: Path, other_bundle: Path) -> Iterator[Cluster]:
    with serving([one_bundle, other_bundle], [*OPTIONS, *LOAD, "--replicas", "2"]) as running:
        yield running


@pytest.fixture(scope="module")
def generate(one_bundle: Path, other_bundle: Path) -> Iterator[Callable[..., np.ndarray]]:
    """Function that generates an image with a bundle's plain pipeline."""
    pipes: dict[str, Any] = {}
    for name, bundle in (("one", one_bundle), ("other", other_bundle)):
        pipes[name] = offcut.load(bundle, "onnxruntime", threads=1)
        pipes[name].set_progress_bar_config(disable=True)
        pipes[name].unet.advise = False

    def image_of(name: str, seed: int, steps: int = STEPS) -> np.ndarray:
        pipe = pipes[name]
        pipe.unet.set_schedule(Uniform(3))
        generator = torch.Generator().manual_seed(seed)
        output = pipe(prompt="a", num_inference_steps=steps, guidance_scale=7.5, generator=generator)
        return np.asarray(output.images[0])

    yield image_of
    for pipe in pipes.values():
        pipe.unet.close()


def pixels(b64: str | None) -> np.ndarray:
    from PIL import Image

    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def image(reply: httpx.Response) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return pixels(reply.json()["data"][0]["b64_json"])


def images_agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two images agree up to rounding, which depends on the batch size."""
    return bool(np.abs(one.astype(int) - other.astype(int)).max() <= 2)


def metric(cluster: Cluster, name: str, **labels: str) -> float:
    """Return a metric's sum over replicas and models."""
    families = text_string_to_metric_families(cluster.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    frames = reply.read().decode().split("\n\n")
    data = [frame.partition("data: ")[2] for frame in frames]
    return [json.loads(each) for each in data if each.startswith("{")]


def test_openais_client_gets_the_images_of_two_bundles(cluster: Cluster, generate: Any) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY, max_retries=0, timeout=LIMIT)
    assert [model.id for model in client.models.list()] == ["one", "other"]
    for name in ("one", "other"):
        reply = client.images.generate(model=name, prompt="a", extra_body={"seed": 5})
        assert images_agree(pixels((reply.data or [])[0].b64_json), generate(name, 5))
        assert reply.model_extra["offcut"]["timeline"] == "#..#.."  # type: ignore[index]
    assert not images_agree(generate("one", 5), generate("other", 5))
    stream: list[Any] = list(client.images.generate(prompt="a", stream=True, partial_images=1, extra_body={"seed": 6}))
    kinds = [event.type.removeprefix("image_generation.") for event in stream]
    assert kinds == [*["progress"] * 3, "partial_image", *["progress"] * 3, "completed"]
    assert [event.step for event in stream if hasattr(event, "kind")] == [1, 2, 3, 4, 5, 6]
    assert images_agree(pixels(stream[-1].b64_json), generate("one", 6))
    with pytest.raises(openai.NotFoundError, match="'one', 'other'"):
        client.images.generate(model="another", prompt="a")


def test_key_limits_and_health_are_checked_in_the_ingress(cluster: Cluster) -> None:
    assert httpx.get(f"{cluster.url}/v2/health/live").json() == {"live": True}
    assert httpx.get(f"{cluster.url}/v2/health/ready").json() == {"ready": True}
    assert httpx.get(f"{cluster.url}/v1/models").status_code == 401
    assert cluster.post({"prompt": "a"}, headers={}).status_code == 401
    started = metric(cluster, "offcut_queue_seconds_count")
    refused = cluster.post({"prompt": "a", "size": "8000x8000"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "limit_exceeded")
    assert cluster.post({"prompt": "a", "sede": 3}).json()["error"]["message"].startswith("sede: there is no such")
    assert cluster.post({"prompt": "a" * 2**17}).json()["error"]["code"] == "body_too_large"
    assert metric(cluster, "offcut_queue_seconds_count") == started
    late = cluster.post({**LONG, "timeout": 0.3})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_clients_that_disconnect_free_their_places_and_a_full_queue_refuses(cluster: Cluster, generate: Any) -> None:
    before = metric(cluster, "offcut_requests_total", outcome="cancelled")
    with httpx.Client(limits=httpx.Limits(max_connections=None)) as client, contextlib.ExitStack() as replies:
        for _ in range(2 * 3 + 6):  # two replicas with three places, and six that wait
            reply = cluster.stream(client, LONG)
            replies.callback(reply.close)
            assert reply.status_code == 200
        until(lambda: metric(cluster, "offcut_in_flight_requests") == 6)
        refused = cluster.post({"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
    until(lambda: metric(cluster, "offcut_in_flight_requests") == 0)
    until(lambda: metric(cluster, "offcut_requests_total", outcome="cancelled") >= before + 6)
    reply = cluster.post({"prompt": "a", "seed": 1})
    assert images_agree(image(reply), generate("one", 1))


def test_a_replica_that_is_killed_under_load_loses_no_request(cluster: Cluster, generate: Any) -> None:
    steps = 250
    bodies = [{"prompt": "a", "num_inference_steps": steps, "seed": seed} for seed in range(8)]
    all_started = threading.Barrier(len(bodies) + 1, timeout=LIMIT)

    def request(body: dict[str, Any]) -> list[dict[str, Any]]:
        with httpx.Client() as client, contextlib.closing(cluster.stream(client, body)) as reply:
            all_started.wait()
            return events(reply)

    replicas = cluster.replicas()
    assert len(replicas) == 2
    before = metric(cluster, "offcut_resends_total")
    with ThreadPoolExecutor(len(bodies)) as clients:
        replies = [clients.submit(request, body) for body in bodies]
        all_started.wait()
        until(lambda: metric(cluster, "offcut_in_flight_requests") > 3)  # each has three places, so both have work
        killed = next(iter(replicas))
        replicas[killed].send_signal(signal.SIGKILL)
        streams = [reply.result() for reply in replies]
    for body, stream in zip(bodies, streams, strict=True):
        assert stream[-1]["type"] == "image_generation.completed", stream[-1]
        assert images_agree(pixels(stream[-1]["b64_json"]), generate("one", body["seed"], steps))
        # Each step once, as if no replica had been lost.
        assert [event["step"] for event in stream[:-1]] == list(range(1, steps + 1))
    assert metric(cluster, "offcut_resends_total") > before
    # Ray starts another replica, and both generate again.
    until(lambda: len(cluster.replicas().keys() - {killed}) == 2)
    until(lambda: cluster.get("/metrics").text.count('offcut_healthy{model="one"') == 2)
    assert cluster.post({"prompt": "a", "seed": 3}).status_code == 200


def test_an_update_under_load_loses_no_request(
    cluster: Cluster, one_bundle: Path, other_bundle: Path, generate: Any
) -> None:
    """The bundles swap names, so the same model names give other images; each replica now keeps one model open."""
    done = threading.Event()

    def request(seed: int) -> list[httpx.Response]:
        replies = []
        while not done.is_set():
            replies.append(cluster.post({"model": "one", "prompt": "a", "seed": seed}))
        return replies

    old = cluster.replicas().keys()
    command = [sys.executable, "-m", "offcut", "serve", str(other_bundle), str(one_bundle), "--ray", "--update"]
    command += ["--name", "one", "--name", "other", "--loaded", "1", "--replicas", "2", "--api-key", KEY]
    with ThreadPoolExecutor(2) as clients:
        requests = [clients.submit(request, seed) for seed in (1, 2)]
        try:
            updated = subprocess.run(
                [*command, *OPTIONS, *LOAD, "--ray-address", cluster.address],
                capture_output=True,
                text=True,
                timeout=2 * LIMIT,
            )
        finally:
            done.set()
    assert updated.returncode == 0, updated.stderr
    for seed, replies in zip((1, 2), requests, strict=True):
        images = [image(reply) for reply in replies.result()]
        from_old, from_new = (
            [images_agree(each, generate(name, seed)) for each in images] for name in ("one", "other")
        )
        assert all(one != other for one, other in zip(from_old, from_new, strict=True))
        assert from_old[0]
    for name, bundle in [("one", "other"), ("other", "one")] * 2:  # replicas open models on demand
        reply = cluster.post({"model": name, "prompt": "a", "seed": 4})
        assert images_agree(image(reply), generate(bundle, 4))
    until(lambda: len(cluster.replicas()) == 2 and not cluster.replicas().keys() & old)


def test_a_signal_lets_requests_finish(cluster: Cluster) -> None:
    with httpx.Client() as client, contextlib.closing(cluster.stream(client, LONG)) as reply:
        until(lambda: metric(cluster, "offcut_in_flight_requests") == 1)
        cluster.process.send_signal(signal.SIGTERM)
        until(lambda: cluster.get("/v2/health/ready").status_code == 503)
        refused = cluster.post({"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert events(reply)[-1]["type"] == "image_generation.completed"
    assert cluster.process.wait(LIMIT) == 0
