"""Images with and without caching: figures, pictures, the demo's table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import offcut
from offcut.errors import UserError
from offcut.runtime.images.compare import generate_to_file
from offcut.runtime.images.demo import DemoSetting, demo
from offcut.runtime.images.generate import generate
from offcut.runtime.images.metrics import psnr
from offcut.runtime.images.picture import Tile, difference, sheet
from offcut.runtime.images.request import ImageRequest


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[Any]:
    pipe = offcut.load(tiny_bundle, engine="onnxruntime", threads=1)
    yield pipe
    pipe.unet.close()


def test_psnr_of_known_errors() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert psnr(black, black) == math.inf
    assert psnr(black, grey) == pytest.approx(20 * math.log10(255 / 51))


def test_difference_is_brightened_and_clipped() -> None:
    picture = difference(Image.new("RGB", (2, 2), (10, 0, 0)), Image.new("RGB", (2, 2), (0, 100, 0)), gain=4)
    assert picture.getpixel((0, 0)) == (40, 255, 0)


def test_caching_changes_the_image_and_its_timeline(pipe: Any) -> None:
    request = ImageRequest("a cat", steps=6, seed=3)
    uncached = generate(pipe, request, None)
    again = generate(pipe, request, None)
    cached = generate(pipe, request, offcut.Uniform(3))
    assert psnr(uncached.image, again.image) == math.inf
    assert 15 < psnr(uncached.image, cached.image) < math.inf
    assert uncached.run.timeline == "######"
    assert cached.run.timeline == "#..#.."
    assert len(cached.run.seconds) == 6
    assert 0 < sum(cached.run.seconds) < cached.seconds


def test_on_step_is_called_for_every_step(pipe: Any) -> None:
    steps: list[int] = []
    generate(pipe, ImageRequest("a cat", steps=5), None, on_step=lambda: steps.append(1))
    assert len(steps) == 5


def test_the_timeline_is_drawn(pipe: Any) -> None:
    """Full calls are tall bars and shallow ones short, in the colours of the legend."""
    cached = generate(pipe, ImageRequest("a cat", steps=4), offcut.Uniform(2))
    picture = sheet([("a cat", [Tile(cached.image, "title", "note", cached.run)])])
    pixels = [
        picture.getpixel((x, y))
        for x in range(16, 16 + 256)
        for y in range(16 + 20 + 20 + 256, 16 + 20 + 20 + 256 + 22)
    ]
    full, shallow = (214, 92, 54), (86, 146, 166)
    assert 0 < pixels.count(shallow) < pixels.count(full)


def test_compare_writes_one_picture(pipe: Any, tmp_path: Path) -> None:
    output = tmp_path / "picture.png"
    report = generate_to_file(pipe, ImageRequest("a cat", steps=4), offcut.Uniform(2), None, output, compare=True)
    assert Image.open(output).width > 3 * 256
    assert report["speed_up"] == pytest.approx(report["uncached_seconds"] / report["seconds"])
    assert (report["full_calls"], report["shallow_calls"], report["cut"]) == (2, 2, "deepcache:0")


def test_an_unwritable_file_is_refused_before_generating(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        generate_to_file(pipe, ImageRequest("a cat", steps=4), None, None, tmp_path / "nowhere" / "picture.png")


def test_the_demos_figures_match_its_images(pipe: Any, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    result = demo(
        pipe,
        ["a cat", "a dog"],
        picture,
        steps=6,
        settings=(DemoSetting(2), DemoSetting(3), DemoSetting(3, 1.0)),
        warmup=1,
    )
    uncached, two, three, forecast = result.rows
    assert (uncached.full_calls, two.full_calls, three.full_calls) == (6, 3, 2)
    assert (forecast.full_calls, forecast.damping, three.damping) == (2, 1.0, None)
    assert forecast.psnr != three.psnr
    assert uncached.speed_up == 1
    assert uncached.psnr is None
    assert two.psnr_worst is not None
    assert two.psnr is not None
    assert two.psnr_worst <= two.psnr
    assert Image.open(picture).height > 2 * 256
