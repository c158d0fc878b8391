"""The system under test answers every sample once, batches what waits, and comes to an end when drawing fails."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.benchmarks.mlperf.system import Picture, System


@dataclass(frozen=True)
class Sample:
    id: int
    index: int


def picture(index: int) -> Picture:
    return np.full((2, 2, 3), index, np.uint8)


class Answers:
    def __init__(self) -> None:
        self.given: dict[int, Picture | None] = {}

    def __call__(self, pairs: Sequence[tuple[int, Picture | None]]) -> None:
        for name, drawn in pairs:
            assert name not in self.given
            self.given[name] = drawn


@settings(deadline=None, max_examples=30)
@given(queries=st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=8), batch=st.integers(1, 5))
def test_every_sample_is_answered_once_with_its_own_picture(queries: list[list[int]], batch: int) -> None:
    answers = Answers()
    system = System(lambda indices: [picture(index) for index in indices], answers, batch)
    wanted = {}
    for query in queries:
        samples = [Sample(len(wanted) + place, index) for place, index in enumerate(query)]
        wanted |= {sample.id: sample.index for sample in samples}
        system.issue(samples)
    system.close()
    given_back = {name: int(drawn[0, 0, 0]) for name, drawn in answers.given.items() if drawn is not None}
    assert given_back == wanted
    assert sum(system.batches) == len(wanted)
    assert all(1 <= size <= batch for size in system.batches)


def test_what_waits_when_the_worker_gets_free_is_drawn_together() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def draw(indices: Sequence[int]) -> list[Picture]:
        begun.set()
        go_on.wait(10)
        return [picture(index) for index in indices]

    system = System(draw, Answers(), 4)
    system.issue([Sample(0, 0)])
    begun.wait(10)
    system.issue([Sample(name, name) for name in range(1, 7)])
    go_on.set()
    system.close()
    assert system.batches == [1, 4, 2]


def test_a_failure_is_raised_at_the_end_and_nobody_waits_for_ever() -> None:
    answers = Answers()

    def draw(indices: Sequence[int]) -> list[Picture]:
        if 3 in indices:
            raise RuntimeError("the engine broke")
        return [picture(index) for index in indices]

    system = System(draw, answers, 1)
    system.issue([Sample(name, name) for name in range(6)])
    with pytest.raises(RuntimeError, match="the engine broke"):
        system.close()
    assert {name for name, drawn in answers.given.items() if drawn is None} == {3, 4, 5}
