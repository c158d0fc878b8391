"""Cancelled, late, wrong and too large requests, engine failures, draining and closing of a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

import offcut
from offcut.engines.onnxruntime.pair import BoundOnnxRuntimePair
from offcut.errors import (
    CapacityError,
    CutError,
    DeadlineError,
    EngineFaultError,
    QueueFullError,
    RequestCancelledError,
    UserError,
    WorkerClosedError,
)
from offcut.runtime.batching import Step, Ticket, Worker
from offcut.runtime.batching.pool import SlotPool
from offcut.runtime.generation.schedule import Uniform

LatentsAlone = Callable[..., torch.Tensor]
Send = Callable[..., Ticket]

LONG: dict[str, Any] = {"arguments": {"num_inference_steps": 40}, "schedule": Uniform(4)}
SLOT_BYTES = 2 * 16 * 16 * 16 * 4
"""Bytes of the slot of a guided request with deepcache:0 of ``tiny_pipeline_dir``: [2, 16, 16, 16] in fp32."""


def request_with(seed: int, **arguments: Any) -> dict[str, Any]:
    return {"arguments": {"seed": seed, **arguments}, "schedule": Uniform(3)}


class Gate:
    """``on_step`` callback that records the steps, and blocks its request at one step until ``open`` is set."""

    def __init__(self, at: int | None = None) -> None:
        self.steps: list[Step] = []
        self.reached, self.open = threading.Event(), threading.Event()
        self._at = at

    def __call__(self, step: Step) -> None:
        self.steps.append(step)
        if step.call == self._at:
            self.reached.set()
            assert self.open.wait(60)


def test_steps_are_reported_as_they_complete(shared_pipe: Any, send: Send) -> None:
    gate = Gate()
    with Worker(shared_pipe) as worker:
        send(worker, request_with(0), on_step=gate).future.result()
    assert [step.call for step in gate.steps] == list(range(6))
    assert [step.full for step in gate.steps] == [True, False, False, True, False, False]
    assert {(step.calls, step.rows) for step in gate.steps} == {(6, 2)}


def test_a_cancelled_request_frees_its_slot_within_a_step(
    shared_pipe: Any, latents_alone: LatentsAlone, send: Send
) -> None:
    gate = Gate(at=5)
    with Worker(shared_pipe, cache_bytes=SLOT_BYTES) as worker:
        first = send(worker, LONG, on_step=gate)
        assert gate.reached.wait(60)
        assert (worker.statistics().slots, worker.statistics().cache_bytes) == (1, SLOT_BYTES)
        second = send(worker, request_with(1))  # finds no room until the first is gone
        first.cancel()
        gate.open.set()
        with pytest.raises(RequestCancelledError, match="cancelled"):
            first.future.result()
        assert torch.equal(second.future.result().images, latents_after_close(worker, latents_alone, request_with(1)))
    assert gate.steps[-1].call == 5


def latents_after_close(worker: Worker, latents_alone: LatentsAlone, request: dict[str, Any]) -> torch.Tensor:
    """Close the worker, so that the pipeline has its engines back, and return the latents of the request."""
    worker.close()
    return latents_alone(request)


def test_a_request_that_waits_at_the_unet_is_cancelled_at_once(shared_pipe: Any, send: Send) -> None:
    gate = Gate(at=0)
    with Worker(shared_pipe, patience=60) as worker:
        held, waiting = send(worker, LONG, on_step=gate), send(worker, request_with(1))
        assert gate.reached.wait(60)
        deadline = time.monotonic() + 60
        while not worker._batcher._waiting_unet_calls and time.monotonic() < deadline:
            time.sleep(0.01)
        waiting.cancel()  # the engines wait for the first request, so no step of the second can follow
        with pytest.raises(RequestCancelledError):
            waiting.future.result(60)
        gate.open.set()
        held.cancel()
    assert held.future.exception() is not None


def test_queued_requests_can_be_cancelled(shared_pipe: Any, send: Send) -> None:
    gate = Gate(at=0)
    with Worker(shared_pipe, max_in_flight=1) as worker:
        running = send(worker, request_with(0), on_step=gate)
        assert gate.reached.wait(60)
        one, other = send(worker, request_with(1)), send(worker, request_with(2))
        one.cancel()
        assert other.future.cancel()  # through concurrent.futures
        with pytest.raises(RequestCancelledError):
            one.future.result(0)
        gate.open.set()
        running.future.result()
        with pytest.raises(CancelledError):
            other.future.result()
        running.cancel()  # has no effect
        assert worker.drain(60)
        assert worker.statistics().requests["cancelled"].count == 1


def test_features_never_pass_from_one_request_to_another(
    shared_pipe: Any, latents_alone: LatentsAlone, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests use the same few slots one after another; the slots hold NaN before the first step."""
    expected = [latents_alone(request_with(seed)) for seed in range(6)]
    take = SlotPool.take

    def take_with_nan(self: SlotPool, layout: Any) -> Any:
        slot = take(self, layout)
        for feature in slot.copies[0].values() if slot else ():
            feature.fill_(torch.nan)
        return slot

    monkeypatch.setattr(SlotPool, "take", take_with_nan)
    with Worker(shared_pipe, cache_bytes=2 * SLOT_BYTES) as worker:
        gates = [Gate(at=2), Gate(at=3)]
        cancelled = [send(worker, LONG, on_step=gate) for gate in gates]
        assert all(gate.reached.wait(60) for gate in gates)
        tickets = [send(worker, request_with(seed)) for seed in range(6)]
        for ticket, gate in zip(cancelled, gates, strict=True):
            ticket.cancel()
            gate.open.set()
        for ticket, latents in zip(tickets, expected, strict=True):
            assert torch.equal(ticket.future.result().images, latents)


def test_the_pool_is_never_larger_than_its_limit(shared_pipe: Any, latents_alone: LatentsAlone, send: Send) -> None:
    expected = [latents_alone(request_with(seed)) for seed in range(5)]
    used: list[int] = []
    with Worker(shared_pipe, cache_bytes=2 * SLOT_BYTES + 1) as worker:

        def record_cache_bytes(step: Step) -> None:
            used.append(worker.statistics().cache_bytes)

        tickets = [send(worker, request_with(seed), on_step=record_cache_bytes) for seed in range(5)]
        tickets.append(send(worker, {"arguments": {"seed": 9}}))  # caches no features, so it needs no slot
        images = [ticket.future.result().images for ticket in tickets]
    assert max(used) == 2 * SLOT_BYTES
    assert all(torch.equal(*pair) for pair in zip(images, expected, strict=False))


def test_a_request_that_never_fits_is_refused_and_others_go_on(shared_pipe: Any, send: Send) -> None:
    with Worker(shared_pipe, cache_bytes=SLOT_BYTES) as worker:
        large, small = send(worker, request_with(0, num_images_per_prompt=2)), send(worker, request_with(1))
        with pytest.raises(CapacityError, match="larger cache_bytes"):
            large.future.result()
        small.future.result()


def test_an_error_ends_its_own_request_only(shared_pipe: Any, latents_alone: LatentsAlone, send: Send) -> None:
    def fail(step: Step) -> None:
        raise RuntimeError("the callback failed")

    expected = latents_alone(request_with(4))
    with Worker(shared_pipe) as worker:
        wrong = [
            send(worker, request_with(0, height=13, width=13)),
            send(worker, request_with(1, height=72, width=64)),  # not a multiple of what the UNet needs
            send(worker, {**request_with(2), "cut": "deepcache:9"}),
            send(worker, request_with(3), on_step=fail),
        ]
        right = send(worker, request_with(4))
        expected_errors = [(ValueError, "divisible by 8"), (UserError, "multiple of"), (CutError, "deepcache:9")]
        for ticket, (kind, message) in zip(
            wrong, [*expected_errors, (RuntimeError, "the callback failed")], strict=True
        ):
            with pytest.raises(kind, match=message):
                ticket.future.result()
        assert torch.equal(right.future.result().images, expected)
        assert worker.healthy
        assert worker.statistics().requests["failed"].count == 4
        assert worker.statistics().slots == 0


def test_requests_end_at_their_deadlines(shared_pipe: Any, send: Send) -> None:
    gate = Gate(at=1)
    with Worker(shared_pipe, max_in_flight=1) as worker:
        with pytest.raises(DeadlineError, match="cannot be met"):
            send(worker, request_with(0), deadline=0)
        running = send(worker, LONG, on_step=gate, deadline=0.3)
        assert gate.reached.wait(60)
        queued = send(worker, request_with(1), deadline=1e-6)
        relaxed = send(worker, request_with(2), deadline=600)
        time.sleep(0.35)
        gate.open.set()
        with pytest.raises(DeadlineError, match="by its deadline, at step 2"):
            running.future.result()
        with pytest.raises(DeadlineError):
            queued.future.result()
        relaxed.future.result()
        assert worker.statistics().requests["expired"].count == 2
        assert worker.statistics().rejected == 1


def test_requests_start_in_the_order_of_their_deadlines(shared_pipe: Any, send: Send) -> None:
    gate, started = Gate(at=0), []
    with Worker(shared_pipe, max_in_flight=1) as worker:
        send(worker, request_with(0), on_step=gate)
        assert gate.reached.wait(60)
        deadlines = {"none": None, "late": 50.0, "soon": 20.0}
        tickets = [
            send(worker, request_with(1), deadline=deadline, on_step=lambda step, name=name: started.append(name))
            for name, deadline in deadlines.items()
        ]
        gate.open.set()
        for ticket in tickets:
            ticket.future.result()
    assert list(dict.fromkeys(started)) == ["soon", "late", "none"]


def test_a_full_queue_refuses_requests(shared_pipe: Any, send: Send) -> None:
    gate = Gate(at=0)
    with Worker(shared_pipe, max_in_flight=1, max_queue=1) as worker:
        running = send(worker, request_with(0), on_step=gate)
        assert gate.reached.wait(60)
        queued = send(worker, request_with(1))
        with pytest.raises(QueueFullError, match="1 requests wait already, and 1 are in flight"):
            send(worker, request_with(2))
        with pytest.raises(QueueFullError, match="1 requests wait already"):
            worker.expect_room()
        assert worker.statistics().rejected == 2
        gate.open.set()
        running.future.result()
        queued.future.result()
        worker.expect_room()
        send(worker, request_with(2)).future.result()


@pytest.mark.parametrize("kind", ["full", "shallow"])
def test_an_engine_failure_ends_all_requests(
    kind: str, shared_pipe: Any, latents_alone: LatentsAlone, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = latents_alone(request_with(0))
    gate = Gate(at=1)
    with Worker(shared_pipe, max_in_flight=2) as worker:
        held = send(worker, LONG, on_step=gate)
        assert gate.reached.wait(60)
        with monkeypatch.context() as patch:

            def fail(self: BoundOnnxRuntimePair, *cut: str) -> None:
                raise RuntimeError("the device fell off the bus")

            patch.setattr(BoundOnnxRuntimePair, kind, fail)
            others = [send(worker, request_with(seed)) for seed in range(3)]
            gate.open.set()
            for ticket in [held, *others]:
                with pytest.raises(EngineFaultError, match=r"onnxruntime engine failed.*fell off the bus") as raised:
                    ticket.future.result(60)
                assert isinstance(raised.value.__cause__, RuntimeError)
        assert not worker.healthy
        assert "fell off the bus" in str(worker.fault)
        assert worker.statistics().fault == worker.fault
        with pytest.raises(EngineFaultError, match="fell off the bus"):
            send(worker, request_with(0))
        assert worker.drain(60)
    assert torch.equal(latents_alone(request_with(0)), expected)


def test_draining_finishes_the_present_requests(shared_pipe: Any, send: Send) -> None:
    with Worker(shared_pipe, max_in_flight=2) as worker:
        tickets = [send(worker, request_with(seed)) for seed in range(5)]
        assert not worker.drain(0)
        with pytest.raises(WorkerClosedError, match="takes no more"):
            send(worker, request_with(9))
        assert worker.drain(120)
        assert all(ticket.future.done() and ticket.future.exception() is None for ticket in tickets)


def test_closing_cancels_all_requests_and_gives_the_engines_back(
    shared_pipe: Any, latents_alone: LatentsAlone, send: Send
) -> None:
    gate = Gate(at=2)
    worker = Worker(shared_pipe, max_in_flight=1)
    tickets = [send(worker, LONG, on_step=gate), send(worker, request_with(1))]
    assert gate.reached.wait(60)
    with pytest.raises(UserError, match="a worker runs this UNet's engines"):
        latents_alone(request_with(0))
    with pytest.raises(UserError, match="a worker runs this UNet's engines"):
        Worker(shared_pipe)
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.open.set()
    closing.join(60)
    for ticket in tickets:
        with pytest.raises(WorkerClosedError, match="was closed before"):
            ticket.future.result(0)
    worker.close()
    latents_alone(request_with(0))


def test_requests_without_a_generator_give_different_images(shared_pipe: Any) -> None:
    arguments = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    with Worker(shared_pipe) as worker:
        tickets = [worker.submit(arguments) for _ in range(2)]
        one, other = (ticket.future.result().images for ticket in tickets)
    assert not torch.equal(one, other)


def test_a_worker_of_a_bundle_owns_its_engines(tiny_bundle: Any, send: Send) -> None:
    with Worker(tiny_bundle, engine="onnxruntime", threads=1, max_in_flight=2) as worker:
        send(worker, request_with(0)).future.result()
    with pytest.raises(offcut.OffcutError, match="closed"):
        worker.unet._open_pair()


def test_wrong_arguments_are_refused(shared_pipe: Any, eager: Any) -> None:
    with pytest.raises(UserError, match=r"needs a StableDiffusionPipeline with an offcut\.UNet"):
        Worker(eager)
    with pytest.raises(UserError, match="max_in_flight is at least 1, not 0"):
        Worker(shared_pipe, max_in_flight=0)
