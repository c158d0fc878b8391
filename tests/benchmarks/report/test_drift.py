"""Drift on the page: the matrix with its schedule, errors before and after prediction, samples, smoothness."""

from pathlib import Path

import pytest
from PIL import Image
from support.results import drift, result

from offcut.benchmarks.report.blocks import Group, Plot
from offcut.benchmarks.report.drift import section
from offcut.benchmarks.report.page import write_report
from offcut.benchmarks.report.plots import heatmap
from offcut.benchmarks.schema.drift import Call


def test_the_page_shows_all_of_it(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    page = write_report([result(drift=drift())], tmp_path).read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "25.0 % of the features' size on average if reused, 12.5 % as predicted" in page.replace("&#39;", "'")
    assert "from none to 100 % of the features&#39; size and above" in page
    assert "a &lt;b&gt;" in page
    assert "31.2 dB" in page
    assert "missing" in page  # one of the samples' files


def test_without_a_forecast_there_is_one_curve(tmp_path: Path) -> None:
    plain = drift(forecast=None)
    page = write_report([result(drift=plain)], tmp_path).read_text(encoding="utf-8")
    assert ">predicted<" not in page.partition("<table")[0]
    assert "Left out: 4 images" in page
    assert "as predicted" not in page


def test_the_schedule_is_drawn_where_its_calls_are() -> None:
    figure = heatmap([[0.5, 1.0, 1.0], [0.25, 0.5], [0.0]], [(0, 1), (1, 4)], 1.0)
    boxes = [(*box.get_xy(), box.get_width(), box) for box in figure.axes[0].patches]
    assert [box[:3] for box in boxes if box[3].get_gid() == "full"] == [(0, 0, 1), (1, 1, 1)]
    assert [box[:3] for box in boxes if box[3].get_gid() == "used"] == [(2, 1, 2)]
    shades = {box[:2]: box[3].get_facecolor()[3] for box in boxes if box[3].get_gid() == "value"}
    assert shades == {(1, 0): 0.5, (2, 0): 1.0, (3, 0): 1.0, (2, 1): 0.25, (3, 1): 0.5, (3, 2): 0.0}


@pytest.mark.parametrize("fulls", [0.25, 0.75])
def test_images_that_differ_are_said(tmp_path: Path, fulls: float) -> None:
    calls = [*drift().calls[:-1], Call(cut="deepcache:0", last=1, reused=0.4, read=0.4, fulls=fulls)]
    page = write_report([result(drift=drift(calls=calls))], tmp_path).read_text(encoding="utf-8")
    assert "full calls at different places" in page
    matrix = section(drift(calls=calls), tmp_path).blocks[0]
    assert isinstance(matrix, Group)
    plot = matrix.blocks[1]
    assert isinstance(plot, Plot)
    squares = [box for box in plot.draw().axes[0].patches if box.get_gid() == "full"]
    assert len(squares) == (2 if fulls < 0.5 else 3)
