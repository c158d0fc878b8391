"""Fixtures: two bundles whose images differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offcut


@pytest.fixture(scope="session")
def one_bundle(small_pipeline_dir: Path, once: Any) -> Path:
    """``small_pipeline_dir`` built for ONNX Runtime."""
    return once("one.offcut", lambda path: offcut.build(small_pipeline_dir, path, engine="onnxruntime"))


@pytest.fixture(scope="session")
def other_bundle(small_pipeline_dir: Path, once: Any) -> Path:
    """The same model with the last layer negated, so that its images differ."""

    def build(path: Path) -> None:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(small_pipeline_dir)
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(-1.0)
        pipe.save_pretrained(path / "model")
        offcut.build(path / "model", path / "other.offcut", engine="onnxruntime")

    return once("other", build) / "other.offcut"
