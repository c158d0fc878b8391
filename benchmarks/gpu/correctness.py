"""Checks that an engine computes what eager PyTorch computes: one call of every cut, and whole trajectories."""

from __future__ import annotations

import torch

from ...engines.builder.verify import verify
from ...engines.precision import bounds
from ...exporter.trace.reference import read_reference
from ...runtime.generation.schedule import Uniform
from .check import BoundedFigure, CheckOutcome
from .exercise import STALE, addresses, bind, max_difference_of_all, run, stale_outputs, write
from .models import SIDE, conditioning, dtype_of, eager_unet, noise
from .peers import CachedDenoiser, CachedUNet, DenoisingLoop, EngineDenoiser, decibels
from .workbench import CUT, Workbench

STEPS = 10
SCHEDULE = Uniform(3)
# On this trajectory eager PyTorch in fp16 has 66 dB to itself in fp32, and 49 dB in bf16. A trajectory without the
# cache has 34 dB. Each bound lies in between.
TRAJECTORY = {"fp32": 80.0, "fp16": 50.0, "bf16": 40.0}
"""Minimum PSNR in dB between the cached trajectories of an engine and of eager PyTorch, by precision."""


def parity(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Compare every graph of the pair with the reference, within the bounds of ``offcut build``."""
    bundle = bench.bundle(engine, precision)
    variant = bundle.manifest.variants[bundle.entry(engine).variant]
    reference = read_reference(bundle.path / variant.reference)
    with bench.pair(bundle, engine) as pair:
        comparisons = verify(pair, reference, bounds(engine, precision))
    claims = tuple(
        BoundedFigure(
            f"{comparison.name}, {'relative' if comparison.relative else 'absolute'} difference",
            comparison.error,
            ">" if comparison.at_least else "<=",
            comparison.bound,
        )
        for comparison in comparisons
    )
    return CheckOutcome(claims, {"cuts": ", ".join(bundle.entry(engine).cuts), "opset": variant.opset})


def trajectory(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Compare the engine's latents with those of eager PyTorch with a hand-written cache, from the same noise."""
    bundle = bench.bundle(engine, precision)
    eager = CachedUNet(eager_unet(bench.model("small", precision), precision, bench.device))
    dtype = dtype_of(precision)
    loop = DenoisingLoop(noise(eager.unet.config, 1, SIDE["small"], dtype, bench.device), STEPS)
    inputs = conditioning(eager.unet.config, 2, dtype, bench.device)
    cached = CachedDenoiser(loop, eager, inputs, SCHEDULE).generate()
    uncached = CachedDenoiser(loop, eager, inputs, None).generate()
    with bench.unet(bundle, engine) as unet:
        ours = EngineDenoiser(loop, unet, inputs, SCHEDULE, CUT).generate()
        last = unet.last_run
        ours_uncached = EngineDenoiser(loop, unet, inputs, None, None).generate()
    bound = TRAJECTORY[precision]
    return CheckOutcome(
        (
            BoundedFigure(
                "cached trajectory, PSNR to eager PyTorch cached alike, dB", decibels(ours, cached), ">=", bound
            ),
            BoundedFigure(
                "uncached trajectory, PSNR to eager PyTorch, dB", decibels(ours_uncached, uncached), ">=", bound
            ),
            # Otherwise the first figure would not distinguish a cached trajectory from an uncached one.
            BoundedFigure("PSNR between eager PyTorch's two trajectories, dB", decibels(cached, uncached), "<=", bound),
        ),
        {"timeline": "" if last is None else last.timeline, "schedule": str(SCHEDULE)},
    )


def interleaved(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Run two bound pairs of different shapes in turns, and compare each with its outputs alone."""
    with bench.pair(bench.bundle(engine, precision), engine) as pair:
        shapes = ((2, SIDE["small"]), (4, 2 * SIDE["small"]))
        alone = []
        for batch, side in shapes:
            bound = bind(pair, batch, side)
            alone.append(stale_outputs(pair, bound, CUT, (0, 1, 2)))
            bound.close()
        first, second = (bind(pair, batch, side) for batch, side in shapes)
        before = [addresses(first), addresses(second)]
        together: list[list[torch.Tensor]] = [[], []]
        for seed in (0, 1, 2):
            for cut, inputs in ((None, seed), (CUT, seed + STALE)):
                for outputs, bound in zip(together, (first, second), strict=True):
                    write(pair, bound, inputs)
                    outputs.append(run(bound, cut))
        moved = sum(
            then[name] != now[name]
            for then, now in zip(before, [addresses(first), addresses(second)], strict=True)
            for name in then
        )
        differences = [max_difference_of_all(ours, theirs) for ours, theirs in zip(together, alone, strict=True)]
        first.close()
        second.close()
    across = bounds(engine, precision).across
    return CheckOutcome(
        (
            BoundedFigure("smaller shape, relative difference to itself alone", differences[0], "<=", across),
            BoundedFigure("larger shape, relative difference to itself alone", differences[1], "<=", across),
            BoundedFigure("buffers that moved", moved, "==", 0),
        )
    )
