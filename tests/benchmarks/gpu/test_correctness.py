"""The checks that need no GPU: they pass with a correct engine, and each fails with a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from offcut.benchmarks.gpu import correctness, lifetime, streams
from offcut.benchmarks.gpu.check import CheckOutcome
from offcut.benchmarks.gpu.exercise import max_difference
from offcut.benchmarks.gpu.workbench import CUT, Workbench
from offcut.engines.base import BoundPair

pytestmark = pytest.mark.slow

CHECKS = [
    correctness.parity,
    correctness.trajectory,
    correctness.interleaved,
    lifetime.threads,
    streams.moved_buffers,
]


def broken(outcome: CheckOutcome) -> list[str]:
    return [claim.name for claim in outcome.claims if not claim.holds]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_correct_engine_passes(check: Callable[..., CheckOutcome], engine: str, bench: Workbench) -> None:
    assert broken(check(bench, engine, "fp32")) == []


def test_replays_equal_launches_and_an_engine_without_replays_fails(bench: Workbench) -> None:
    assert broken(streams.cuda_graphs(bench, "onnxruntime", "fp32")) == ["replayed calls among 10"]


class _WrongPair:
    """A bound pair that calls a test's function after each engine call."""

    def __init__(self, bound: BoundPair, spoil: Callable[[BoundPair, str | None], None]) -> None:
        self.buffers, self.dims = bound.buffers, bound.dims
        self._bound, self._spoil = bound, spoil

    def full(self) -> None:
        self._bound.full()
        self._spoil(self._bound, None)

    def shallow(self, cut: str) -> None:
        self._bound.shallow(cut)
        self._spoil(self._bound, cut)

    def close(self) -> None:
        self._bound.close()


@pytest.fixture
def spoil(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes the workbench's pairs wrong; ``when`` gets ``cuda_graphs`` and selects the pairs."""
    original = bench.pair

    def apply(change: Callable[[BoundPair, str | None], None], when: Callable[[bool], bool] = lambda _: True) -> None:
        @contextmanager
        def pair(*arguments: Any, cuda_graphs: bool = True, **how: Any) -> Iterator[Any]:
            with original(*arguments, cuda_graphs=cuda_graphs, **how) as opened:
                prepare = opened.prepare
                if when(cuda_graphs):
                    opened.prepare = lambda shapes: _WrongPair(prepare(shapes), change)  # type: ignore[method-assign]
                yield opened

        monkeypatch.setattr(bench, "pair", pair)

    return apply


def nudge_shallow(bound: BoundPair, cut: str | None) -> None:
    """Change the output of shallow calls slightly."""
    if cut is not None:
        bound.buffers["noise_pred"].mul_(1.02)


def forget_the_features(bound: BoundPair, cut: str | None) -> None:
    """Overwrite the features of the last full call."""
    if cut is None:
        bound.buffers["deep_feature_0"].zero_()


@pytest.mark.parametrize("change", [nudge_shallow, forget_the_features])
def test_a_wrong_shallow_call_fails_parity_and_trajectory(
    change: Callable[[BoundPair, str | None], None], spoil: Callable[..., None], bench: Workbench
) -> None:
    spoil(change)
    assert any("shallow deepcache:0" in name for name in broken(correctness.parity(bench, "onnxruntime", "fp32")))
    failed = broken(correctness.trajectory(bench, "onnxruntime", "fp32"))
    assert failed == ["cached trajectory, PSNR to eager PyTorch cached alike, dB"]


def test_an_engine_that_never_caches_fails_the_trajectory(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    from offcut.runtime.unet import UNet

    monkeypatch.setattr(UNet, "_enqueue", lambda self, generation, bound, *rest: bound.full())
    failed = broken(correctness.trajectory(bench, "onnxruntime", "fp32"))
    assert failed == ["cached trajectory, PSNR to eager PyTorch cached alike, dB"]


def test_a_bound_that_no_engine_meets_fails(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(correctness.TRAJECTORY, "fp32", 1e6)
    assert len(broken(correctness.trajectory(bench, "onnxruntime", "fp32"))) == 2


def test_pairs_that_share_their_features_fail_when_they_take_turns(
    spoil: Callable[..., None], bench: Workbench
) -> None:
    pairs: list[BoundPair] = []

    def overwrite(bound: BoundPair, cut: str | None) -> None:
        """Make a full call of one bound pair overwrite the features of the others."""
        if bound not in pairs:
            pairs.append(bound)
        for other in pairs:
            if cut is None and other is not bound and other.buffers:
                other.buffers["deep_feature_0"].zero_()

    spoil(overwrite)
    failed = broken(correctness.interleaved(bench, "onnxruntime", "fp32"))
    assert failed == ["smaller shape, relative difference to itself alone"]


def test_a_replay_that_differs_fails(spoil: Callable[..., None], bench: Workbench) -> None:
    calls = 0

    def stale(bound: BoundPair, cut: str | None) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            bound.buffers["noise_pred"].mul_(1.0001)

    spoil(stale, when=lambda graphs: graphs)
    failed = broken(streams.cuda_graphs(bench, "onnxruntime", "fp32"))
    assert "relative difference of replayed to launched calls" in failed


def test_threads_that_share_features_fail(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    from offcut.benchmarks.gpu.peers import EngineDenoiser

    original, samples = EngineDenoiser.predict, []

    def predict(self: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        import threading

        if threading.current_thread() is not threading.main_thread():
            samples.append(sample)
            sample = samples[0]
        return original(self, sample, timestep)

    monkeypatch.setattr(EngineDenoiser, "predict", predict)
    assert any("two threads" in name for name in broken(lifetime.threads(bench, "onnxruntime", "fp32")))


def test_the_difference_of_nonfinite_values_is_infinite() -> None:
    one = torch.ones(3)
    assert max_difference(one * float("nan"), one) == float("inf")
    assert max_difference(one, one) == 0
    assert CUT == "deepcache:0"


def test_calls_that_write_to_freed_buffers_fail(spoil: Callable[..., None], bench: Workbench) -> None:
    """Replaying a graph for another pair than it was captured for writes to freed buffers."""
    captured: dict[str, torch.Tensor] = {}

    def replay(bound: BoundPair, cut: str | None) -> None:
        if not captured:
            captured.update(bound.buffers)
        if (ours := bound.buffers["noise_pred"]) is not captured["noise_pred"]:
            captured["noise_pred"].copy_(ours)
            ours.zero_()

    spoil(replay, when=lambda cuda_graphs: cuda_graphs)
    assert broken(streams.moved_buffers(bench, "onnxruntime", "fp32")) == [
        "relative difference of the second pair to launched calls",
        "values overwritten where the first pair's buffers were",
    ]
