"""What engines on CUDA share: a stream of the pair's own, and CUDA graphs of its calls."""

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
    """A pair's own CUDA stream, ordered by events with whatever stream a caller works on.

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
        """After all that the caller's stream holds, and before all that it will: gives the stream's handle.

        Inside it the stream is PyTorch's current one, so that memory allocated there is the stream's.
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
        """Let the host wait until all that was enqueued is done: for closing only."""
        self.stream.synchronize()


class Captured(Protocol):
    """A recorded sequence of launches, such as ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


def capture(enqueue: Enqueue) -> Captured:
    """Record what this enqueues on the current stream, without running it."""
    import torch

    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile, which the default mode would take for an error.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        enqueue()
    except BaseException:
        with suppress(RuntimeError):  # the capture that this ends was broken by the error that is raised
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


@dataclass
class _Held:
    """What the launches depend on, and their recording once there is one."""

    depends: Hashable
    graph: Captured | None = None


class CudaGraphs:
    """Recordings of a pair's calls, made when they pay and dropped when what they point to has moved.

    The first call with given addresses runs as it is, which is the warm-up that a capture needs; the second records
    and replays; later ones replay. A shape that is used once is never recorded.

    Args:
        capture: records what a function enqueues.
    """

    def __init__(self, capture: Callable[[Enqueue], Captured] = capture) -> None:
        self._capture = capture
        self._held: dict[Hashable, _Held] = {}

    def run(self, key: Hashable, depends: Hashable, enqueue: Enqueue) -> None:
        """Run a call, from its recording where that still holds.

        Args:
            key: the call, e.g. ``("shallow", "deepcache:0")``.
            depends: all that a recording bakes in: addresses of buffers and scratch memory, the state of the weights.
            enqueue: the call itself.
        """
        held = self._held.get(key)
        if held is None or held.depends != depends:
            self._drop(key)
            enqueue()
            self._held[key] = _Held(depends)
            return
        if held.graph is None:
            held.graph = self._capture(enqueue)
        held.graph.replay()

    def recorded(self) -> set[Hashable]:
        """The calls that would be replayed."""
        return {key for key, held in self._held.items() if held.graph is not None}

    def close(self) -> None:
        """Drop every recording; none may still be running."""
        for key in list(self._held):
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        held = self._held.pop(key, None)
        if held is not None and held.graph is not None:
            held.graph.reset()


class GraphIds:
    """The numbers under which ONNX Runtime keeps its CUDA graphs.

    Each session and thread captures in the third run under a number, after two that allocate. Every later run replays
    that: at the addresses of the capture, whatever is bound by then. So a number stands for one graph bound to one set
    of buffers, and no other set ever gets it: neither one of the same shapes, nor one that comes to lie at the same
    place after the first was freed.
    """

    OFF = -1
    """Runs under it are neither captured nor replayed."""

    def __init__(self) -> None:
        self._last = 0  # a number that ONNX Runtime uses itself
        self._lock = threading.Lock()

    def take(self, graphs: Iterable[Graph]) -> dict[Graph, int]:
        """A fresh number for each of these graphs, which are being bound to new buffers."""
        with self._lock:
            numbers = {graph: self._last + place for place, graph in enumerate(graphs, start=1)}
            self._last += len(numbers)
        return numbers
