"""Times of full and shallow calls with every build of a bundle, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from ...engines.bundle.bundle import Bundle
from ..gpu.exercise import write
from ..latency.loop import call_dims
from ..schema.precision import CallRow, Calls
from .builds import Build, builds_in

FULL = "full"


def measure(
    bundle: Bundle,
    engines: Sequence[str] = (),
    *,
    size: int,
    rounds: int,
    threads: int | None,
    progress: Callable[[str], None],
) -> Calls:
    """Time every call once in each round, after one round that is not measured.

    Args:
        bundle: the bundle with the builds.
        engines: names of the bundle's engines; all by default.
        size: side of the image that the calls are for, in pixels.

    Raises:
        UserError: the bundle has no build with these engines.
        EngineError: a build cannot be opened here.
        ShapeError: the UNet does not support this size.
    """
    dims = call_dims(bundle, size)
    calls: dict[tuple[Build, str], Callable[[], object]] = {}
    with ExitStack() as opened:
        for build, entry in builds_in(bundle, engines):
            progress(f"open {build.engine} {build.name}")
            pair = bundle.pair(entry, threads=threads)
            opened.callback(pair.close)
            bound = pair.prepare({name: spec.resolve(dims) for name, spec in pair.inputs.items()})
            opened.callback(bound.close)
            write(pair, bound, seed=0)
            cut = entry.cuts[0]
            calls[build, FULL], calls[build, cut] = bound.full, partial(bound.shallow, cut)
        times: dict[tuple[Build, str], list[float]] = {call: [] for call in calls}
        for turn in range(rounds + 1):
            progress(f"round {turn} of {rounds}" if turn else "warm up")
            for call, run in calls.items():
                began = time.perf_counter()
                run()
                if turn:
                    times[call].append(time.perf_counter() - began)
    return Calls(sizes=dims, rounds=rounds, rows=[_row(*call, times) for call in times])


def _row(build: Build, call: str, times: Mapping[tuple[Build, str], list[float]]) -> CallRow:
    own, exact = times[build, call], times.get((Build(build.engine), call))
    ratios = [one / other for one, other in zip(own, exact, strict=True)] if exact else []
    return CallRow(
        engine=build.engine,
        precision=build.name,
        call=call,
        seconds=own,
        to_fp32=statistics.median(ratios) if ratios and own is not exact else None,
    )
