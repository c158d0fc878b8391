"""The command for real, on a small pipeline: sweeps in processes of their own, an export and a build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from offcut.benchmarks import record
from offcut.benchmarks.report import sections
from offcut.benchmarks.report.blocks import for_terminal
from offcut.benchmarks.schema.growth import Growth
from offcut.cli import app
from offcut.errors import UserError

Once = Callable[[str, Callable[[Path], object]], Path]
pytestmark = pytest.mark.slow


def growth(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "growth", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tiny_unet_dir: Path, once: Once) -> Growth:
    def run(folder: Path) -> None:
        result = growth(
            tiny_bundle, "--engine", "onnxruntime", "--steps", "6", "--interval", "3", "--iterations", "2",
            "--all-steps", "none", "--all-images", "1,4", "--all-sides", "none", "--all-intervals", "1",
            "--threads", "1", "--build", tiny_unet_dir, "--build", "no-such-model", "-o", folder, "--json",
        )  # fmt: skip
        assert result.exit_code == 1, result.output  # for the model that is not there
        said = " ".join(result.stderr.split())
        assert "no-such-model was not built: no-such-model is not a directory" in said
        assert json.loads(result.stdout) == json.loads((folder / "result.json").read_text(encoding="utf-8"))

    found = record.read(once("bench-growth", run)).growth
    assert found is not None
    return found


def test_each_sweep_goes_through_the_base(measured: Growth) -> None:
    images, interval = measured.sweeps
    assert (images.axis, [point.value for point in images.points]) == ("images", [1, 4])
    assert (interval.axis, [point.value for point in interval.points]) == ("interval", [1, 3])
    assert images.points[0].loops == interval.points[1].loops
    assert measured.drift is not None
    assert measured.drift > 0
    for sweep in measured.sweeps:
        for point in sweep.points:
            assert len(point.loops) == 2
            calls = (6, 0) if (sweep.axis, point.value) == ("interval", 1) else (2, 4)
            assert (len(point.full), len(point.shallow)) == (2 * calls[0], 2 * calls[1])
            assert (point.host_peak_bytes or 0) > 2**26


def test_exponents_are_those_of_the_points(measured: Growth) -> None:
    images, interval = measured.sweeps
    assert [law.of for law in images.fits] == ["loop", "full call", "shallow call", "memory"]
    assert [law.of for law in interval.fits] == ["loop", "memory"]
    one, four = images.points
    assert four.loop / one.loop == pytest.approx(4 ** images.fits[0].exponent)


def test_commands_on_models_have_time_memory_and_size(measured: Growth, tiny_unet_dir: Path) -> None:
    export, build = measured.made
    assert (export.command, build.command) == ("export", "build")
    weights = sum(file.stat().st_size for file in tiny_unet_dir.rglob("*.safetensors"))
    for row in measured.made:
        assert row.model == tiny_unet_dir.name
        assert 4 * row.parameters == pytest.approx(weights, rel=0.05)
        assert row.size_bytes > 0.9 * weights
        assert row.seconds > 0
        assert row.host_peak_bytes > 2**26
    assert list(measured.not_made) == ["no-such-model"]


def test_the_tables_show_them(measured: Growth) -> None:
    console = Console(width=120, record=True)
    for block in for_terminal(sections.growth(measured)):
        console.print(block)
    text = console.export_text()
    assert "images a call" in text
    assert f"^ {measured.sweeps[0].fits[0].exponent:.2f}" in text
    assert "measured again at the end" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--all-images", "1,x"], "is not a list such as 1,2,4"),
        (["--precision", "int8"], "has no int8 build of this engine"),
        (["--size", "30"], "does not fit this UNet"),
    ],
)
def test_what_cannot_be_is_refused(tiny_bundle: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    result = growth(tiny_bundle, "-o", tmp_path, "--all-sides", "none", *arguments)
    assert isinstance(result.exception, UserError | SystemExit)
    assert result.exit_code != 0
    assert says in " ".join(f"{result.stderr} {result.exception}".replace("│", " ").split())
    assert not (tmp_path / "result.json").exists()
