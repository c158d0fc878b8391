"""Claims follow from intervals: known differences in made-up scores give the verdicts that they should."""

import numpy as np
import pytest

from offcut.benchmarks.quality import claims, plan
from offcut.benchmarks.quality.plan import SHALLOW_OVER_FULL, QualitySetting
from offcut.benchmarks.quality.scores import Scored
from offcut.benchmarks.stats import Estimate


@pytest.mark.parametrize(
    ("low", "high", "goal", "expected"),
    [
        (0.1, 0.3, "beats", True),
        (-0.1, 0.3, "beats", None),
        (-0.3, -0.1, "beats", False),
        (-0.01, 0.3, "matches", True),
        (-0.01, -0.005, "matches", True),  # worse for certain, and within the margin for certain
        (-0.05, 0.3, "matches", None),
        (-0.05, -0.01, "matches", False),
    ],
)
def test_verdicts(low: float, high: float, goal: claims.Goal, expected: bool | None) -> None:
    assert claims.verdict(Estimate(mean=(low + high) / 2, low=low, high=high), goal, 0.02) is expected


def scored(psnr: float, right: float, spread: float, count: int, seed: int) -> Scored:
    random = np.random.default_rng(seed)
    rights = (np.arange(count) < right * count).astype(float)
    psnrs = psnr + random.normal(size=count)
    features = random.normal(size=(count, 4)) * spread
    return Scored(psnrs, psnrs, psnrs, rights, rights, features)


def found(count: int, **quality: dict[str, tuple[float, float, float]]) -> dict[str, bool | None]:
    settings = [plan.cached("ddim", 50, "uniform", n) for n in (1, 10)]
    settings += [plan.cached("ddim", 50, "quad", 10), QualitySetting("ddim", 10, fewer=True)]
    names = ("uncached", "uniform", "quad", "fewer")
    values = zip(names, settings, strict=True)
    scores = {row: scored(*quality.get(name, (30, 0.8, 1.0)), count, 7) for name, row in values}
    drawn = np.random.default_rng(8).normal(size=(count, 4))
    return {claim.text: claim.agrees for claim in claims.claims(settings, scores, drawn, SHALLOW_OVER_FULL)}


def test_a_difference_that_is_there_is_found() -> None:
    agrees = found(400, uniform=(35, 0.8, 1.0), quad=(40, 0.8, 0.9), fewer=(30, 0.8, 1.0))
    assert [value for text, value in agrees.items() if "nearer" in text] == [True]
    assert [value for text, value in agrees.items() if "prompts" in text] == [True]
    assert [value for text, value in agrees.items() if "in PSNR" in text] == [True]


def test_a_difference_the_other_way_is_found_too() -> None:
    agrees = found(400, uniform=(25, 0.6, 3.0), quad=(20, 0.6, 4.0), fewer=(30, 0.8, 1.0))
    assert set(agrees.values()) == {False}
    assert len(agrees) == 5


@pytest.mark.parametrize(("reused", "agrees"), [(30.0, True), (40.0, False), (35.0, None)])
def test_a_forecast_is_held_against_reuse_and_fewer_steps(reused: float, agrees: bool | None) -> None:
    plain = plan.cached("ddim", 50, "uniform", 10, warmup=2)
    forecast = plan.cached("ddim", 50, "uniform", 10, warmup=2, damping=1.0)
    settings = [QualitySetting("ddim", 50), plain, forecast, QualitySetting("ddim", 10, fewer=True)]
    values = ((30, 0.8), (reused, 0.8), (35, 0.8), (30, 0.8))
    scores = {
        row: scored(psnr, right, 1.0, 400, seed)
        for seed, (row, (psnr, right)) in enumerate(zip(settings, values, strict=True))
    }
    drawn = np.random.default_rng(8).normal(size=(400, 4))
    made = claims.claims(settings, scores, drawn, SHALLOW_OVER_FULL)
    mine = [claim for claim in made if "forecast" in claim.text]
    assert [claim.agrees for claim in mine] == [agrees, True]
    assert mine[0].text.endswith("than reuse with the same schedule")


def test_few_pictures_claim_nothing() -> None:
    assert set(found(40, uniform=(35, 0.8, 1.0)).values()) == {None}
