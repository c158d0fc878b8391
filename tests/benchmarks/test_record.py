"""``result.json``: results are read back unchanged, other files are refused, derived figures are right."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.benchmarks import record
from offcut.benchmarks.report.findings import gain
from offcut.benchmarks.schema.latency import Contestant, Latency
from offcut.benchmarks.stats import percentile
from offcut.errors import UserError

ROW = Contestant(
    name="offcut openvino fp32",
    family="offcut",
    engine="openvino",
    precision="fp32",
    caching="every 2nd call full, deepcache:0",
    loops=[2.4, 2.2, 2.3],
    full=[1.0, 1.0],
    shallow=[0.1, 0.3, 0.2],
    full_calls=2,
    shallow_calls=1,
)
BASE = Contestant(name="eager", family="diffusers", engine="pytorch", precision="fp32", loops=[4.8, 4.4, 6.9])


def result() -> record.Result:
    latency = Latency(
        model="sd15",
        steps=3,
        height=64,
        width=64,
        images_per_call=1,
        guidance=7.5,
        scheduler="DDIMScheduler",
        rounds=3,
        clock="monotonic",
        contestants=[ROW, BASE, Contestant(name="x", family="x", engine="x", precision="fp32", not_run="no x here")],
    )
    machine = record.environment(["torch", "no-such-package"])
    return record.Result(
        title="t", command="offcut bench", started=record.now(), seconds=1, environment=machine, latency=latency
    )


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = result()
    assert record.read(tmp_path / "new" if written.save(tmp_path / "new") else tmp_path) == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]
    assert written.environment.packages.keys() == {"torch"}


def test_derived_figures_are_in_the_file_for_readers_without_offcut(tmp_path: Path) -> None:
    text = result().save(tmp_path).read_text(encoding="utf-8")
    assert '"wall_over_ideal": 1.04545' in text  # 2.3 / (2 * 1.0 + 1 * 0.2)


def test_ratios_are_taken_within_a_round_and_missing_where_nothing_was_measured() -> None:
    latency = result().latency
    assert latency is not None
    rows = {row.name: row for row in latency.contestants}
    assert gain(rows[ROW.name], rows["eager"]) == 2.0
    assert gain(rows["x"], rows["eager"]) is None
    assert BASE.wall_over_ideal is None
    assert dict(ROW.percentiles((0, 50, 100))) == {0: 2.2, 50: 2.3, 100: 2.4}


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 2}', "[1]", "\xff"])
def test_files_without_a_result_are_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is not a result"):
        record.read(tmp_path)


def test_a_missing_file_and_a_folder_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        record.read(tmp_path / "none.json")
    (tmp_path / "result.json").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        result().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        result().save(tmp_path / "file")


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_a_percentile_equals_numpys(values: list[float], percent: float) -> None:
    numpy = pytest.importorskip("numpy")
    assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent), abs=1e-6)


def test_no_values_have_no_percentile() -> None:
    for values, percent in (([], 50), ([1.0], 101)):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, percent)


def test_a_result_of_an_earlier_version_is_read_without_its_empty_sections(tmp_path: Path) -> None:
    fields = json.loads(result().model_dump_json()) | {"growth": None, "drift": None}
    (tmp_path / record.NAME).write_text(json.dumps(fields), encoding="utf-8")
    assert record.read(tmp_path) == result()
    (tmp_path / record.NAME).write_text(json.dumps(fields | {"growth": {"model": "sd15"}}), encoding="utf-8")
    with pytest.raises(UserError, match="not a result of this version"):
        record.read(tmp_path)
