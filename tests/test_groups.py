"""``offcut build`` and ``offcut run`` for one model of each group in the README's table of families."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from elsewhere import save_as_optimum
from models import _lively
from PIL import Image
from unets import UNCONDITIONAL

from offcut.cli import main

pytestmark = pytest.mark.slow

Command = Callable[..., dict[str, Any]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The entry point of the command line; what it prints as JSON."""
    levels = [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]

    def run(*arguments: str | Path) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["offcut", *map(str, arguments), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code in (0, None), said.err
        return dict(json.loads(said.out))

    yield run
    for library, level in zip((diffusers, transformers), levels, strict=True):
        library.utils.logging.set_verbosity(level)
        library.utils.logging.enable_progress_bar()


@pytest.fixture
def made(command: Command, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Build a model, run the bundle at interval 3, and give the report of the run."""

    def run(model: Path, *asked: str | Path, built: tuple[str, ...] = (), output: str = "out.png") -> dict[str, Any]:
        bundle, file = tmp_path / "model.offcut", tmp_path / output
        report = command("build", model, "-o", bundle, "--engine", "onnxruntime", *built)
        assert [entry["verified"] for entry in report["engines"].values()] == [True]
        drawn = command(
            "run", bundle, *asked, "-o", file, "--steps", "6", "--interval", "3", "--warmup", "0", "--threads", "1"
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
    unet = _lively(diffusers.UNet2DModel(**UNCONDITIONAL))
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


def test_an_image_from_onnx_made_elsewhere(
    made: Callable[..., dict[str, Any]], small_pipeline_dir: Path, tmp_path: Path
) -> None:
    theirs = save_as_optimum(small_pipeline_dir, tmp_path / "onnx")
    assert made(theirs, "a red square")["frames"] == 1
