"""Recording, replay and renewed recording of calls; and the order of streams, on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from offcut.engines.cuda import CudaGraphs, PairStream, capture

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU")


class Recorder:
    """Imitates CUDA graphs: calls do not run during a capture, and all of them run at each replay."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.captures = 0
        self.alive = 0
        self._tape: list[str] | None = None

    def call(self, name: str) -> Callable[[], None]:
        return lambda: (self.ran if self._tape is None else self._tape).append(name)

    def capture(self, enqueue: Callable[[], None]) -> Recording:
        self._tape = []
        try:
            enqueue()
            tape = self._tape
        finally:
            self._tape = None
        self.captures += 1
        self.alive += 1
        return Recording(self, tape)


class Recording:
    def __init__(self, recorder: Recorder, tape: list[str]) -> None:
        self._recorder, self._tape = recorder, tape

    def replay(self) -> None:
        self._recorder.ran.extend(self._tape)

    def reset(self) -> None:
        self._recorder.alive -= 1


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphs(recorder: Recorder) -> CudaGraphs:
    return CudaGraphs(recorder.capture)


def test_each_call_runs_once_recorded_or_not(recorder: Recorder, graphs: CudaGraphs) -> None:
    for count in range(1, 6):
        graphs.run("full", (1, 2), recorder.call("full"))
        assert recorder.ran == ["full"] * count


def test_the_first_call_warms_up_the_second_is_recorded_and_no_other(recorder: Recorder, graphs: CudaGraphs) -> None:
    graphs.run("full", (1, 2), recorder.call("full"))
    assert (recorder.captures, graphs.recorded()) == (0, set())
    for _ in range(4):
        graphs.run("full", (1, 2), recorder.call("full"))
        assert (recorder.captures, graphs.recorded()) == (1, {"full"})


def test_each_graph_has_its_own_recording(recorder: Recorder, graphs: CudaGraphs) -> None:
    for _ in range(3):
        for cut in ("deepcache:0", "mlperf"):
            graphs.run(("shallow", cut), (1,), recorder.call(cut))
    assert recorder.ran == ["deepcache:0", "mlperf"] * 3
    assert graphs.recorded() == {("shallow", "deepcache:0"), ("shallow", "mlperf")}


def test_a_recording_whose_addresses_have_moved_is_never_replayed(recorder: Recorder, graphs: CudaGraphs) -> None:
    for _ in range(3):
        graphs.run("full", (1, 2), recorder.call("old"))
    graphs.run("full", (1, 3), recorder.call("new"))
    assert recorder.ran == ["old"] * 3 + ["new"]
    assert (graphs.recorded(), recorder.alive) == (set(), 0)
    for _ in range(2):
        graphs.run("full", (1, 3), recorder.call("new"))
    assert recorder.ran == ["old"] * 3 + ["new"] * 3
    assert (recorder.captures, recorder.alive) == (2, 1)


def test_addresses_that_move_each_time_are_never_recorded(recorder: Recorder, graphs: CudaGraphs) -> None:
    for address in range(5):
        graphs.run("full", (address,), recorder.call("full"))
    assert (recorder.captures, len(recorder.ran)) == (0, 5)


def test_a_failed_call_does_not_count_as_a_warm_up(recorder: Recorder, graphs: CudaGraphs) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            graphs.run("full", (1,), fail)
    assert recorder.captures == 0
    graphs.run("full", (1,), recorder.call("full"))
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.run("full", (1,), fail)
    assert graphs.recorded() == set()


def test_closing_drops_every_recording(recorder: Recorder, graphs: CudaGraphs) -> None:
    for _ in range(2):
        graphs.run("full", (1,), recorder.call("full"))
        graphs.run("shallow", (1,), recorder.call("shallow"))
    assert recorder.alive == 2
    graphs.close()
    assert (recorder.alive, graphs.recorded()) == (0, set())


# ---- on a GPU


@pytest.mark.gpu
@needs_gpu
def test_a_captured_launch_replays_on_the_same_memory() -> None:
    stream = PairStream(torch.device("cuda", 0))
    value = torch.zeros(4, device="cuda")
    graphs = CudaGraphs(capture)
    for count in range(1, 5):
        with stream.ordered():
            graphs.run("add", value.data_ptr(), lambda: value.add_(1))
        assert value.tolist() == [count] * 4
    assert graphs.recorded() == {"add"}
    stream.synchronize()
    graphs.close()


@pytest.mark.gpu
@needs_gpu
def test_the_pairs_stream_runs_between_the_callers_earlier_and_later_work() -> None:
    """Both streams update one value in turn; each update takes long enough that a missing order gives a wrong value."""
    stream = PairStream(torch.device("cuda", 0))
    big = torch.ones(2048, 2048, device="cuda")
    value = torch.zeros((), device="cuda")
    caller = torch.cuda.Stream()
    with torch.cuda.stream(caller):
        for _ in range(20):
            value.copy_((big @ big).mean() * 0 + value + 1)
            with stream.ordered():
                value.copy_((big @ big).mean() * 0 + value * 2)
            value.sub_(1)
    caller.synchronize()
    expected = 0.0
    for _ in range(20):
        expected = (expected + 1) * 2 - 1
    assert value.item() == expected


@pytest.mark.gpu
@needs_gpu
def test_the_host_does_not_wait_in_a_call() -> None:
    stream = PairStream(torch.device("cuda", 0))
    value = torch.zeros(4, device="cuda")
    graphs = CudaGraphs(capture)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            with stream.ordered():
                graphs.run("add", value.data_ptr(), lambda: value.add_(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.tolist() == [4.0] * 4
