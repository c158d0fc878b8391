"""The performance checks on the CPU: their figures are right, and their claims can fail."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from offcut.benchmarks.gpu import performance
from offcut.benchmarks.gpu.peers import DenoisingLoop, LoopDenoiser
from offcut.benchmarks.gpu.performance import Contest
from offcut.benchmarks.gpu.workbench import Workbench
from offcut.benchmarks.turns import in_turns

CONTEST = Contest("small", "onnxruntime", "fp32", 1)


class _SleepingDenoiser(LoopDenoiser):
    """A denoiser whose calls take a number of seconds, and which records its turns."""

    def __init__(self, name: str, seconds: float, order: list[str]) -> None:
        super().__init__(DenoisingLoop(torch.randn(1, 4, 8, 8), 2), None, {})
        self._name, self._seconds, self._order = name, seconds, order

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._order.append(self._name)
        yield

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time.sleep(self._seconds)
        return torch.zeros_like(sample)


def test_contestants_take_turns_after_their_warm_up() -> None:
    order: list[str] = []
    denoisers = [_SleepingDenoiser("a", 0.0, order), _SleepingDenoiser("b", 0.02, order)]
    loops = in_turns(denoisers, 3)
    assert order == ["a", "b"] * 5  # two warm-up turns of each, then three measured turns
    assert [len(loop) for loop in loops] == [3, 3]
    fast, slow = (statistics.median(loop.seconds for loop in measured) for measured in loops)
    assert slow - fast >= 0.03  # two calls of 20 ms


@pytest.mark.slow
def test_the_figures_of_a_loop_are_consistent(bench: Workbench) -> None:
    outcome = performance.loop(bench, CONTEST)
    figures: Any = outcome.figures
    claims = {claim.name: claim for claim in outcome.claims}
    full, shallow = figures["full calls"], figures["shallow calls"]
    assert (full, shallow) == (2, 4)
    for where in ("inside", "alone"):
        ideal = full * figures[f"full call {where}, ms"] + shallow * figures[f"shallow call {where}, ms"]
        (claim,) = (claim for name, claim in claims.items() if name.startswith("wall") and where in name)
        assert claim.value == pytest.approx(figures["loop, ms"] / ideal)
        assert (claim.sign, claim.bound) == ("<=", 1.02)
    assert figures["speed-up"] == pytest.approx(figures["loop uncached, ms"] / figures["loop, ms"])
    assert 0 < figures["shallow call alone, ms"] < figures["full call alone, ms"]


@pytest.mark.slow
def test_a_loop_with_work_between_its_engine_calls_fails(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DenoisingLoop.run

    def dawdle(self: DenoisingLoop, predict: Any) -> torch.Tensor:
        latents = original(self, predict)
        time.sleep(1.0)
        return latents

    monkeypatch.setattr(DenoisingLoop, "run", dawdle)
    assert all(not claim.holds for claim in performance.loop(bench, CONTEST).claims)


@pytest.mark.slow
def test_deepcaches_helper_runs_the_same_loop(bench: Workbench) -> None:
    outcome = performance.against_helper(bench, CONTEST)
    (claim,) = outcome.claims
    figures: Any = outcome.figures
    assert claim.value == pytest.approx(figures["helper's loop, ms"] / figures["loop, ms"])
    assert (claim.sign, claim.bound) == (">=", 1.5)


def test_the_counted_work_is_that_of_the_published_model() -> None:
    full, shallow = performance.count("sd15", "fp16", 2)
    assert full.flops / 1e12 == pytest.approx(1.6, rel=0.05)  # 0.8 TFLOP for each image of 512 x 512
    assert 0.05 < shallow.flops / full.flops < 0.15
    assert full.bytes > 2 * 859e6  # 859 M parameters
    assert shallow.bytes < 0.1 * full.bytes


def test_work_is_proportional_to_the_batch() -> None:
    one, two = (performance.count("small", "fp32", batch)[1] for batch in (2, 4))
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)


@pytest.mark.slow
def test_the_roofline_check_fails_above_the_ceiling(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = performance.roofline(bench, CONTEST)
    assert len(outcome.claims) == 2
    assert {"matrix product, TFLOP/s", "copy, GB/s", "full, TFLOP/s", "shallow, GB/s at least"} <= set(outcome.figures)
    monkeypatch.setattr(performance, "ceilings", lambda *_: (1.0, 1.0))
    assert not any(claim.holds for claim in performance.roofline(bench, CONTEST).claims)
