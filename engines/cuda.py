"""A pair's own CUDA stream, and CUDA graphs of its calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

Enqueue = Callable[[], None]
Graph = TypeVar("Graph")


class PairStream:
    """A pair's own CUDA stream, ordered by events with the caller's current stream.

    The host never waits. One thread at a time enqueues, so that calls of several bound pairs follow one another.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._before = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._after = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def ordered(self) -> Iterator[int]:
        """Order the stream between the earlier and the later work of the caller's stream, and yield its handle.

        Inside the context the stream is PyTorch's current one, so that memory allocated there belongs to the stream.
        """
        import torch

        with self._lock:
            caller = torch.cuda.current_stream(self.device)
            caller.record_event(self._before)
            self.stream.wait_event(self._before)
            with torch.cuda.stream(self.stream):
                yield self.stream.cuda_stream
            self.stream.record_event(self._after)
            caller.wait_event(self._after)

    def synchronize(self) -> None:
        """Let the host wait until all enqueued work is done; only for closing."""
        self.stream.synchronize()


class CapturedGraph(Protocol):
    """A recorded sequence of kernel launches, such as ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


def capture(enqueue: Enqueue) -> CapturedGraph:
    """Record what ``enqueue`` launches on the current stream, without running it."""
    import torch

    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile, which is an error in the default mode.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        enqueue()
    except BaseException:
        with suppress(RuntimeError):  # the error of enqueue has already broken the capture
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


@dataclass
class _Recording:
    """A call's recording, and the state that it depends on; ``graph`` is None before the capture."""

    state: Hashable
    graph: CapturedGraph | None = None


class CudaGraphs:
    """CUDA graphs of a pair's calls, recorded at the second call and dropped after an address in them has changed.

    The first call with given addresses runs without recording, which is the warm-up that a capture needs. The second
    records and replays; later calls replay. A shape that is used once is never recorded.

    Args:
        capture: records the launches of a function.
    """

    def __init__(self, capture: Callable[[Enqueue], CapturedGraph] = capture) -> None:
        self._capture = capture
        self._recordings: dict[Hashable, _Recording] = {}

    def run(self, key: Hashable, state: Hashable, enqueue: Enqueue) -> None:
        """Run a call, from its recording if that is still valid.

        Args:
            key: names the call, e.g. ``("shallow", "deepcache:0")``.
            state: everything that a recording fixes: addresses of buffers and scratch memory, version of the weights.
            enqueue: the call itself.
        """
        recording = self._recordings.get(key)
        if recording is None or recording.state != state:
            self._drop(key)
            enqueue()
            self._recordings[key] = _Recording(state)
            return
        if recording.graph is None:
            recording.graph = self._capture(enqueue)
        recording.graph.replay()

    def recorded(self) -> set[Hashable]:
        """Return the keys of the calls that have a recording."""
        return {key for key, recording in self._recordings.items() if recording.graph is not None}

    def close(self) -> None:
        """Drop every recording; none of them may still be running."""
        for key in list(self._recordings):
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        recording = self._recordings.pop(key, None)
        if recording is not None and recording.graph is not None:
            recording.graph.reset()


class GraphIds:
    """Numbers under which ONNX Runtime keeps its CUDA graphs.

    A session captures in its third run under a number, after two runs that allocate. Every later run replays the
    capture with the addresses of that run, even if other buffers are bound by then. So each number stands for one graph
    bound to one set of buffers and is never used again: not for buffers of the same shapes, and not for buffers that
    are allocated at the same address after the first were freed.
    """

    OFF = -1
    """The number of runs that are neither captured nor replayed."""

    def __init__(self) -> None:
        self._last = 0  # the id 0 is reserved by ONNX Runtime
        self._lock = threading.Lock()

    def take(self, graphs: Iterable[Graph]) -> dict[Graph, int]:
        """Return a new number for each of these graphs, which are being bound to new buffers."""
        with self._lock:
            numbers = {graph: self._last + place for place, graph in enumerate(graphs, start=1)}
            self._last += len(numbers)
        return numbers
