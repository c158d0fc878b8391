"""Distances between images compared with closed forms, and intervals compared with theory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from offcut.benchmarks.quality import metrics
from offcut.benchmarks.stats import mean_of, require
from offcut.errors import MissingExtraError, UserError
from offcut.runtime.images.metrics import MAX_PSNR
from offcut.runtime.images.metrics import psnr as psnr_of_two


def noise(seed: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, 64, 64, 3), dtype=np.uint8)


def test_psnr_equals_that_of_offcut_run_and_is_finite_for_equal_pictures() -> None:
    first, second = noise(0), noise(1)
    single = [psnr_of_two(Image.fromarray(a), Image.fromarray(b)) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(metrics.psnr(first, second), single)
    assert metrics.psnr(first, first).tolist() == [MAX_PSNR] * 3
    nearly_equal = first.copy()
    nearly_equal[:, 0, 0, 0] ^= 1
    assert (metrics.psnr(first, nearly_equal) < MAX_PSNR).all()


def test_ssim_is_one_for_equal_images_and_falls_with_noise() -> None:
    first = np.repeat(np.repeat(noise(0)[:, :8, :8], 8, axis=1), 8, axis=2)
    random = np.random.default_rng(1)

    def disturbed(deviation: float) -> np.ndarray:
        return np.clip(first + random.normal(scale=deviation, size=first.shape), 0, 255).astype(np.uint8)

    np.testing.assert_allclose(metrics.ssim(first, first), 1, atol=5e-4)
    slight, strong = metrics.ssim(first, disturbed(5)), metrics.ssim(first, disturbed(50))
    assert ((slight < 1) & (slight > strong)).all()
    alone = [metrics.ssim(first[place : place + 1], disturbed(0)[place : place + 1])[0] for place in range(3)]
    np.testing.assert_allclose(alone, metrics.ssim(first, disturbed(0)), atol=5e-4)


def test_ssim_in_fp32_agrees_with_fp64() -> None:
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    first = np.full((2, 64, 64, 3), 20, dtype=np.uint8)  # flat and dark, where rounding matters most
    first[1, 20:40, 20:40] = 250
    second = first + np.random.default_rng(0).integers(0, 4, size=first.shape, dtype=np.uint8)
    tensors = [torch.from_numpy(side).permute(0, 3, 1, 2).double() for side in (first, second)]
    double = structural_similarity_index_measure(*tensors, data_range=255.0, reduction="none")
    np.testing.assert_allclose(metrics.ssim(first, second), double.numpy(), atol=5e-4)


def test_without_torchmetrics_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"offcut\[bench\]"):
        require("the quality benchmark", "torchmetrics")


@given(st.floats(-3, 3), st.floats(0.2, 4), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_frechet_equals_the_closed_form_for_commuting_covariances(shift: float, scale: float, width: int) -> None:
    """For ``C2 = s² C1`` and a difference d of the means, the distance is ``|d|² + (1 - s)² tr(C1)``."""
    features = np.random.default_rng(width).normal(size=(50, width))
    other = (features - features.mean(axis=0)) * scale + features.mean(axis=0) + shift
    expected = width * shift**2 + (1 - scale) ** 2 * features.var(axis=0, ddof=1).sum()
    assert metrics.frechet(features, other) == pytest.approx(expected, abs=1e-6)
    assert metrics.frechet(other, features) == pytest.approx(expected, abs=1e-6)


def test_frechet_needs_two_pictures() -> None:
    with pytest.raises(UserError, match="at least two"):
        metrics.frechet(np.zeros((1, 4)), np.zeros((5, 4)))


def test_frechet_is_biased_upward_by_few_pictures() -> None:
    random = np.random.default_rng(0)
    few, many = (metrics.frechet(*random.normal(size=(2, count, 20))) for count in (50, 2000))
    assert few > 5 * many


def test_an_estimate_agrees_with_theory_and_is_reproducible() -> None:
    values = np.random.default_rng(0).normal(size=400)
    estimate = mean_of(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert estimate == mean_of(values)
    assert estimate != mean_of(values, seed=1)


def test_a_paired_interval_shows_a_change_that_two_means_hide() -> None:
    random = np.random.default_rng(0)
    base = random.normal(scale=5, size=300)
    better = base + 0.2 + random.normal(scale=0.1, size=300)
    assert mean_of(better).low < base.mean()
    assert mean_of(better - base).low > 0.15


def test_unequal_numbers_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="same number"):
        metrics.psnr(noise(0, 2), noise(0, 3))
