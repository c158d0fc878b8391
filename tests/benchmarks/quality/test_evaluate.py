"""``offcut bench quality`` on the shapes model: rows, images, continued runs, invalid input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import offcut
from offcut.benchmarks import record
from offcut.benchmarks.quality import pictures, plan, pool
from offcut.benchmarks.quality.evaluate import evaluate
from offcut.benchmarks.quality.pictures import ImageTask
from offcut.benchmarks.schema.quality import Quality
from offcut.benchmarks.shapes.model import model_path
from offcut.cli.bench import app
from offcut.errors import UserError

pytestmark = pytest.mark.slow
pytest.importorskip("torchmetrics")

SETTINGS = plan.with_fewer_steps(
    [*plan.product_plan(8, ["ddim", "euler ancestral"], ["uniform"], [3], ["deepcache:0"], [0])], plan.SHALLOW_OVER_FULL
)


@pytest.fixture(scope="module")
def pipe(shapes_bundle: Path) -> Any:
    return offcut.load(shapes_bundle, threads=1)


@pytest.fixture(scope="module")
def task() -> ImageTask:
    return ImageTask(pictures.prompts(6, 1000), guidance=3.0, seed=0, batch=4, identity="test")


@pytest.fixture(scope="module")
def whole(pipe: Any, task: ImageTask, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Quality]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(pipe, task, SETTINGS, folder, ratios=plan.SHALLOW_OVER_FULL, model="shapes")


def test_each_row_has_its_figures_and_pictures(whole: tuple[Path, Quality], task: ImageTask) -> None:
    folder, quality = whole
    assert [row.kind for row in quality.rows] == ["uncached"] * 2 + ["cached"] * 2 + ["fewer steps"] * 2
    assert quality.sample_prompts == list(task.prompts[:4])
    for row in quality.rows:
        assert (row.full_calls, row.shallow_calls) == (row.timeline.count("#"), row.timeline.count("."))  # type: ignore[union-attr]
        assert row.full_calls + row.shallow_calls == row.steps
        assert row.images == 6
        assert row.accuracy is not None
        assert row.frechet is not None
        if row.kind == "uncached":
            assert row.psnr is None
        else:
            assert row.psnr is not None
            assert row.psnr_worst is not None
            assert row.psnr_worst <= row.psnr.mean < 60
            assert row.ssim is not None
            assert row.distance is not None
            assert 0 < row.ssim.mean < 1
            assert row.distance.mean > 0
        for name in row.samples:
            assert Image.open(folder / name).size == (64, 64)
    assert 0 < quality.ratios_here["deepcache:0"] < 1


def test_an_image_does_not_depend_on_its_place_in_a_batch(pipe: Any, task: ImageTask, tmp_path: Path) -> None:
    small = ImageTask(task.prompts, task.guidance, task.seed, 1, task.identity)
    for setting in SETTINGS[1:3]:
        together = pictures.make(pipe, task, setting, tmp_path).pictures
        alone = pictures.make(pipe, small, setting, tmp_path).pictures
        assert np.abs(together.astype(int) - alone).max() <= 1


def test_the_uncached_images_are_those_of_diffusers(pipe: Any, whole: tuple[Path, Quality], task: ImageTask) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    eager = StableDiffusionPipeline.from_pretrained(model_path())
    eager.set_progress_bar_config(disable=True)
    images = eager(
        list(task.prompts[:2]),
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(index) for index in range(2)],
        output_type="np",
    ).images
    stored = pictures.make(pipe, task, SETTINGS[0], whole[0] / "pictures").pictures[:2]
    assert np.abs(np.rint(images * 255) - stored).max() <= 2


def test_an_interrupted_run_continues_with_the_same_result(
    pipe: Any, task: ImageTask, whole: tuple[Path, Quality], tmp_path: Path
) -> None:
    calls = []

    def cut_off(count: int) -> None:
        calls.append(count)
        if len(calls) == 20:  # in the second row
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, task, SETTINGS, tmp_path, ratios=plan.SHALLOW_OVER_FULL, model="shapes", on_call=cut_off)
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    assert len(stored) == 1
    continued = evaluate(pipe, task, SETTINGS, tmp_path, ratios=plan.SHALLOW_OVER_FULL, model="shapes")
    assert all(path.stat().st_mtime_ns == written for path, written in stored.items())
    for setting in SETTINGS:
        first, second = (pictures.make(None, task, setting, folder / "pictures") for folder in (whole[0], tmp_path))
        assert (first.pictures == second.pictures).all()
    for one, other in zip(whole[1].rows, continued.rows, strict=True):
        assert (one.name, one.timeline, one.samples) == (other.name, other.timeline, other.samples)
        assert one.frechet == pytest.approx(other.frechet, rel=1e-4)
        for name in ("psnr", "ssim", "distance", "accuracy"):
            first_figure, second_figure = getattr(one, name), getattr(other, name)
            if first_figure is not None:
                assert first_figure.model_dump() == pytest.approx(second_figure.model_dump(), rel=1e-4), name


def test_the_command_writes_a_result_and_generates_nothing_twice(shapes_bundle: Path, tmp_path: Path) -> None:
    arguments = [
        "quality",
        str(shapes_bundle),
        "-o",
        str(tmp_path / "out"),
        "--images",
        "3",
        "--steps",
        "8",
        "--interval",
        "4",
    ]
    arguments += ["--engine", "onnxruntime", "--threads", "1", "--json"]
    first = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    result = record.read(tmp_path / "out")
    assert result.quality is not None
    assert [row.kind for row in result.quality.rows] == ["uncached", "cached", "fewer steps"]
    printed = json.loads(first.stdout)
    assert printed["quality"]["rows"][1]["interval"] == 4
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").iterdir()}
    second = CliRunner().invoke(app, arguments[:-1], catch_exceptions=False)
    assert second.exit_code == 0
    assert "uniform:4" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_several_processes_generate_the_same_images_as_one(
    pipe: Any, shapes_bundle: Path, task: ImageTask, tmp_path: Path
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    for setting in SETTINGS[1:3]:
        pictures.make(pipe, task, setting, one)
    calls: list[int] = []
    options = {"workers": 2, "threads": 1, "on_call": calls.append}
    pool.make(shapes_bundle, "onnxruntime", task, SETTINGS[1:3], several, **options)  # type: ignore[arg-type]
    assert sum(calls) == sum(6 * setting.steps for setting in SETTINGS[1:3])
    for setting in SETTINGS[1:3]:
        first, second = (pictures.make(None, task, setting, folder) for folder in (one, several))
        assert first.timeline == second.timeline
        assert (first.pictures == second.pictures).all()
    pool.make(shapes_bundle, "no engine", task, SETTINGS[1:3], several, workers=2)  # all images exist


def test_the_error_of_a_process_is_raised_in_the_caller(shapes_bundle: Path, task: ImageTask, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another directory"):
        pool.make(shapes_bundle, "onnxruntime", task, SETTINGS[:2], tmp_path / "file", workers=2, threads=1)


def test_a_dry_run_lists_the_settings_and_generates_nothing(shapes_bundle: Path, tmp_path: Path) -> None:
    arguments = [
        "quality",
        str(shapes_bundle),
        "-o",
        str(tmp_path / "out"),
        "--dry-run",
        "--interval",
        "4",
        "--images",
        "2",
    ]
    result = CliRunner().invoke(app, [*arguments, "--engine", "onnxruntime", "--steps", "8"], catch_exceptions=False)
    assert result.exit_code == 0
    assert re.search(r"3 settings \(1 uncached, 1 cached, 1 fewer steps\) of 2 images", result.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "heun"], "is not a sampler of this benchmark"),
        (["--plan", "full", "--sampler", "heun"], "is not a sampler of this benchmark"),
        (["--plan", "quick", "--sampler", "dpm++ 2m"], "this plan has ddim, euler ancestral"),
        (["--plan", "full", "--interval", "3"], "leave it or them out"),
        (["--shallow-ratio", "deepcache:0=2"], "between 0 and 1"),
        (["--cut", "nowhere:1"], "nowhere"),
        (["--latency", "absent.json"], "cannot read"),
        (["--fid", "absent.pt"], "TorchScript"),
        (["--lpips", "absent.pth"], "torchvision"),
    ],
)
def test_invalid_input_is_refused_in_one_sentence(
    shapes_bundle: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    command = ["quality", str(shapes_bundle), "-o", str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code != 0
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
