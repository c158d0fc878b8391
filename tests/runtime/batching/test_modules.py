"""Text encoders and autoencoder of requests that wait together are called once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from offcut.errors import RequestCancelledError
from offcut.runtime.batching import Step, Ticket, Worker
from offcut.runtime.batching.modules import POSITIONS, ModuleCall, ModuleCalls
from offcut.runtime.generation.schedule import Uniform

Send = Callable[..., Ticket]


@contextmanager
def held(worker: Worker, send: Send) -> Iterator[None]:
    """A request that is at work, so that all others wait for it, until the block ends."""
    reached, released = threading.Event(), threading.Event()

    def hold(step: Step) -> None:
        if not released.is_set():
            reached.set()
            assert released.wait(60)

    ticket = send(worker, {"arguments": {"num_inference_steps": 40}}, on_step=hold)
    assert reached.wait(60)
    yield
    released.set()
    ticket.cancel()


def wait_for(count: int, worker: Worker) -> None:
    """Until so many requests stand at a module."""
    until = time.monotonic() + 60
    while len(worker._batcher._at_modules) < count:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_requests_share_them_and_images_stay_what_they_are(
    shared: Any, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], ModuleCalls.make

    def noting(self: ModuleCalls, calls: list[ModuleCall]) -> list[Any]:
        made.append((tuple(calls[0].tensors), sum(call.rows for call in calls)))
        return make(self, calls)

    monkeypatch.setattr(ModuleCalls, "make", noting)
    asks = [
        {"arguments": {"seed": seed, "prompt": "a red square " * (1 + seed), "output_type": "pt"}} for seed in range(4)
    ]
    with Worker(shared, max_in_flight=1) as worker:
        alone = [send(worker, ask).future.result().images for ask in asks]
    assert [rows for _, rows in made] == [1] * 12
    made.clear()
    with Worker(shared, max_in_flight=5, patience=60) as worker:
        with held(worker, send):
            tickets = [send(worker, ask, schedule=Uniform(1)) for ask in asks]
            wait_for(4, worker)
            made.clear()
        images = [ticket.future.result().images for ticket in tickets]
    assert made == [(("input_ids",), 4), (("input_ids",), 4), (("latents",), 4)]
    for one, other in zip(images, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_request_is_cancelled_where_it_waits_for_one(shared: Any, send: Send) -> None:
    with Worker(shared, patience=60) as worker, held(worker, send):
        waiting = send(worker, {"arguments": {}})
        wait_for(1, worker)
        waiting.cancel()
        with pytest.raises(RequestCancelledError):
            waiting.future.result(60)


def call(rows: int, forward: Callable[..., Any], key: Any = "same", due: float = 0, positions: int = 1) -> ModuleCall:
    request: Any = SimpleNamespace(due=due, key=due)
    return ModuleCall(request, key, forward, {"x": torch.full((rows, 3), float(due))}, {}, rows, positions)


def outputs(x: torch.Tensor) -> Any:
    return BaseModelOutputWithPooling(last_hidden_state=x + 1, hidden_states=(x, x * 2))


def test_each_gets_its_own_rows() -> None:
    calls = [call(rows, outputs, due=place) for place, rows in enumerate((1, 3, 2))]
    for place, (made, answer) in enumerate(zip(calls, ModuleCalls().make(calls), strict=True)):
        assert torch.equal(answer.last_hidden_state, torch.full((made.rows, 3), place + 1.0))
        assert torch.equal(answer.hidden_states[1], torch.full((made.rows, 3), place * 2.0))
        assert answer.pooler_output is None
        assert answer[0] is answer.last_hidden_state


def test_an_error_is_its_own_sender_s() -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if (x == 1).any():
            raise ValueError("one is too many")
        return x

    makes = ModuleCalls()
    answers = makes.make([call(1, picky, due=place) for place in range(3)])
    assert [isinstance(answer, ValueError) for answer in answers] == [False, True, False]
    assert len(makes.choose([call(1, picky), call(1, picky)])) == 2  # which does not stop others from sharing


@pytest.mark.parametrize("answer", [lambda x: x.sum(), lambda x: x[:1], lambda x: {"a": x.mean(0)}])
def test_what_cannot_be_made_together_is_made_alone_from_then_on(answer: Callable[..., Any]) -> None:
    makes, calls = ModuleCalls(), [call(2, answer, due=place) for place in range(2)]
    for made, each in zip(makes.make(calls), calls, strict=True):
        assert str(made) == str(answer(each.tensors["x"]))
    assert makes.choose(calls) == calls[:1]


def test_those_alike_go_together_while_there_is_room_the_first_due_first() -> None:
    third = POSITIONS // 3
    late, first, other, alike, full = (
        call(1, outputs, key, due, third)
        for key, due in (("same", 4), ("same", 0), ("other", 1), ("same", 2), ("same", 3))
    )
    assert ModuleCalls().choose([late, first, other, alike, full]) == [first, alike, full]
    large = call(1, outputs, positions=2 * POSITIONS)
    assert ModuleCalls().choose([large]) == [large]
