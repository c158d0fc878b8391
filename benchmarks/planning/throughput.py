"""Images a second of a worker with several requests in flight, beside one pipeline call after another.

    python -m offcut.benchmarks.planning.throughput shapes.offcut

All take part in each round, in turns, so that other programs on the machine slow them all down alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.batching import Worker

if TYPE_CHECKING:
    from ...runtime.generation.schedule import Schedule


@dataclass(frozen=True)
class Row:
    """So many requests in flight at once; 0 is a pipeline without a worker.

    Attributes:
        rates: images a second in each round.
        overhead: seconds that a tick takes beside the engine call, on average: choosing, copying, counting.
        engine: seconds of an engine call, on average.
    """

    in_flight: int
    rates: tuple[float, ...]
    overhead: float = 0.0
    engine: float = 0.0


def measure(
    pipe: Any,
    arguments: Mapping[str, Any],
    schedule: Schedule | None,
    *,
    in_flight: Sequence[int] = (1, 2, 4, 8),
    images: int = 8,
    rounds: int = 5,
) -> list[Row]:
    """Draw so many images in each way, in turns; a round before the first is not measured.

    Args:
        pipe: of ``offcut.load``.
        arguments: of a request's pipeline call; each draws one image with a seed of its own.
        schedule: None for full calls only.
    """
    rates: dict[int, list[float]] = {count: [] for count in (0, *in_flight)}
    overheads: dict[int, tuple[float, float]] = {}
    for place in range(rounds + 1):
        for count in rates:
            seconds, overheads[count] = (
                _in_worker(pipe, arguments, schedule, count, images)
                if count
                else _one_after_another(pipe, arguments, schedule, images)
            )
            if place:
                rates[count].append(images / seconds)
    return [Row(count, tuple(values), *overheads[count]) for count, values in rates.items()]


def _one_after_another(
    pipe: Any, arguments: Mapping[str, Any], schedule: Schedule | None, images: int
) -> tuple[float, tuple[float, float]]:
    pipe.unet.set_schedule(schedule)
    began = time.perf_counter()
    for seed in range(images):
        pipe(**_seeded(arguments, seed))
    seconds = time.perf_counter() - began
    pipe.unet.set_schedule(None)
    return seconds, (0.0, 0.0)


def _in_worker(
    pipe: Any, arguments: Mapping[str, Any], schedule: Schedule | None, count: int, images: int
) -> tuple[float, tuple[float, float]]:
    with Worker(pipe, max_in_flight=count, max_queue=images, max_batch=10**6) as worker:
        worker.submit(_seeded(arguments, 0), schedule=schedule).future.result()
        began = time.perf_counter()
        tickets = [worker.submit(_seeded(arguments, seed), schedule=schedule) for seed in range(images)]
        for ticket in tickets:
            ticket.future.result()
        seconds = time.perf_counter() - began
        counted = worker.statistics()
    ticks = counted.ticks.values()
    engine = sum(total.seconds for total in ticks) / sum(total.count for total in ticks)
    return seconds, (counted.overhead.mean, engine)


def _seeded(arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    import torch

    return {**arguments, "generator": torch.Generator("cpu").manual_seed(seed)}


def main(given: Sequence[str] | None = None) -> int:
    from ...runtime.generation.schedule import Uniform
    from ...runtime.pipeline import load
    from ..shapes.model import PROMPTS, model_path

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="of the shapes model; built if absent")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--interval", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(given)
    if not options.bundle.exists():
        from ...engines.builder.build import build

        build(model_path(), options.bundle, engine=options.engine)
    pipe: Any = load(options.bundle, options.engine, threads=options.threads)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.advise = False
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": options.steps, "guidance_scale": 3.0}
    schedule = Uniform(options.interval) if options.interval > 1 else None
    rows = measure(pipe, arguments, schedule, rounds=options.rounds)
    base = rows[0].rates
    for row in rows:
        ratio = statistics.median(rate / other for rate, other in zip(row.rates, base, strict=True))
        name = f"worker, {row.in_flight} in flight" if row.in_flight else "one call after another"
        beside = f"; {row.overhead * 1e6:.0f} us a tick beside {row.engine * 1e3:.1f} ms of engine"
        print(
            f"{name}: {statistics.median(row.rates):.2f} images/s, {ratio:.2f}x{beside if row.in_flight else ''}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
