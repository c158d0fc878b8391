"""Functions that bind a pair to a shape, write its inputs, run it and compare its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ...exporter.families import example_inputs
from .models import TOKENS, dims

if TYPE_CHECKING:
    from ...engines.base import BoundPair, EnginePair

STALE = 1000
"""Number added to the seed of a shallow call, so that its inputs differ from those of the full call before it."""


def bind(pair: EnginePair, batch: int, side: int, tokens: int = TOKENS) -> BoundPair:
    """Bind a pair to latents [batch, channels, side, side]."""
    sizes = dims(list(pair.inputs.values()), batch, side, tokens)
    return pair.prepare({name: spec.resolve(sizes) for name, spec in pair.inputs.items()})


def write(pair: EnginePair, bound: BoundPair, seed: int) -> None:
    """Fill the input buffers with random values that depend only on the seed."""
    for name, tensor in example_inputs(tuple(pair.inputs.values()), bound.dims, seed).items():
        bound.buffers[name].copy_(tensor)


def run(bound: BoundPair, cut: str | None = None) -> torch.Tensor:
    """Run the full graph, or the shallow graph of a cut, and return a copy of ``noise_pred``."""
    if cut is None:
        bound.full()
    else:
        bound.shallow(cut)
    return bound.buffers["noise_pred"].clone()


def stale_outputs(pair: EnginePair, bound: BoundPair, cut: str, seeds: tuple[int, ...]) -> list[torch.Tensor]:
    """Return two outputs for each seed: of a full call, and of a shallow call on other inputs."""
    outputs = []
    for seed in seeds:
        write(pair, bound, seed)
        outputs.append(run(bound))
        write(pair, bound, seed + STALE)
        outputs.append(run(bound, cut))
    return outputs


def max_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference divided by the largest expected value; infinite if a value is not finite."""
    ours, theirs = output.double(), expected.double()
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return math.inf
    return float((ours - theirs).abs().max() / theirs.abs().max())


def max_difference_of_all(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest relative difference, as ``max_difference`` measures it, between corresponding outputs."""
    return max(max_difference(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))


def addresses(bound: BoundPair) -> Mapping[str, int]:
    """Return the address of each buffer."""
    return {name: tensor.data_ptr() for name, tensor in bound.buffers.items()}


def own_stream(device: str) -> Any:
    """Return a context in which PyTorch uses a new stream; on the CPU it does nothing."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def wait(device: str) -> None:
    """Make the host wait for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
