from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import offcut
from offcut.runtime.profiler_ranges import FULL, SCHEDULER, SHALLOW


@pytest.fixture(scope="module")
def unet(unet_bundle: Path) -> Iterator[offcut.UNet]:
    opened = offcut.UNet.load(unet_bundle, "onnxruntime", threads=1)
    yield opened
    opened.close()


def call(unet: offcut.UNet, timestep: int) -> None:
    unet(torch.ones(1, 4, 8, 8), timestep, torch.ones(1, 7, 16))


def named(profile: torch.profiler.profile) -> list[tuple[str, float, float]]:
    """offcut's ranges as (name, begin, end), in the order of their beginnings."""
    found = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events() if e.name.startswith("offcut")]
    return sorted(found, key=lambda entry: entry[1])


def profiled() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def test_a_generation_is_full_and_shallow_calls_with_the_scheduler_between(unet: offcut.UNet) -> None:
    unet.set_schedule(offcut.Uniform(2))
    with profiled() as profile, unet.generation(calls=4):
        for timestep in (9, 6, 3, 0):
            call(unet, timestep)
    ranges = named(profile)
    assert [name for name, _, _ in ranges] == [FULL, SCHEDULER, SHALLOW, SCHEDULER] * 2
    for (_, _, end), (_, begin, _) in pairwise(ranges):
        assert end <= begin


def test_unannounced_calls_have_no_scheduler_range(unet: offcut.UNet) -> None:
    """Nobody says when such a generation ends, so the time after a call may be anything."""
    with profiled() as profile:
        for timestep in (9, 6):
            call(unet, timestep)
    assert SCHEDULER not in {name for name, _, _ in named(profile)}


def test_a_call_that_fails_closes_its_range(unet: offcut.UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("the engine broke")

    call(unet, 9)
    assert unet.bound is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(unet.bound), "full", broken)
        with profiled() as profile, pytest.raises(RuntimeError, match="the engine broke"), unet.generation(calls=1):
            call(unet, 9)
    assert [name for name, _, _ in named(profile)] == [FULL]
