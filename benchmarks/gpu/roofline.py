"""How far the graphs are from what the machine can do: counted work over measured time, beside measured ceilings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..latency.ceiling import product
from ..latency.clock import Clock
from .check import Claim, Outcome
from .models import DTYPES, SIDE, conditioning, meta_unet, noise
from .peers import CachedUNet
from .performance import Contest
from .workbench import CUT, Workbench

_CALLS = 20
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes: more than any cache holds


@dataclass(frozen=True)
class Work:
    """What one call of a graph has to do at least.

    Attributes:
        flops: two for each multiply-add of convolutions, matrix products and attention.
        bytes: its weights, inputs and outputs, each moved once; activations inside are not counted.
    """

    flops: int
    bytes: int


def count(architecture: str, precision: str, batch: int) -> tuple[Work, Work]:
    """The work of the full graph and of the shallow one of ``deepcache:0``, counted without weights or a device.

    Args:
        batch: of a UNet call.
    """
    from torch.utils.flop_counter import FlopCounterMode

    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    unet = CachedUNet(meta_unet(architecture).to(dtype))
    config = unet.unet.config
    sample = noise(config, batch, SIDE[architecture], dtype, "meta")
    timestep = torch.zeros((batch,), device="meta")
    given = conditioning(config, batch, dtype, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        feature = unet.full(sample, timestep, given)[1]
    with torch.no_grad(), FlopCounterMode(display=False) as shallow:
        unet.shallow(sample, timestep, given, feature)
    moved = [2 * sample.nbytes, feature.nbytes, *(tensor.nbytes for tensor in _tensors(given))]
    every = sum(parameter.nbytes for parameter in unet.unet.parameters())
    some = sum(parameter.nbytes for parameter in unet.shallow_parameters())
    return (
        Work(full.get_total_flops(), every + sum(moved)),
        Work(shallow.get_total_flops(), some + sum(moved)),
    )


def ceilings(device: str, precision: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s of a large copy (read and written ones), on this machine."""
    copied, clock = _COPIED[torch.device(device).type], Clock(device)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / clock.median(lambda: target.copy_(source), 10)
    return product(device, precision), bandwidth


def roofline(bench: Workbench, contest: Contest) -> Outcome:
    """Achieved TFLOP/s and GB/s of both graphs beside the ceilings."""
    clock = Clock(bench.device)
    with contest.open(bench) as (unet, _):
        loop, given = contest.loop(bench, unet.config)
        sample = noise(unet.config, 2 * contest.images, SIDE[contest.architecture], contest.dtype, bench.device)
        unet.set_schedule(None)
        with unet.generation(calls=1):
            unet(sample, loop.timesteps[0], **given)
        bound = unet.bound
        assert bound is not None
        seconds = {
            "full": clock.median(bound.full, _CALLS),
            "shallow": clock.median(lambda: bound.shallow(CUT), _CALLS),
        }
    compute, bandwidth = ceilings(bench.device, contest.precision)
    work = dict(zip(seconds, count(contest.architecture, contest.precision, 2 * contest.images), strict=True))
    claims = []
    figures: dict[str, float] = {"matrix product, TFLOP/s": compute / 1e12, "copy, GB/s": bandwidth / 1e9}
    for name, graph in work.items():
        achieved = graph.flops / seconds[name]
        # More than the ceiling would mean that work was left out or time was not measured.
        claims.append(Claim(f"{name}: FLOP/s, of the matrix product's", achieved / compute, "<=", 1.05))
        figures[f"{name}, ms"] = 1e3 * seconds[name]
        figures[f"{name}, GFLOP"] = graph.flops / 1e9
        figures[f"{name}, TFLOP/s"] = achieved / 1e12
        figures[f"{name}, GB/s at least"] = graph.bytes / seconds[name] / 1e9
    return Outcome(tuple(claims), figures)


def _tensors(given: Any) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for value in given.values():
        tensors += [value] if isinstance(value, torch.Tensor) else _tensors(value)
    return tensors
