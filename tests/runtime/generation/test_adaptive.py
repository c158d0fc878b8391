"""Adaptive schedules: the rules of the decision, the drift estimate, and a plain implementation on real engines."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import offcut
from offcut import Adaptive, Uniform
from offcut.errors import ScheduleError
from offcut.runtime.generation.feature_drift import FeatureDriftEstimator
from offcut.runtime.generation.schedule import parse
from offcut.runtime.generation.state import GenerationState

CALLS, CUT, FEATURE = 16, "deepcache:0", "deep_feature_0"
schedules = st.builds(
    lambda bound, least, more, warmup, cooldown: Adaptive(
        bound, least, warmup=warmup, cooldown=cooldown, max_shallow=None if more is None else least + more
    ),
    st.floats(0.01, 2),
    st.integers(1, 3),
    st.integers(0, 6) | st.none(),
    st.integers(0, 4),
    st.integers(0, 3),
)
error_lists = st.lists(st.floats(0, 2) | st.just(float("nan")) | st.none(), min_size=CALLS, max_size=CALLS)


@given(schedules, error_lists)
def test_a_call_is_full_where_the_error_exceeds_the_bound(schedule: Adaptive, errors: list[float | None]) -> None:
    queries: list[tuple[int, int]] = []

    def predicted_error(call: int, last: int) -> float | None:
        queries.append((call, last))
        return errors[call]

    generation = GenerationState(schedule, calls=CALLS)
    generation.drift = cast(Any, SimpleNamespace(predicted_error=predicted_error))
    for _ in range(CALLS):
        assert generation.next_is_full == generation.next_is_full  # a second query gives the same decision
        generation.end(generation.begin("A"))
    full = generation.run().full
    assert generation.plan is None
    assert len(set(queries)) == len(queries)
    for call in range(CALLS):
        last = max((other for other in range(call) if full[other]), default=None)
        if last is None or call < schedule.warmup or call >= CALLS - schedule.cooldown:
            assert full[call]
            continue
        shallow = call - last - 1
        if schedule.max_shallow is not None and shallow == schedule.max_shallow:
            assert full[call]
        elif shallow < schedule.least:
            assert not full[call]
        else:
            error = errors[call]
            assert (call, last) in queries
            assert full[call] == (error is None or not error <= schedule.bound)


@given(schedules)
def test_text_forms_can_be_read_back(schedule: Adaptive) -> None:
    assert parse(str(schedule)) == schedule
    assert eval(repr(schedule)) == schedule


def test_invalid_arguments_are_refused() -> None:
    for bound in (0.0, -1.0, float("nan"), float("inf"), "much", True):
        with pytest.raises(ScheduleError, match="needs one above 0"):
            Adaptive(bound)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="least is 0"):
        Adaptive(0.2, 0)
    with pytest.raises(ScheduleError, match="max_shallow is 2, but must be at least least, which is 3"):
        Adaptive(0.2, 3, max_shallow=2)
    with pytest.raises(ScheduleError, match="unknown before it"):
        Adaptive(0.2).full_calls(20)
    with pytest.raises(ScheduleError, match=r"unet\.generation\(calls=n\)"):
        GenerationState(Adaptive(0.2, cooldown=1))
    assert parse("adaptive:0.25:least=2", warmup=3) == Adaptive(0.25, 2, warmup=3)


def test_calls_after_a_failure_or_with_other_shapes_are_full_whatever_the_estimate() -> None:
    generation = GenerationState(Adaptive(0.5, warmup=1))
    generation.drift = cast(Any, SimpleNamespace(predicted_error=lambda call, last: 0.0))
    generation.end(generation.begin("A"))
    assert not generation.begin("A")  # this call fails
    assert generation.begin("A")
    generation.end(True)
    assert generation.begin("B")


def test_the_drift_estimate_follows_its_formula() -> None:
    buffers = {"sample": torch.zeros(2, 4, 4, 4), "a": torch.zeros(2, 3, 8, 8), "b": torch.zeros(2, 2, 2, 2)}
    bound: Any = SimpleNamespace(buffers=buffers)
    estimator = FeatureDriftEstimator(("a", "b"))
    random = torch.Generator().manual_seed(0)
    snapshots = []
    for call in range(5):
        for buffer in buffers.values():
            buffer.copy_(torch.randn(buffer.shape, generator=random))
        snapshots.append({name: buffer.flatten().clone() for name, buffer in buffers.items()})
        if call < 2:
            estimator.record_full(bound)
        else:
            estimator.record_shallow(bound, call)
        assert (estimator.predicted_error(call + 1, 1) is None) == (call < 2)

    def moved(now: torch.Tensor, then: torch.Tensor) -> float:
        return float((now - then).norm() / now.norm())

    features = [torch.cat([buffers["a"], buffers["b"]]) for buffers in snapshots]
    feature_per_latent = moved(features[1], features[0]) / moved(snapshots[1]["sample"], snapshots[0]["sample"])
    expected = feature_per_latent * moved(snapshots[4]["sample"], snapshots[1]["sample"]) * 4 / 3
    assert estimator.predicted_error(5, 1) == pytest.approx(expected, rel=1e-5)
    assert estimator.predicted_error(6, 1) is None  # the last estimate is not of the previous call
    estimator.record_full(SimpleNamespace(buffers=buffers))  # type: ignore[arg-type]  # other shapes: no earlier features to compare with
    estimator.record_shallow(SimpleNamespace(buffers=buffers), 6)  # type: ignore[arg-type]
    assert estimator.predicted_error(7, 5) is None


def run(unet: offcut.UNet, schedule: Any, on_call: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
    """Return the outputs of a generation whose latents drift along a line at increasing speed."""
    unet.set_schedule(schedule, CUT)
    width = unet.config["cross_attention_dim"]
    random = torch.Generator().manual_seed(5)
    start, along = (torch.randn(2, 4, 8, 8, generator=random) for _ in range(2))
    text = torch.randn(2, 77, width, generator=random)
    outputs = []
    with unet.generation(CALLS):
        for call in range(CALLS):
            sample = start + along * (call / CALLS) ** 2
            outputs.append(unet(sample, torch.tensor(900.0 - 50 * call), text).sample)
            on_call()
    return outputs


def test_full_calls_follow_the_movement_of_features_and_latents(unet: offcut.UNet) -> None:
    records: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record() -> None:
        assert unet.bound is not None
        records.append((unet.bound.buffers["sample"].clone(), unet.bound.buffers[FEATURE].clone()))

    schedule = Adaptive(0.02, max_shallow=5)
    outputs = run(unet, schedule, record)
    assert unet.last_run is not None
    full = unet.last_run.full_calls
    assert 3 < len(full) < CALLS - 3

    def moved(index: int, now: int, then: int) -> float:
        return float((records[now][index] - records[then][index]).norm() / records[now][index].norm())

    expected = [0, 1]
    for call in range(2, CALLS):
        last, before = expected[-1], expected[-2]
        if call - last > 1:
            error = moved(1, last, before) / moved(0, last, before) * moved(0, call - 1, last)
            if call - last > 5 or error * (call - last) / (call - 1 - last) > schedule.bound:
                expected.append(call)
    assert full == tuple(expected)
    # A fixed schedule with the same full calls gives the same outputs.
    for one, other in zip(outputs, run(unet, offcut.Steps(full)), strict=True):
        assert torch.equal(one, other)


def test_a_generation_does_not_depend_on_the_one_before(unet: offcut.UNet) -> None:
    first = run(unet, Adaptive(0.02))
    again = run(unet, Adaptive(0.02))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    run(unet, Adaptive(1e9, max_shallow=4))
    assert unet.last_run is not None
    assert unet.last_run.full_calls == Uniform(5, warmup=2).full_calls(CALLS)
    run(unet, Adaptive(1e-9, least=2))
    assert unet.last_run.full_calls == Uniform(3, warmup=2).full_calls(CALLS)
