"""A pair of plans for families of image UNets, built for real, for a GPU that is not here.

Stable Diffusion's is ``test_compile``'s, Stable Video Diffusion's ``test_video``'s, that of ONNX made elsewhere
``engines/test_imported``'s. The exports are other tests' too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import offcut
from offcut.engines.sizes import Sizes

pytestmark = [pytest.mark.usefixtures("trt"), pytest.mark.slow]

SETTINGS = {"tensorrt-rtx": {"compute_capabilities": ("89",)}}


def add_plans(model: Path, bundle: Path, size: str, **asked: object) -> offcut.Bundle:
    """Compile what the bundle holds, at one size of images."""
    return offcut.build(
        model,
        bundle,
        engine="tensorrt-rtx",
        cuts=["deepcache:0"],
        profiles=Sizes(static=(size,)),
        settings=SETTINGS,
        **asked,  # type: ignore[arg-type]
    )


def check(bundle: offcut.Bundle) -> None:
    entry = bundle.entry("tensorrt-rtx")
    assert "deepcache:0" in entry.shallow
    for file in (entry.full, *entry.shallow.values()):
        assert (bundle.path / file).stat().st_size > 10_000
    assert [Path(name).name for name in entry.references] == ["reference-0.safetensors"]
    bundle.verify_files(entry.files)


@pytest.mark.parametrize("name", ["sd2", "inpaint", "sdxl", "refiner", "unconditional", "class", "ldm-class"])
def test_an_image_family(
    name: str, family_model: Callable[[str], Path], family_bundle: Callable[[str], Path], copied: Callable[[Path], Path]
) -> None:
    check(add_plans(family_model(name), copied(family_bundle(name)), "64x64"))


def test_cross_frame_attention(tiny_unet_dir: Path, tmp_path: Path) -> None:
    check(add_plans(tiny_unet_dir, tmp_path / "zero.offcut", "64x64", attention="cross-frame"))
