"""State of a generation without engines: random calls, failures and shapes, and the timesteps of real schedulers."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import pytest
from diffusers import DDIMInverseScheduler, DDIMScheduler, SchedulerMixin
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.errors import ScheduleError
from offcut.runtime.generation.schedule import Quad, Steps, Uniform
from offcut.runtime.generation.state import GenerationState

schedules = st.one_of(
    st.builds(lambda n, w, m: Uniform(n, warmup=w, max_shallow=m), st.integers(1, 8), st.integers(0, 3), st.none()),
    st.builds(Steps, st.lists(st.integers(0, 40), max_size=8)),
    st.builds(lambda n, c: Quad(n, center=None, cooldown=c), st.integers(1, 8), st.integers(0, 3)),
)
events = st.lists(st.tuples(st.sampled_from(["call", "fails", "invalidate"]), st.sampled_from("AAAB")), max_size=60)


@settings(max_examples=1000, deadline=None)
@given(schedules, st.integers(1, 40), events)
def test_features_are_read_only_after_a_completed_call_with_the_same_shapes(
    schedule: Uniform | Steps | Quad, calls: int, events: list[tuple[str, str]]
) -> None:
    generation = GenerationState(schedule, calls=calls)
    readable: str | None = None  # shapes whose features may be read
    completed = 0
    for event, shapes in events:
        if event == "invalidate":
            generation.invalidate()
            readable = None
            continue
        full = generation.begin(shapes)
        assert full == (readable != shapes or completed >= calls or completed in schedule.full_calls(calls))
        if event == "call":
            generation.end(full)
            readable = shapes
            completed += 1
        else:
            readable = None
    assert len(generation.run().full) == completed


def run_calls(generation: GenerationState, calls: int) -> tuple[bool, ...]:
    for _ in range(calls):
        generation.end(generation.begin("A"))
    return generation.run().full


@given(schedules, st.integers(1, 40), st.integers(0, 5))
def test_an_undisturbed_generation_follows_its_schedule(
    schedule: Uniform | Steps | Quad, calls: int, beyond: int
) -> None:
    full = run_calls(GenerationState(schedule, calls=lambda: calls), calls + beyond)
    assert full == (*(call in schedule.full_calls(calls) for call in range(calls)), *[True] * beyond)


def test_the_number_of_calls_is_resolved_once_at_the_first_call() -> None:
    resolutions = []
    generation = GenerationState(Quad(5), calls=lambda: resolutions.append(1) or 50)
    assert resolutions == []
    assert generation.run().calls is None
    run_calls(generation, 50)
    assert resolutions == [1]
    assert generation.run().calls == 50
    assert generation.run().full_calls == Quad(5).full_calls(50)
    assert generation.run().timeline.startswith("#....#...#")


def test_the_error_for_a_missing_number_of_calls_says_how_to_give_it() -> None:
    with pytest.raises(ScheduleError, match=r"unet\.generation\(calls=n\)"):
        GenerationState(Quad(5))
    with pytest.raises(ScheduleError, match="0 UNet calls were announced"):
        GenerationState(Uniform(5), calls=0).begin("A")
    with pytest.raises(ScheduleError, match="smaller center"):
        GenerationState(Quad(5), calls=10).begin("A")


def _settings(scheduler: type[SchedulerMixin]) -> list[dict[str, Any]]:
    known = inspect.signature(scheduler).parameters
    options: list[dict[str, Any]] = [
        {},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"skip_prk_steps": True},
        {"solver_order": 3},
    ]
    return [option for option in options if set(option) <= set(known)]


def _compatible() -> list[type[SchedulerMixin]]:
    """Return every scheduler that diffusers lists as compatible with Stable Diffusion, as far as installed."""
    return sorted(
        {DDIMScheduler, diffusers.LCMScheduler, diffusers.TCDScheduler, *DDIMScheduler().compatibles},
        key=lambda scheduler: scheduler.__name__,
    )


def _timesteps(scheduler: type[SchedulerMixin], steps: int, **options: Any) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        instance = scheduler(**options)
        instance.set_timesteps(steps)
    return [float(timestep) for timestep in instance.timesteps]


def unannounced(timesteps: list[float], schedule: Uniform) -> list[list[bool]]:
    """Split timesteps into generations as a bare UNet does; return for each its calls, True for full ones."""
    generations: list[GenerationState] = []
    for timestep in timesteps:
        if not generations or not generations[-1].continues("A", timestep):
            generations.append(GenerationState(schedule))
        generations[-1].end(generations[-1].begin("A", timestep))
    return [list(generation.run().full) for generation in generations]


@pytest.mark.parametrize("scheduler", _compatible(), ids=lambda scheduler: scheduler.__name__)
def test_unannounced_generations_follow_every_schedulers_timesteps(scheduler: type[SchedulerMixin]) -> None:
    tried = 0
    for options in _settings(scheduler):
        for steps in (1, 2, 3, 12, 50) if options in ({}, {"use_karras_sigmas": True}) else (3, 12):
            try:
                timesteps = _timesteps(scheduler, steps, **options)
            except ImportError:
                pytest.skip("needs a package that is not installed")
            except ValueError:
                continue  # the scheduler refuses so many steps or these options
            if len(timesteps) < 2:
                continue
            tried += 1
            n = len(timesteps)
            expected = [call in Uniform(3).full_calls(n) for call in range(n)]
            assert unannounced(timesteps * 2, Uniform(3)) == [expected] * 2, (options, steps, timesteps)
            later = timesteps[n // 4 * 2 :]  # as img2img begins; a whole step of second-order schedulers
            if later[0] >= timesteps[-1] + 1:
                assert unannounced(timesteps + later, Uniform(3)) == [expected, expected[: len(later)]]
    assert tried


def test_rising_timesteps_are_full_unless_the_generation_is_announced() -> None:
    timesteps = _timesteps(DDIMInverseScheduler, 10)
    assert unannounced(timesteps, Uniform(3)) == [[True]] * 10
    generation = GenerationState(Uniform(3), calls=10)
    assert run_calls(generation, 10) == tuple(call in (0, 3, 6, 9) for call in range(10))


def test_an_unannounced_generation_ends_with_other_shapes_or_a_failed_call() -> None:
    generation = GenerationState(Uniform(3))
    generation.end(generation.begin("A", 999.0))
    assert generation.continues("A", 900.0)
    assert generation.continues("A", 999.0)
    assert not generation.continues("B", 900.0)
    generation.begin("A", 900.0)  # no end: the call failed
    assert not generation.continues("A", 800.0)
