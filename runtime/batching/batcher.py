"""The engine thread: when every request in flight waits for a call, it makes one call for several of them.

Threads take turns: either one request's own code runs (tokenizer, scheduler) or the engines do. Python runs one thread
at a time anyway, and on a CPU the engines have all cores to themselves. The engines' turn comes when every request in
flight waits for a UNet call, or for a call of a text encoder or autoencoder, which the engine thread makes too. So each
call serves as many requests as possible. One turn of the engine thread is a tick; it makes at most one call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...engines.base import BoundPair, EnginePair
from ...errors import DeadlineError, EngineFaultError, RequestError, ShapeError
from ..generation.features import CachedFeatures
from .calls import EngineCalls
from .lanes import Lanes
from .modules import ModuleCall, ModuleCalls
from .policy import Pick, Policy, WaitingCall
from .pool import Layout, SlotPool
from .request import UNetCall, WorkerRequest
from .statistics import CallLog


class Batcher:
    """Runs the engines for all requests of a worker.

    Args:
        pair: the engines; only this batcher may use them.
        lanes: groups of requests that can share calls.
        pool: memory for cached features.
        policy: chooses the requests that share the next call.
        patience: seconds that the engines wait for a request that neither waits for a call nor computes, e.g. because
            its callback blocks.
        on_tick: called in the engine thread after each tick.
        on_fault: called once, with the error, after the engines failed.
    """

    def __init__(
        self,
        pair: EnginePair,
        lanes: Lanes,
        pool: SlotPool,
        policy: Policy,
        *,
        patience: float,
        on_tick: Callable[[], None],
        on_fault: Callable[[EngineFaultError], None],
    ) -> None:
        self.turn = threading.Lock()
        """Held by the thread that computes."""
        self.log = CallLog(pair.device.type == "cuda")
        self.fault: EngineFaultError | None = None
        self.pool = pool
        self.lanes = lanes
        self._pair, self._policy, self._patience = pair, policy, patience
        self._engines = EngineCalls(pair, self.log)
        self._modules = ModuleCalls()
        self._on_tick, self._on_fault = on_tick, on_fault
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting_unet_calls: dict[int, UNetCall] = {}
        self._waiting_module_calls: dict[int, ModuleCall] = {}
        self._running = 0  # number of requests in flight that wait for no call
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="offcut-engines", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs; only ``close`` should end it."""
        return self._thread.is_alive()

    # Called by the request runners

    def enter(self) -> None:
        """Begin a request: take the turn."""
        with self._lock:
            self._running += 1
        self.turn.acquire()

    def leave(self, request: WorkerRequest) -> None:
        """End a request: give its slots and the turn back."""
        for features in list(request.slots):
            self._release_slot(request, features)
        self.turn.release()
        with self._changed:
            self._running -= 1
            self._changed.notify()

    def execute(self, call: UNetCall | ModuleCall) -> Any:
        """Wait until the engine thread has made a call, and return its result. Meanwhile other requests have the turn.

        Returns:
            The output of the module; for a UNet call the noise prediction for the call's rows, a new tensor in the
            sample's dtype.

        Raises:
            RequestError: the request was cancelled, its deadline passed, or it needs more memory than the worker has.
            EngineFaultError: the engines failed.
            ShapeError: the engines do not take this batch.
            Exception: any exception that a module raises.
        """
        with self._changed:
            error = self.fault or call.request.stop_error
            if error is None:
                if isinstance(call, UNetCall):
                    self._waiting_unet_calls[call.request.key] = call
                else:
                    self._waiting_module_calls[call.request.key] = call
                self._running -= 1
                if not self._running or len(self._waiting_unet_calls) + len(self._waiting_module_calls) == 1:
                    self._changed.notify()
        if error is not None:
            raise copy_of(error)
        self.turn.release()
        call.done.wait()
        self.turn.acquire()
        if isinstance(call.result, Exception):
            raise call.result
        return call.result

    def outside(self) -> AbstractContextManager[object]:
        """Return a context in which a request's thread may block: other threads have the turn meanwhile."""
        return _WithoutTurn(self.turn)

    def stop(self, request: WorkerRequest, error: RequestError) -> None:
        """Stop a request, from any thread: at once if it waits for a call, otherwise at its next call."""
        with self._changed:
            request.stop_error = request.stop_error or error
            call = self._waiting_unet_calls.pop(request.key, None) or self._waiting_module_calls.pop(request.key, None)
            if call is not None:
                self._finish(call, copy_of(request.stop_error))
            self._changed.notify()

    def close(self) -> None:
        """Stop the engine thread and free the buffers; the last request must have left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.lanes.close()

    # The engine thread

    def _run(self) -> None:
        device = self._pair.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.no_grad():
            while self._wait_for_requests():
                with self.turn:
                    try:
                        stuck = not self._tick()
                    except Exception as error:
                        self._fail(error)
                        stuck = False
                self._on_tick()
                if stuck:
                    with self._changed:
                        self._changed.wait(self._patience)

    def _wait_for_requests(self) -> bool:
        """Wait until all requests in flight wait for a call. Return whether there is more to do."""
        with self._changed:
            while not self._waiting_unet_calls and not self._waiting_module_calls and not self._closing:
                self._changed.wait()
            while self._running and not self._closing:
                notified = self._changed.wait(self._patience)
                if not notified and not self.turn.locked():
                    break  # the other requests are not computing either
            return bool(self._waiting_unet_calls or self._waiting_module_calls) or not self._closing

    def _tick(self) -> bool:
        """Make one call if possible. Return False if every waiting request waits for memory."""
        if self._waiting_module_calls:
            self._run_module()
            return True
        begin = time.perf_counter()
        with self._changed:
            ready = self._ready_calls(time.monotonic())
            if not ready:
                return not self._waiting_unet_calls
            limits = {call.lane.number: 0 if call.lane.exclusive else call.lane.max_rows for call in ready.values()}
            waiting = [_waiting_call(call) for call in ready.values()]
        pick = self._policy.choose(waiting, limits)
        calls = [ready[key] for key in pick.members]
        lane, rows = calls[0].lane, sum(call.part.rows for call in calls)
        try:
            bound, size = self.lanes.bind(lane, rows)
        except ShapeError as error:
            if len(calls) > 1:
                lane.max_rows = rows - 1  # the next choice is a smaller call
                return True
            with self._changed:
                self._withdraw(calls)
                self._finish(calls[0], error)
            return True
        with self._changed:
            calls = self._withdraw(calls)
            if len(calls) < len(pick.members):  # one was cancelled just now: choose again
                self._waiting_unet_calls |= {call.request.key: call for call in calls}
                return True
            for call in ready.values():
                call.passed_over += 1
        self._run_engines(pick, calls, bound, size, begin)
        return True

    def _run_module(self) -> None:
        with self._changed:
            calls = self._modules.choose(self._waiting_module_calls.values()) if self._waiting_module_calls else []
            for call in calls:
                del self._waiting_module_calls[call.request.key]
        results = self._modules.run(calls) if calls else []
        with self._changed:
            for call, result in zip(calls, results, strict=True):
                self._finish(call, result)

    def _run_engines(self, pick: Pick, calls: Sequence[UNetCall], bound: BoundPair, size: int, begin: float) -> None:
        now = time.monotonic()
        try:
            results = self._engines.run(pick.cut, calls, bound, size)
        except BaseException:
            with self._changed:  # `_fail` gives the error to all waiting calls
                self._waiting_unet_calls |= {call.request.key: call for call in calls}
            raise
        for call in calls:
            if call.last:
                self._release_slot(call.request, call.part.features)
        with self._changed:
            for call, result in zip(calls, results, strict=True):
                stop_error = call.request.stop_error
                self._finish(call, result if stop_error is None else copy_of(stop_error))
        self.log.add_call(time.perf_counter() - begin, [now - call.arrived for call in calls])

    def _ready_calls(self, now: float) -> dict[int, UNetCall]:
        """Return the calls that can be made now, by request. End expired requests; those without memory wait."""
        for call in list(self._waiting_unet_calls.values()):
            expires = call.request.expires
            if expires is not None and now > expires:
                call.request.stop_error = DeadlineError(
                    f"the request was not done by its deadline, at step {call.part.call}: allow more time, or send "
                    "fewer requests at once"
                )
                self._finish(self._waiting_unet_calls.pop(call.request.key), copy_of(call.request.stop_error))
        has_room = True
        ready = {}
        for call in sorted(self._waiting_unet_calls.values(), key=lambda call: (call.request.due, call.request.key)):
            try:
                if call.layout is not None and not self._reserve(call, call.layout, has_room):
                    has_room = False  # no slot for later requests, or a large request might never get one
                    continue
            except RequestError as error:
                self._finish(self._waiting_unet_calls.pop(call.request.key), error)
                continue
            ready[call.request.key] = call
        return ready

    def _reserve(self, call: UNetCall, layout: Layout, has_room: bool) -> bool:
        """Reserve the slot of a call's trajectory, and return whether the call can be made.

        A request waits for its first slot only, so that no two requests wait for each other's: a further trajectory
        without room is not cached, and its next call is full again.

        Raises:
            CapacityError: the slot is larger than all the memory for slots.
        """
        slots, features = call.request.slots, call.part.features
        for other in list(slots):
            if other.released or (other is features and slots[other].layout != layout):
                self._release_slot(call.request, other)
        if features in slots:
            return True
        slot = self.pool.take(layout) if has_room else None
        if slot is not None:
            slots[features] = slot
            features.latest, features.earlier = slot.copies if layout.copies == 2 else (*slot.copies, {})
        return bool(slots)

    def _withdraw(self, calls: Sequence[UNetCall]) -> list[UNetCall]:
        """Remove calls from the waiting calls, and return those that were still waiting."""
        return [call for call in calls if self._waiting_unet_calls.pop(call.request.key, None) is not None]

    def _finish(self, call: UNetCall | ModuleCall, result: Any) -> None:
        self._running += 1
        call.result = result
        call.done.set()

    def _release_slot(self, request: WorkerRequest, features: CachedFeatures) -> None:
        slot = request.slots.pop(features, None)
        if slot is not None:
            self.pool.give_back(slot)
            features.drop()

    def _fail(self, error: Exception) -> None:
        self.fault = EngineFaultError(f"the {self._pair.name} engine failed: {type(error).__name__}: {error}")
        self.fault.__cause__ = error
        with self._changed:
            for calls in (self._waiting_unet_calls, self._waiting_module_calls):
                while calls:
                    self._finish(calls.popitem()[1], copy_of(self.fault))
        self._on_fault(self.fault)


class _WithoutTurn:
    """Context without the turn: it releases the turn, and takes the turn again at the end."""

    def __init__(self, turn: threading.Lock) -> None:
        self._turn = turn

    def __enter__(self) -> None:
        self._turn.release()

    def __exit__(self, *_: object) -> None:
        self._turn.acquire()


def _waiting_call(call: UNetCall) -> WaitingCall:
    request = call.request
    return WaitingCall(request.key, call.lane.number, call.cut, call.part.rows, request.due, call.passed_over)


def copy_of(error: Exception) -> Exception:
    """Return a copy of an error for another thread, since each thread adds its own traceback."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
