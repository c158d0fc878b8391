"""Checks of memory and threads: allocations in steady state, memory after closing, and two UNets in two threads."""

from __future__ import annotations

import gc
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from ...runtime.generation.schedule import Uniform
from .check import BoundedFigure, CheckOutcome
from .correctness import SCHEDULE, STEPS, TRAJECTORY
from .exercise import max_difference, own_stream, wait
from .models import SIDE, conditioning, dtype_of, noise
from .peers import DenoisingLoop, EngineDenoiser, decibels
from .streams import inputs
from .workbench import CUT, Workbench

CALLS = 20
CYCLES = 4
MIB = 1 << 20


def allocations(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Count the allocations of calls in steady state, in PyTorch's allocator and in the driver."""
    device = bench.device
    with bench.unet(bench.bundle(engine, precision), engine) as unet:
        sample, arguments = inputs(unet, precision, device)
        timesteps = torch.linspace(900, 100, CALLS, device=device).unbind()
        unet.set_schedule(Uniform(2), cut=CUT)
        counts: list[int] = []
        free: list[int] = []
        for steady in (False, True):
            with unet.generation(calls=CALLS):
                for timestep in timesteps:
                    before = _allocations(device)
                    unet(sample, timestep, **arguments)
                    if steady:
                        counts.append(_allocations(device) - before)
                        torch.cuda.synchronize(device)
                        free.append(torch.cuda.mem_get_info(device)[0])
    return CheckOutcome(
        (
            BoundedFigure("maximum of allocations in a call; noise_pred needs one", max(counts), "<=", 1),
            BoundedFigure(f"driver memory that {CALLS} calls took, MiB", (free[0] - min(free)) / MIB, "<=", 0),
        ),
        {"minimum of allocations in a call": min(counts)},
    )


def close(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Open, run and close an engine repeatedly, and compare the memory after each closing."""
    device = bench.device
    bundle = bench.bundle(engine, precision)
    closed: list[int] = []
    opened: list[int] = []
    allocated: list[int] = []
    for _ in range(CYCLES):
        with bench.unet(bundle, engine) as unet:
            sample, arguments = inputs(unet, precision, device)
            unet.set_schedule(Uniform(2), cut=CUT)
            with unet.generation(calls=4):
                for timestep in torch.linspace(900, 300, 4, device=device).unbind():
                    unet(sample, timestep, **arguments)
            opened.append(used_memory(device))
        del unet, sample, arguments, timestep
        closed.append(used_memory(device))
        allocated.append(torch.cuda.memory_allocated(device))
    # The first cycle also loads libraries and kernels, which stay in memory.
    driver, pytorch = closed[-1] - closed[0], allocated[-1] - allocated[0]
    return CheckOutcome(
        (
            BoundedFigure("driver memory that later closings did not free, MiB", driver / MIB, "<=", 2),
            BoundedFigure("PyTorch memory that later closings did not free, bytes", pytorch, "<=", 0),
            BoundedFigure("driver memory that closing frees, MiB", (min(opened[1:]) - max(closed)) / MIB, ">", 0),
        ),
        {"open, MiB": round(opened[-1] / MIB), "closed, MiB": round(closed[-1] / MIB), "cycles": CYCLES},
    )


def threads(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Compare the latents of two UNets that run in two threads with those of the same UNets one after the other."""
    bundle = bench.bundle(engine, precision)
    dtype = dtype_of(precision)
    with bench.unet(bundle, engine) as first, bench.unet(bundle, engine) as second:
        arguments = conditioning(first.config, 2, dtype, bench.device)
        denoisers = [
            EngineDenoiser(
                DenoisingLoop(noise(unet.config, 1, SIDE["small"], dtype, bench.device, seed), STEPS),
                unet,
                arguments,
                SCHEDULE,
                CUT,
            )
            for seed, unet in enumerate((first, second))
        ]
        together = Barrier(len(denoisers), timeout=300)

        def generate(denoiser: EngineDenoiser) -> torch.Tensor:
            together.wait()
            with own_stream(bench.device):
                for _ in range(2):
                    latents = denoiser.generate()
                wait(bench.device)
            return latents

        wait(bench.device)
        with ThreadPoolExecutor(len(denoisers)) as pool:
            at_once = list(pool.map(generate, denoisers))
        in_turn = [denoiser.generate() for denoiser in denoisers]
    bound = TRAJECTORY[precision]
    closeness = min(decibels(ours, theirs) for ours, theirs in zip(at_once, in_turn, strict=True))
    return CheckOutcome(
        (
            BoundedFigure("minimum PSNR of two threads to the same UNets in turn, dB", closeness, ">=", bound),
            # Otherwise swapped results would not be noticed.
            BoundedFigure("PSNR between the two threads' latents, dB", decibels(in_turn[0], in_turn[1]), "<=", bound),
        ),
        {
            "bit for bit": closeness == math.inf,
            "largest relative difference": max(max_difference(o, t) for o, t in zip(at_once, in_turn, strict=True)),
        },
    )


def _allocations(device: str) -> int:
    """Return the number of blocks that PyTorch's allocator has allocated so far."""
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])


def used_memory(device: str) -> int:
    """Return the bytes of device memory that all programs use, after PyTorch has freed its cached blocks."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)
