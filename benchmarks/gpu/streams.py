"""Streams and CUDA graphs: nothing waits on the host, and everything is in order on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ...engines.precision import bounds
from ...runtime.generation.schedule import Uniform
from .check import Claim, NotRun, Outcome
from .exercise import addresses, apart, bind, farthest, stale_answers
from .models import DTYPES, SIDE, conditioning, noise
from .peers import Conditioning
from .workbench import CUT, Workbench

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle
    from ...runtime.unet import UNet

RECORDING = ("tensorrt", "tensorrt-rtx", "inductor", "onnxruntime")
"""Engines whose pairs replay their calls from CUDA graphs."""

_OF_ITS_OWN = ("onnxruntime",)
"""Those of them that capture by themselves, in the third run; the others leave it to PyTorch, in the second."""

CALLS = 8
_OTHERS = 7
"""A value in memory that belongs to somebody else by now."""

# Long against any launch: about a tenth of a second on GPUs of 1 to 2 GHz.
_SLEEP_CYCLES = 200_000_000


def no_sync(bench: Workbench, engine: str, precision: str) -> Outcome:
    """``UNet.forward`` in steady state, under PyTorch's watch for synchronisations, then behind a sleeping device."""
    with bench.unet(bench.bundle(engine, precision), engine) as unet:
        sample, given = inputs(unet, precision, bench.device)
        timesteps = list(torch.linspace(900, 100, CALLS, device=bench.device).unbind())
        unet.set_schedule(Uniform(2), cut=CUT)
        with unet.generation(calls=CALLS):
            for timestep in timesteps:
                unet(sample, timestep, **given)
        by_tensor = _synchronisations(unet, sample, timesteps, given)
        by_number = _synchronisations(unet, sample, [900 - 100 * call for call in range(CALLS)], given)
        ahead = _ahead_of_a_sleeping_device(unet, sample, timesteps, given)
        run = unet.last_run
    assert run is not None
    shallow = [call for call, full in enumerate(run.full) if not full]
    return Outcome(
        (
            Claim(f"synchronising calls of {CALLS}, timestep on the device", len(by_tensor), "==", 0),
            Claim(f"synchronising calls of {CALLS}, timestep a number", len(by_number), "==", 0),
            # An engine without CUDA graphs may fill the queue of launches in a full call, and wait for that.
            Claim(
                f"shallow calls of {len(shallow)} that returned before the device began with them",
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


def side_stream(bench: Workbench, engine: str, precision: str) -> Outcome:
    """A caller on a stream of its own, whose inputs come late and who reads the answer at once."""
    with bench.unet(bench.bundle(engine, precision), engine) as unet:
        first, given = inputs(unet, precision, bench.device)
        samples = [first, *(inputs(unet, precision, bench.device, seed)[0] for seed in (1, 2, 3))]
        timestep = torch.tensor(500.0, device=bench.device)
        unet.set_schedule(Uniform(2), cut=CUT)

        def generation(late: bool) -> list[torch.Tensor]:
            answers = []
            with unet.generation(calls=len(samples)):
                for wanted in samples:
                    sample = torch.zeros_like(wanted)
                    if late:
                        torch.cuda._sleep(_SLEEP_CYCLES // 4)  # type: ignore[no-untyped-call]
                    sample.copy_(wanted)
                    answers.append(unet(sample, timestep, return_dict=False, **given)[0] + 0)
            return answers

        generation(late=False)  # the first calls record their graphs
        expected = generation(late=False)
        torch.cuda.synchronize(bench.device)
        stream: Any = torch.cuda.Stream(bench.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            got = generation(late=True)
        stream.synchronize()
        spread = min(apart(one, other) for one, other in pairwise(expected))
        difference = farthest(got, expected)
    across = bounds(engine, precision).across
    return Outcome(
        (
            Claim("relative difference to the default stream", difference, "<=", across),
            # Else an answer to earlier inputs would pass.
            Claim("relative difference between answers to different inputs", spread, ">", across),
        )
    )


def cuda_graphs(bench: Workbench, engine: str, precision: str) -> Outcome:
    """Calls replayed from CUDA graphs against the same calls launched one by one."""
    seeds = tuple(range(5))
    bundle = bench.bundle(engine, precision)
    plain, repeated = _launched(bench, bundle, engine, seeds)
    with bench.pair(bundle, engine) as pair:
        bound = bind(pair, 2, SIDE["small"])
        before = addresses(bound)
        counting = _counting_launches(bench.device) if engine in _OF_ITS_OWN else _counting_replays()
        with counting as replays:
            replayed = farthest(stale_answers(pair, bound, CUT, seeds), plain)
        moved = sum(before[name] != address for name, address in addresses(bound).items())
        bound.close()
    return Outcome(
        (
            # 0 where the engine computes the same bits twice.
            Claim("relative difference of replayed to launched calls", replayed, "<=", repeated),
            # The first calls of each graph are launched, as a warm-up.
            Claim(
                f"calls of {2 * len(seeds)} that were replayed",
                len(replays),
                ">=",
                2 * (len(seeds) - (2 if engine in _OF_ITS_OWN else 1)),
            ),
            Claim("buffers that moved", moved, "==", 0),
        ),
        {"relative difference of launched calls, repeated": repeated},
    )


def moved_buffers(bench: Workbench, engine: str, precision: str) -> Outcome:
    """A pair is bound, recorded and closed; another one of the same shapes lies elsewhere, and must not be replayed as
    the first, whose memory others have by then."""
    seeds = tuple(range(5))
    bundle = bench.bundle(engine, precision)
    plain, repeated = _launched(bench, bundle, engine, seeds)
    with bench.pair(bundle, engine) as pair:
        first = bind(pair, 2, SIDE["small"])
        stale_answers(pair, first, CUT, seeds)
        others, then = dict(first.buffers), set(addresses(first).values())
        first.close()
        for memory in others.values():
            memory.fill_(_OTHERS)
        second = bind(pair, 2, SIDE["small"])
        difference = farthest(stale_answers(pair, second, CUT, seeds), plain)
        overwritten = sum(int((memory != _OTHERS).sum()) for memory in others.values())
        in_place = len(then & set(addresses(second).values()))
        second.close()
    return Outcome(
        (
            Claim("relative difference of the second pair to launched calls", difference, "<=", repeated),
            Claim("values overwritten where the first pair's buffers were", overwritten, "==", 0),
            # Else nothing moved, and nothing was shown.
            Claim("buffers of the second pair that lie where one of the first did", in_place, "==", 0),
        )
    )


def inputs(unet: UNet, precision: str, device: str, seed: int = 0) -> tuple[torch.Tensor, Conditioning]:
    """A sample [2, channels, 16, 16] and its conditioning."""
    dtype = getattr(torch, DTYPES[precision])
    return noise(unet.config, 2, SIDE["small"], dtype, device, seed), conditioning(unet.config, 2, dtype, device)


def _launched(
    bench: Workbench, bundle: Bundle, engine: str, seeds: tuple[int, ...]
) -> tuple[list[torch.Tensor], float]:
    """The answers of calls that are launched one by one, and how far off the same calls' second answers are."""
    with bench.pair(bundle, engine, cuda_graphs=False) as pair:
        bound = bind(pair, 2, SIDE["small"])
        plain = stale_answers(pair, bound, CUT, seeds)
        repeated = farthest(stale_answers(pair, bound, CUT, seeds), plain)
        bound.close()
    return plain, repeated


@contextmanager
def _counting_replays() -> Iterator[list[None]]:
    """One entry for each CUDA graph that PyTorch replays meanwhile."""
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
    """The same for graphs of whatever library, as PyTorch's profiler sees them; filled at the end.

    Raises:
        NotRun: it sees nothing of CUDA here.
    """
    launches: list[None] = []
    with torch.profiler.profile() as profile:
        yield launches
    names = [event.name for event in profile.events() or ()]
    if device.startswith("cuda") and "cudaLaunchKernel" not in names:
        raise NotRun("PyTorch's profiler sees no CUDA calls here, so nobody can tell whether graphs were replayed")
    launches += [None] * names.count("cudaGraphLaunch")


def _synchronisations(
    unet: UNet, sample: torch.Tensor, timesteps: Sequence[torch.Tensor | float], given: Conditioning
) -> list[str]:
    """What PyTorch says of each call that waits for the device."""
    found = []
    with unet.generation(calls=len(timesteps)):
        for timestep in timesteps:
            torch.cuda.set_sync_debug_mode("error")
            try:
                unet(sample, timestep, **given)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                found.append(str(error).splitlines()[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return found


def _ahead_of_a_sleeping_device(
    unet: UNet, sample: torch.Tensor, timesteps: Sequence[torch.Tensor], given: Conditioning
) -> list[bool]:
    """Whether each call returned while the device still slept: then nothing in it waited, not in the engine either."""
    ahead = []
    with unet.generation(calls=len(timesteps)):
        for timestep in timesteps:
            torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            awake = torch.cuda.Event()  # type: ignore[no-untyped-call]
            awake.record()
            unet(sample, timestep, **given)
            ahead.append(not awake.query())  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
    return ahead
