"""Tuned schedules and forecasts, of a request or as the server's default; those that do not fit are refused."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import offcut
from offcut.errors import ScheduleError, UserError
from offcut.runtime.batching import Worker
from offcut.runtime.generation.forecast import Coefficients
from offcut.runtime.generation.schedule import SKIP, Uniform
from offcut.runtime.server.models import ServedModel
from offcut.runtime.server.service import WorkerService
from offcut.runtime.server.settings import ServeSettings
from offcut.runtime.tuning.artifact import Tuned, make_key, save
from offcut.runtime.tuning.document import ReportRow, TunedDocument

STEPS, GUIDANCE = 6, 5.0
FEW_STEPS = ServeSettings(steps=STEPS, interval=3, warmup=0, guidance=GUIDANCE)
CUT = "deepcache:1"
FULL = (0, 1, 4)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> offcut.Bundle:
    """A copy of the bundle with a hand-made tuned schedule for six steps at guidance 5."""
    copy = tmp_path_factory.mktemp("schedules") / "tiny.offcut"
    shutil.copytree(tiny_bundle, copy)
    opened = offcut.Bundle.open(copy)
    row = ReportRow(name="this", full_calls=3, shallow_calls=2, skipped_calls=1, speed_up=2.0, psnr=30.0, worst=25.0)
    document = TunedDocument(
        key=make_key(opened, pipe.scheduler, STEPS, (1.0, GUIDANCE)),
        cut=CUT,
        cuts=(None, None, CUT, SKIP, None, CUT),
        full=FULL,
        predictors=("full", "full", "fit", SKIP, "full", "reuse"),
        engine="onnxruntime",
        shallow_over_full=0.5,
        samples={"fit": 1, "select": 1, "test": 1},
        measured=(row,),
    )
    (feature,) = pipe.unet.cut_features[CUT]
    save(opened, Tuned("by-hand", document, {2: {feature: Coefficients(scale=0.75)}}))
    return offcut.Bundle.open(copy)


@pytest.fixture
def server(start_server: Any, bundle: offcut.Bundle) -> Iterator[Any]:
    with start_server(FEW_STEPS, bundle=bundle) as running:
        yield running


@pytest.fixture(scope="module")
def plain_pipe(tiny_bundle: Path) -> Iterator[Any]:
    """The same pipeline without a server."""
    loaded: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    loaded.set_progress_bar_config(disable=True)
    loaded.unet.advise = False
    yield loaded
    loaded.unet.close()


def generate(pipe: Any) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(1)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": generator}
    return np.asarray(pipe("a", **arguments).images[0])


def pixels(reply: Any) -> np.ndarray:
    from PIL import Image

    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))))


def test_a_forecast_gives_the_images_of_the_plain_pipeline(server: Any, plain_pipe: Any) -> None:
    images = {}
    for damping in (0.0, 1.0):
        plain_pipe.unet.set_schedule(Uniform(2), forecast=offcut.Extrapolate(damping))
        reply = server.post({"prompt": "a", "seed": 1, "interval": 2, "forecast": damping})
        images[damping] = pixels(reply)
        assert np.array_equal(images[damping], generate(plain_pipe))
        assert reply.json()["offcut"]["forecast"] == (None if not damping else "extrapolated, damping 1")
    assert not np.array_equal(images[0.0], images[1.0])


@pytest.mark.parametrize("name", ["auto", "tuned:by-hand"])
def test_a_tuned_schedule_gives_the_image_of_the_plain_pipeline(
    name: str, server: Any, plain_pipe: Any, bundle: offcut.Bundle
) -> None:
    Tuned.load(bundle, "by-hand").apply(plain_pipe.unet)
    reply = server.post({"prompt": "a", "seed": 1, "schedule": name})
    assert np.array_equal(pixels(reply), generate(plain_pipe))
    details = reply.json()["offcut"]
    assert (details["schedule"], details["timeline"], details["forecast"]) == ("tuned:by-hand", "##._#.", "tuned")
    assert (details["full_calls"], details["shallow_calls"], details["skipped_calls"]) == (3, 2, 1)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"schedule": "auto", "num_inference_steps": 5}, "schedule", "tuned for 6 steps, not 5"),
        ({"schedule": "tuned:by-hand", "guidance_scale": 9}, "schedule", "guidance 1 to 5, not 9"),
        ({"schedule": "tuned:other"}, "schedule", "it has by-hand"),
        ({"schedule": "auto", "forecast": 0.5}, "forecast", "has a forecast of its own"),
        ({"schedule": "auto", "warmup": 1}, "warmup", "has a warmup of its own"),
        ({"schedule": "auto", "cut": "deepcache:0"}, "cut", "has a cut of its own"),
        ({"interval": 1, "forecast": 0.5}, "forecast", "every call of this request is full"),
        ({"forecast": 1.5}, "forecast", "less than or equal to 1"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(fields: dict[str, Any], param: str, message: str, server: Any) -> None:
    before = server.service.worker.statistics().ticks
    reply = server.post({"prompt": "a", **fields})
    assert reply.status_code == 422
    error = reply.json()["error"]
    assert (error["param"], message in error["message"]) == (param, True), error
    assert "/" not in error["message"]
    assert server.service.worker.statistics().ticks == before


def test_the_default_schedule_applies_to_requests_without_one(start_server: Any, bundle: offcut.Bundle) -> None:
    with start_server(replace(FEW_STEPS, schedule="auto", forecast=1.0), bundle=bundle) as server:
        model = server.get("/v1/models").json()["data"][0]["offcut"]
        assert (model["tuned"], model["defaults"]["schedule"], model["defaults"]["forecast"]) == (
            ["by-hand"],
            "auto",
            1.0,
        )
        default, other = (server.post({"prompt": "a", **fields}).json()["offcut"] for fields in ({}, {"interval": 2}))
        assert (default["schedule"], default["forecast"]) == ("tuned:by-hand", "tuned")
        assert (other["timeline"], other["forecast"]) == ("#.#.#.", "extrapolated, damping 1")
        full = server.post({"prompt": "a", "interval": 1}).json()["offcut"]
        assert (full["timeline"], full["forecast"]) == ("######", None)
        refused = server.post({"prompt": "a", "num_inference_steps": 5})
        assert (refused.status_code, "tuned for 6 steps" in refused.text) == (422, True)


def test_the_default_schedule_may_be_a_list_of_steps(start_server: Any) -> None:
    with start_server(replace(FEW_STEPS, schedule="steps:0,3")) as server:
        assert server.post({"prompt": "a"}).json()["offcut"]["timeline"] == "#..#.."
        assert server.post({"prompt": "a", "warmup": 2}).json()["offcut"]["timeline"] == "##.#.."
        assert "no tuned schedule" in server.post({"prompt": "a", "schedule": "auto"}).text


def test_a_default_schedule_that_does_not_fit_is_refused_at_start(pipe: Any, bundle: offcut.Bundle) -> None:
    model = ServedModel(pipe, "tiny", multiple=8, bundle=bundle)
    with Worker(pipe, max_in_flight=1) as worker:
        for wrong in ({"steps": 5}, {"guidance": 9.0}, {"schedule": "tuned:x"}, {"schedule": "quad:2:center=9"}):
            with pytest.raises(UserError, match="the server's default schedule does not fit"):
                WorkerService(worker, model, replace(FEW_STEPS, **{"schedule": "auto", **wrong}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="damping is 2"):
        replace(FEW_STEPS, forecast=2.0)
    with pytest.raises(ScheduleError, match="no tuned schedule"):
        ServedModel(pipe, "tiny", multiple=8).tuned_for(None, STEPS, GUIDANCE)


def test_a_forecast_needs_twice_the_memory(pipe: Any, start_server: Any, bundle: offcut.Bundle) -> None:
    once = ServedModel(pipe, "tiny").feature_bytes(None, 2, 64, 64)
    assert ServedModel(pipe, "tiny").feature_bytes(None, 2, 64, 64, schedule=Uniform(2), forecast=True) == 2 * once
    mixed = Tuned.load(bundle, "by-hand").document.model_copy(
        update={"cuts": (None, None, CUT, "deepcache:0", None, CUT)}
    )
    both = ServedModel(pipe, "tiny").feature_bytes(CUT, 2, 64, 64, schedule=mixed.schedule)
    assert both == once + ServedModel(pipe, "tiny").feature_bytes(CUT, 2, 64, 64)
    with start_server(FEW_STEPS, cache_bytes=2 * once - 1) as server:
        assert server.post({"prompt": "a"}).status_code == 200
        assert server.post({"prompt": "a", "forecast": 0.5}).status_code == 422
