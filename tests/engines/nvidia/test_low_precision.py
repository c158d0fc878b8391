"""Real builds of plans in int8 and fp8, from fp16 graphs with rounded layers."""

from __future__ import annotations

from pathlib import Path

import pytest

import offcut
from offcut.errors import EngineError

from .conftest import STATIC

pytestmark = [pytest.mark.usefixtures("trt"), pytest.mark.slow]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_both_graphs_are_compiled(precision: str, tiny_unet_dir: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    bundle = offcut.build(
        tiny_unet_dir,
        tmp_path / "b",
        engine="tensorrt-rtx",
        precision=precision,
        profiles=[STATIC],
        settings={"tensorrt-rtx": {"compute_capabilities": ("89", "120")}},
        deploy=True,
        calibration=offcut.Calibration(samples=1, steps=2),
        progress=messages.append,
    )
    entry = bundle.entry("tensorrt-rtx", precision=precision)
    assert set(entry.shallow) == {"deepcache:0"}
    assert all((bundle.path / file).stat().st_size > 1000 for file in entry.files if file.endswith(".plan"))
    variant = bundle.manifest.variants[entry.variant]
    assert variant.quantization is not None
    assert (variant.precision, variant.quantization.base) == (precision, "fp16")
    assert {tensor.dtype for tensor in (variant.noise_pred, *variant.cuts[0].cached)} == {"float16"}
    assert "no text-to-image pipeline: calibrate on latents denoised from noise, with random conditioning" in messages


def test_fp8_is_for_nvidia_only(tiny_unet_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no CPU computes in fp8"):
        offcut.build(tiny_unet_dir, tmp_path / "b", engine="openvino", precision="fp8")
