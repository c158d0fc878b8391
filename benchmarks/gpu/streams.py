"""Checks that the host never waits, that streams are ordered, and that CUDA graphs compute the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ...engines.precision import bounds
from ...runtime.generation.schedule import Uniform
from .check import BoundedFigure, CheckOutcome, NotRun
from .exercise import addresses, bind, max_difference, max_difference_of_all, stale_outputs
from .models import SIDE, conditioning, dtype_of, noise
from .peers import Conditioning
from .workbench import CUT, Workbench

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle
    from ...runtime.unet import UNet

RECORDING = ("tensorrt", "tensorrt-rtx", "inductor", "onnxruntime")
"""Engines whose pairs replay calls from CUDA graphs."""

_OWN_CAPTURE = ("onnxruntime",)
"""Engines that capture their graphs themselves, in the third call; PyTorch captures the others in the second."""

CALLS = 8
_NEW_OWNER = 7
"""Value written to freed memory, as a new owner would."""

# Longer than any launch: about a tenth of a second on GPUs of 1 to 2 GHz.
_SLEEP_CYCLES = 200_000_000


def no_sync(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Call ``UNet.forward`` while PyTorch reports synchronisations, then while the device sleeps."""
    with bench.unet(bench.bundle(engine, precision), engine) as unet:
        sample, arguments = inputs(unet, precision, bench.device)
        timesteps = list(torch.linspace(900, 100, CALLS, device=bench.device).unbind())
        unet.set_schedule(Uniform(2), cut=CUT)
        with unet.generation(calls=CALLS):
            for timestep in timesteps:
                unet(sample, timestep, **arguments)
        by_tensor = _synchronisations(unet, sample, timesteps, arguments)
        by_number = _synchronisations(unet, sample, [900 - 100 * call for call in range(CALLS)], arguments)
        ahead = _ahead_of_a_sleeping_device(unet, sample, timesteps, arguments)
        run = unet.last_run
    assert run is not None
    shallow = [call for call, full in enumerate(run.full) if not full]
    return CheckOutcome(
        (
            BoundedFigure(f"synchronising calls among {CALLS}, timestep on the device", len(by_tensor), "==", 0),
            BoundedFigure(f"synchronising calls among {CALLS}, timestep a number", len(by_number), "==", 0),
            # Without CUDA graphs, a full call may fill the launch queue, and the host then waits.
            BoundedFigure(
                f"shallow calls among {len(shallow)} that returned before the device began them",
                sum(ahead[call] for call in shallow),
                "==",
                len(shallow),
            ),
        ),
        {
            "full calls that returned before the device began": sum(ahead[call] for call in run.full_calls),
            "full calls": len(run.full_calls),
            "first synchronisation": next(iter([*by_tensor, *by_number]), "none"),
        },
    )


def side_stream(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Call the UNet on the caller's own stream; inputs are written late, and outputs are read at once."""
    with bench.unet(bench.bundle(engine, precision), engine) as unet:
        first, arguments = inputs(unet, precision, bench.device)
        samples = [first, *(inputs(unet, precision, bench.device, seed)[0] for seed in (1, 2, 3))]
        timestep = torch.tensor(500.0, device=bench.device)
        unet.set_schedule(Uniform(2), cut=CUT)

        def generation(late: bool) -> list[torch.Tensor]:
            outputs = []
            with unet.generation(calls=len(samples)):
                for values in samples:
                    sample = torch.zeros_like(values)
                    if late:
                        torch.cuda._sleep(_SLEEP_CYCLES // 4)  # type: ignore[no-untyped-call]
                    sample.copy_(values)
                    outputs.append(unet(sample, timestep, return_dict=False, **arguments)[0] + 0)
            return outputs

        generation(late=False)  # the first calls capture their graphs
        expected = generation(late=False)
        torch.cuda.synchronize(bench.device)
        stream: Any = torch.cuda.Stream(bench.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            outputs = generation(late=True)
        stream.synchronize()
        spread = min(max_difference(one, other) for one, other in pairwise(expected))
        difference = max_difference_of_all(outputs, expected)
    across = bounds(engine, precision).across
    return CheckOutcome(
        (
            BoundedFigure("relative difference to the default stream", difference, "<=", across),
            # Otherwise the output for earlier inputs would pass.
            BoundedFigure("relative difference between outputs for different inputs", spread, ">", across),
        )
    )


def cuda_graphs(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Compare calls replayed from CUDA graphs with the same calls launched one by one."""
    seeds = tuple(range(5))
    bundle = bench.bundle(engine, precision)
    plain, repeated = _launched(bench, bundle, engine, seeds)
    with bench.pair(bundle, engine) as pair:
        bound = bind(pair, 2, SIDE["small"])
        before = addresses(bound)
        counting = _counting_launches(bench.device) if engine in _OWN_CAPTURE else _counting_replays()
        with counting as replays:
            replayed = max_difference_of_all(stale_outputs(pair, bound, CUT, seeds), plain)
        moved = sum(before[name] != address for name, address in addresses(bound).items())
        bound.close()
    return CheckOutcome(
        (
            # 0 where the engine computes the same bits twice.
            BoundedFigure("relative difference of replayed to launched calls", replayed, "<=", repeated),
            # The first calls of each graph warm up: their kernels are launched one by one, not replayed.
            BoundedFigure(
                f"replayed calls among {2 * len(seeds)}",
                len(replays),
                ">=",
                2 * (len(seeds) - (2 if engine in _OWN_CAPTURE else 1)),
            ),
            BoundedFigure("buffers that moved", moved, "==", 0),
        ),
        {"relative difference of launched calls, repeated": repeated},
    )


def moved_buffers(bench: Workbench, engine: str, precision: str) -> CheckOutcome:
    """Bind, capture and close a pair, then bind another one of the same shapes at other addresses.

    Replaying the first pair's graphs would write to memory that has a new owner.
    """
    seeds = tuple(range(5))
    bundle = bench.bundle(engine, precision)
    plain, repeated = _launched(bench, bundle, engine, seeds)
    with bench.pair(bundle, engine) as pair:
        first = bind(pair, 2, SIDE["small"])
        stale_outputs(pair, first, CUT, seeds)
        freed, then = dict(first.buffers), set(addresses(first).values())
        first.close()
        for memory in freed.values():
            memory.fill_(_NEW_OWNER)
        second = bind(pair, 2, SIDE["small"])
        difference = max_difference_of_all(stale_outputs(pair, second, CUT, seeds), plain)
        overwritten = sum(int((memory != _NEW_OWNER).sum()) for memory in freed.values())
        in_place = len(then & set(addresses(second).values()))
        second.close()
    return CheckOutcome(
        (
            BoundedFigure("relative difference of the second pair to launched calls", difference, "<=", repeated),
            BoundedFigure("values overwritten where the first pair's buffers were", overwritten, "==", 0),
            # The check needs buffers that moved.
            BoundedFigure("buffers of the second pair at an address of the first", in_place, "==", 0),
        )
    )


def inputs(unet: UNet, precision: str, device: str, seed: int = 0) -> tuple[torch.Tensor, Conditioning]:
    """Return a sample [2, channels, 16, 16] and its conditioning."""
    dtype = dtype_of(precision)
    return noise(unet.config, 2, SIDE["small"], dtype, device, seed), conditioning(unet.config, 2, dtype, device)


def _launched(
    bench: Workbench, bundle: Bundle, engine: str, seeds: tuple[int, ...]
) -> tuple[list[torch.Tensor], float]:
    """Return the outputs of calls launched one by one, and the largest difference when the calls are repeated."""
    with bench.pair(bundle, engine, cuda_graphs=False) as pair:
        bound = bind(pair, 2, SIDE["small"])
        plain = stale_outputs(pair, bound, CUT, seeds)
        repeated = max_difference_of_all(stale_outputs(pair, bound, CUT, seeds), plain)
        bound.close()
    return plain, repeated


@contextmanager
def _counting_replays() -> Iterator[list[None]]:
    """Yield a list to which each CUDA graph that PyTorch replays adds an entry."""
    replays: list[None] = []
    original = torch.cuda.CUDAGraph.replay

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(None)
        original(graph)

    torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign, assignment]
    try:
        yield replays
    finally:
        torch.cuda.CUDAGraph.replay = original  # type: ignore[method-assign]


@contextmanager
def _counting_launches(device: str) -> Iterator[list[None]]:
    """Yield a list with an entry for each launch of a CUDA graph by any library; it is filled at the end.

    Raises:
        NotRun: the profiler sees no CUDA calls here.
    """
    launches: list[None] = []
    with torch.profiler.profile() as profile:
        yield launches
    names = [event.name for event in profile.events() or ()]
    if device.startswith("cuda") and "cudaLaunchKernel" not in names:
        raise NotRun("PyTorch's profiler sees no CUDA calls here, so replays of graphs cannot be counted")
    launches += [None] * names.count("cudaGraphLaunch")


def _synchronisations(
    unet: UNet, sample: torch.Tensor, timesteps: Sequence[torch.Tensor | float], arguments: Conditioning
) -> list[str]:
    """Return PyTorch's message for each call that waits for the device."""
    messages = []
    with unet.generation(calls=len(timesteps)):
        for timestep in timesteps:
            torch.cuda.set_sync_debug_mode("error")
            try:
                unet(sample, timestep, **arguments)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                messages.append(str(error).splitlines()[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return messages


def _ahead_of_a_sleeping_device(
    unet: UNet, sample: torch.Tensor, timesteps: Sequence[torch.Tensor], arguments: Conditioning
) -> list[bool]:
    """Return for each call whether it returned while the device slept, so that no library waited for the device."""
    ahead = []
    with unet.generation(calls=len(timesteps)):
        for timestep in timesteps:
            torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            awake = torch.cuda.Event()  # type: ignore[no-untyped-call]
            awake.record()
            unet(sample, timestep, **arguments)
            ahead.append(not awake.query())  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
    return ahead
