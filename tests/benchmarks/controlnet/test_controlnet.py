"""``offcut bench controlnet`` on the shapes model: rows, passes, going on after a cut, bad input."""

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
    return settings.task(3, steps=STEPS, guidance=3.0, seed=0, batch=2, identity="test")


@pytest.fixture(scope="module")
def whole(
    pipes: pipelines.Pipelines, task: settings.SceneTask, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ControlNetReuse]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(pipes, task, COMPARED, folder, rounds=2, model="shapes", controlnet="control")


def test_each_way_has_its_calls_and_passes(whole: tuple[Path, ControlNetReuse]) -> None:
    _, measured = whole
    calls = {row.name: (row.full_calls, row.shallow_calls, row.passes) for row in measured.rows}
    assert calls == {
        "uncached without ControlNet": (7, 0, 0),
        "uncached": (7, 0, 7),
        "interval 3": (3, 4, 7),  # ##..#..
        "interval 3, ControlNet reused": (3, 4, 3),
    }
    assert measured.images == 3
    assert measured.scheduler == "DDIMScheduler"


def test_each_row_has_the_figures_that_are_its_own(whole: tuple[Path, ControlNetReuse]) -> None:
    _, measured = whole
    plain, uncached, cached, reused = measured.rows
    assert plain.psnr is uncached.psnr is plain.change is uncached.change is cached.change is None
    assert cached.psnr is not None
    assert reused.psnr is not None
    assert reused.change is not None
    assert reused.change.psnr.mean == pytest.approx(reused.psnr.mean - cached.psnr.mean)
    assert reused.change.overlap.mean == pytest.approx(reused.overlap.mean - cached.overlap.mean)
    for row in measured.rows:
        assert len(row.seconds) == len(row.controlnet_seconds) == 2
        assert 0 < row.overlap.mean <= 1
        assert row.to_uncached is not None
    assert uncached.to_uncached == 1
    assert plain.share == 0
    assert uncached.share is not None
    assert 0 < uncached.share < 1
    assert 0.8 < measured.drawn_overlap < 1


def test_a_rested_controlnet_draws_another_picture(
    pipes: pipelines.Pipelines, task: settings.SceneTask, whole: tuple[Path, ControlNetReuse]
) -> None:
    folder, _ = whole
    drawn = [pipelines.make(pipes, task, way, folder / "pictures", lambda count: None).pictures for way in COMPARED]
    for one, other in pairwise(drawn):
        assert not np.array_equal(one, other)


def test_kept_pictures_are_not_drawn_again_and_damaged_ones_are_refused(
    pipes: pipelines.Pipelines, task: settings.SceneTask, whole: tuple[Path, ControlNetReuse]
) -> None:
    folder, measured = whole
    steps: list[int] = []
    again = evaluate(
        pipes, task, COMPARED, folder, rounds=0, model="shapes", controlnet="control", on_step=steps.append
    )
    assert steps == []
    untimed = [
        row.model_copy(update={"seconds": [], "controlnet_seconds": [], "to_uncached": None}) for row in measured.rows
    ]
    assert again.rows == untimed
    assert again.rows[1].share is None
    other = settings.task(3, steps=STEPS, guidance=3.0, seed=1, batch=2, identity="test")
    assert pipelines.missing(other, COMPARED[0], folder / "pictures") == 3
    kept = folder / "pictures" / f"{task.key(COMPARED[0])}.npz"
    whole_file = kept.read_bytes()
    kept.write_bytes(whole_file[:100])
    with pytest.raises(UserError, match="damaged"):
        pipelines.make(pipes, task, COMPARED[0], folder / "pictures", lambda count: None)
    kept.write_bytes(whole_file)


def test_the_page_shows_every_row(whole: tuple[Path, ControlNetReuse], tmp_path: Path) -> None:
    page = write_report([result(controlnet=whole[1])], tmp_path).read_text(encoding="utf-8")
    for row in whole[1].rows:
        assert f">{row.name}<" in page
    assert "3 of 7" in page


def test_the_command_writes_its_result(bundle: Path, tmp_path: Path) -> None:
    asked = ["controlnet", str(bundle), "-o", str(tmp_path), "--images", "2", "--steps", "4", "--interval", "2"]
    done = CliRunner().invoke(app, [*asked, "--warmup", "0", "--rounds", "1", "--threads", "1", "--json"])
    assert done.exit_code == 0, done.output
    measured = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["controlnet"]
    assert [row["passes"] for row in measured["rows"]] == [0, 4, 4, 2]
    assert (tmp_path / "report.html").exists()


def test_a_directory_without_a_controlnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no ControlNet"):
        pipelines.digest(tmp_path)
