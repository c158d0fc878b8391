"""How fast is the loop: against its own engine calls, against no cache, and against what others run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...runtime.generation.schedule import Schedule, Uniform
from ...runtime.unet import UNet
from ..latency.clock import Clock, Marks, TimedPair
from .check import Claim, Outcome
from .clock import MarkedDenoiser, interleaved, warm_up
from .exercise import wait
from .lifetime import MIB, used_memory
from .models import DTYPES, SIDE, conditioning, eager_unet, meta_unet, noise
from .peers import CachedUNet, Conditioning, Denoiser, EngineDenoiser, HelperDenoiser, compiled
from .trajectory import Loop
from .workbench import CUT, Workbench

_ALONE = 20
"""Calls of a graph back to back, for its time alone."""


@dataclass(frozen=True)
class Contest:
    """An engine on one architecture and shape, ready for its loops.

    Attributes:
        architecture, engine, precision: of the contest.
        images: a UNet call has a batch of twice as many.
    """

    architecture: str
    engine: str
    precision: str
    images: int

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, DTYPES[self.precision])
        assert isinstance(dtype, torch.dtype)
        return dtype

    def loop(self, bench: Workbench, config: Any) -> tuple[Loop, Conditioning]:
        """The denoising loop and its conditioning."""
        latents = noise(config, self.images, SIDE[self.architecture], self.dtype, bench.device)
        given = conditioning(config, 2 * self.images, self.dtype, bench.device)
        return Loop(latents, bench.options.steps), given

    @contextmanager
    def open(self, bench: Workbench, *, cuts: tuple[str, ...] | None = None) -> Iterator[tuple[UNet, TimedPair]]:
        """The engine behind the stand-in, every call of it marked."""
        bundle = bench.fast_bundle(self.architecture, self.engine, self.precision, 2 * self.images)
        with bench.pair(bundle, self.engine, cuts=cuts) as pair:
            timed = TimedPair(pair, Marks(Clock(bench.device)))
            unet = UNet(timed, bundle.unet_config)
            try:
                yield unet, timed
            finally:
                unet.close()


def loop(bench: Workbench, contest: Contest) -> Outcome:
    """The cached loop against the sum of its engine calls, and against the uncached loop."""
    clock, schedule = Clock(bench.device), Uniform(bench.options.interval)
    with contest.open(bench) as (unet, timed):
        loop, given = contest.loop(bench, unet.config)
        cached = EngineDenoiser(unet, given, schedule, CUT)
        uncached = EngineDenoiser(unet, given, None, None)
        warm_up(loop, (cached, uncached))
        marked = MarkedDenoiser(cached, timed.marks)
        wall, wall_uncached = interleaved(clock, loop, (marked, uncached), bench.options.rounds)
        inside = timed.marks.medians()
        bound = unet.bound
        assert bound is not None
        alone = (clock.median(bound.full, _ALONE), clock.median(lambda: bound.shallow(CUT), _ALONE))
    full = len(schedule.full_calls(bench.options.steps))
    shallow = bench.options.steps - full
    ideal_inside, ideal_alone = (full * times[0] + shallow * times[1] for times in (inside, alone))
    speed_up, ideal_speed_up = wall_uncached / wall, bench.options.steps * alone[0] / ideal_alone
    return Outcome(
        (
            Claim("wall / ideal, engine calls timed inside the loop", wall / ideal_inside, "<=", 1.02),
            Claim("wall / ideal, engine calls timed alone", wall / ideal_alone, "<=", 1.02),
            Claim("speed-up over the same engine uncached, of the ideal one", speed_up / ideal_speed_up, ">=", 0.97),
        ),
        {
            "loop, ms": 1e3 * wall,
            "loop uncached, ms": 1e3 * wall_uncached,
            "speed-up": speed_up,
            "ideal speed-up": ideal_speed_up,
            "full call inside, ms": 1e3 * inside[0],
            "full call alone, ms": 1e3 * alone[0],
            "shallow call inside, ms": 1e3 * inside[1],
            "shallow call alone, ms": 1e3 * alone[1],
            "schedule": str(schedule),
            "full calls": full,
            "shallow calls": shallow,
        },
    )


def against_helper(bench: Workbench, contest: Contest) -> Outcome:
    """The cached loop against DeepCache's helper on eager PyTorch: channels_last, SDPA, the same precision."""
    unet = _eager(bench, contest)
    given = contest.loop(bench, unet.config)[1]
    ours, theirs = _duel(bench, contest, HelperDenoiser(unet, given, bench.options.interval))
    return Outcome(
        (Claim("times faster than DeepCache's helper on eager PyTorch", theirs / ours, ">=", 1.5),),
        {"loop, ms": 1e3 * ours, "helper's loop, ms": 1e3 * theirs},
    )


def against_compiled(bench: Workbench, contest: Contest) -> Outcome:
    """The cached loop against two hand-written modules through ``torch.compile(mode="max-autotune")``."""
    unet = CachedUNet(_eager(bench, contest))
    given = contest.loop(bench, unet.unet.config)[1]
    schedule: Schedule = Uniform(bench.options.interval)
    ours, theirs = _duel(bench, contest, compiled(unet, given, schedule))
    return Outcome(
        (Claim("speed relative to two modules of torch.compile", theirs / ours, ">=", 0.97),),
        {"loop, ms": 1e3 * ours, "compiled loop, ms": 1e3 * theirs, "gap, %": 100 * (ours / theirs - 1)},
    )


def memory(bench: Workbench, contest: Contest) -> Outcome:
    """What the cached engine holds on the device after its loops, at its peak, against the same engine uncached."""
    held: list[int] = []
    features = 0
    schedule = Uniform(bench.options.interval)
    # The first round also loads libraries and kernels, which stay.
    for cuts in (None, (), None):
        before = used_memory(bench.device)
        with contest.open(bench, cuts=cuts) as (unet, timed):
            loop, given = contest.loop(bench, unet.config)
            ours = EngineDenoiser(unet, given, schedule if cuts is None else None, CUT if cuts is None else None)
            for _ in range(2):
                loop.generate(ours)
            wait(bench.device)
            free, total = torch.cuda.mem_get_info(bench.device)  # spare blocks included: what the peak has left
            held.append(total - free - before)
            assert unet.bound is not None
            features = sum(tensor.nbytes for name, tensor in unet.bound.buffers.items() if name in set(timed.cuts[CUT]))
        del unet, timed, loop, given, ours
    weights = sum(parameter.numel() for parameter in CachedUNet(meta_unet(contest.architecture)).shallow_parameters())
    weights *= contest.dtype.itemsize
    # The engine opened without its shallow graph writes the features too.
    more = held[2] - (held[1] - features)
    return Outcome(
        (
            Claim(
                "memory beyond the uncached engine, of the shallow weights and features",
                more / (weights + features),
                "<=",
                1.1,
            ),
            Claim("memory of the uncached engine, MiB", held[1] / MIB, ">", 0),
        ),
        {
            "cached, MiB": held[2] / MIB,
            "shallow weights, MiB": weights / MIB,
            "features, MiB": features / MIB,
            "of uncached": held[2] / held[1] if held[1] else math.nan,
        },
    )


def _eager(bench: Workbench, contest: Contest) -> Any:
    model = bench.model(contest.architecture, contest.precision)
    return eager_unet(model, contest.precision, bench.device, channels_last=True)


def _duel(bench: Workbench, contest: Contest, other: Denoiser) -> tuple[float, float]:
    """Median seconds of the engine's cached loop and of the other's."""
    with contest.open(bench) as (unet, _):
        loop, given = contest.loop(bench, unet.config)
        ours = EngineDenoiser(unet, given, Uniform(bench.options.interval), CUT)
        warm_up(loop, (ours, other))
        first, second = interleaved(Clock(bench.device), loop, (ours, other), bench.options.rounds)
    return first, second
