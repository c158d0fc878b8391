"""``offcut bench precision`` on the shapes model: every part, its files, and invalid input."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from offcut.benchmarks import record
from offcut.benchmarks.precision.builds import BUILDS, Build, builds_of
from offcut.benchmarks.precision.joint import corrections
from offcut.benchmarks.schema.precision import Precision
from offcut.cli import app
from offcut.errors import BundleError, UserError
from offcut.runtime.tuning.prediction import FeatureMoments

ENGINE, LOW = "openvino", "fp32 computed in bf16"  # int8 has the same code path, but its calibration takes minutes
STEPS, IMAGES = 6, 4
SMALL = (
    "--engine", ENGINE, "--precision", "bf16", "--steps", str(STEPS), "--interval", "3", "--images", str(IMAGES),
    "--samples", "4", "--rounds", "3", "--threads", "1", "--batch", "2",
)  # fmt: skip


def offcut(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "precision", *map(str, arguments)])


@pytest.fixture(scope="module")
def done(shapes_bundle: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Run the command and return the directory with ``bundle`` and ``out``."""

    def run(folder: Path) -> None:
        shutil.copytree(shapes_bundle, folder / "bundle")
        result = offcut(folder / "bundle", "-o", folder / "out", *SMALL, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == json.loads((folder / "out" / "result.json").read_text(encoding="utf-8"))

    return once("bench-precision", run)


@pytest.fixture(scope="module")
def measured(done: Path) -> Precision:
    section = record.read(done / "out").precision
    assert section is not None
    return section


@pytest.mark.slow
def test_every_build_of_the_engine_is_timed(measured: Precision) -> None:
    assert measured.calls is not None
    assert measured.model == "shapes"
    rows = {(row.engine, row.precision, row.call): row for row in measured.calls.rows}
    builds = [(ENGINE, "fp32"), (ENGINE, LOW)]  # not ONNX Runtime's, which the bundle has too
    assert set(rows) == {(*build, call) for build in builds for call in ("full", "deepcache:0")}
    for row in rows.values():
        assert len(row.seconds) == measured.calls.rounds == 3
    for build in builds:
        assert rows[*build, "deepcache:0"].median < rows[*build, "full"].median
    low, exact = rows[ENGINE, LOW, "full"], rows[ENGINE, "fp32", "full"]
    ratios = [one / other for one, other in zip(low.seconds, exact.seconds, strict=True)]
    assert low.to_fp32 == pytest.approx(statistics.median(ratios))
    assert exact.to_fp32 is None
    assert measured.calls.sizes == {"batch": 2, "height": 16, "width": 16, "sequence": 77}


@pytest.mark.slow
def test_images_are_compared_with_fp32_of_the_same_engine(measured: Precision, done: Path) -> None:
    assert measured.images is not None
    assert measured.images.images == IMAGES
    rows = {(row.precision, row.schedule): row for row in measured.images.rows}
    cached = "uniform:3:warmup=2"
    assert list(rows) == [("fp32", None), ("fp32", cached), (LOW, None), (LOW, cached)]
    exact, both = rows["fp32", None], rows[LOW, cached]
    assert exact.psnr is exact.psnr_uncached is exact.accuracy_change is None
    for row in rows.values():
        if row.precision == "fp32":
            assert row.psnr is None
            continue
        assert row.psnr is not None
        assert row.psnr_uncached is not None
        assert row.psnr_worst is not None
        assert row.psnr_worst <= row.psnr.mean < 100
    assert rows["fp32", cached].psnr_uncached is not None
    assert both.psnr is not None
    assert both.psnr_uncached is not None
    assert both.psnr_uncached.mean < both.psnr.mean  # caching changes an image more than bf16
    stored = list((done / "out" / "pictures").glob("*.npz"))
    assert len(stored) == 4


@pytest.mark.slow
def test_every_precision_is_measured_with_every_way_of_caching(measured: Precision) -> None:
    joint = measured.joint
    assert joint is not None
    assert (joint.engine, joint.samples, joint.images, joint.interval) == (ENGINE, 4, IMAGES, 3)
    ways = ["uncached", "reuse", "DP", "DP + correction", "ours"]
    rows = {(row.precision, row.way): row for row in joint.rows}
    assert list(rows) == [(precision, way) for precision in ("fp32", "bf16") for way in ways]
    assert rows["fp32", "uncached"].psnr.mean == 100
    for precision in ("fp32", "bf16"):
        spent = {way: _cost(rows[precision, way].timeline, joint.shallow_over_full) for way in ways}
        assert spent["uncached"] == STEPS
        assert spent["reuse"] == spent["DP"] == spent["DP + correction"] < STEPS
        assert spent["ours"] <= spent["DP"] + 1e-9
        assert all(rows[precision, way].psnr.mean < 60 for way in ways[1:])


def _cost(timeline: str, ratio: float) -> float:
    return timeline.count("#") + ratio * timeline.count(".")


@pytest.mark.slow
def test_a_second_run_generates_no_image_again(done: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "out" / "pictures").iterdir()}
    result = offcut(folder / "bundle", "-o", folder / "out", *SMALL, "--part", "images")
    assert result.exit_code == 0, result.output
    assert {file.name: file.stat().st_mtime_ns for file in (folder / "out" / "pictures").iterdir()} == before
    second = record.read(folder / "out").precision
    assert second is not None
    assert second.calls is second.joint is None
    assert f"{IMAGES} images a row" in result.output
    assert "uniform:3:warmup=2" in result.output
    assert "…" not in result.output


@pytest.mark.slow
def test_the_page_shows_every_part(done: Path, measured: Precision) -> None:
    page = (done / "out" / "report.html").read_text(encoding="utf-8")
    assert measured.joint is not None
    assert all(f">{row.timeline}</td>" in page for row in measured.joint.rows)
    for heading in ("Time of a call", "Quality of the images", "Caching and low precision together", LOW):
        assert heading in page


def test_the_calls_of_any_bundle_can_be_timed(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ["--part", "calls", "--size", "64", "--rounds", "1", "--threads", "1"]
    result = offcut(tiny_bundle, "-o", tmp_path, *options)
    assert result.exit_code == 0, result.output
    section = record.read(tmp_path).precision
    assert section is not None
    assert section.calls is not None
    assert {row.engine for row in section.calls.rows} == {"onnxruntime", "openvino"}
    assert "Time of a call" in result.output
    one = offcut(tiny_bundle, "-o", tmp_path, *options, "--engine", "openvino", "--json")
    assert one.exit_code == 0, one.output
    assert {row["engine"] for row in json.loads(one.stdout)["precision"]["calls"]["rows"]} == {"openvino"}
    none = offcut(tiny_bundle, "-o", tmp_path, *options, "--engine", "tensorrt")
    assert isinstance(none.exception, UserError)
    assert "has builds of onnxruntime, openvino, not of tensorrt" in str(none.exception)


def test_other_parts_need_the_shapes_model(tiny_bundle: Path, tmp_path: Path, copied: Callable[[Path], Path]) -> None:
    result = offcut(copied(tiny_bundle), "-o", tmp_path / "out", "--part", "images")
    assert isinstance(result.exception, BundleError)
    assert not (tmp_path / "out").exists()


def test_builds_are_chosen_by_engine_and_precision() -> None:
    assert builds_of([], []) == list(BUILDS)
    assert builds_of(["openvino"], ["int8"]) == [Build("openvino"), Build("openvino", "int8")]
    assert [build.name for build in builds_of([], ["bf16"])] == ["fp32", "fp32", "fp32 computed in bf16"]


@pytest.mark.parametrize(
    ("engines", "precisions", "says"),
    [
        (["tensorrt"], [], "tensorrt is not compared: choose onnxruntime or openvino"),
        ([], ["fp8"], "fp8 is not compared: choose int8 or bf16"),
        (["onnxruntime"], ["bf16"], "onnxruntime cannot compute in bf16: omit --engine"),
    ],
)
def test_unknown_engines_and_precisions_are_refused(engines: list[str], precisions: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        builds_of(engines, precisions)


def test_cachequants_correction_is_a_regression_on_the_last_full_call() -> None:
    calls, channels = 5, 3
    random = torch.randn(channels, 2 * calls, 200, generator=torch.Generator().manual_seed(0)).double()
    sums = FeatureMoments(2 * calls, channels)
    sums.add(random)
    fitted = corrections({"f": sums}, (0, 3), calls, reference=True)
    assert sorted(fitted) == [1, 2, 4]
    for call, last in ((1, 0), (2, 0), (4, 3)):
        coefficients = fitted[call]["f"]
        for channel in range(channels):
            x, y = random[channel, last].numpy(), random[channel, calls + call].numpy()
            slope, intercept = np.polyfit(x, y, 1)
            assert isinstance(coefficients.scale, torch.Tensor)
            assert isinstance(coefficients.shift, torch.Tensor)
            assert float(coefficients.scale[channel]) == pytest.approx(slope, abs=1e-9)
            assert float(coefficients.shift[channel]) == pytest.approx(intercept, abs=1e-9)
