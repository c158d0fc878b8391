"""A gain in PSNR counts only if it is larger than its standard error."""

from __future__ import annotations

import pytest

from offcut.runtime.tuning.candidates import significantly_better


@pytest.mark.parametrize(
    ("gains", "significant"),
    [([1.0], True), ([0.0], False), ([1.0, 1.2, 0.9], True), ([4.0, -3.0, -0.5, 0.0], False), ([-1.0, -1.0], False)],
)
def test_only_gains_larger_than_their_standard_error_are_significant(gains: list[float], significant: bool) -> None:
    assert significantly_better([30 + gain for gain in gains], [30.0] * len(gains)) is significant
