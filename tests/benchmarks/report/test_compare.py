"""``offcut bench compare`` reports changes beyond noise, and its exit code says whether a figure is worse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.results import contestant, latency, machine, quality, result
from typer.testing import CliRunner

from offcut.benchmarks.report.compare import Comparison, compare
from offcut.benchmarks.schema.latency import Contestant, Latency
from offcut.benchmarks.schema.quality import Quality
from offcut.cli import app
from offcut.errors import UserError


def scaled(row: Contestant, scale: float, noise: float = 0.0, seed: int = 0) -> Contestant:
    chance = random.Random(seed)
    changed = {
        field: [value * scale * (1 + chance.uniform(-noise, noise)) for value in getattr(row, field)]
        for field in ("loops", "full", "shallow")
    }
    return row.model_copy(update=changed)


def runs(*rows: Contestant) -> Latency:
    return latency(contestants=list(rows))


def verdicts(comparison: Comparison) -> dict[tuple[str, str], str]:
    return {(change.row, change.figure): change.verdict for change in comparison.changes}


ROW = contestant("offcut openvino fp32, interval 5", 1.0, 0.1)
BASE = contestant("diffusers eager fp32", 2.0)
QUALITY = quality()

ROWS = st.builds(
    contestant,
    st.sampled_from(["offcut openvino fp32", "diffusers eager fp32"]),
    st.floats(1e-3, 100),
    st.one_of(st.none(), st.floats(1e-4, 10)),
    rounds=st.integers(1, 6),
    noise=st.floats(0, 0.1),
    seed=st.integers(0, 9),
)


@given(ROWS)
@settings(deadline=None, max_examples=30)
def test_a_result_does_not_differ_from_itself(row: Contestant) -> None:
    once = result(latency=runs(row), quality=QUALITY)
    for environment in (None, machine(cpu="another")):
        comparison = compare(once, result(latency=runs(row), quality=QUALITY, environment=environment))
        assert {change.verdict for change in comparison.changes} == {"noise"}
        assert comparison.worse() == ()


@given(st.floats(1.1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_a_change_beyond_noise_and_threshold_is_worse_or_better(scale: float, seed: int) -> None:
    fast = result(latency=runs(ROW, BASE))
    slow = result(latency=runs(scaled(ROW, scale, noise=0.003, seed=seed), BASE))
    for figure in ("loop, s", "full call, s", "shallow call, s"):
        assert verdicts(compare(fast, slow))[ROW.name, figure] == "worse"
        assert verdicts(compare(slow, fast))[ROW.name, figure] == "better"
    assert {change.row for change in compare(fast, slow).worse()} == {ROW.name}


def test_a_change_within_the_noise_is_reported_as_noise() -> None:
    noisy = ROW.model_copy(update={"loops": [2.0, 2.9, 2.3, 3.3, 2.1], "full": [], "shallow": []})
    slower = ROW.model_copy(update={"loops": [2.4, 3.4, 2.2, 3.1, 2.6], "full": [], "shallow": []})
    assert verdicts(compare(result(latency=runs(noisy)), result(latency=runs(slower)))) == {
        (ROW.name, "loop, s"): "noise"
    }


def test_a_significant_change_within_the_threshold_is_small() -> None:
    old, new = result(latency=runs(ROW)), result(latency=runs(scaled(ROW, 1.04)))
    assert set(verdicts(compare(old, new)).values()) <= {"small", "noise"}
    assert verdicts(compare(old, new))[ROW.name, "full call, s"] == "small"
    assert verdicts(compare(old, new, threshold=0.03))[ROW.name, "full call, s"] == "worse"


def test_the_noise_of_one_round_is_unknown() -> None:
    one = ROW.model_copy(update={"loops": ROW.loops[:1], "full": [], "shallow": []})
    two = one.model_copy(update={"loops": [9.0]})
    (change,) = compare(result(latency=runs(one)), result(latency=runs(two))).changes
    assert (change.verdict, change.note) == ("unknown", "one round only")


def test_missing_rows_fail_and_new_rows_are_only_reported() -> None:
    missing = ROW.model_copy(update={"loops": [], "not_run": "out of memory"})
    comparison = compare(result(latency=runs(ROW, BASE)), result(latency=runs(missing, BASE)))
    assert [(change.row, change.verdict, change.note) for change in comparison.worse()] == [
        (ROW.name, "vanished", "out of memory")
    ]
    assert comparison.worse(allow_missing=True) == ()
    back = compare(result(latency=runs(missing, BASE)), result(latency=runs(ROW, BASE)))
    assert verdicts(back)[ROW.name, "row"] == "appeared"
    assert back.worse() == ()


def test_on_another_machine_ratios_to_the_base_are_compared() -> None:
    other = machine(cpu="another")
    fast = result(latency=runs(ROW, BASE))
    slow_machine = result(latency=runs(scaled(ROW, 3), scaled(BASE, 3)), environment=other)
    comparison = compare(fast, slow_machine)
    assert set(verdicts(comparison).values()) == {"noise"}
    assert any("ratios to 'diffusers eager fp32'" in warning for warning in comparison.warnings)
    regressed = result(latency=runs(scaled(ROW, 3.9), scaled(BASE, 3)), environment=other)
    assert verdicts(compare(fast, regressed))[ROW.name, "loop, of diffusers eager fp32"] == "worse"


def test_on_another_machine_without_a_base_the_change_is_unknown() -> None:
    comparison = compare(result(latency=runs(ROW)), result(latency=runs(scaled(ROW, 3)), environment=machine(cores=64)))
    assert {change.verdict for change in comparison.changes} == {"unknown"}
    assert any("no row is in both" in warning for warning in comparison.warnings)


def test_other_differences_are_warnings() -> None:
    other = ROW.model_copy(update={"settings": {"threads": "4"}, "precision": "bf16"})
    new = result(
        latency=latency(contestants=[other], threads=4), environment=machine(packages={"torch": "2.14.0"}, load=3.5)
    )
    warnings = "\n".join(compare(result(latency=runs(ROW)), new).warnings)
    for part in (
        "torch differs: 2.13.0 and 2.14.0",
        "diffusers differs: 0.42.1 and none",
        f"{ROW.name}: precision differs: fp32 and bf16",
        f"{ROW.name}: opset differs: 23 and none",
        "threads differ: 2 and 4",
        "newer run began: load average 3.5",
    ):
        assert part in warnings


@pytest.mark.parametrize("changed", [{"steps": 50}, {"scheduler": "EulerDiscreteScheduler"}, {"model": "other"}])
def test_different_tasks_are_not_compared(changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="different tasks"):
        compare(result(), result(latency=latency(**changed)))


def test_results_without_a_common_section_are_not_compared() -> None:
    with pytest.raises(UserError, match="no row in common"):
        compare(result(latency=latency()), result(quality=QUALITY))


def moved(measured: Quality, metric: str, by: float, half: float | None = None) -> Quality:
    rows = []
    for row in measured.rows:
        estimate = getattr(row, metric)
        if row.kind == "cached" and estimate:
            low, high = (estimate.mean - half, estimate.mean + half) if half else (estimate.low, estimate.high)
            estimate = estimate.model_copy(update={"mean": estimate.mean + by, "low": low + by, "high": high + by})
            row = row.model_copy(update={metric: estimate})
        rows.append(row)
    return measured.model_copy(update={"rows": rows})


@pytest.mark.parametrize(
    ("metric", "by", "verdict"),
    [
        ("psnr", -3.0, "worse"),
        ("psnr", 3.0, "better"),
        ("psnr", -0.5, "noise"),
        ("ssim", -0.2, "worse"),
        ("ssim", -0.004, "small"),
        ("distance", 0.1, "worse"),
        ("distance", -0.1, "better"),
        ("accuracy", -0.2, "worse"),
        ("accuracy", -0.05, "noise"),
    ],
)
def test_changes_of_quality_are_compared_with_their_intervals(metric: str, by: float, verdict: str) -> None:
    old, new = result(quality=QUALITY), result(quality=moved(QUALITY, metric, by))
    for change in compare(old, new).changes:
        touched = change.figure.startswith(metric) and "uniform" in change.row
        assert change.verdict == (verdict if touched else "noise"), change


def test_more_full_calls_are_a_worse_cost_without_noise() -> None:
    new = quality()
    row = next(row for row in new.rows if row.interval == 5)
    row.full_calls, row.shallow_calls, row.cost = row.full_calls + 10, row.shallow_calls - 10, row.cost + 9
    worse = compare(result(quality=QUALITY), result(quality=new)).worse()
    assert [(change.row, change.figure) for change in worse] == [(row.name, "cost, full calls")]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "compare", *map(str, arguments)])


def test_the_exit_code_says_whether_a_figure_is_worse(tmp_path: Path) -> None:
    for name, row in (("old", ROW), ("slow", scaled(ROW, 1.3))):
        result(latency=runs(row, BASE)).save(tmp_path / name)
    unchanged = run(tmp_path / "old", tmp_path / "old" / "result.json")
    assert (unchanged.exit_code, unchanged.stdout) == (0, "5 within noise\n")
    slow = run(tmp_path / "old", tmp_path / "slow")
    assert slow.exit_code == 1
    assert "3 worse; 2 within noise" in slow.stdout
    assert run(tmp_path / "slow", tmp_path / "old").exit_code == 0
    assert run(tmp_path / "old", tmp_path / "slow", "--threshold", "50 %").exit_code == 0
    listed = run(tmp_path / "old", tmp_path / "old", "--all")
    assert "diffusers" in listed.stdout


def test_json_has_what_scripts_need(tmp_path: Path) -> None:
    result(latency=runs(ROW, BASE)).save(tmp_path / "old")
    result(latency=runs(scaled(ROW, 1.3), BASE)).save(tmp_path / "new")
    done = run(tmp_path / "old", tmp_path / "new", "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["failed"] is True
    worst = report["changes"][0]
    assert (worst["row"], worst["figure"], worst["verdict"]) == (ROW.name, "loop, s", "worse")
    assert worst["low"] < worst["percent"] < worst["high"]
    assert worst["percent"] == pytest.approx(30, abs=2)


@pytest.mark.parametrize("option", [["--threshold", "much"], ["--threshold", "-1%"], ["--confidence", "100%"]])
def test_an_error_has_exit_code_two(tmp_path: Path, option: list[str]) -> None:
    result().save(tmp_path / "old")
    assert run(tmp_path / "old", tmp_path / "old", *option).exit_code == 2
    missing = run(tmp_path / "old", tmp_path / "none")
    assert missing.exit_code == 2
    assert "cannot read" in missing.output
