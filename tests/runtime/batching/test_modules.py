"""Requests that wait together share one call of a text encoder or the autoencoder."""

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
from offcut.runtime.batching.modules import MAX_POSITIONS, ModuleCall, ModuleCalls
from offcut.runtime.generation.schedule import Uniform

Send = Callable[..., Ticket]


@contextmanager
def blocked(worker: Worker, send: Send) -> Iterator[None]:
    """Block the engines until the end of the context: one request holds all others up."""
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


def wait_for_module_calls(count: int, worker: Worker) -> None:
    """Wait until this number of module calls waits."""
    until = time.monotonic() + 60
    while len(worker._batcher._waiting_module_calls) < count:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_requests_share_calls_and_images_stay_the_same(
    shared_pipe: Any, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_calls, run = [], ModuleCalls.run

    def recording(self: ModuleCalls, calls: list[ModuleCall]) -> list[Any]:
        made_calls.append((tuple(calls[0].tensors), sum(call.rows for call in calls)))
        return run(self, calls)

    monkeypatch.setattr(ModuleCalls, "run", recording)
    requests = [
        {"arguments": {"seed": seed, "prompt": "a red square " * (1 + seed), "output_type": "pt"}} for seed in range(4)
    ]
    with Worker(shared_pipe, max_in_flight=1) as worker:
        images_alone = [send(worker, request).future.result().images for request in requests]
    assert [rows for _, rows in made_calls] == [1] * 12
    made_calls.clear()
    with Worker(shared_pipe, max_in_flight=5, patience=60) as worker:
        with blocked(worker, send):
            tickets = [send(worker, request, schedule=Uniform(1)) for request in requests]
            wait_for_module_calls(4, worker)
            made_calls.clear()
        images = [ticket.future.result().images for ticket in tickets]
    assert made_calls == [(("input_ids",), 4), (("input_ids",), 4), (("latents",), 4)]
    for one, other in zip(images, images_alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_request_that_waits_for_a_module_call_is_cancelled(shared_pipe: Any, send: Send) -> None:
    with Worker(shared_pipe, patience=60) as worker, blocked(worker, send):
        waiting = send(worker, {"arguments": {}})
        wait_for_module_calls(1, worker)
        waiting.cancel()
        with pytest.raises(RequestCancelledError):
            waiting.future.result(60)


def call(rows: int, forward: Callable[..., Any], key: Any = "same", due: float = 0, positions: int = 1) -> ModuleCall:
    request: Any = SimpleNamespace(due=due, key=due)
    return ModuleCall(request, key, forward, {"x": torch.full((rows, 3), float(due))}, {}, rows, positions)


def outputs(x: torch.Tensor) -> Any:
    return BaseModelOutputWithPooling(last_hidden_state=x + 1, hidden_states=(x, x * 2))


def test_each_call_gets_its_own_rows() -> None:
    calls = [call(rows, outputs, due=place) for place, rows in enumerate((1, 3, 2))]
    for place, (module_call, output) in enumerate(zip(calls, ModuleCalls().run(calls), strict=True)):
        assert torch.equal(output.last_hidden_state, torch.full((module_call.rows, 3), place + 1.0))
        assert torch.equal(output.hidden_states[1], torch.full((module_call.rows, 3), place * 2.0))
        assert output.pooler_output is None
        assert output[0] is output.last_hidden_state


def test_an_error_goes_to_the_sender_of_its_call() -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if (x == 1).any():
            raise ValueError("one is too many")
        return x

    module_calls = ModuleCalls()
    results = module_calls.run([call(1, picky, due=place) for place in range(3)])
    assert [isinstance(result, ValueError) for result in results] == [False, True, False]
    assert len(module_calls.choose([call(1, picky), call(1, picky)])) == 2  # other calls are still shared


@pytest.mark.parametrize("forward", [lambda x: x.sum(), lambda x: x[:1], lambda x: {"a": x.mean(0)}])
def test_calls_that_cannot_be_shared_run_alone_from_then_on(forward: Callable[..., Any]) -> None:
    module_calls, calls = ModuleCalls(), [call(2, forward, due=place) for place in range(2)]
    for result, module_call in zip(module_calls.run(calls), calls, strict=True):
        assert str(result) == str(forward(module_call.tensors["x"]))
    assert module_calls.choose(calls) == calls[:1]


def test_calls_with_the_same_key_go_together_while_there_is_room() -> None:
    a_third = MAX_POSITIONS // 3
    last, first, other_key, second, third_call = (
        call(1, outputs, key, due, a_third)
        for key, due in (("same", 4), ("same", 0), ("other", 1), ("same", 2), ("same", 3))
    )
    assert ModuleCalls().choose([last, first, other_key, second, third_call]) == [first, second, third_call]
    large = call(1, outputs, positions=2 * MAX_POSITIONS)
    assert ModuleCalls().choose([large]) == [large]
