"""Measurement of a device's times in a worker, with the threads, copies and turns of a server."""

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
    """Run groups of equal requests on a worker in turns, and compute the times from its statistics.

    Args:
        pipe: result of ``offcut.load`` or ``offcut.attach``.
        arguments: arguments of one request's pipeline call.
        schedule: a schedule with full and shallow calls in each request.
        model, device: descriptions for the result.
        together: numbers of requests that share engine calls.
        repeats: number of measured rounds, whose median is the result; one more round comes first.

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
        # A short request may run before the others of its group have arrived.
        groups = [group for group in groups if {("full", rows), ("shallow", rows)} <= set(group.ticks)]
        if not groups:
            raise UserError(
                "the requests of a group shared no full or no shallow calls: give another schedule or more steps"
            )
        full[rows] = statistics.median(group.ticks["full", rows].mean for group in groups)
        shallow[rows] = statistics.median(group.ticks["shallow", rows].mean for group in groups)
        between[rows] = statistics.median(group.between(rows) for group in groups)
    all_groups = [group for groups in rounds.values() for group in groups]
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
        encode=statistics.median(group.encode(per_request) for group in all_groups),
        decode=statistics.median(group.decode for group in all_groups),
    )


def _run(
    worker: Worker, arguments: Mapping[str, Any], schedule: Schedule, cut: str | None, count: int
) -> _RequestGroup:
    """Run equal requests at the same time and return their times."""
    ends: list[float] = []  # end of each step of each request

    def mark(step: Step) -> None:
        ends.append(time.perf_counter())

    before = worker.statistics()
    began = time.perf_counter()
    tickets = [worker.submit(arguments, schedule=schedule, cut=cut, on_step=mark) for _ in range(count)]
    images = [ticket.future.result().images for ticket in tickets]
    ended = time.perf_counter()
    ticks = _difference(before, worker.statistics())
    last = ends[-count]  # the first end of a last step: some requests reach the autoencoder before others
    return _RequestGroup(count, ends[0] - began, last - ends[0], ended - last, ticks, images[0][0])


@dataclass(frozen=True)
class _RequestGroup:
    """Times of equal requests that ran together.

    Attributes:
        count: number of requests.
        before: seconds until the first of the requests ends its first step.
        within: seconds from then until the first of the requests ends its last step.
        after: seconds from then until all requests are done.
        ticks: number and seconds of the engine calls, by kind and rows.
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
        """Return the mean seconds between two engine calls; the first call is over before ``within`` begins."""
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
