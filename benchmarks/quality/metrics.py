"""Figures of pictures beside other pictures, and how sure a mean of them is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ...errors import MissingExtraError, UserError
from .record import Estimate

Pictures = npt.NDArray[np.uint8]
"""uint8 (N, H, W, 3), sRGB."""

Values = npt.NDArray[np.float64]
"""One value for each picture, (N,)."""

Rows = npt.NDArray[np.intp]
"""Which pictures, by their places."""

EQUAL = 100.0
"""PSNR, in dB, that equal pictures are given: the least difference of 8-bit pictures of 64x64 is 89 dB."""

_RESAMPLES = 2000
_BATCH = 128


def psnr(first: Pictures, second: Pictures) -> Values:
    """Peak signal-to-noise ratio of each pair in decibels; `EQUAL` where two are the same."""
    values = []
    for one, other in _batches(first, second):
        error = np.square(one.astype(np.float64) - other).mean(axis=(1, 2, 3))
        with np.errstate(divide="ignore"):
            values.append(np.minimum(10 * np.log10(255.0**2 / error), EQUAL))
    return np.concatenate(values)


def ssim(first: Pictures, second: Pictures) -> Values:
    """Structural similarity of each pair, by torchmetrics with a Gaussian window of standard deviation 1.5.

    Computed in fp32, which is 30 times faster here and keeps three digits.

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    require_torchmetrics()
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = []
    for one, other in _batches(first, second):
        tensors = [torch.from_numpy(side).permute(0, 3, 1, 2).float() for side in (one, other)]
        made = structural_similarity_index_measure(*tensors, data_range=255.0, reduction="none")
        values.append(np.asarray(made.numpy()).reshape(-1))
    return np.concatenate(values)


def require_torchmetrics() -> None:
    """Raises MissingExtraError if it is not installed; to be called before hours of work, not after."""
    from importlib.util import find_spec

    if find_spec("torchmetrics") is None:
        raise MissingExtraError("the quality benchmark", "torchmetrics", "bench")


def frechet(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """The Fréchet distance of the Gaussians with the means and covariances of two sets of features, (N, D) and (M, D).

    ``|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (arXiv 1706.08500, equation 6). The trace of the root is the sum of
    the roots of the eigenvalues of ``C1^(1/2) C2 C1^(1/2)``, which is symmetric and has no negative ones. The value is
    biased upward where N and M are small; compare only values of equal N and M.

    Raises:
        UserError: fewer than two vectors in a set.
    """
    if min(len(first), len(second)) < 2:
        raise UserError("a Fréchet distance needs at least two images on each side: give --images 2 or more")
    root = _square_root(_covariance(first))
    other = _covariance(second)
    crossed = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other @ root), 0, None)).sum()
    apart = first.mean(axis=0) - second.mean(axis=0)
    return max(0.0, float(apart @ apart + np.trace(root @ root) + np.trace(other) - 2 * crossed))


def estimate(values: Values, *, seed: int = 0) -> Estimate:
    """The mean with its 95 % confidence interval, by a percentile bootstrap over pictures.

    Of paired values, such as the difference of two settings for the same prompt and seed, it is a paired interval. The
    draws depend on `seed` and the number of values only.
    """
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [values[random.integers(len(values), size=(100, len(values)))].mean(axis=1) for _ in range(_RESAMPLES // 100)]
    )
    return _interval(float(values.mean()), means)


def estimate_of(value: Callable[[Rows], float], count: int, *, resamples: int, seed: int = 0) -> Estimate:
    """As `estimate`, of a figure that is no mean: `value` gets the rows of a resample out of `count` pictures.

    The interval is the "basic" one, reflected at the figure itself, which cancels the bias that resampling adds.
    """
    random = np.random.default_rng(seed)
    whole = value(np.arange(count))
    drawn = np.array([value(random.integers(count, size=count)) for _ in range(resamples)])
    return _interval(whole, 2 * whole - drawn)


def _interval(mean: float, drawn: Values) -> Estimate:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(mean=mean, low=min(mean, float(low)), high=max(mean, float(high)))


def _covariance(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.atleast_2d(np.cov(features, rowvar=False))


def _square_root(covariance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def _batches(first: Pictures, second: Pictures) -> list[tuple[Pictures, Pictures]]:
    if first.shape != second.shape or not len(first):
        raise ValueError(f"the pictures are {first.shape} and {second.shape}; pass as many of both, of one size.")
    starts = range(0, len(first), _BATCH)
    return [(first[start : start + _BATCH], second[start : start + _BATCH]) for start in starts]
