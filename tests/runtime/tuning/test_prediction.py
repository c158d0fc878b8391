"""Errors and fits from moments (sums of products) equal errors and fits from the feature values."""

from __future__ import annotations

import pytest
import torch

from offcut.runtime.generation.forecast import Coefficients
from offcut.runtime.tuning.prediction import FeatureMoments, Predictors, Ridge

CALLS, CHANNELS, POSITIONS = 6, 5, 40


def values(seed: int, noise: float = 0.01) -> torch.Tensor:
    """Return features that drift along a line, each channel at its own rate: [channels, calls, positions]."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(CHANNELS, 1, POSITIONS, generator=random)
    step = torch.randn(CHANNELS, 1, POSITIONS, generator=random) * 0.2
    calls = torch.arange(CALLS)[None, :, None]
    return start + calls * step + noise * torch.randn(CHANNELS, CALLS, POSITIONS, generator=random)


def moments(*generations: torch.Tensor) -> FeatureMoments:
    sums = FeatureMoments(generations[0].shape[1], CHANNELS)
    for generation in generations:
        sums.add(generation)
    return sums


def residual(x: torch.Tensor, call: int, last: int, before: int, c: Coefficients) -> torch.Tensor:
    scale, slope, shift = (
        torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1) for value in (c.scale, c.slope, c.shift)
    )
    x = x.double()
    return x[:, call] - (scale * x[:, last] + slope * (x[:, last] - x[:, before]) + shift)


@pytest.mark.parametrize(
    "coefficients",
    [
        Coefficients(),
        Coefficients(slope=0.7),
        Coefficients(1.1, -0.4, 0.2),
        Coefficients(torch.rand(CHANNELS), torch.rand(CHANNELS), torch.rand(CHANNELS)),
    ],
)
def test_errors_from_moments_equal_errors_from_values(coefficients: Coefficients) -> None:
    first, second = values(1), values(2)
    errors = moments(first, second).errors(range(4, 5), 3, 1, coefficients)
    residuals = torch.cat([residual(x, 4, 3, 1, coefficients) for x in (first, second)], 1)
    assert float(errors[0]) == pytest.approx(float((residuals**2).mean(1).sum()), rel=1e-9)


def test_distances_are_the_l1_norms() -> None:
    first, second = values(1), values(2)
    distances = moments(first, second).distances
    expected = sum(float((x[:, 2] - x[:, 5]).abs().sum()) for x in (first, second))
    assert float(distances[2, 5]) == pytest.approx(expected, rel=1e-5)
    assert float(distances[5, 2]) == pytest.approx(expected, rel=1e-5)
    assert float(distances[3, 3]) == pytest.approx(0, abs=1e-4)


def test_small_errors_survive_the_difference_of_large_sums() -> None:
    constant = values(3, noise=0) * 0 + 1000.0
    constant[:, 4] += 1e-3
    error = moments(constant).errors(range(4, 5), 3, 3, Coefficients())
    assert float(error[0]) == pytest.approx(CHANNELS * 1e-6, rel=0.05)


@pytest.mark.parametrize("strength", [0.0, 0.1])
@pytest.mark.parametrize("slopes", [True, False])
def test_a_fit_is_ridge_least_squares(strength: float, slopes: bool) -> None:
    x = values(4).double()
    last, before = 3, 1
    fitted = Ridge(strength, slopes).fit(moments(x), range(4, 6), last, before)
    for column, call in enumerate((4, 5)):
        for channel in range(CHANNELS):
            latest, difference = x[channel, last], x[channel, last] - x[channel, before]
            rows = torch.stack([latest, difference] if slopes else [latest], 1)
            centred = rows - rows.mean(0)
            target = x[channel, call] - latest
            gram = centred.T @ centred
            gram += strength * torch.diag(gram.diag())
            weights = torch.linalg.solve(gram, centred.T @ (target - target.mean()))
            assert isinstance(fitted.scale, torch.Tensor)
            assert isinstance(fitted.slope, torch.Tensor)
            assert isinstance(fitted.shift, torch.Tensor)
            assert float(fitted.scale[channel, column]) == pytest.approx(1 + float(weights[0]), abs=1e-6)
            if slopes:
                assert float(fitted.slope[channel, column]) == pytest.approx(float(weights[1]), abs=1e-6)
            full = 1 + weights[0]
            mean = x[channel, call].mean() - full * latest.mean() - (weights[1] * difference.mean() if slopes else 0)
            assert float(fitted.shift[channel, column]) == pytest.approx(float(mean), abs=1e-6)


def test_linear_features_are_extrapolated_and_noisy_ones_reused() -> None:
    predictors = Predictors({"f": moments(values(5))}, {"f": moments(values(6))})
    chosen = predictors.best(5, 3, 1)
    assert chosen.kind.startswith(("forecast 1", "fit"))
    assert chosen.error < 0.1 * float(predictors.reuse_errors(3, 6)[-1])
    noise = [torch.randn(CHANNELS, CALLS, 4000) * 0.1 + torch.randn(CHANNELS, 1, 4000) for _ in range(2)]
    noisy = Predictors({"f": moments(noise[0])}, {"f": moments(noise[1])}, kinds=("forecast",))
    assert noisy.best(5, 3, 1).kind == "reuse"


def test_without_an_earlier_full_call_there_is_no_slope() -> None:
    predictors = Predictors({"f": moments(values(5))}, {"f": moments(values(6))})
    chosen = predictors.best(3, 0, None)
    slopes = [] if chosen.coefficients is None else [chosen.coefficients["f"].slope]
    assert all(torch.as_tensor(slope).abs().max() == 0 for slope in slopes)


def test_predictions_aim_at_the_reference() -> None:
    """The reference's features are the engine's with a scale and a shift, which a fit finds."""
    own = [values(seed) for seed in (5, 6)]
    scale, shift = torch.rand(CHANNELS, 1, 1) + 0.5, torch.randn(CHANNELS, 1, 1)
    both = [moments(torch.cat([x, scale * x + shift], 1)) for x in own]
    held_out = torch.cat([own[1], scale * own[1] + shift], 1).double()

    predictors = Predictors({"f": both[0]}, {"f": both[1]}, reference=True)
    assert predictors.calls == CALLS
    power = (held_out[:, CALLS + 5] ** 2).mean(1).sum()
    reused = ((held_out[:, CALLS + 5] - held_out[:, 3]) ** 2).mean(1).sum() / power
    assert float(predictors.reuse_errors(3, 6)[-1]) == pytest.approx(float(reused), rel=1e-6)
    chosen = predictors.best(5, 3, 1)
    assert chosen.kind.startswith("fit")
    assert chosen.error < 0.05 * float(reused)
    assert chosen.coefficients is not None
    coefficients = chosen.coefficients["f"]
    residuals = held_out[:, CALLS + 5] - (
        torch.as_tensor(coefficients.scale)[:, None] * held_out[:, 3]
        + torch.as_tensor(coefficients.slope)[:, None] * (held_out[:, 3] - held_out[:, 1])
        + torch.as_tensor(coefficients.shift)[:, None]
    )
    assert chosen.error == pytest.approx(float((residuals**2).mean(1).sum() / power), rel=1e-4)
    own_moments, first_moments = moments(own[1]), both[1].first_calls(CALLS)
    assert torch.allclose(first_moments.products, own_moments.products)
    assert torch.allclose(
        first_moments.errors(range(4, 6), 3, 1, Coefficients()), own_moments.errors(range(4, 6), 3, 1, Coefficients())
    )


def test_cached_errors_are_extended_to_later_calls() -> None:
    predictors = Predictors({"f": moments(values(5))}, {"f": moments(values(6))})
    short = predictors.errors(1, 0, 4)
    assert len(short) == 2
    whole = predictors.errors(1, 0, 6)
    assert len(whole) == 4
    assert torch.equal(whole[:2], short)
    assert torch.equal(predictors.errors(1, 0, 4), short)
