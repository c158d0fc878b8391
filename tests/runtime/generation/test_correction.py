"""Corrections: compared with a plain implementation, the same for both halves, and only while on the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

import offcut
from offcut.runtime.generation.correction import Convolutions, Kernel
from offcut.runtime.tuning.steps import FittedForecast

CUT, CALLS, GUIDANCE, FULL = "deepcache:0", 7, 3.0, (0, 1, 4)
INPUT_COUNTS = {1: 6, 2: 9, 3: 10, 4: 10, 5: 9, 6: 10}
"""Number of latents among each call's kernel inputs: this call's output, sample and difference of the halves, three for
each of at most two earlier full calls, and the previous call's output if that call was shallow."""


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


def kernels(input_counts: Mapping[int, int] = INPUT_COUNTS) -> dict[int, Kernel]:
    made = torch.Generator().manual_seed(5)
    return {
        call: Kernel(0.02 * torch.randn(4, 4 * count, 3, 3, generator=made), 0.1 * torch.randn(4, generator=made))
        for call, count in input_counts.items()
    }


def run(
    unet: offcut.UNet, correction: Convolutions | None, images: int = 1, refresh: int | None = None
) -> list[torch.Tensor]:
    """Return the outputs of a generation; the features are dropped before call ``refresh``."""
    unet.set_schedule(offcut.Steps(FULL), CUT, FittedForecast({}, FULL, correction))
    made = []
    with unet.generation(CALLS):
        for call in range(CALLS):
            if call == refresh:
                unet.reset()
            made.append(unet(*inputs(unet, call, images)).sample)
    return made


def expected_corrections(
    unet: offcut.UNet, outputs: list[torch.Tensor], kernels_by_call: dict[int, Kernel]
) -> list[torch.Tensor]:
    """Return the expected correction of each output, [images, 4, 8, 8]; zeros for calls without a kernel."""
    guided, differences, changes = [], [], []
    for call, output in enumerate(outputs):
        without, prompted = output.chunk(2)
        sample = inputs(unet, call, len(output) // 2)[0].chunk(2)[0]
        combined = without + GUIDANCE * (prompted - without)
        differences.append(prompted - without)
        kernel_inputs = [combined, sample, differences[call]]
        for full in sorted((other for other in FULL if other < call), reverse=True)[:2]:
            kernel_inputs += [
                guided[full],
                sample - inputs(unet, full, len(output) // 2)[0].chunk(2)[0],
                differences[full],
            ]
        if call - 1 not in FULL and call > 0:
            kernel_inputs.append(guided[call - 1])
        change = torch.zeros_like(combined)
        if call in kernels_by_call:
            change = torch.nn.functional.conv2d(
                torch.cat(kernel_inputs, 1), kernels_by_call[call].weight, kernels_by_call[call].bias, padding=1
            )
        changes.append(change)
        guided.append(combined + change)
    return changes


def test_without_kernels_outputs_are_the_same_bit_for_bit(unet: offcut.UNet) -> None:
    plain = run(unet, None)
    same = run(unet, Convolutions({}, FULL, GUIDANCE))
    assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True))


@pytest.mark.parametrize("images", [1, 3])
def test_both_halves_are_corrected_by_the_convolution(unet: offcut.UNet, images: int) -> None:
    plain, made = run(unet, None, images), kernels()
    outputs = run(unet, Convolutions(made, FULL, GUIDANCE), images)
    for call, change in enumerate(expected_corrections(unet, plain, made)):
        assert call == 0 or change.abs().max() > 0.1
        torch.testing.assert_close(outputs[call], plain[call] + change.repeat(2, 1, 1, 1))


def test_without_guidance_each_row_is_an_image(unet: offcut.UNet) -> None:
    """The kernel inputs of call 1 are outputs and samples of this call and of call 0, row by row."""
    kernel = kernels({1: 4})[1]
    plain, outputs = run(unet, None), run(unet, Convolutions({1: kernel}, FULL, None))
    before, sample = (inputs(unet, call)[0] for call in (0, 1))
    kernel_inputs = torch.cat([plain[1], sample, plain[0], sample - before], 1)
    change = torch.nn.functional.conv2d(kernel_inputs, kernel.weight, kernel.bias, padding=1)
    torch.testing.assert_close(outputs[1], plain[1] + change)
    assert torch.equal(outputs[2], plain[2])


def test_a_generation_that_leaves_the_schedule_is_no_longer_corrected(unet: offcut.UNet) -> None:
    correction = Convolutions(kernels(), FULL, GUIDANCE)
    plain, outputs = run(unet, None, refresh=3), run(unet, correction, refresh=3)
    assert not torch.equal(plain[2], outputs[2])
    for call in range(3, CALLS):
        assert torch.equal(plain[call], outputs[call])


def test_a_generation_does_not_depend_on_the_one_before(unet: offcut.UNet) -> None:
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
