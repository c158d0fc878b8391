"""The simulator held against the worker: the same requests at the same moments, in both.

    python -m offcut.benchmarks.planning.check shapes.offcut -o check.json

For several loads: a worker serves requests that come by a Poisson process, and the simulator is asked about the very
same arrivals with times that were measured just before and just after. Mean latency and throughput are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.batching import Policy, Worker
from .arrivals import arrivals
from .costs import Costs
from .measure import measure
from .simulate import Kind, Setting, simulate

if TYPE_CHECKING:
    from ...runtime.generation.schedule import Schedule


@dataclass(frozen=True)
class Comparison:
    """One load, measured and predicted.

    Attributes:
        rate: requests a second; if all came at once, what the device can do.
        load: the rate as a share of what the device can do.
        latency, throughput, rows: of the worker: mean seconds of a request, images a second, rows of an engine call.
        predicted_latency, predicted_throughput, predicted_rows: the same of the simulator.
        drift: by how much a full call took longer after the load than before, as a share: the machine's own.
    """

    rate: float
    load: float
    latency: float
    throughput: float
    rows: float
    predicted_latency: float
    predicted_throughput: float
    predicted_rows: float
    drift: float

    @property
    def latency_error(self) -> float:
        return self.predicted_latency / self.latency - 1

    @property
    def throughput_error(self) -> float:
        return self.predicted_throughput / self.throughput - 1


def compare(
    pipe: Any,
    arguments: Mapping[str, Any],
    schedule: Schedule,
    *,
    calls: int,
    loads: Sequence[float],
    requests: int,
    max_in_flight: int = 8,
    policy: Policy | None = None,
    seed: int = 0,
    repeats: int = 3,
    told: Callable[[Comparison], None] = lambda comparison: None,
) -> list[Comparison]:
    """Serve the same load with a worker and in the simulator.

    Times are measured before and after each load, and the simulator has their mean: where other programs slow the
    machine down for a while, they do so in both.

    Args:
        calls: of the UNet, in a request.
        loads: shares of what the device can do; infinite for requests that all come at once.
        requests: for each load.
        repeats: of each measurement of times.
        told: called with each comparison as it is made.
    """
    full = set(schedule.full_calls(calls))
    kind = Kind(tuple(call in full for call in range(calls)))
    setting = Setting(policy or Policy(), max_in_flight=max_in_flight, max_queue=requests, max_batch=10**6)
    together = [count for count in (1, 2, 4, 8, 16) if count <= max_in_flight]

    def measured() -> Costs:
        return measure(pipe, arguments, schedule, model="", device="here", together=together, repeats=repeats)

    before, compared = measured(), []
    for load in loads:
        most = simulate(before, [kind], [0.0] * requests, setting).throughput
        times = [0.0] * requests if math.isinf(load) else arrivals("poisson", most * load, requests, seed)
        latencies, seconds, rows = _serve(pipe, arguments, schedule, before.cut, times, setting)
        after = measured()
        predicted = simulate(mean(before, after), [kind], times, setting)
        compared.append(
            Comparison(
                rate=most if math.isinf(load) else most * load,
                load=load,
                latency=sum(latencies) / len(latencies),
                throughput=len(latencies) / seconds,
                rows=rows,
                predicted_latency=sum(predicted.latencies) / len(predicted.latencies),
                predicted_throughput=predicted.throughput,
                predicted_rows=predicted.mean_rows,
                drift=after.full[after.rows] / before.full[before.rows] - 1,
            )
        )
        told(compared[-1])
        before = after
    return compared


def mean(one: Costs, other: Costs) -> Costs:
    """Between two measurements of the same device."""
    tables = {
        name: {rows: (seconds + getattr(other, name)[rows]) / 2 for rows, seconds in getattr(one, name).items()}
        for name in ("full", "shallow", "between")
    }
    return one.model_copy(
        update=tables | {"encode": (one.encode + other.encode) / 2, "decode": (one.decode + other.decode) / 2}
    )


def _serve(
    pipe: Any,
    arguments: Mapping[str, Any],
    schedule: Schedule,
    cut: str,
    times: Sequence[float],
    setting: Setting,
) -> tuple[list[float], float, float]:
    """Latencies in seconds, the seconds from the first arrival to the last image, and the mean rows of a call."""
    ended: dict[int, float] = {}
    with Worker(
        pipe,
        max_in_flight=setting.max_in_flight,
        max_queue=setting.max_queue,
        max_batch=setting.max_batch,
        policy=setting.policy,
    ) as worker:
        began = time.perf_counter()
        tickets = []
        for place, moment in enumerate(times):
            time.sleep(max(0.0, began + moment - time.perf_counter()))
            ticket = worker.submit(arguments, schedule=schedule, cut=cut)
            ticket.future.add_done_callback(_noting(ended, place))
            tickets.append(ticket)
        for ticket in tickets:
            ticket.future.result()
        seconds = max(ended.values()) - began - times[0]
        rows = worker.statistics().mean_rows
    return [ended[place] - began - moment for place, moment in enumerate(times)], seconds, rows


def _noting(ended: dict[int, float], place: int) -> Callable[[object], None]:
    def note(_: object) -> None:
        ended[place] = time.perf_counter()

    return note


def main(given: Sequence[str] | None = None) -> int:
    """0 if every difference is within the bound."""
    from ...runtime.generation.schedule import Uniform
    from ...runtime.pipeline import load
    from ..shapes.model import PROMPTS, model_path

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="of the shapes model; built if absent")
    parser.add_argument("-o", "--output", type=Path, help="a JSON file for what was found")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--interval", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--load", type=float, action="append", help="share of what the device can do, or inf; again")
    parser.add_argument("--bound", type=float, default=0.1)
    options = parser.parse_args(given)
    if not options.bundle.exists():
        from ...engines.builder.build import build

        build(model_path(), options.bundle, engine=options.engine)
    pipe = load(options.bundle, options.engine, threads=options.threads)
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": options.steps, "guidance_scale": 3.0}
    schedule = Uniform(options.interval)

    def tell(each: Comparison) -> None:
        print(
            f"load {each.load:g}: latency {each.latency:.3f} s, predicted {each.predicted_latency:.3f} "
            f"({each.latency_error:+.1%}); throughput {each.throughput:.3f} images/s, predicted "
            f"{each.predicted_throughput:.3f} ({each.throughput_error:+.1%}); rows {each.rows:.1f}, predicted "
            f"{each.predicted_rows:.1f}; drift {each.drift:+.0%}",
            flush=True,
        )

    found = compare(
        pipe,
        arguments,
        schedule,
        calls=options.steps,
        loads=options.load or (0.4, 0.7, math.inf),
        requests=options.requests,
        told=tell,
    )
    if options.output is not None:
        text = json.dumps([{**asdict(each), "load": str(each.load)} for each in found], indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")
    errors = itertools.chain.from_iterable((each.latency_error, each.throughput_error) for each in found)
    return int(any(abs(error) > options.bound for error in errors))


if __name__ == "__main__":
    raise SystemExit(main())
