"""Checks of speed: the loop compared with its engine calls, with the uncached engine, and with peers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...engines.base import EnginePair
from ...runtime.generation.schedule import Uniform
from ...runtime.unet import UNet
from ..latency.ceiling import product
from ..turns import Clock, LoopTimes, Marks, in_turns, mark_calls
from .check import BoundedFigure, CheckOutcome
from .exercise import wait
from .lifetime import MIB, used_memory
from .models import SIDE, conditioning, dtype_of, eager_unet, meta_unet, noise
from .peers import (
    CachedDenoiser,
    CachedUNet,
    Conditioning,
    DenoisingLoop,
    EngineDenoiser,
    HelperDenoiser,
    LoopDenoiser,
    max_autotune,
)
from .workbench import CUT, Workbench

_ALONE = 20
"""Number of calls back to back, which give the time of a call alone."""
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes: more than any processor cache holds


@dataclass(frozen=True)
class Contest:
    """The engine, architecture and number of images of a performance check.

    Attributes:
        images: number of images; a UNet call has two rows for each.
    """

    architecture: str
    engine: str
    precision: str
    images: int

    def loop(self, bench: Workbench, config: Any) -> tuple[DenoisingLoop, Conditioning]:
        """Return the denoising loop and its conditioning."""
        dtype = dtype_of(self.precision)
        latents = noise(config, self.images, SIDE[self.architecture], dtype, bench.device)
        return DenoisingLoop(latents, bench.options.steps), conditioning(config, 2 * self.images, dtype, bench.device)

    @contextmanager
    def open(
        self, bench: Workbench, *, marks: Marks | None = None, cuts: tuple[str, ...] | None = None
    ) -> Iterator[tuple[UNet, EnginePair]]:
        """Open the engine in offcut's UNet, with marks around its calls."""
        bundle = bench.fast_bundle(self.architecture, self.engine, self.precision, 2 * self.images)
        with bench.pair(bundle, self.engine, cuts=cuts) as pair:
            if marks is not None:
                mark_calls(pair, marks)
            unet = UNet(pair, bundle.unet_config)
            try:
                yield unet, pair
            finally:
                unet.close()

    def eager(self, bench: Workbench) -> Any:
        """Return the eager UNet in this precision, with channels_last and PyTorch's attention."""
        model = bench.model(self.architecture, self.precision)
        return eager_unet(model, self.precision, bench.device, channels_last=True)


def loop(bench: Workbench, contest: Contest) -> CheckOutcome:
    """Compare the cached loop with the sum of its engine calls, and with the uncached loop."""
    clock, schedule = Clock(bench.device), Uniform(bench.options.interval)
    marks = Marks(clock)
    with contest.open(bench, marks=marks) as (unet, _):
        trajectory, inputs = contest.loop(bench, unet.config)
        cached = EngineDenoiser(trajectory, unet, inputs, schedule, CUT, marks)
        uncached = EngineDenoiser(trajectory, unet, inputs, None, None)
        loops, uncached_loops = in_turns((cached, uncached), bench.options.rounds)
        bound = unet.bound
        assert bound is not None
        alone = (clock.median(bound.full, _ALONE), clock.median(lambda: bound.shallow(CUT), _ALONE))
    wall, wall_uncached = _median(loops), _median(uncached_loops)
    inside = (
        statistics.median(seconds for loop in loops for seconds in loop.full),
        statistics.median(seconds for loop in loops for seconds in loop.shallow),
    )
    full = len(schedule.full_calls(bench.options.steps))
    shallow = bench.options.steps - full
    ideal_inside, ideal_alone = (full * times[0] + shallow * times[1] for times in (inside, alone))
    speed_up, ideal_speed_up = wall_uncached / wall, bench.options.steps * alone[0] / ideal_alone
    return CheckOutcome(
        (
            BoundedFigure("wall / ideal, engine calls timed inside the loop", wall / ideal_inside, "<=", 1.02),
            BoundedFigure("wall / ideal, engine calls timed alone", wall / ideal_alone, "<=", 1.02),
            BoundedFigure("speed-up over the uncached engine / ideal speed-up", speed_up / ideal_speed_up, ">=", 0.97),
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


def against_helper(bench: Workbench, contest: Contest) -> CheckOutcome:
    """Compare the cached loop with DeepCache's helper on eager PyTorch in the same precision."""
    unet = contest.eager(bench)
    trajectory, inputs = contest.loop(bench, unet.config)
    ours, theirs = _duel(bench, contest, HelperDenoiser(trajectory, unet, inputs, bench.options.interval))
    return CheckOutcome(
        (BoundedFigure("times faster than DeepCache's helper on eager PyTorch", theirs / ours, ">=", 1.5),),
        {"loop, ms": 1e3 * ours, "helper's loop, ms": 1e3 * theirs},
    )


def against_compiled(bench: Workbench, contest: Contest) -> CheckOutcome:
    """Compare the cached loop with two hand-written modules in ``torch.compile(mode="max-autotune")``."""
    unet = contest.eager(bench)
    trajectory, inputs = contest.loop(bench, unet.config)
    schedule = Uniform(bench.options.interval)
    ours, theirs = _duel(bench, contest, CachedDenoiser(trajectory, CachedUNet(unet), inputs, schedule, max_autotune))
    return CheckOutcome(
        (BoundedFigure("speed relative to two modules of torch.compile", theirs / ours, ">=", 0.97),),
        {"loop, ms": 1e3 * ours, "compiled loop, ms": 1e3 * theirs, "gap, %": 100 * (ours / theirs - 1)},
    )


def memory(bench: Workbench, contest: Contest) -> CheckOutcome:
    """Compare the peak device memory of the cached engine with that of the uncached engine."""
    memory_taken: list[int] = []
    features = 0
    schedule = Uniform(bench.options.interval)
    # The first round also loads libraries and kernels, which stay in memory.
    for cuts in (None, (), None):
        before = used_memory(bench.device)
        with contest.open(bench, cuts=cuts) as (unet, pair):
            trajectory, inputs = contest.loop(bench, unet.config)
            ours = EngineDenoiser(trajectory, unet, inputs, schedule if cuts is None else None, CUT)
            for _ in range(2):
                ours.generate()
            wait(bench.device)
            free, total = torch.cuda.mem_get_info(bench.device)  # PyTorch's cached blocks belong to the peak
            memory_taken.append(total - free - before)
            assert unet.bound is not None
            features = sum(unet.bound.buffers[name].nbytes for name in list(pair.outputs)[1:])
        del unet, pair, trajectory, inputs, ours
    shallow = CachedUNet(meta_unet(contest.architecture)).shallow_parameters()
    weights = sum(parameter.numel() for parameter in shallow) * dtype_of(contest.precision).itemsize
    # The engine without its shallow graph writes the features too.
    added_memory = memory_taken[2] - (memory_taken[1] - features)
    return CheckOutcome(
        (
            BoundedFigure(
                "memory added by caching / shallow weights and features",
                added_memory / (weights + features),
                "<=",
                1.1,
            ),
            BoundedFigure("memory of the uncached engine, MiB", memory_taken[1] / MIB, ">", 0),
        ),
        {
            "cached, MiB": memory_taken[2] / MIB,
            "shallow weights, MiB": weights / MIB,
            "features, MiB": features / MIB,
            "cached / uncached": memory_taken[2] / memory_taken[1] if memory_taken[1] else math.nan,
        },
    )


def roofline(bench: Workbench, contest: Contest) -> CheckOutcome:
    """Compare the FLOP/s and bytes/s of both graphs with the machine's ceilings."""
    clock, precision, images = Clock(bench.device), contest.precision, contest.images
    with contest.open(bench) as (unet, _):
        trajectory, inputs = contest.loop(bench, unet.config)
        sample = noise(unet.config, 2 * images, SIDE[contest.architecture], dtype_of(precision), bench.device)
        unet.set_schedule(None)
        with unet.generation(calls=1):
            unet(sample, trajectory.timesteps[0], **inputs)
        bound = unet.bound
        assert bound is not None
        seconds = {
            "full": clock.median(bound.full, _ALONE),
            "shallow": clock.median(lambda: bound.shallow(CUT), _ALONE),
        }
    compute, bandwidth = ceilings(bench.device, precision)
    work = dict(zip(seconds, count(contest.architecture, precision, 2 * images), strict=True))
    claims = []
    figures: dict[str, float] = {"matrix product, TFLOP/s": compute / 1e12, "copy, GB/s": bandwidth / 1e9}
    for name, graph in work.items():
        achieved = graph.flops / seconds[name]
        # A value above the ceiling means that operations were skipped or that time was not measured.
        claims.append(BoundedFigure(f"{name}: FLOP/s / FLOP/s of the matrix product", achieved / compute, "<=", 1.05))
        figures[f"{name}, ms"] = 1e3 * seconds[name]
        figures[f"{name}, GFLOP"] = graph.flops / 1e9
        figures[f"{name}, TFLOP/s"] = achieved / 1e12
        figures[f"{name}, GB/s at least"] = graph.bytes / seconds[name] / 1e9
    return CheckOutcome(tuple(claims), figures)


@dataclass(frozen=True)
class CallWork:
    """The minimum work of one call of a graph.

    Attributes:
        flops: floating-point operations of convolutions, matrix products and attention, two for each multiply-add.
        bytes: bytes of weights, inputs and outputs, each moved once; activations inside the graph do not count.
    """

    flops: int
    bytes: int


def count(architecture: str, precision: str, batch: int) -> tuple[CallWork, CallWork]:
    """Count the work of the full graph and of the shallow graph of ``deepcache:0``, without weights or a device.

    Args:
        batch: number of rows of a UNet call.
    """
    from torch.utils.flop_counter import FlopCounterMode

    dtype = dtype_of(precision)
    unet = CachedUNet(meta_unet(architecture).to(dtype))
    config = unet.unet.config
    sample = noise(config, batch, SIDE[architecture], dtype, "meta")
    timestep = torch.zeros((batch,), device="meta")
    inputs = conditioning(config, batch, dtype, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        feature = unet.full(sample, timestep, inputs)[1]
    with torch.no_grad(), FlopCounterMode(display=False) as shallow:
        unet.shallow(sample, timestep, inputs, feature)
    moved = 2 * sample.nbytes + feature.nbytes + sum(tensor.nbytes for tensor in _tensors(inputs))
    weights, shallow_weights = (
        sum(weight.nbytes for weight in part) for part in (unet.unet.parameters(), unet.shallow_parameters())
    )
    return (
        CallWork(full.get_total_flops(), weights + moved),
        CallWork(shallow.get_total_flops(), shallow_weights + moved),
    )


def ceilings(device: str, precision: str) -> tuple[float, float]:
    """Measure FLOP/s of a large matrix product, and bytes/s (read and written) of a large copy."""
    copied, clock = _COPIED[torch.device(device).type], Clock(device)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / clock.median(lambda: target.copy_(source), 10)
    return product(device, precision), bandwidth


def _tensors(inputs: Any) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for value in inputs.values():
        tensors += [value] if isinstance(value, torch.Tensor) else _tensors(value)
    return tensors


def _median(loops: list[LoopTimes]) -> float:
    return statistics.median(loop.seconds for loop in loops)


def _duel(bench: Workbench, contest: Contest, other: LoopDenoiser) -> tuple[float, float]:
    """Return the median seconds of the engine's cached loop and of the other model's loop."""
    with contest.open(bench) as (unet, _):
        ours = EngineDenoiser(other.trajectory, unet, other.conditioning, Uniform(bench.options.interval), CUT)
        first, second = in_turns((ours, other), bench.options.rounds)
    return _median(first), _median(second)
