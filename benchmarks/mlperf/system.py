"""The system under test: one worker that turns LoadGen's queries into images, in batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterable

Picture = npt.NDArray[np.uint8]
Draw = Callable[[Sequence[int]], Sequence[Picture]]
"""Makes one picture, uint8 [H, W, 3], for each index of the sample library."""

Answer = Callable[[Sequence[tuple[int, Picture | None]]], None]
"""Hands (query id, picture) pairs back to the load generator; None where no picture could be made."""


class System:
    """Takes samples at any time, from any thread, and answers them from one worker thread.

    What waits when the worker gets free is drawn together, the oldest first, at most ``batch`` at once. So a single
    stream runs one by one, an offline query in full batches, and a server as its load asks for.

    After a failure every sample is answered without a picture, so that the load generator comes to its end, and
    ``close`` raises the failure: a test with one has no figures.
    """

    def __init__(self, draw: Draw, answer: Answer, batch: int) -> None:
        self._draw, self._answer, self._batch = draw, answer, batch
        self._waiting: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self.batches: list[int] = []
        """Sizes of the batches so far."""
        self._worker = threading.Thread(target=self._work, name="offcut-mlperf", daemon=True)
        self._worker.start()

    def issue(self, samples: Iterable[Any]) -> None:
        """Take LoadGen's samples: objects with ``id`` (of the query) and ``index`` (into the library)."""
        for sample in samples:
            self._waiting.put((sample.id, sample.index))

    def close(self) -> None:
        """Finish what waits, stop the worker, and raise its failure if it had one."""
        self._waiting.put(None)
        self._worker.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            samples, last = self._together(first)
            pictures: Sequence[Picture | None] = [None] * len(samples)
            if self._failure is None:
                try:
                    pictures = self._draw([index for _, index in samples])
                    self.batches.append(len(samples))
                except Exception as error:  # raised by `close`, in the thread that asked
                    self._failure = error
            self._answer([(name, picture) for (name, _), picture in zip(samples, pictures, strict=True)])
            if last:
                return

    def _together(self, first: tuple[int, int]) -> tuple[list[tuple[int, int]], bool]:
        """The batch that begins with this sample, and whether the end was met behind it."""
        samples = [first]
        while len(samples) < self._batch:
            try:
                sample = self._waiting.get_nowait()
            except queue.Empty:
                break
            if sample is None:
                return samples, True
            samples.append(sample)
        return samples, False
