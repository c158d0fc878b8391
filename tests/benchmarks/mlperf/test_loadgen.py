"""LoadGen with small systems: its verdicts are parsed, and a failed system has no figures."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from offcut.benchmarks.mlperf import loadgen
from offcut.benchmarks.mlperf.loadgen import Pixels, ShortenedRules
from offcut.benchmarks.schema.mlperf import Scenario
from offcut.errors import UserError

pytest.importorskip("mlperf_loadgen")
BRIEF = ShortenedRules(seconds=0.5, queries=20, rate=40.0, latency=1.0)


def generate(indices: Sequence[int]) -> list[Pixels]:
    time.sleep(0.005)
    return [np.full((2, 2, 3), index, np.uint8) for index in indices]


@pytest.mark.parametrize(
    ("scenario", "metric"),
    [
        ("SingleStream", "90.0th percentile latency"),
        ("Offline", "Samples per second"),
        ("Server", "Completed samples per second"),
    ],
)
def test_each_scenario_ends_with_loadgens_own_verdict(scenario: Scenario, metric: str, tmp_path: Path) -> None:
    verdict, batches = loadgen.performance(scenario, generate, 8, BRIEF, 4, tmp_path)
    text = (tmp_path / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    assert verdict.valid == ("Result is : VALID" in text)
    assert verdict.metric == metric
    assert f"{metric}" in text
    assert verdict.latencies["Min"] <= verdict.latencies["50.00 percentile"] <= verdict.latencies["Max"]
    assert verdict.latencies["Min"] >= 0.005
    assert sum(batches) >= 20
    assert max(batches) == 1 if scenario == "SingleStream" else max(batches) <= 4


def test_a_run_with_too_few_queries_is_invalid_with_loadgens_reason(tmp_path: Path) -> None:
    # Ten samples: Offline needs at least the rate times the duration.
    verdict, _ = loadgen.performance("Offline", generate, 8, ShortenedRules(seconds=2, queries=10, rate=1), 8, tmp_path)
    assert not verdict.valid
    assert any("expected QPS" in reason for reason in verdict.reasons)


def test_the_accuracy_run_returns_every_image(tmp_path: Path) -> None:
    pictures = loadgen.accuracy("Offline", generate, 5, BRIEF, 2, tmp_path, (2, 2, 3))
    assert {index: int(picture[1, 1, 2]) for index, picture in pictures.items()} == {n: n for n in range(5)}


def test_a_failing_system_ends_the_test_with_its_error(tmp_path: Path) -> None:
    def broken(indices: Sequence[int]) -> list[Pixels]:
        raise RuntimeError("the engine broke")

    with pytest.raises(RuntimeError, match="the engine broke"):
        loadgen.performance("SingleStream", broken, 4, BRIEF, 1, tmp_path)


def test_logs_without_a_verdict_are_refused() -> None:
    with pytest.raises(UserError, match="left no verdict"):
        loadgen.summarize("Scenario : Offline\n")
