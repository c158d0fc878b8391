"""When corrections are believed."""

from __future__ import annotations

import pytest

from offcut.runtime.tuning.gauge import surely


@pytest.mark.parametrize(
    ("gains", "sure"),
    [([1.0], True), ([0.0], False), ([1.0, 1.2, 0.9], True), ([4.0, -3.0, -0.5, 0.0], False), ([-1.0, -1.0], False)],
)
def test_a_gain_must_be_more_than_chance(gains: list[float], sure: bool) -> None:
    assert surely([30 + gain for gain in gains], [30.0] * len(gains)) is sure
