"""A device's times, measured with the worker itself: the same threads, copies and turns as in production."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...runtime.batching import Statistics, Step, Total, Worker
from .costs import DeviceCosts

if TYPE_CHECKING:
    from ...runtime.generation.schedule import Schedule


def measure(
    pipe: Any,
    arguments: Mapping[str, Any],
    schedule: Schedule,
    *,
    model: str,
    device: str,
    cut: str | None = None,
    together: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 3,
    stage: Callable[[str], None] = lambda text: None,
) -> DeviceCosts:
    """Run groups of equal requests on a worker, in turns, and read its statistics.

    Args:
        pipe: of ``offcut.load`` or ``offcut.attach``.
        arguments: of one request's pipeline call.
        schedule: has full and shallow calls in a request.
        model, device: described in words.
        together: numbers of requests that share engine calls.
        repeats: rounds after one that is not measured; each time is the median over rounds.

    Raises:
        UserError: the requests made no shallow calls, or shared no engine calls.
    """
    rounds: dict[int, list[_RequestGroup]] = {count: [] for count in together}
    with Worker(pipe, max_in_flight=max(together), max_queue=0, max_batch=10**6, bound_shapes=len(together)) as worker:
        for place in range(repeats + 1):
            stage("warm up" if place == 0 else f"round {place} of {repeats}")
            for count in together:
                group = _run(worker, arguments, schedule, cut, count)
                if place:
                    rounds[count].append(group)
        cut = cut or worker.unet.cuts[0]
    one = rounds[min(together)][0]
    per_request = max(rows for _, rows in one.ticks) // min(together)
    full, shallow, between = {}, {}, {}
    for count, groups in rounds.items():
        rows = per_request * count
        # One of several short requests may run before the others have arrived.
        groups = [group for group in groups if {("full", rows), ("shallow", rows)} <= set(group.ticks)]
        if not groups:
            raise UserError("these requests make no full and shallow calls together: give another schedule, or steps")
        full[rows] = statistics.median(group.ticks["full", rows].mean for group in groups)
        shallow[rows] = statistics.median(group.ticks["shallow", rows].mean for group in groups)
        between[rows] = statistics.median(group.between(rows) for group in groups)
    every = [group for groups in rounds.values() for group in groups]
    return DeviceCosts(
        model=model,
        engine=pipe.unet.engine,
        device=device,
        height=one.size[0],
        width=one.size[1],
        cut=cut,
        rows=per_request,
        full=full,
        shallow=shallow,
        between=between,
        encode=statistics.median(group.encode(per_request) for group in every),
        decode=statistics.median(group.decode for group in every),
    )


def _run(
    worker: Worker, arguments: Mapping[str, Any], schedule: Schedule, cut: str | None, count: int
) -> _RequestGroup:
    """Run a number of equal requests at once, from submission until all are done."""
    ends: list[float] = []  # of each step of each request

    def mark(step: Step) -> None:
        ends.append(time.perf_counter())

    before = worker.statistics()
    began = time.perf_counter()
    tickets = [worker.submit(arguments, schedule=schedule, cut=cut, on_step=mark) for _ in range(count)]
    images = [ticket.future.result().images for ticket in tickets]
    ended = time.perf_counter()
    ticks = _difference(before, worker.statistics())
    last = ends[-count]  # the first end of a last step: some requests may reach the autoencoder before others
    return _RequestGroup(count, ends[0] - began, last - ends[0], ended - last, ticks, images[0][0])


@dataclass(frozen=True)
class _RequestGroup:
    """Equal requests that ran together.

    Attributes:
        count: number of requests.
        before, within, after: seconds until the first end of a first step, from there until the first end of a last
            step, and from there until all are done.
        ticks: the engine calls, by kind and rows.
        image: one of the generated images.
    """

    count: int
    before: float
    within: float
    after: float
    ticks: Mapping[tuple[str, int], Total]
    image: Any

    def encode(self, per_request: int) -> float:
        """Return the seconds of one request before its first call."""
        return max(self.before - self.ticks["full", per_request * self.count].mean, 0.0) / self.count

    @property
    def decode(self) -> float:
        """Seconds of one request after its last call."""
        return self.after / self.count

    def between(self, rows: int) -> float:
        """Return the seconds from one engine call to the next; the first call lies before the first end of a step."""
        engine = sum(total.seconds for total in self.ticks.values()) - self.ticks["full", rows].mean
        calls = sum(total.count for total in self.ticks.values()) - 1
        return max(self.within - engine, 0.0) / calls

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image: PIL's, NumPy's [H, W, 3], or a tensor's [3, H, W]."""
        if isinstance(getattr(self.image, "size", None), tuple):
            return self.image.size[1], self.image.size[0]
        shape = tuple(self.image.shape)
        return (shape[0], shape[1]) if shape[-1] == 3 else (shape[-2], shape[-1])


def _difference(before: Statistics, after: Statistics) -> dict[tuple[str, int], Total]:
    """Return the engine calls between two moments."""
    calls: dict[tuple[str, int], Total] = {}
    for key, total in after.ticks.items():
        earlier = before.ticks.get(key, Total())
        if total.count > earlier.count:
            calls[key] = Total(total.count - earlier.count, total.seconds - earlier.seconds)
    return calls
