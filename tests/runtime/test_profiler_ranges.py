"""Ranges of a profiler around full and shallow calls, and between them."""

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


def ranges_of(profile: torch.profiler.profile) -> list[tuple[str, float, float]]:
    """offcut's ranges as (name, begin, end), in the order of their beginnings."""
    ranges = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events() if e.name.startswith("offcut")]
    return sorted(ranges, key=lambda entry: entry[1])


def cpu_profile() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def test_a_generation_is_full_and_shallow_calls_with_the_scheduler_between(unet: offcut.UNet) -> None:
    unet.set_schedule(offcut.Uniform(2))
    with cpu_profile() as profile, unet.generation(calls=4):
        for timestep in (9, 6, 3, 0):
            call(unet, timestep)
    ranges = ranges_of(profile)
    assert [name for name, _, _ in ranges] == [FULL, SCHEDULER, SHALLOW, SCHEDULER] * 2
    for (_, _, end), (_, begin, _) in pairwise(ranges):
        assert end <= begin


def test_unannounced_calls_have_no_scheduler_range(unet: offcut.UNet) -> None:
    """The end of such a generation is unknown, so the time after a call may not be the scheduler's."""
    with cpu_profile() as profile:
        for timestep in (9, 6):
            call(unet, timestep)
    assert SCHEDULER not in {name for name, _, _ in ranges_of(profile)}


def test_a_call_that_fails_closes_its_range(unet: offcut.UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("the engine broke")

    call(unet, 9)
    assert unet.bound is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(unet.bound), "full", broken)
        with cpu_profile() as profile, pytest.raises(RuntimeError, match="the engine broke"), unet.generation(calls=1):
            call(unet, 9)
    assert [name for name, _, _ in ranges_of(profile)] == [FULL]
