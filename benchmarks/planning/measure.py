"""Measuring a device's times with the worker itself: the same threads, copies and turns as in production."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...runtime.batching import Statistics, Step, Total, Worker
from .costs import Costs

if TYPE_CHECKING:
    from ...runtime.schedule import Schedule


def measure(
    pipe: Any,
    arguments: Mapping[str, Any],
    schedule: Schedule,
    *,
    model: str,
    device: str,
    cut: str | None = None,
    together: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 2,
    stage: Callable[[str], None] = lambda text: None,
) -> Costs:
    """Run groups of equal requests on a worker, and read its statistics.

    Args:
        pipe: of ``offcut.load`` or ``offcut.attach``.
        arguments: of one request's pipeline call.
        schedule: with full and shallow calls among so many.
        model, device: what is measured, in words.
        together: how many requests share engine calls.
        repeats: of each group, after one that is not measured.

    Raises:
        UserError: the requests made no shallow calls, or did not run together.
    """
    full: dict[int, float] = {}
    shallow: dict[int, float] = {}
    between: dict[int, float] = {}
    encodes: list[float] = []
    decodes: list[float] = []
    per_request = 0
    height = width = 0
    name = cut
    for count in together:
        stage(f"{count} requests together" if count > 1 else "one request")
        with Worker(pipe, max_in_flight=count, max_batch=10**6) as worker:
            group = _Group(worker, arguments, schedule, cut, count)
            group.run()
            before = worker.statistics()
            walls = [group.run() for _ in range(repeats)]
            after = worker.statistics()
            name = name or worker._unet.cuts[0]
        ticks = _difference(before, after)
        per_request = per_request or max(rows for _, rows in ticks)
        rows = per_request * count
        if ("full", rows) not in ticks or ("shallow", rows) not in ticks:
            raise UserError("these requests make no full and shallow calls together: give another schedule, or steps")
        full[rows], shallow[rows] = ticks["full", rows].mean, ticks["shallow", rows].mean
        height, width = walls[0].size
        encodes += [max(wall.before - full[rows], 0.0) / count for wall in walls]
        decodes += [wall.after / count for wall in walls]
        # The first call lies before the first mark, and so do its seconds.
        engine = sum(total.seconds for total in ticks.values()) - repeats * full[rows]
        calls = sum(total.count for total in ticks.values()) - repeats
        between[rows] = max(sum(wall.within for wall in walls) - engine, 0.0) / calls
    return Costs(
        model=model,
        engine=pipe.unet.engine,
        device=device,
        height=height,
        width=width,
        cut=str(name),
        rows=per_request,
        full=full,
        shallow=shallow,
        between=between,
        encode=statistics.median(encodes),
        decode=statistics.median(decodes),
    )


class _Group:
    """So many equal requests at once."""

    def __init__(
        self, worker: Worker, arguments: Mapping[str, Any], schedule: Schedule, cut: str | None, count: int
    ) -> None:
        self._worker, self._arguments = worker, arguments
        self._schedule, self._cut, self._count = schedule, cut, count

    def run(self) -> _Wall:
        """From submission until all are done."""
        marks: list[float] = []

        def mark(step: Step) -> None:
            marks.append(time.perf_counter())

        began = time.perf_counter()
        tickets = [
            self._worker.submit(self._arguments, schedule=self._schedule, cut=self._cut, on_step=mark)
            for _ in range(self._count)
        ]
        images = [ticket.future.result().images for ticket in tickets]
        ended = time.perf_counter()
        return _Wall(marks[0] - began, marks[-1] - marks[0], ended - marks[-1], images[0])


class _Wall:
    """Seconds of a group: until its first step was over, from there to the end of its last one, and after that."""

    def __init__(self, before: float, within: float, after: float, images: Any) -> None:
        self.before, self.within, self.after = before, within, after
        self._image = images[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image: PIL's, NumPy's [H, W, 3], or a tensor's [3, H, W]."""
        if hasattr(self._image, "size") and isinstance(self._image.size, tuple):
            return self._image.size[1], self._image.size[0]
        shape = tuple(self._image.shape)
        return (shape[0], shape[1]) if shape[-1] == 3 else (shape[-2], shape[-1])


def _difference(before: Statistics, after: Statistics) -> dict[tuple[str, int], Total]:
    """Engine calls between two moments."""
    made = {}
    for key, total in after.ticks.items():
        earlier = before.ticks.get(key, Total())
        if total.count > earlier.count:
            made[key] = Total(total.count - earlier.count, total.seconds - earlier.seconds)
    return {(kind, rows): total for (kind, rows), total in made.items()}
