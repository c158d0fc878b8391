"""``offcut bench controlnet`` on the shapes model: rows, passes, invalid input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.results import result
from typer.testing import CliRunner

import offcut
from offcut.benchmarks.controlnet import pipelines, settings
from offcut.benchmarks.controlnet.evaluate import evaluate
from offcut.benchmarks.report.page import write_report
from offcut.benchmarks.schema.controlnet import ControlNetReuse
from offcut.benchmarks.shapes.model import control_path, model_path
from offcut.cli.bench import app
from offcut.errors import UserError

pytestmark = pytest.mark.slow
STEPS = 7
COMPARED = settings.compared_settings([3], 2)


@pytest.fixture(scope="module")
def bundle(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    def build(path: Path) -> None:
        offcut.build(model_path(), path, engine="onnxruntime", adapters=["controlnet"])

    return once("shapes-controlnet.offcut", build)


@pytest.fixture(scope="module")
def pipes(bundle: Path) -> Iterator[pipelines.Pipelines]:
    unet = offcut.UNet.load(bundle, threads=1)
    yield pipelines.Pipelines(unet, model_path(), control_path())
    unet.close()


@pytest.fixture(scope="module")
def task() -> settings.SceneTask:
    return settings.task(3, steps=STEPS, guidance=3.0, seed=0, batch=2)


@pytest.fixture(scope="module")
def whole(pipes: pipelines.Pipelines, task: settings.SceneTask) -> ControlNetReuse:
    return evaluate(pipes, task, COMPARED, rounds=2, model="shapes", controlnet="control")


def test_each_setting_has_its_calls_and_passes(whole: ControlNetReuse) -> None:
    calls = {row.name: (row.full_calls, row.shallow_calls, row.passes) for row in whole.rows}
    assert calls == {
        "uncached without ControlNet": (7, 0, 0),
        "uncached": (7, 0, 7),
        "interval 3": (3, 4, 7),  # ##..#..
        "interval 3, ControlNet reused": (3, 4, 3),
    }
    assert whole.images == 3
    assert whole.scheduler == "DDIMScheduler"


def test_figures_depend_on_the_kind_of_row(whole: ControlNetReuse) -> None:
    plain, uncached, cached, reused = whole.rows
    assert plain.psnr is uncached.psnr is plain.change is uncached.change is cached.change is None
    assert cached.psnr is not None
    assert reused.psnr is not None
    assert reused.change is not None
    assert reused.change.psnr.mean == pytest.approx(reused.psnr.mean - cached.psnr.mean)
    assert reused.change.overlap.mean == pytest.approx(reused.overlap.mean - cached.overlap.mean)
    for row in whole.rows:
        assert len(row.seconds) == len(row.controlnet_seconds) == 2
        assert 0 < row.overlap.mean <= 1
        assert row.to_uncached is not None
    assert uncached.to_uncached == 1
    assert plain.share == 0
    assert uncached.share is not None
    assert 0 < uncached.share < 1
    assert 0.8 < whole.drawn_overlap < 1


def test_each_setting_generates_other_images(pipes: pipelines.Pipelines, task: settings.SceneTask) -> None:
    images = [pipelines.generate_images(pipes, task, way, lambda count: None).pictures for way in COMPARED]
    for one, other in pairwise(images):
        assert not np.array_equal(one, other)


def test_a_run_without_rounds_has_no_times(
    pipes: pipelines.Pipelines, task: settings.SceneTask, whole: ControlNetReuse
) -> None:
    second = evaluate(pipes, task, COMPARED, rounds=0, model="shapes", controlnet="control")
    untimed = [
        row.model_copy(update={"seconds": [], "controlnet_seconds": [], "to_uncached": None}) for row in whole.rows
    ]
    assert second.rows == untimed
    assert second.rows[1].share is None


def test_the_page_shows_every_row(whole: ControlNetReuse, tmp_path: Path) -> None:
    page = write_report([result(controlnet=whole)], tmp_path).read_text(encoding="utf-8")
    for row in whole.rows:
        assert f">{row.name}<" in page
    assert "3 of 7" in page


def test_the_command_writes_its_result(bundle: Path, tmp_path: Path) -> None:
    arguments = ["controlnet", str(bundle), "-o", str(tmp_path), "--images", "2", "--steps", "4", "--interval", "2"]
    done = CliRunner().invoke(app, [*arguments, "--warmup", "0", "--rounds", "1", "--threads", "1", "--json"])
    assert done.exit_code == 0, done.output
    measured = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["controlnet"]
    assert [row["passes"] for row in measured["rows"]] == [0, 4, 4, 2]
    assert (tmp_path / "report.html").exists()


def test_a_directory_without_a_controlnet_is_refused(pipes: pipelines.Pipelines, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no ControlNet"):
        pipelines.Pipelines(pipes.unet, model_path(), tmp_path)
