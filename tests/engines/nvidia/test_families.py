"""Real builds of plans for every family of the README's table, for a GPU that this machine does not have.

``test_compile`` builds Stable Diffusion, ``test_video`` Stable Video Diffusion, and ``builder/test_foreign`` foreign
ONNX. Other tests use the same exports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from support.ip_adapters import save_ip_adapter

import offcut
from offcut.engines.builder.request import Sizes
from offcut.engines.profiles import Profile

pytestmark = [pytest.mark.usefixtures("trt"), pytest.mark.slow]

SETTINGS = {"tensorrt-rtx": {"compute_capabilities": ("89",)}}


def add_plans(model: Path, bundle: Path, size: str, **options: object) -> offcut.Bundle:
    """Compile the bundle's graphs for one image size."""
    return offcut.build(
        model,
        bundle,
        engine="tensorrt-rtx",
        cuts=["deepcache:0"],
        profiles=Sizes(static=(size,)),
        settings=SETTINGS,
        **options,  # type: ignore[arg-type]
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


@pytest.mark.parametrize("name", ["animatediff", "text-to-video"])
def test_a_video_family(
    name: str, video_dir: Callable[[str], Path], video_bundle: Callable[[str], Path], copied: Callable[[Path], Path]
) -> None:
    sizes = {"batch": 2, "frames": 3, "height": 8, "width": 8, "sequence": 7}
    bundle = offcut.build(
        video_dir(name),
        copied(video_bundle(name)),
        engine="tensorrt-rtx",
        cuts=["deepcache:0"],
        profiles=[Profile.of({dim: (size,) * 3 for dim, size in sizes.items()})],
        settings=SETTINGS,
    )
    check(bundle)


def test_every_adapter_in_one(tiny_unet_dir: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_unet_dir)
    images = [
        save_ip_adapter(tmp_path / "plain.safetensors", unet, seed=1),
        save_ip_adapter(tmp_path / "plus.safetensors", unet, seed=2, plus=True),
    ]
    bundle = add_plans(
        tiny_unet_dir,
        tmp_path / "adapters.offcut",
        "64x64",
        adapters=["controlnet", "t2i-adapter"],
        ip_adapters=images,
    )
    check(bundle)
    (variant,) = bundle.manifest.variants.values()
    names = {tensor.name for tensor in variant.inputs}
    assert {"mid_block_residual", "down_block_residual_0", "down_intrablock_residual_0", "image_embeds_1"} <= names
    (log,) = bundle.path.rglob("build.log")
    assert not any(path in log.read_text() for path in (str(Path(tempfile.gettempdir(), "offcut-")), "site-packages"))


def test_cross_frame_attention(tiny_unet_dir: Path, tmp_path: Path) -> None:
    check(add_plans(tiny_unet_dir, tmp_path / "zero.offcut", "64x64", attention="cross-frame"))
