"""Growth on the page: every figure of the record, a plot for each sweep, and no answers that nothing backs."""

from pathlib import Path

import pytest
from support.results import growth, result

from offcut.benchmarks.report.curves import log_ticks
from offcut.benchmarks.report.page import write_report


def test_the_page_shows_sweeps_builds_and_exponents(tmp_path: Path) -> None:
    page = write_report([result(growth=growth())], tmp_path).read_text(encoding="utf-8")
    assert "In short" not in page  # its questions are about other sections
    assert page.count('class="scatter"') == 2
    assert "loop ^ 1.00 ± 0.01" in page
    assert "2567 M" in page
    assert "build, seconds ^ 0.80" in page
    assert "&lt;transformer&gt;" in page
    assert "1.004" in page


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (0.3, 40.0), (1e-4, 1e3)])
def test_ticks_lie_inside(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)
