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
def made(command: Callable[..., str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Build a model, run the bundle at interval 3, and give the report of the run."""

    def run(model: Path, *asked: str | Path, built: tuple[str, ...] = (), output: str = "out.png") -> dict[str, Any]:
        bundle, file = tmp_path / "model.offcut", tmp_path / output
        said = command("build", model, "-o", bundle, "--engine", "onnxruntime", *built, "--json")
        report = json.loads(said)
        assert [entry["verified"] for entry in report["engines"].values()] == [True]
        schedule = ("--steps", "6", "--interval", "3", "--warmup", "0")
        drawn: dict[str, Any] = json.loads(
            command("run", bundle, *asked, "-o", file, *schedule, "--threads", "1", "--json")
        )
        assert drawn["timeline"] == "#..#.."
        with Image.open(file) as picture:
            assert getattr(picture, "n_frames", 1) == drawn["frames"]
        return drawn

    return run


def test_an_image_from_a_prompt(made: Callable[..., dict[str, Any]], small_pipeline_dir: Path) -> None:
    assert made(small_pipeline_dir, "a red square")["frames"] == 1


def test_an_image_from_noise_alone(made: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = with_lively_weights(diffusers.UNet2DModel(**UNCONDITIONAL))
    diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler()).save_pretrained(tmp_path / "model")
    assert made(tmp_path / "model")["frames"] == 1


def test_a_video(made: Callable[..., dict[str, Any]], video_dir: Callable[[str], Path]) -> None:
    size = ("--frames", "3", "--height", "32", "--width", "32")
    assert made(video_dir("text-to-video"), "a cat", *size, output="out.gif")["frames"] == 3


def test_an_image_under_a_controlnet(
    made: Callable[..., dict[str, Any]], small_pipeline_dir: Path, tmp_path: Path
) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(small_pipeline_dir)
    torch.manual_seed(1)
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 16))
    diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net, requires_safety_checker=False
    ).save_pretrained(tmp_path / "model")
    Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "edges.png")
    assert made(tmp_path / "model", "a red square", "--image", tmp_path / "edges.png")["frames"] == 1


def test_an_image_from_foreign_onnx(
    made: Callable[..., dict[str, Any]], small_pipeline_dir: Path, tmp_path: Path
) -> None:
    theirs = save_as_optimum(small_pipeline_dir, tmp_path / "onnx")
    assert made(theirs, "a red square")["frames"] == 1
