"""Memory and threads: steady state allocates nothing, closing gives everything back, UNets do not meet."""

from __future__ import annotations

import gc
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from ...runtime.generation.schedule import Uniform
from .check import Claim, Outcome
from .correctness import SCHEDULE, STEPS, TRAJECTORY
from .exercise import apart, own_stream, wait
from .models import DTYPES, SIDE, conditioning, noise
from .peers import EngineDenoiser
from .streams import inputs
from .trajectory import Loop, decibels
from .workbench import CUT, Workbench

CALLS = 20
CYCLES = 4
MIB = 1 << 20


def allocations(bench: Workbench, engine: str, precision: str) -> Outcome:
    """Memory over calls in steady state, as PyTorch's allocator counts it and as the driver does."""
    device = bench.device
    with bench.unet(bench.bundle(engine, precision), engine) as unet:
        sample, given = inputs(unet, precision, device)
        timesteps = torch.linspace(900, 100, CALLS, device=device).unbind()
        unet.set_schedule(Uniform(2), cut=CUT)
        counts: list[int] = []
        free: list[int] = []
        for steady in (False, True):
            with unet.generation(calls=CALLS):
                for timestep in timesteps:
                    before = _allocations(device)
                    unet(sample, timestep, **given)
                    if steady:
                        counts.append(_allocations(device) - before)
                        torch.cuda.synchronize(device)
                        free.append(torch.cuda.mem_get_info(device)[0])
    return Outcome(
        (
            Claim("most allocations in a call, of which one is the fresh noise_pred", max(counts), "<=", 1),
            Claim(f"driver memory that {CALLS} calls took, MiB", (free[0] - min(free)) / MIB, "<=", 0),
        ),
        {"least allocations in a call": min(counts)},
    )


def close(bench: Workbench, engine: str, precision: str) -> Outcome:
    """Open, run and close again and again: what is taken comes back, by PyTorch's count and by the driver's."""
    device = bench.device
    bundle = bench.bundle(engine, precision)
    held: list[int] = []
    taken: list[int] = []
    ours: list[int] = []
    for _ in range(CYCLES):
        with bench.unet(bundle, engine) as unet:
            sample, given = inputs(unet, precision, device)
            unet.set_schedule(Uniform(2), cut=CUT)
            with unet.generation(calls=4):
                for timestep in torch.linspace(900, 300, 4, device=device).unbind():
                    unet(sample, timestep, **given)
            taken.append(used_memory(device))
        del unet, sample, given, timestep
        held.append(used_memory(device))
        ours.append(torch.cuda.memory_allocated(device))
    # The first cycle also loads libraries and kernels, which stay.
    return Outcome(
        (
            Claim("driver memory that stays after each further closing, MiB", (held[-1] - held[0]) / MIB, "<=", 2),
            Claim("PyTorch's memory that stays after each further closing, bytes", ours[-1] - ours[0], "<=", 0),
            Claim("driver memory that closing gives back, MiB", (min(taken[1:]) - max(held)) / MIB, ">", 0),
        ),
        {"open, MiB": round(taken[-1] / MIB), "closed, MiB": round(held[-1] / MIB), "cycles": CYCLES},
    )


def threads(bench: Workbench, engine: str, precision: str) -> Outcome:
    """Two threads with a UNet each, at the same time, against the same UNets one after the other."""
    bundle = bench.bundle(engine, precision)
    dtype = getattr(torch, DTYPES[precision])
    with bench.unet(bundle, engine) as first, bench.unet(bundle, engine) as second:
        unets = (first, second)
        given = conditioning(first.config, 2, dtype, bench.device)
        loops = [
            Loop(noise(first.config, 1, SIDE["small"], dtype, bench.device, seed), STEPS) for seed in range(len(unets))
        ]
        denoisers = [EngineDenoiser(unet, given, SCHEDULE, CUT) for unet in unets]
        together = Barrier(len(unets), timeout=300)

        def generate(index: int) -> torch.Tensor:
            together.wait()
            with own_stream(bench.device):
                for _ in range(2):
                    latents = loops[index].generate(denoisers[index])
                wait(bench.device)
            return latents

        wait(bench.device)
        with ThreadPoolExecutor(len(unets)) as pool:
            at_once = list(pool.map(generate, range(len(unets))))
        in_turn = [loop.generate(denoiser) for loop, denoiser in zip(loops, denoisers, strict=True)]
    bound = TRAJECTORY[precision]
    closeness = [decibels(ours, theirs) for ours, theirs in zip(at_once, in_turn, strict=True)]
    return Outcome(
        (
            Claim("latents of two threads, least PSNR to one after the other, dB", min(closeness), ">=", bound),
            # Else an exchange of the two would go unnoticed.
            Claim("PSNR between the two threads' latents, dB", decibels(in_turn[0], in_turn[1]), "<=", bound),
        ),
        {
            "bit for bit": min(closeness) == math.inf,
            "largest relative difference": max(apart(o, t) for o, t in zip(at_once, in_turn, strict=True)),
        },
    )


def _allocations(device: str) -> int:
    """How many blocks PyTorch's allocator has handed out so far."""
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])


def used_memory(device: str) -> int:
    """Bytes of the device in use by anybody, with PyTorch's spare blocks given back."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)
