"""Real builds of a video UNet's plans, for a GPU that this machine does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import offcut
from offcut.engines.builder.request import Sizes

pytestmark = [pytest.mark.usefixtures("trt"), pytest.mark.slow]


def test_stable_video_diffusion_is_built_for_its_trained_number_of_frames(
    video_dir: Callable[[str], Path], video_bundle: Callable[[str], Path], copied: Callable[[Path], Path]
) -> None:
    bundle = offcut.build(
        video_dir("svd"),
        copied(video_bundle("svd")),
        engine="tensorrt-rtx",
        cuts=["deepcache:0"],
        profiles=Sizes(static=("32x32",), dynamic="32..64"),
        settings={"tensorrt-rtx": {"compute_capabilities": ("89",)}},
    )
    entry = bundle.entry("tensorrt-rtx")
    static, dynamic = (entry.profiles[index].profile() for index in range(2))
    assert static.opt == {"batch": 2, "frames": 3, "height": 4, "width": 4}
    assert (dynamic.min["frames"], dynamic.max["frames"], dynamic.max["batch"]) == (3, 3, 2)
    for file in (entry.full, *entry.shallow.values()):
        assert (bundle.path / file).stat().st_size > 10_000
    bundle.verify_files()
