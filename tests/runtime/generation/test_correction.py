"""Corrections: the convolution written plainly, the same for both halves, per image, and only on the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

import offcut
from offcut.runtime.generation.correction import Convolutions, Kernel
from offcut.runtime.tuning.steps import FittedForecast

CUT, CALLS, GUIDANCE, FULL = "deepcache:0", 7, 3.0, (0, 1, 4)
SEEN = {1: 6, 2: 9, 3: 10, 4: 10, 5: 9, 6: 10}
"""Of each call how many latents a kernel sees: the answer, the sample and the difference of the halves, three for each
of at most two full calls before, and the answer of the call before if that was shallow."""


@pytest.fixture(scope="module")
def unet(tiny_bundle: Path) -> Iterator[offcut.UNet]:
    opened = offcut.UNet.load(tiny_bundle, "onnxruntime", threads=1)
    opened.advise = False
    yield opened
    opened.close()


def inputs(unet: offcut.UNet, call: int, images: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sample = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(call)).repeat(2, 1, 1, 1)
    width = unet.config["cross_attention_dim"]
    text = torch.randn(2 * images, 77, width, generator=torch.Generator().manual_seed(99))
    return sample, torch.tensor(900.0 - 50 * call), text


def kernels(numbers: Mapping[int, int] = SEEN) -> dict[int, Kernel]:
    made = torch.Generator().manual_seed(5)
    return {
        call: Kernel(0.02 * torch.randn(4, 4 * seen, 3, 3, generator=made), 0.1 * torch.randn(4, generator=made))
        for call, seen in numbers.items()
    }


def run(
    unet: offcut.UNet, correction: Convolutions | None, images: int = 1, refresh: int | None = None
) -> list[torch.Tensor]:
    """The answers; the features are dropped before call ``refresh``."""
    unet.set_schedule(offcut.Steps(FULL), CUT, FittedForecast({}, FULL, correction))
    made = []
    with unet.generation(CALLS):
        for call in range(CALLS):
            if call == refresh:
                unet.reset()
            made.append(unet(*inputs(unet, call, images)).sample)
    return made


def plainly(unet: offcut.UNet, answers: list[torch.Tensor], by: dict[int, Kernel]) -> list[torch.Tensor]:
    """The corrections of these answers, [images, 4, 8, 8]; none at a call without a kernel."""
    guided, apart, changes = [], [], []
    for call, answer in enumerate(answers):
        without, prompted = answer.chunk(2)
        sample = inputs(unet, call, len(answer) // 2)[0].chunk(2)[0]
        own = without + GUIDANCE * (prompted - without)
        apart.append(prompted - without)
        seen = [own, sample, apart[call]]
        for full in sorted((each for each in FULL if each < call), reverse=True)[:2]:
            seen += [guided[full], sample - inputs(unet, full, len(answer) // 2)[0].chunk(2)[0], apart[full]]
        if call - 1 not in FULL and call > 0:
            seen.append(guided[call - 1])
        change = torch.zeros_like(own)
        if call in by:
            change = torch.nn.functional.conv2d(torch.cat(seen, 1), by[call].weight, by[call].bias, padding=1)
        changes.append(change)
        guided.append(own + change)
    return changes


def test_without_kernels_outputs_are_the_same_bit_for_bit(unet: offcut.UNet) -> None:
    plain = run(unet, None)
    same = run(unet, Convolutions({}, FULL, GUIDANCE))
    assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True))


@pytest.mark.parametrize("images", [1, 3])
def test_both_halves_are_corrected_by_the_convolution(unet: offcut.UNet, images: int) -> None:
    plain, made = run(unet, None, images), kernels()
    answers = run(unet, Convolutions(made, FULL, GUIDANCE), images)
    for call, change in enumerate(plainly(unet, plain, made)):
        assert call == 0 or change.abs().max() > 0.1
        torch.testing.assert_close(answers[call], plain[call] + change.repeat(2, 1, 1, 1))


def test_without_guidance_each_row_is_an_image(unet: offcut.UNet) -> None:
    """One call is corrected: the answer, the sample, and both of the full call before, row by row."""
    kernel = kernels({1: 4})[1]
    plain, answers = run(unet, None), run(unet, Convolutions({1: kernel}, FULL, None))
    before, sample = (inputs(unet, call)[0] for call in (0, 1))
    seen = torch.cat([plain[1], sample, plain[0], sample - before], 1)
    change = torch.nn.functional.conv2d(seen, kernel.weight, kernel.bias, padding=1)
    torch.testing.assert_close(answers[1], plain[1] + change)
    assert torch.equal(answers[2], plain[2])


def test_a_generation_that_leaves_the_schedule_is_no_longer_corrected(unet: offcut.UNet) -> None:
    correction = Convolutions(kernels(), FULL, GUIDANCE)
    plain, answers = run(unet, None, refresh=3), run(unet, correction, refresh=3)
    assert not torch.equal(plain[2], answers[2])
    for call in range(3, CALLS):
        assert torch.equal(plain[call], answers[call])


def test_nothing_outlives_a_generation(unet: offcut.UNet) -> None:
    correction = Convolutions(kernels(), FULL, GUIDANCE)
    first, second = run(unet, correction), run(unet, correction)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_an_odd_batch_is_not_corrected(unet: offcut.UNet) -> None:
    unet.set_schedule(offcut.Steps(FULL), CUT, FittedForecast({}, FULL, Convolutions(kernels(), FULL, GUIDANCE)))
    rows = [tensor if tensor.dim() == 0 else tensor[:1] for tensor in inputs(unet, 0)]
    with unet.generation(CALLS):
        corrected = [unet(*rows).sample for _ in range(2)]
    unet.set_schedule(offcut.Steps(FULL), CUT)
    with unet.generation(CALLS):
        plain = [unet(*rows).sample for _ in range(2)]
    assert torch.equal(torch.stack(corrected), torch.stack(plain))
