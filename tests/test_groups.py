"""``offcut build`` and ``offcut run`` for one model of each group in the README's table of families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from support.foreign import save_as_optimum
from support.models import with_lively_weights
from support.unets import UNCONDITIONAL

pytestmark = pytest.mark.slow


@pytest.fixture
def build_and_run(command: Callable[..., str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that builds a model, runs the bundle at interval 3, and returns the report of the run."""

    def run(model: Path, *arguments: str | Path, output: str = "out.png") -> dict[str, Any]:
        bundle, file = tmp_path / "model.offcut", tmp_path / output
        build_report = json.loads(command("build", model, "-o", bundle, "--engine", "onnxruntime", "--json"))
        assert [entry["verified"] for entry in build_report["engines"].values()] == [True]
        schedule = ("--steps", "6", "--interval", "3", "--warmup", "0")
        report: dict[str, Any] = json.loads(
            command("run", bundle, *arguments, "-o", file, *schedule, "--threads", "1", "--json")
        )
        assert report["timeline"] == "#..#.."
        with Image.open(file) as picture:
            assert getattr(picture, "n_frames", 1) == report["frames"]
        return report

    return run


def test_an_image_from_a_prompt(build_and_run: Callable[..., dict[str, Any]], small_pipeline_dir: Path) -> None:
    assert build_and_run(small_pipeline_dir, "a red square")["frames"] == 1


def test_an_image_from_noise_alone(build_and_run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = with_lively_weights(diffusers.UNet2DModel(**UNCONDITIONAL))
    diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler()).save_pretrained(tmp_path / "model")
    assert build_and_run(tmp_path / "model")["frames"] == 1


def test_a_video(build_and_run: Callable[..., dict[str, Any]], video_dir: Callable[[str], Path]) -> None:
    size = ("--frames", "3", "--height", "32", "--width", "32")
    assert build_and_run(video_dir("text-to-video"), "a cat", *size, output="out.gif")["frames"] == 3


def test_an_image_with_a_controlnet(
    build_and_run: Callable[..., dict[str, Any]], small_pipeline_dir: Path, tmp_path: Path
) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(small_pipeline_dir)
    torch.manual_seed(1)
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 16))
    diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net, requires_safety_checker=False
    ).save_pretrained(tmp_path / "model")
    Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "edges.png")
    assert build_and_run(tmp_path / "model", "a red square", "--image", tmp_path / "edges.png")["frames"] == 1


def test_an_image_from_foreign_onnx(
    build_and_run: Callable[..., dict[str, Any]], small_pipeline_dir: Path, tmp_path: Path
) -> None:
    model = save_as_optimum(small_pipeline_dir, tmp_path / "onnx")
    assert build_and_run(model, "a red square")["frames"] == 1
