"""Drift on the page: the matrix with its schedule, errors before and after prediction, samples, smoothness."""

import re
from pathlib import Path

import pytest
from support.results import drift, result

from offcut.benchmarks.drift.record import Call
from offcut.benchmarks.report.heatmap import heatmap
from offcut.benchmarks.report.page import write_report


def test_the_page_shows_all_of_it(tmp_path: Path) -> None:
    page = write_report([result(drift=drift())], tmp_path).read_text(encoding="utf-8")
    assert "In short" not in page
    assert page.count('class="heatmap"') == 1
    assert "25.0 % of the features' size on average if they reuse, 12.5 % as predicted" in page.replace("&#x27;", "'")
    assert len(re.findall(r'class="curve \w+"', page)) == 2
    assert "0 to 100 % of the features&#x27; size and above" in page
    assert "a &lt;b&gt;" in page
    assert "31.2 dB" in page
    assert "missing" in page  # the samples' files
    assert "0.0816" in page  # the uncached walk's ISTD
    assert "0.0000" in page


def test_without_a_forecast_there_is_one_curve_and_without_walks_no_table(tmp_path: Path) -> None:
    plain = drift(forecast=None, uncached_walks=[], cached_walks=[])
    page = write_report([result(drift=plain)], tmp_path).read_text(encoding="utf-8")
    assert len(re.findall(r'class="curve \w+"', page)) == 1
    assert "as predicted" not in page
    assert "ISTD" not in page


def test_the_schedule_is_drawn_where_its_calls_are() -> None:
    drawn = heatmap([[0.5, 1.0, 1.0], [0.25, 0.5], [0.0]], [(0, 1), (1, 4)], 1.0, "four calls")
    boxes = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" class="(\w+)"', drawn)
    side = 90.0
    placed = [((float(x) - 34) / side, (float(y) - 8) / side, float(w) / side, kind) for x, y, w, _, kind in boxes]
    assert [each for each in placed if each[3] == "full"] == [(0, 0, 1, "full"), (1, 1, 1, "full")]
    assert [each for each in placed if each[3] == "used"] == [(2, 1, 2, "used")]
    shades = [each for each in placed if each[3].startswith("h")]
    assert shades == [(1, 0, 1, "h5"), (2, 0, 2, "h9"), (2, 1, 1, "h2"), (3, 1, 1, "h5"), (3, 2, 1, "h0")]


@pytest.mark.parametrize("fulls", [0.25, 0.75])
def test_images_that_differ_are_said(tmp_path: Path, fulls: float) -> None:
    calls = [*drift().calls[:-1], Call(cut="deepcache:0", last=1, reused=0.4, read=0.4, fulls=fulls)]
    page = write_report([result(drift=drift(calls=calls))], tmp_path).read_text(encoding="utf-8")
    assert "full calls at different places" in page
    assert page.count('class="full"/>') == (2 if fulls < 0.5 else 3)
