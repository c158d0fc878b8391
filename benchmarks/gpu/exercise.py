"""Small motions that many checks make: bind a pair to a shape, give it inputs, run it, compare."""

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
"""Added to a seed for the inputs of a shallow call, so that they are not those of the full call before it."""


def bind(pair: EnginePair, batch: int, side: int, tokens: int = TOKENS) -> BoundPair:
    """Bind a pair to latents [batch, channels, side, side]."""
    sizes = dims(list(pair.inputs.values()), batch, side, tokens)
    return pair.prepare({name: spec.resolve(sizes) for name, spec in pair.inputs.items()})


def write(pair: EnginePair, bound: BoundPair, seed: int) -> None:
    """Fill the input buffers with random values, always the same for a seed."""
    for name, tensor in example_inputs(tuple(pair.inputs.values()), bound.dims, seed).items():
        bound.buffers[name].copy_(tensor)


def run(bound: BoundPair, cut: str | None = None) -> torch.Tensor:
    """The full graph, or this cut's shallow one; a copy of ``noise_pred``."""
    if cut is None:
        bound.full()
    else:
        bound.shallow(cut)
    return bound.buffers["noise_pred"].clone()


def stale_answers(pair: EnginePair, bound: BoundPair, cut: str, seeds: tuple[int, ...]) -> list[torch.Tensor]:
    """For each seed a full call, then a shallow one on other inputs, so that the cached features matter."""
    answers = []
    for seed in seeds:
        write(pair, bound, seed)
        answers.append(run(bound))
        write(pair, bound, seed + STALE)
        answers.append(run(bound, cut))
    return answers


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value; infinite where a value is not finite."""
    ours, theirs = got.double(), expected.double()
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return math.inf
    return float((ours - theirs).abs().max() / theirs.abs().max())


def farthest(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest ``apart`` of these answers."""
    return max(apart(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def addresses(bound: BoundPair) -> Mapping[str, int]:
    """Where each buffer lies."""
    return {name: tensor.data_ptr() for name, tensor in bound.buffers.items()}


def own_stream(device: str) -> Any:
    """A context in which PyTorch works on a stream of its own; nothing on the CPU."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def wait(device: str) -> None:
    """Let the host wait for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
