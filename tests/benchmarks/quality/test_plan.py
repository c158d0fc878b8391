"""Plans: their parameters, the costs of settings, and the settings with fewer steps."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.benchmarks.quality import plan
from offcut.benchmarks.quality.plan import SHALLOW_OVER_FULL, QualitySetting
from offcut.errors import UserError
from offcut.runtime.generation.forecast import Extrapolate

PLANS = {"full": plan.full_plan(50), "quick": plan.quick_plan(50)}


def test_the_full_plan_varies_every_parameter() -> None:
    rows = PLANS["full"]
    cached = [row for row in rows if row.kind == "cached"]
    assert {row.interval for row in rows} == set(plan.INTERVALS)
    assert {row.cut for row in cached} == set(plan.CUTS)
    assert {row.parsed.warmup for row in cached if row.parsed} == set(plan.WARMUPS)
    assert {row.sampler for row in cached} == set(plan.SAMPLERS)
    assert {row.parsed.kind for row in cached if row.parsed} == {"uniform", "quad"}
    forecast = [row for row in cached if row.damping is not None]
    assert {row.sampler for row in forecast} == set(plan.SAMPLERS)
    assert all(row.parsed is not None and row.parsed.warmup == 2 for row in forecast)
    assert any(replace(row, damping=None) in rows for row in forecast)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("steps", [8, 16, 50])
def test_each_cached_setting_has_counterparts_uncached_and_with_fewer_steps(name: str, steps: int) -> None:
    settings_ = {"full": plan.full_plan, "quick": plan.quick_plan}[name](steps)
    rows = plan.with_fewer_steps(settings_, SHALLOW_OVER_FULL)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        base = plan.reference(row, rows)
        assert base.schedule is None
        assert not base.fewer
        assert base.steps >= row.steps
        if row.schedule:
            cost = row.cost(SHALLOW_OVER_FULL)
            fewer = [other.steps for other in rows if other.fewer and other.sampler == row.sampler]
            assert min(abs(steps - cost) for steps in fewer) <= max(0.5, 0.06 * cost)


def test_the_plans_of_single_samplers_add_up_to_the_full_plan() -> None:
    """A long run can be split into one run for each sampler."""
    whole = plan.with_fewer_steps(PLANS["full"], SHALLOW_OVER_FULL)
    parts = [
        plan.with_fewer_steps(plan.of_samplers(PLANS["full"], [name]), SHALLOW_OVER_FULL) for name in plan.SAMPLERS
    ]
    assert {row for part in parts for row in part} == set(whole)
    assert sum(map(len, parts)) == len(whole)


@given(st.integers(20, 60), st.sampled_from(["uniform", "quad"]), st.integers(2, 10), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_cost_counts_a_shallow_call_as_a_share_of_a_full_one(
    steps: int, kind: str, interval: int, warmup: int
) -> None:
    row = plan.cached("ddim", steps, kind, interval, "paper:0", warmup)  # type: ignore[arg-type]
    assert row.cut == "deepcache:1"
    assert row.parsed is not None
    full = len(row.parsed.full_calls(steps))
    assert row.cost({"deepcache:1": 0.25}) == pytest.approx(full + 0.25 * (steps - full))
    assert row.cost({"deepcache:1": 1.0}) == pytest.approx(steps)


def test_a_forecast_is_named_and_costs_nothing() -> None:
    plain, forecast = plan.product_plan(20, ["ddim"], ["uniform"], [4], ["deepcache:0"], [2], [None, 0.5])[1:]
    assert forecast.name == f"{plain.name}, forecast 0.5"
    assert forecast.forecast == Extrapolate(0.5)
    assert plain.forecast is None
    assert forecast.cost(SHALLOW_OVER_FULL) == plain.cost(SHALLOW_OVER_FULL)


def test_interval_one_gives_the_uncached_setting() -> None:
    assert plan.cached("ddim", 50, "uniform", 1) == QualitySetting("ddim", 50)
    rows = plan.product_plan(20, ["ddim"], ["uniform"], [1, 3], ["deepcache:0"], [0, 2])
    assert [row.kind for row in rows] == ["uncached", "cached", "cached"]


def test_invalid_plans_are_refused() -> None:
    with pytest.raises(UserError, match="not a sampler"):
        plan.product_plan(20, ["heun"], ["uniform"], [3], ["deepcache:0"], [0])
    with pytest.raises(UserError, match="between 0 and 1"):
        plan.reference_ratios([], {"deepcache:0": 1.5})
    with pytest.raises(UserError, match=r"--shallow-ratio deepcache:7="):
        plan.reference_ratios([plan.cached("ddim", 50, "uniform", 5, "deepcache:7")], {})


def test_the_users_ratios_replace_the_measured_ones() -> None:
    settings = [plan.cached("ddim", 50, "uniform", 5, "deepcache:1")]
    assert plan.reference_ratios(settings, {"paper:0": 0.2})["deepcache:1"] == pytest.approx(0.2)
    assert plan.reference_ratios(settings, {"paper:0": 0.2})["deepcache:0"] == SHALLOW_OVER_FULL["deepcache:0"]
