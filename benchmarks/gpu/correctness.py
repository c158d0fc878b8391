"""Does an engine compute what eager PyTorch computes: one call of every cut, and whole trajectories."""

from __future__ import annotations

import torch

from ...engines.builder.verify import verify
from ...engines.precision import bounds
from ...exporter.trace.reference import read_reference
from ...runtime.generation.schedule import Uniform
from .check import Claim, Outcome
from .exercise import STALE, addresses, bind, farthest, run, stale_answers, write
from .models import DTYPES, SIDE, conditioning, eager_unet, noise
from .peers import CachedDenoiser, CachedUNet, EngineDenoiser
from .trajectory import Loop, decibels
from .workbench import CUT, Workbench

STEPS = 10
SCHEDULE = Uniform(3)
# Eager PyTorch in half precision comes within 66 dB (fp16) and 49 dB (bf16) of itself in fp32 on this trajectory, and a
# trajectory without the cache is 34 dB away: each bound lies between.
TRAJECTORY = {"fp32": 80.0, "fp16": 50.0, "bf16": 40.0}
"""Least PSNR, in decibels, of an engine's cached trajectory to eager PyTorch's in the same precision."""


def parity(bench: Workbench, engine: str, precision: str) -> Outcome:
    """Hold every graph of the pair to the bounds that the build holds it to."""
    bundle = bench.bundle(engine, precision)
    variant = bundle.manifest.variants[bundle.entry(engine).variant]
    reference = read_reference(bundle.path / variant.reference)
    with bench.pair(bundle, engine) as pair:
        comparisons = verify(pair, reference, bounds(engine, precision))
    claims = tuple(
        Claim(
            f"{each.name}, {'relative' if each.relative else 'absolute'} difference",
            each.error,
            ">" if each.at_least else "<=",
            each.bound,
        )
        for each in comparisons
    )
    return Outcome(claims, {"cuts": ", ".join(bundle.entry(engine).cuts), "opset": variant.opset})


def trajectory(bench: Workbench, engine: str, precision: str) -> Outcome:
    """Denoise with the engine and with eager PyTorch that caches by hand, from the same noise."""
    bundle = bench.bundle(engine, precision)
    eager = CachedUNet(eager_unet(bench.model("small", precision), precision, bench.device))
    dtype = getattr(torch, DTYPES[precision])
    loop = Loop(noise(eager.unet.config, 1, SIDE["small"], dtype, bench.device), STEPS)
    given = conditioning(eager.unet.config, 2, dtype, bench.device)
    cached = loop.generate(CachedDenoiser(eager, given, SCHEDULE))
    uncached = loop.generate(CachedDenoiser(eager, given, None))
    with bench.unet(bundle, engine) as unet:
        ours = loop.generate(EngineDenoiser(unet, given, SCHEDULE, CUT))
        run = unet.last_run
        ours_uncached = loop.generate(EngineDenoiser(unet, given, None, None))
    bound = TRAJECTORY[precision]
    return Outcome(
        (
            Claim("cached trajectory, PSNR to eager PyTorch cached alike, dB", decibels(ours, cached), ">=", bound),
            Claim("uncached trajectory, PSNR to eager PyTorch, dB", decibels(ours_uncached, uncached), ">=", bound),
            # Else the first claim could not tell a cached trajectory from an uncached one.
            Claim("PSNR between eager PyTorch's two trajectories, dB", decibels(cached, uncached), "<=", bound),
        ),
        {"timeline": "" if run is None else run.timeline, "schedule": str(SCHEDULE)},
    )


def interleaved(bench: Workbench, engine: str, precision: str) -> Outcome:
    """Two bound pairs of different shapes take turns, and each answers as it does alone."""
    with bench.pair(bench.bundle(engine, precision), engine) as pair:
        shapes = ((2, SIDE["small"]), (4, 2 * SIDE["small"]))
        alone = []
        for batch, side in shapes:
            bound = bind(pair, batch, side)
            alone.append(stale_answers(pair, bound, CUT, (0, 1, 2)))
            bound.close()
        first, second = (bind(pair, batch, side) for batch, side in shapes)
        before = [addresses(first), addresses(second)]
        together: list[list[torch.Tensor]] = [[], []]
        for seed in (0, 1, 2):
            for cut, inputs in ((None, seed), (CUT, seed + STALE)):
                for answers, bound in zip(together, (first, second), strict=True):
                    write(pair, bound, inputs)
                    answers.append(run(bound, cut))
        moved = sum(
            then[name] != now[name]
            for then, now in zip(before, [addresses(first), addresses(second)], strict=True)
            for name in then
        )
        differences = [farthest(ours, theirs) for ours, theirs in zip(together, alone, strict=True)]
        first.close()
        second.close()
    across = bounds(engine, precision).across
    return Outcome(
        (
            Claim("smaller shape, relative difference to itself alone", differences[0], "<=", across),
            Claim("larger shape, relative difference to itself alone", differences[1], "<=", across),
            Claim("buffers that moved", moved, "==", 0),
        )
    )
