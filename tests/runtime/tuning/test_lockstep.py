"""Least-squares fits of correction kernels, and their evaluation on left-out images."""

from __future__ import annotations

from typing import Any

import torch

from offcut.runtime.generation.correction import Kernel
from offcut.runtime.tuning.lockstep import best_kernels


def samples_of(count: int, weight: torch.Tensor, bias: torch.Tensor, noise: float, seed: int) -> list[Any]:
    """Return inputs and targets of images, where the targets are a noisy convolution of the inputs."""
    random = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        inputs = torch.randn(1, weight.shape[1], 12, 12, generator=random) + 0.5
        targets = torch.nn.functional.conv2d(inputs, weight, bias, padding=1)
        samples.append((inputs, targets + noise * torch.randn(targets.shape, generator=random)))
    return samples


def test_least_squares_find_the_convolution() -> None:
    random = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(4, 6, 3, 3, generator=random), torch.randn(4, generator=random)
    kernels = best_kernels(samples_of(8, weight, bias, 0.1, 2))
    assert kernels is not None
    kernel = kernels.kernel
    torch.testing.assert_close(kernel.weight, weight, rtol=0, atol=0.03)
    torch.testing.assert_close(kernel.bias, bias, rtol=0, atol=0.2)
    inputs, targets = samples_of(1, weight, bias, 0.0, 4)[0]
    assert (kernel(inputs) - targets).norm() < 0.02 * targets.norm()


def test_the_kernel_for_an_image_is_fitted_to_other_images() -> None:
    random = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(4, 6, 3, 3, generator=random), torch.randn(4, generator=random)
    normal, half_weight = samples_of(8, weight, bias, 0.0, 2), samples_of(8, 0.5 * weight, bias, 0.0, 2)
    kernels = best_kernels([half_weight[image] if image % 4 == 0 else normal[image] for image in range(8)])
    assert kernels is not None

    def weight_share(kernel: Kernel) -> float:
        return float((kernel.weight * weight).sum() / weight.square().sum())

    shares = [weight_share(kernels.without(image)) for image in range(8)]
    assert shares[:4] == shares[4:]  # images of the same folds
    # Targets of the first fold have half the weight. Its images are a quarter of all images, and a third of the images
    # to which the kernels of the other folds are fitted.
    assert shares[0] - 0.05 > weight_share(kernels.kernel) > max(shares[1:4]) + 0.01


def test_noise_gets_no_kernel() -> None:
    zero = torch.zeros(4, 6, 3, 3), torch.zeros(4)
    assert best_kernels(samples_of(6, *zero, 1.0, 2)) is None


def test_one_image_gets_no_kernel() -> None:
    ones = torch.ones(4, 6, 3, 3), torch.ones(4)
    assert best_kernels(samples_of(1, *ones, 0.1, 2)) is None
    assert best_kernels(samples_of(2, *ones, 0.1, 2)) is not None
