"""The page of ``offcut bench growth`` has every figure of the record and a plot for each sweep."""

from pathlib import Path

from support.results import growth, result

from offcut.benchmarks.report.page import write_report


def test_the_page_shows_sweeps_builds_and_exponents(tmp_path: Path) -> None:
    page = write_report([result(growth=growth())], tmp_path).read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "loop ^ 1.00 ± 0.01" in page
    assert "2567 M" in page
    assert "build, seconds ^ 0.80" in page
    assert "&lt;transformer&gt;" in page
    assert "1.004" in page
