"""The engines' own thread: it gathers the requests that stand at the UNet, and makes one engine call after another.

Everybody takes turns: either one request's own code runs (tokenizer, scheduler) or the engines do. Python runs one
thread at a time anyway, and on a CPU the engines have all cores to themselves. The engines' turn comes when every
request in flight stands at the UNet, or at a text encoder or autoencoder, whose calls this thread makes too; so a call
has all the members that it can have.
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
from .calls import EngineCalls
from .lanes import Lanes
from .modules import ModuleCall, ModuleCalls
from .policy import Pick, Policy, View, Waiting
from .pool import SlotPool
from .request import Call, Request
from .ticks import TickLog


class Batcher:
    """Runs the engines for all requests of a worker.

    Args:
        pair: the engines; nobody else may use them.
        lanes, pool, policy: see there.
        patience: seconds that the engines wait for a request that is neither at the UNet nor at work, e.g. in a
            callback that blocks.
        on_tick: called in the engines' thread after each tick.
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
        """Held by whoever computes."""
        self.log = TickLog(pair.device)
        self.fault: EngineFaultError | None = None
        self.pool = pool
        self.lanes = lanes
        self._pair, self._policy, self._patience = pair, policy, patience
        self._engines = EngineCalls(pair, self.log)
        self._modules = ModuleCalls()
        self._on_tick, self._on_fault = on_tick, on_fault
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: dict[int, Call] = {}
        self._at_modules: dict[int, ModuleCall] = {}
        self._active = 0  # requests in flight that stand at neither
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="offcut-engines", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs; only ``close`` should end it."""
        return self._thread.is_alive()

    # Called by the requests' threads

    def enter(self) -> None:
        """A request begins; it takes the turn."""
        with self._lock:
            self._active += 1
        self.turn.acquire()

    def leave(self, request: Request) -> None:
        """It ends, and gives the turn and its slot back."""
        self._release(request)
        self.turn.release()
        with self._changed:
            self._active -= 1
            self._changed.notify()

    def step(self, call: Call) -> torch.Tensor:
        """Let the engines make this call; another request has the turn meanwhile.

        Returns:
            The noise prediction for the call's rows, in the sample's dtype and memory of its own.

        Raises:
            RequestError: the request was cancelled, its deadline passed, or it needs more memory than there is.
            EngineFaultError: the engines failed.
            ShapeError: they take no such batch.
        """
        answer: torch.Tensor = self.wait(call)
        return answer

    def wait(self, call: Call | ModuleCall) -> Any:
        """Until a call was made; its answer.

        Raises:
            Exception: as ``step``, or what a module raised.
        """
        with self._changed:
            error = self.fault or call.request.ended
            if error is None:
                if isinstance(call, Call):
                    self._waiting[call.request.key] = call
                else:
                    self._at_modules[call.request.key] = call
                self._active -= 1
                if not self._active or len(self._waiting) + len(self._at_modules) == 1:
                    self._changed.notify()
        if error is not None:
            raise again(error)
        self.turn.release()
        call.done.wait()
        self.turn.acquire()
        if isinstance(call.answer, Exception):
            raise call.answer
        return call.answer

    def outside(self) -> AbstractContextManager[object]:
        """Around somebody else's code in a request's thread, which may block: others have the turn meanwhile."""
        return _Outside(self.turn)

    def end(self, request: Request, why: RequestError) -> None:
        """Stop a request at its next step: now, if it stands at the UNet or a module. From any thread."""
        with self._changed:
            request.ended = request.ended or why
            call = self._waiting.pop(request.key, None) or self._at_modules.pop(request.key, None)
            if call is not None:
                self._answer(call, again(request.ended))
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread, after the last request has left, and give the buffers back."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.lanes.close()

    # The engines' thread

    def _work(self) -> None:
        device = self._pair.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.no_grad():
            while self._meet():
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

    def _meet(self) -> bool:
        """Wait until all requests in flight stand at the UNet or a module; whether there is more to do."""
        with self._changed:
            while not self._waiting and not self._at_modules and not self._closing:
                self._changed.wait()
            while self._active and not self._closing:
                told = self._changed.wait(self._patience)
                if not told and not self.turn.locked():
                    break  # those who are not here are not at work either
            return bool(self._waiting or self._at_modules) or not self._closing

    def _tick(self) -> bool:
        """One call, if one can be made; False if all that wait do so for memory."""
        if self._at_modules:
            self._make_at_module()
            return True
        began = time.perf_counter()
        with self._changed:
            ready = self._ready(time.monotonic())
            if not ready:
                return not self._waiting
            limits = {call.lane.number: 0 if call.lane.alone else call.lane.limit for call in ready.values()}
            times = {call.lane.number: call.lane.times for call in ready.values()}
            view = View(tuple(_view(call) for call in ready.values()), limits, times)
        pick = self._policy.choose(view)
        calls = [ready[key] for key in pick.members]
        lane, rows = calls[0].lane, sum(call.rows for call in calls)
        try:
            bound, size = self.lanes.bind(lane, rows)
        except ShapeError as error:
            if len(calls) > 1:
                lane.limit = rows - 1  # a smaller call is chosen next
                return True
            with self._changed:
                self._withdraw(calls)
                self._answer(calls[0], error)
            return True
        with self._changed:
            calls = self._withdraw(calls)
            if len(calls) < len(pick.members):  # one was cancelled just now: choose again
                self._waiting |= {call.request.key: call for call in calls}
                return True
            for call in ready.values():
                call.passed += 1
        self._make(pick, calls, bound, size, began)
        return True

    def _make_at_module(self) -> None:
        with self._changed:
            calls = self._modules.choose(self._at_modules.values()) if self._at_modules else []
            for call in calls:
                del self._at_modules[call.request.key]
        answers = self._modules.make(calls) if calls else []
        with self._changed:
            for call, answer in zip(calls, answers, strict=True):
                self._answer(call, answer)

    def _make(self, pick: Pick, calls: Sequence[Call], bound: BoundPair, size: int, began: float) -> None:
        waits = time.monotonic()
        try:
            answers = self._engines.make(pick.cut, calls, bound, size)
        except BaseException:
            with self._changed:  # `_fail` tells them
                self._waiting |= {call.request.key: call for call in calls}
            raise
        for call in calls:
            if call.last:
                self._release(call.request)
        with self._changed:
            for call, answer in zip(calls, answers, strict=True):
                self._answer(call, answer if call.request.ended is None else again(call.request.ended))
        self.log.tick(time.perf_counter() - began, [waits - call.came for call in calls])

    def _ready(self, now: float) -> dict[int, Call]:
        """The calls that can be made now, by their requests' keys; others are ended or wait for memory."""
        for call in list(self._waiting.values()):
            expires = call.request.expires
            if expires is not None and now > expires:
                call.request.ended = DeadlineError(
                    f"the request was not done by its deadline, at step {call.number}: allow more time, or send fewer "
                    "requests at once"
                )
                self._answer(self._waiting.pop(call.request.key), again(call.request.ended))
        room = True
        ready = {}
        for call in sorted(self._waiting.values(), key=lambda call: (call.request.due, call.request.key)):
            if call.layout:
                slot = call.request.slot
                if slot is None or not slot.fits(call.layout):
                    self._release(call.request)
                    try:
                        call.request.slot = self.pool.take(call.layout) if room else None
                    except RequestError as error:
                        self._answer(self._waiting.pop(call.request.key), error)
                        continue
                if call.request.slot is None:
                    room = False  # nobody overtakes it, or a large request might never have room
                    continue
            ready[call.request.key] = call
        return ready

    def _withdraw(self, calls: Sequence[Call]) -> list[Call]:
        """Take calls out of the waiting ones; those that are still there."""
        return [call for call in calls if self._waiting.pop(call.request.key, None) is not None]

    def _answer(self, call: Call | ModuleCall, answer: Any) -> None:
        self._active += 1
        call.answer = answer
        call.done.set()

    def _release(self, request: Request) -> None:
        if request.slot is not None:
            self.pool.give_back(request.slot)
            request.slot, request.written, request.before = None, -1, None

    def _fail(self, error: Exception) -> None:
        self.fault = EngineFaultError(f"the {self._pair.name} engine failed: {type(error).__name__}: {error}")
        self.fault.__cause__ = error
        with self._changed:
            for waiting in (self._waiting, self._at_modules):
                while waiting:
                    self._answer(waiting.popitem()[1], again(self.fault))
        self._on_fault(self.fault)


class _Outside:
    def __init__(self, turn: threading.Lock) -> None:
        self._turn = turn

    def __enter__(self) -> None:
        self._turn.release()

    def __exit__(self, *_: object) -> None:
        self._turn.acquire()


def _view(call: Call) -> Waiting:
    request = call.request
    return Waiting(request.key, call.lane.number, call.cut, call.rows, request.due, call.passed, call.until_full)


def again(error: Exception) -> Exception:
    """The same error for one more thread, as each adds its own traceback."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
