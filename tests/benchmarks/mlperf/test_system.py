"""The system under test completes every sample once, batches waiting samples, and ends when generation fails."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.benchmarks.mlperf.loadgen import Pixels, SystemUnderTest


@dataclass(frozen=True)
class Sample:
    id: int
    index: int


def picture(index: int) -> Pixels:
    return np.full((2, 2, 3), index, np.uint8)


class Completions:
    def __init__(self) -> None:
        self.images: dict[int, Pixels | None] = {}

    def __call__(self, pairs: Sequence[tuple[int, Pixels | None]]) -> None:
        for name, image in pairs:
            assert name not in self.images
            self.images[name] = image


@settings(deadline=None, max_examples=30)
@given(queries=st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=8), batch=st.integers(1, 5))
def test_every_sample_is_completed_once_with_its_own_image(queries: list[list[int]], batch: int) -> None:
    completions = Completions()
    system = SystemUnderTest(lambda indices: [picture(index) for index in indices], completions, batch)
    expected = {}
    for query in queries:
        samples = [Sample(len(expected) + place, index) for place, index in enumerate(query)]
        expected |= {sample.id: sample.index for sample in samples}
        system.issue(samples)
    system.close()
    completed = {name: int(image[0, 0, 0]) for name, image in completions.images.items() if image is not None}
    assert completed == expected
    assert sum(system.batches) == len(expected)
    assert all(1 <= size <= batch for size in system.batches)


def test_waiting_samples_are_generated_together() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def generate(indices: Sequence[int]) -> list[Pixels]:
        begun.set()
        go_on.wait(10)
        return [picture(index) for index in indices]

    system = SystemUnderTest(generate, Completions(), 4)
    system.issue([Sample(0, 0)])
    begun.wait(10)
    system.issue([Sample(name, name) for name in range(1, 7)])
    go_on.set()
    system.close()
    assert system.batches == [1, 4, 2]


def test_a_failure_is_raised_at_the_end_and_every_sample_is_completed() -> None:
    completions = Completions()

    def generate(indices: Sequence[int]) -> list[Pixels]:
        if 3 in indices:
            raise RuntimeError("the engine broke")
        return [picture(index) for index in indices]

    system = SystemUnderTest(generate, completions, 1)
    system.issue([Sample(name, name) for name in range(6)])
    with pytest.raises(RuntimeError, match="the engine broke"):
        system.close()
    assert {name for name, image in completions.images.items() if image is None} == {3, 4, 5}
