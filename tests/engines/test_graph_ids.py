"""Numbers of ONNX Runtime's CUDA graphs: no order of binding, running and closing replays wrong addresses.

``Session`` follows the rules of its CUDA provider: each session and thread counts runs under a number, captures in the
third, and later replays at the addresses of the capture.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from offcut.engines.cuda import GraphIds

GRAPHS = (None, "deepcache:0", "mlperf")
Address = int


@dataclass
class Session:
    """A model of ONNX Runtime's session of one graph."""

    runs: dict[tuple[int, int], int] = field(default_factory=dict)
    captured: dict[tuple[int, int], Address] = field(default_factory=dict)

    def run(self, thread: int, number: int, bound: Address) -> Address:
        """Return the address that the run reads and writes."""
        key = (thread, number)
        if number == GraphIds.OFF:
            return bound
        self.runs[key] = self.runs.get(key, 0) + 1
        if self.runs[key] >= 3:
            return self.captured.setdefault(key, bound)
        return bound


@dataclass(eq=False)
class Bound:
    address: Address
    numbers: dict[str | None, int]


class BindingMachine(RuleBasedStateMachine):
    """Binds and closes pairs, reuses addresses of closed pairs, and runs graphs in two threads."""

    bound = Bundle("bound")

    def __init__(self) -> None:
        super().__init__()
        self.ids = GraphIds()
        self.sessions = {graph: Session() for graph in GRAPHS}
        self.taken_numbers: list[int] = []
        self.free: list[Address] = []
        self.highest: Address = 0

    @rule(target=bound, reuse=st.booleans())
    def prepare(self, reuse: bool) -> Bound:
        if reuse and self.free:
            address = self.free.pop()
        else:
            self.highest += 1
            address = self.highest
        numbers = self.ids.take(GRAPHS)
        self.taken_numbers += numbers.values()
        return Bound(address, numbers)

    @rule(pair=bound, graph=st.sampled_from(GRAPHS), thread=st.integers(0, 1), times=st.integers(1, 4))
    def run(self, pair: Bound, graph: str | None, thread: int, times: int) -> None:
        for _ in range(times):
            used_address = self.sessions[graph].run(thread, pair.numbers[graph], pair.address)
            assert used_address == pair.address

    @rule(pair=consumes(bound))
    def close(self, pair: Bound) -> None:
        self.free.append(pair.address)

    @invariant()
    def no_number_is_taken_twice(self) -> None:
        assert len(set(self.taken_numbers)) == len(self.taken_numbers)
        assert not {0, GraphIds.OFF} & set(self.taken_numbers)


TestBindings = BindingMachine.TestCase
TestBindings.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_every_graph_has_a_number_of_its_own() -> None:
    ids = GraphIds()
    first, second = ids.take(GRAPHS), ids.take(GRAPHS)
    assert set(first) == set(second) == set(GRAPHS)
    assert len({*first.values(), *second.values()}) == 2 * len(GRAPHS)


def test_threads_that_bind_at_once_get_different_numbers() -> None:
    from concurrent.futures import ThreadPoolExecutor

    ids = GraphIds()
    with ThreadPoolExecutor(8) as pool:
        taken = [number for numbers in pool.map(lambda _: ids.take(GRAPHS), range(200)) for number in numbers.values()]
    assert len(set(taken)) == 600
