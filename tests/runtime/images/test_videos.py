"""``offcut run`` on video pipelines: arguments of the pipeline, and the written file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import offcut
from offcut.errors import UserError
from offcut.runtime.images.compare import generate_to_file
from offcut.runtime.images.image_files import save
from offcut.runtime.images.metrics import psnr_of_frames
from offcut.runtime.images.request import ImageRequest, pipeline_arguments

SMALL = ImageRequest(None, steps=4, guidance=None, height=32, width=32)


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (80 * index, 0, 0)) for index in range(count)]


@pytest.fixture(scope="module")
def svd(video_bundle: Callable[[str], Path]) -> Iterator[Any]:
    pipe = offcut.load(video_bundle("svd"), "onnxruntime", threads=1)
    yield pipe
    pipe.unet.close()


@pytest.fixture
def start(tmp_path: Path) -> Path:
    file = tmp_path / "start.png"
    Image.linear_gradient("L").resize((32, 32)).save(file)
    return file


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif"])
def test_several_pictures_become_an_animation_with_the_frame_rate(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"out{suffix}"
    save(pictures(3), file, fps=10)
    with Image.open(file) as read:
        assert read.n_frames == 3
        read.seek(2)
        assert read.convert("RGB").getpixel((4, 4)) == (160, 0, 0)
        assert read.info["duration"] == 100


def test_the_psnr_of_a_video_is_over_all_frames() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert psnr_of_frames([black, black], [black, grey]) == pytest.approx(
        psnr_of_frames([black], [grey]) + 3.0103, abs=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("compare", [False, True])
def test_a_video_is_generated_from_an_image_and_written(compare: bool, svd: Any, start: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gif"
    request = replace(SMALL, image=start, frames=4)
    steps: list[None] = []
    report = generate_to_file(
        svd, request, offcut.Uniform(2), None, output, compare=compare, on_step=lambda: steps.append(None)
    )
    assert (report["frames"], report["timeline"], report["calls"]) == (4, "#.#.", 4)
    assert len(steps) == (8 if compare else 4)
    with Image.open(output) as read:
        assert read.n_frames == 4
        assert read.width > 3 * 256 if compare else read.size == (32, 32)


@pytest.mark.slow
def test_a_video_is_generated_from_a_prompt(video_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("animatediff", "text-to-video"):
        pipe = offcut.load(video_bundle(name), "onnxruntime", threads=1)
        report = generate_to_file(
            pipe, replace(SMALL, prompt="a cat", frames=3), offcut.Uniform(2), None, tmp_path / "out.png"
        )
        assert (report["frames"], report["timeline"]) == (3, "#.#.")
        with Image.open(tmp_path / "out.png") as read:
            assert read.n_frames == 3
        pipe.unet.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "StableVideoDiffusionPipeline starts from an image: give its file with --image"),
        ({"prompt": "a cat", "image": Path("x.png")}, "StableVideoDiffusionPipeline takes no prompt: leave it out"),
        ({"image": Path("nowhere.png")}, "cannot read nowhere.png: No such file or directory; give another image"),
    ],
)
def test_a_request_that_does_not_fit_the_pipeline_is_refused(change: dict[str, Any], sentence: str, svd: Any) -> None:
    with pytest.raises(UserError) as caught:
        pipeline_arguments(svd, replace(SMALL, **change))
    assert str(caught.value) == sentence


@pytest.mark.slow
def test_a_file_that_cannot_hold_a_video_is_refused_before_generating(svd: Any, start: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a video cannot be written to .*out\.jpg: give the file the suffix \.png, \.webp, \.gif"
    ):
        generate_to_file(svd, replace(SMALL, image=start), None, None, tmp_path / "out.jpg")
    assert not (tmp_path / "out.jpg").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"frames": 3, "prompt": "a cat"}, "StableDiffusionPipeline takes no frames: leave it out"),
        ({}, "StableDiffusionPipeline generates from a prompt: give one"),
    ],
)
def test_an_image_has_no_frames_and_needs_a_prompt(change: dict[str, Any], sentence: str, tiny_bundle: Path) -> None:
    pipe = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    with pytest.raises(UserError) as caught:
        pipeline_arguments(pipe, replace(SMALL, **change))
    assert str(caught.value) == sentence
    pipe.unet.close()
