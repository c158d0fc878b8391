"""The facts and checks of a model, before anything is generated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from diffusers import HeunDiscreteScheduler

from offcut.engines.profiles import Profile
from offcut.errors import CutError, ShapeError, UserError
from offcut.runtime.server.models import ServedModel
from offcut.runtime.server.settings import ServeSettings

SLOT = 2 * 16 * 16 * 16 * 4
"""Bytes of cached features of a guided request of 64x64 pixels with deepcache:0: [2, 16, 16, 16] in fp32."""


class FromImages:
    def __call__(self, prompt: str, image: object) -> None: ...


class Videos:
    def __call__(self, prompt: str, num_frames: int) -> None: ...


@pytest.mark.parametrize("kind", [FromImages, Videos])
def test_pipelines_that_need_more_than_a_prompt_are_refused(kind: type) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__} does not generate images from prompts alone"):
        ServedModel(kind(), "x")


def test_sizes_must_fit_the_multiple_and_the_profiles(pipe: Any) -> None:
    model = ServedModel(pipe, "tiny", multiple=8)
    assert (model.size, model.multiple, model.scale) == ((64, 64), 32, 4)
    model.check_size(96, 32)
    for width, height, nearest in ((60, 64, 64), (64, 40, 32), (1, 64, 32)):
        with pytest.raises(ShapeError, match=f"the nearest is {nearest}"):
            model.check_size(width, height)
    sides = {"height": (8, 16, 16), "width": (8, 16, 24)}
    narrow = ServedModel(pipe, "tiny", multiple=8, profiles=[Profile.of({"batch": (1, 2, 8), **sides})])
    narrow.check_size(96, 32)
    with pytest.raises(ShapeError, match="no profile of these engines covers 64x96"):
        narrow.check_size(64, 96)


def test_cuts_must_be_those_of_the_engines(pipe: Any) -> None:
    model = ServedModel(pipe, "tiny")
    model.check_cut("paper:0", shallow=True)
    model.check_cut(None, shallow=True)
    with pytest.raises(CutError, match="it has deepcache:0"):
        model.check_cut("deepcache:11", shallow=False)
    model.cuts = ()
    model.check_cut(None, shallow=False)
    with pytest.raises(CutError, match="every call is full"):
        model.check_cut(None, shallow=True)


def test_the_number_of_calls_depends_on_the_scheduler(pipe: Any) -> None:
    assert ServedModel(pipe, "tiny").calls(4) == 4
    other = copy.copy(pipe)
    other.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert ServedModel(other, "tiny").calls(4) == 7
    with pytest.raises(UserError, match="does not take 2000 steps"):
        ServedModel(pipe, "tiny").calls(2000)


def test_the_warm_up_makes_full_and_shallow_calls_and_times_one(pipe: Any, gate: Any) -> None:
    model = ServedModel(pipe, "tiny")
    assert model.call_seconds(2, *model.size) == 0
    model.warm_up(5.0)
    assert gate.calls == 3
    assert pipe.unet.last_run.timeline == "##."
    assert not pipe.unet.record_times
    seconds, rows = model.timed_call
    assert 0 < seconds < 60
    assert rows == 2
    width, height = model.size
    assert model.call_seconds(2, width, height) == seconds
    assert model.call_seconds(4, 2 * width, height) == 8 * seconds  # twice the rows, and attention of twice the pixels
    assert pipe.unet.schedule is None
    assert pipe.unet.advise


def test_feature_bytes_agree_with_the_worker(pipe: Any, start_server: Any) -> None:
    assert ServedModel(pipe, "tiny").feature_bytes(None, 2, 64, 64) == SLOT
    few_steps = ServeSettings(steps=3, interval=3, warmup=0)
    for limit, status in ((SLOT, 200), (SLOT - 1, 422)):
        with start_server(few_steps, cache_bytes=limit) as server:
            assert server.post({"prompt": "a"}).status_code == status
            assert server.post({"prompt": "a", "guidance_scale": 1}).status_code == 200
