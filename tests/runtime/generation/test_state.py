"""State of a generation without engines: which call is full, of which trajectory, and how steps are told apart."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
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


def call(generation: GenerationState, timestep: torch.Tensor | float, shapes: str = "A", **options: Any) -> bool:
    """Make one call, and return whether it was full."""
    begun = generation.begin(shapes, timestep, **options)
    generation.end(begun)
    return begun.full


def elements(count: int) -> list[torch.Tensor]:
    """Return timesteps as a pipeline passes them: elements of one tensor."""
    return list(torch.linspace(999, 0, count))


@settings(max_examples=1000, deadline=None)
@given(schedules, st.integers(1, 40), events)
def test_features_are_read_only_after_a_completed_call_with_the_same_shapes(
    schedule: Uniform | Steps | Quad, calls: int, events: list[tuple[str, str]]
) -> None:
    generation = GenerationState(schedule, calls=calls)
    timesteps = elements(100)
    readable: str | None = None  # shapes whose features may be read
    completed = 0
    for event, shapes in events:
        if event == "invalidate":
            generation.invalidate()
            readable = None
            continue
        begun = generation.begin(shapes, timesteps[completed])
        assert begun.full == (readable != shapes or completed >= calls or completed in schedule.full_calls(calls))
        if event == "call":
            generation.end(begun)
            readable = shapes
            completed += 1
        else:
            readable = None
    assert len(generation.run().full) == completed


def run_calls(generation: GenerationState, calls: int) -> tuple[bool, ...]:
    for timestep in elements(calls):
        call(generation, timestep)
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
        GenerationState(Uniform(5), calls=0).begin("A", 999.0)
    with pytest.raises(ScheduleError, match="smaller center"):
        GenerationState(Quad(5), calls=10).begin("A", 999.0)


# Steps of real schedulers


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


def _timesteps(scheduler: type[SchedulerMixin], steps: int, **options: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        instance = scheduler(**options)
        instance.set_timesteps(steps)
    return torch.as_tensor(instance.timesteps)


def unannounced(timesteps: list[Any], schedule: Uniform) -> list[list[bool]]:
    """Split timesteps into generations as a bare UNet does; return for each its calls, True for full ones."""
    generations: list[GenerationState] = []
    for timestep in timesteps:
        if not generations or not generations[-1].continues("A", timestep):
            generations.append(GenerationState(schedule, announced=False))
        call(generations[-1], timestep)
    return [list(generation.run().full) for generation in generations]


@pytest.mark.parametrize("scheduler", _compatible(), ids=lambda scheduler: scheduler.__name__)
def test_unannounced_generations_follow_every_schedulers_timesteps(scheduler: type[SchedulerMixin]) -> None:
    tried = 0
    for options in _settings(scheduler):
        for steps in (1, 2, 3, 12, 50) if options in ({}, {"use_karras_sigmas": True}) else (3, 12):
            try:
                tensor = _timesteps(scheduler, steps, **options)
            except ImportError:
                pytest.skip("needs a package that is not installed")
            except ValueError:
                continue  # the scheduler refuses so many steps or these options
            if len(tensor) < 2:
                continue
            tried += 1
            n = len(tensor)
            values = [float(value) for value in tensor]
            expected = [call in Uniform(3).full_calls(n) for call in range(n)]
            for timesteps in (list(tensor), values):
                if timesteps is values and n > 2 and values[-1] == values[-2] and values[1] != values[2]:
                    continue  # KDPM2 ancestral repeats its last timestep only: by value, that call is full
                assert unannounced(timesteps * 2, Uniform(3)) == [expected] * 2, (options, steps, timesteps)
                later = timesteps[n // 4 * 2 :]  # as img2img begins; a whole step of second-order schedulers
                if values[n // 4 * 2] >= values[-1] + 1:
                    assert unannounced(timesteps + later, Uniform(3)) == [expected, expected[: len(later)]]
    assert tried


def test_rising_timesteps_of_an_inversion_follow_the_schedule() -> None:
    tensor = _timesteps(DDIMInverseScheduler, 10)
    expected = [call in (0, 3, 6, 9) for call in range(10)]
    assert unannounced(list(tensor), Uniform(3)) == [expected]
    values = [float(value) for value in tensor]
    assert unannounced(values, Uniform(3)) == [[True]] * 10  # nothing shows that they are one generation
    generation = GenerationState(Uniform(3), calls=10)
    assert [call(generation, value) for value in values] == expected


def test_an_unannounced_generation_ends_with_other_shapes_or_a_failed_call() -> None:
    generation = GenerationState(Uniform(3), announced=False)
    call(generation, 999.0)
    assert generation.continues("A", 900.0)
    assert generation.continues("A", 999.0)
    assert not generation.continues("B", 900.0)
    generation.begin("A", 900.0)  # no end: the call failed
    assert not generation.continues("A", 800.0)


def test_a_call_that_failed_is_repeated_by_its_trajectory() -> None:
    generation, timesteps = GenerationState(Uniform(3), calls=4), elements(4)
    first = generation.begin("A", timesteps[0])
    again = generation.begin("A", timesteps[0])
    assert again.trajectory is first.trajectory
    generation.end(again)
    assert not call(generation, timesteps[1])


# Several trajectories


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("by_value", [False, True])
def test_calls_of_one_step_belong_to_different_trajectories(passes: int, announced: bool, by_value: bool) -> None:
    generation = GenerationState(Uniform(3), calls=6 if announced else None, announced=announced)
    for timestep in elements(6):
        for number in range(passes):
            begun = generation.begin("A", float(timestep) if by_value else timestep)
            assert begun.trajectory.index == number
            generation.end(begun)
    run = generation.run()
    assert run.timeline == "".join(mark * passes for mark in "#..#..")
    assert run.trajectories == tuple(range(passes)) * 6


@pytest.mark.parametrize("by_value", [False, True])
def test_a_pass_that_begins_later_is_a_trajectory_of_its_own(by_value: bool) -> None:
    generation, timeline = GenerationState(Uniform(3), calls=8), []
    for step, element in enumerate(elements(8)):
        timestep = float(element) if by_value else element
        timeline.append([call(generation, timestep) for _ in range(2 if step >= 2 else 1)])
    assert [full[0] for full in timeline] == [step % 3 == 0 for step in range(8)]
    assert [full[1] for full in timeline[2:]] == [number % 3 == 0 for number in range(6)]


def test_a_sampler_that_repeats_timesteps_has_one_trajectory_by_value_too() -> None:
    heun = [float(value) for value in _timesteps(diffusers.HeunDiscreteScheduler, 6)]
    assert heun[1] == heun[2]
    generation = GenerationState(Uniform(3), calls=len(heun))
    assert [call(generation, value) for value in heun] == [number % 3 == 0 for number in range(len(heun))]
    assert set(generation.run().trajectories) == {0}


def test_text_embeddings_tell_passes_apart_whose_order_changes() -> None:
    """The first of two passes is left out from the fourth step on, as where guidance ends early."""
    texts = torch.randn(2, 7, 16)
    generation = GenerationState(Uniform(4), calls=8)
    for step, timestep in enumerate(elements(8)):
        for number in (0, 1) if step < 3 else (1,):
            begun = generation.begin("A", timestep, texts[number : number + 1])
            assert begun.trajectory.index == number
            assert begun.full == (step % 4 == 0)
            generation.end(begun)
    assert generation.order_changed is None


def test_a_changed_number_of_calls_without_embeddings_is_noted() -> None:
    generation = GenerationState(Uniform(4), calls=8)
    for step, timestep in enumerate(elements(8)):
        for _ in range(2 if step < 3 else 1):
            call(generation, timestep)
    assert generation.order_changed == (2, 1)


def test_a_restarted_sampler_begins_new_trajectories_with_its_own_number_of_calls() -> None:
    """FreeInit's fast sampling: 2, 4 and 6 steps, with new timesteps each time."""
    counts = iter([2, 4, 6])
    generation = GenerationState(Uniform(3, cooldown=1), calls=lambda: next(counts))
    for steps in (2, 4, 6):
        for timestep in elements(steps):
            call(generation, timestep)
    assert generation.run().timeline == "##" + "#..#" + "#..#.#"
    same_timesteps = GenerationState(Uniform(3), calls=4)
    for timestep in elements(4) * 3:
        call(same_timesteps, timestep)
    assert same_timesteps.run().timeline == "#..#" * 3


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 4), st.randoms(use_true_random=False), st.booleans())
def test_keys_tell_trajectories_apart_in_any_order(
    count: int, steps: int, interval: int, rng: random.Random, announced: bool
) -> None:
    """Trajectories advance in random order, each by its own timesteps, and each follows the schedule by its count."""
    generation = GenerationState(Uniform(interval), calls=steps if announced else None, announced=announced)
    timesteps = elements(steps + 1)
    completed = [0] * count
    while unfinished := [key for key in range(count) if completed[key] < steps]:
        key = rng.choice(unfinished)
        begun = generation.begin("A", timesteps[completed[key]], key=f"tile {key}")
        assert begun.number == completed[key]
        assert begun.full == (completed[key] % interval == 0)
        generation.end(begun)
        completed[key] += 1
    assert len(set(generation.run().trajectories)) == count


def test_rows_at_different_timesteps_make_full_calls_unless_a_key_says_that_they_belong_together() -> None:
    """As in parallel sampling, where the rows of a batch move on from step to step."""
    windows = [torch.tensor([900.0 - 100 * (start + row) for row in range(3)]) for start in range(4)]
    generation = GenerationState(Uniform(3), calls=4)
    assert [call(generation, window) for window in windows] == [True] * 4
    keyed = GenerationState(Uniform(3), calls=4)
    assert [call(keyed, window, key="rows") for window in windows] == [True, False, False, True]
    equal = GenerationState(Uniform(3), calls=4)
    assert [call(equal, torch.full((3,), 900.0 - step)) for step in range(4)] == [True, False, False, True]


# Calls whose latent nothing but their order shows


def readers(
    generation: GenerationState, calls: list[tuple[str, torch.Tensor | float, torch.Tensor | None]]
) -> set[str]:
    """Make calls of latents, and return the latents that a shallow call read another latent's features for."""
    last_full: dict[int, str] = {}
    wrong = set()
    for latent, timestep, conditioning in calls:
        begun = generation.begin("A", timestep, conditioning)
        generation.end(begun)
        if begun.full:
            last_full[begun.trajectory.index] = latent
        elif last_full[begun.trajectory.index] != latent:
            wrong.add(latent)
    generation.finish()
    return wrong


@pytest.mark.parametrize(
    "value", [lambda element: 0.0, float, lambda element: int(element) - 10], ids=["0", "t", "t-10"]
)
def test_calls_that_pass_values_share_no_trajectory_with_calls_that_pass_elements(
    value: Callable[[torch.Tensor], float],
) -> None:
    """A callback that calls the UNet with a latent of its own."""
    text = torch.randn(1, 7, 16)
    calls = [call for element in elements(9) for call in (("main", element, text), ("callback", value(element), text))]
    generation = GenerationState(Uniform(3), calls=9)
    assert readers(generation, calls) == set()
    assert any(not full for full in generation.run().full)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, diffusers.HeunDiscreteScheduler])
def test_a_pass_with_its_own_text_may_begin_or_end_at_any_step_by_value(
    scheduler: type[SchedulerMixin], announced: bool
) -> None:
    texts = {name: torch.randn(1, 7, 16) for name in "AB"}
    values = [float(value) for value in _timesteps(scheduler, 8)]
    for passes in ("A", "B"), ("A", "AB"), ("AB", "A"), ("AB", "B"):
        for step in range(1, len(values)):
            calls = [(name, value, texts[name]) for index, value in enumerate(values) for name in passes[index >= step]]
            generation = GenerationState(Uniform(3), calls=len(values) if announced else None, announced=announced)
            wrong = readers(generation, calls)
            # Where one pass replaces the other, only the text changes, as where a prompt changes.
            assert not wrong or passes == ("A", "B"), (passes, step)


@pytest.mark.parametrize("conditioning", [None, torch.zeros(1, 7, 16)], ids=["no text", "same text"])
@pytest.mark.parametrize("step", [2, 7])
def test_a_call_before_the_others_that_nothing_shows_is_noted_even_in_the_last_step(
    conditioning: torch.Tensor | None, step: int
) -> None:
    timesteps = elements(8)
    calls = [
        (name, timestep, conditioning)
        for index, timestep in enumerate(timesteps)
        for name in (("extra", "main") if index >= step else ("main",))
    ]
    generation = GenerationState(Uniform(3), calls=8)
    assert readers(generation, calls) == {"extra"} or step % 3 == 0
    assert generation.order_changed == (1, 2)
    uncached = GenerationState(None, calls=8)
    assert readers(uncached, calls) == set()
    assert uncached.order_changed is None


def test_more_calls_than_announced_are_noted() -> None:
    generation = GenerationState(Uniform(3), calls=8)
    run_calls(generation, 8)
    assert generation.exceeded is None
    for value in (900.0, 800.0, 800.0, 700.0, 700.0, 600.0, 600.0, 500.0, 500.0):  # Heun's, or a pass that begins later
        call(generation, value)
    assert generation.exceeded == 8


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("latents", [2, 3])
def test_unannounced_loops_that_take_turns_read_their_own_features(lag: int, by_value: bool, latents: int) -> None:
    """Python generators that denoise with the same timesteps, of which each begins some steps after the one before."""
    timesteps: list[Any] = [float(element) for element in elements(12)] if by_value else elements(12)
    generation: GenerationState | None = None
    last_full: dict[int, int] = {}
    for turn in range(12 + lag * latents):
        for latent in range(latents):
            step = turn - lag * latent
            if not 0 <= step < 12:
                continue
            if generation is None or not generation.continues("A", timesteps[step]):
                if generation is not None:
                    generation.release()
                generation, last_full = GenerationState(Uniform(3), announced=False, previous=generation), {}
            begun = generation.begin("A", timesteps[step])
            generation.end(begun)
            if begun.full:
                last_full[begun.trajectory.index] = latent
            assert last_full[begun.trajectory.index] == latent


def test_text_embeddings_with_equal_places_and_other_strides_are_different_tensors() -> None:
    texts = torch.randn(2, 7, 16)
    passes = {"expanded": texts[:1].expand(2, -1, -1), "whole": texts[0:2]}
    calls = [
        (name, timestep, passes[name])
        for step, timestep in enumerate(elements(8))
        for name in (reversed(passes) if step % 2 else passes)
    ]
    assert readers(GenerationState(Uniform(3), calls=8), calls) == set()


@pytest.mark.parametrize("step", [0, 4])
def test_a_loop_that_goes_on_without_a_failed_call_is_noted(step: int) -> None:
    timesteps, text = elements(8), torch.zeros(1, 7, 16)
    generation = GenerationState(Uniform(3), calls=8)
    for index, timestep in enumerate(timesteps):
        for latent in range(2):
            begun = generation.begin("A", timestep, text)
            if (index, latent) != (step, 0):  # the call that failed
                generation.end(begun)
    generation.finish()
    assert generation.order_changed is not None
