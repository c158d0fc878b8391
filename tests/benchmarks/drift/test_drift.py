"""The command for real, on the shapes model: figures that follow from one another, and files that are there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from offcut.benchmarks import record
from offcut.benchmarks.drift.run import coloured, difference_map
from offcut.benchmarks.schema.drift import Drift
from offcut.cli import app

STEPS = 8


def test_maps() -> None:
    black = np.zeros((4, 6, 3))
    half = black.copy()
    half[:, :3, 0] = 0.6
    found = difference_map(black, half)
    assert found[0].tolist() == pytest.approx([0.2] * 3 + [0.0] * 3)
    shown = np.asarray(coloured(found, 0.2))
    assert shown.shape == (4, 6, 3)
    assert shown[0, 0].sum() > 600 > 100 > shown[0, 5].sum()
    assert np.asarray(coloured(found * 0, 0.0)).max() < 50


def run(shapes: Path, folder: Path, *options: str) -> Drift:
    asked = ("--engine", "onnxruntime", "--threads", "1", "--guidance", "3", "--steps", str(STEPS), "--images", "2")
    given = ["bench", "drift", str(shapes), *asked, "-o", str(folder), *options]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found = record.read(folder).drift
    assert found is not None
    assert (folder / "report.html").read_text(encoding="utf-8").count("<svg") == 2
    return found


@pytest.mark.slow
def test_reuse_misses_what_the_features_moved(shapes_bundle: Path, tmp_path: Path) -> None:
    found = run(shapes_bundle, tmp_path, "--schedule", f"steps:0,3:cooldown={STEPS - 4}")
    assert [len(row) for row in found.distances] == list(range(STEPS - 1, 0, -1))
    assert [call.cut is None for call in found.calls] == [True, False, False, *[True] * (STEPS - 3)]
    # Up to the first shallow call the latents are the uncached ones.
    assert found.calls[1].reused == pytest.approx(found.distances[0][0], rel=1e-4)
    assert found.calls[2].reused > found.calls[1].reused > 0
    for call in found.calls:
        assert call.read == pytest.approx(call.reused)
    assert [sample.seed for sample in found.samples] == [0, 1]
    for sample in found.samples:
        one, other = (
            np.asarray(Image.open(tmp_path / name), np.float64) / 255 for name in (sample.uncached, sample.cached)
        )
        assert sample.psnr == pytest.approx(-10 * math.log10(np.mean((one - other) ** 2)), abs=0.01)
        assert Image.open(tmp_path / sample.changed).size == (64, 64)
    assert max(sample.most for sample in found.samples) >= found.mean_most > 0


@pytest.mark.slow
def test_predictions_are_judged_beside_reuse(shapes_bundle: Path, tmp_path: Path) -> None:
    found = run(shapes_bundle, tmp_path, "--schedule", "uniform:3:warmup=2", "--forecast", "1")
    shallow = [call for call in found.calls if call.cut is not None]
    assert len(shallow) == STEPS - 4
    assert all(call.read != pytest.approx(call.reused, rel=1e-3) for call in shallow)
    assert found.calls[2].read < found.calls[2].reused  # DDIM's features go on as they went


@pytest.mark.slow
def test_a_forecast_of_ones_own_does_not_go_with_a_tuned_schedule(shapes_bundle: Path, tmp_path: Path) -> None:
    given = ["bench", "drift", str(shapes_bundle), "--schedule", "auto", "--forecast", "1", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code != 0
    assert "predictions of its own" in f"{result.stderr} {result.exception}"
    assert not (tmp_path / "out").exists()
