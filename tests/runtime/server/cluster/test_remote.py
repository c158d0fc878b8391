"""A request is sent again with the same seed where its replica is lost; other errors are passed on."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

from ray.exceptions import ActorDiedError, RayTaskError

from offcut.errors import (
    DeadlineError,
    EngineFaultError,
    LimitError,
    QueueFullError,
    ReplicaLostError,
    ScheduleError,
    WorkerClosedError,
)
from offcut.runtime.batching import Statistics
from offcut.runtime.server.cluster.remote import MAX_LOSSES, JobFailed, JobStarted, RemoteJob
from offcut.runtime.server.http import problem_of
from offcut.runtime.server.jobs import ImageResult, Preview, Progress
from offcut.runtime.server.metrics import ClusterMetrics
from offcut.runtime.server.params import CachingParams, ImageParams
from offcut.runtime.server.schemas import GenerationRequest

Script = list[Any]
"""What one try says: messages, and an exception or nothing at its end."""

BEGUN = JobStarted("one")
DRAWN = ImageResult(images=("png",), seconds=1.0, queue_seconds=0.0, timeline="#.")
STEPS = [(Progress(step, 3, "full", 0.1, 1),) for step in (1, 2, 3)]


class Sent:
    """Tries as a script has them, one after the other; the last one again and again."""

    def __init__(self, *tries: Script) -> None:
        self.tries = list(tries)
        self.bodies: list[Mapping[str, Any]] = []
        self.closed = 0

    async def __call__(self, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        said = self.tries[min(len(self.bodies), len(self.tries) - 1)]
        self.bodies.append(body)
        try:
            for each in said:
                await asyncio.sleep(0)
                if isinstance(each, BaseException):
                    raise each
                if each is ...:
                    await asyncio.Event().wait()
                yield each
        finally:
            self.closed += 1


def asked(seconds: float = 60.0) -> ImageParams:
    return ImageParams({}, CachingParams(), seed=7, images=1, size=(64, 64), timeout=seconds, stream=True)


async def outcome(sent: Sent, seconds: float = 60.0, stream: bool = True) -> tuple[Any, list[Any], ClusterMetrics]:
    """What came of a request (the error is returned), its events, and the metrics."""
    metrics = ClusterMetrics(dict)
    left: list[Any] = []
    body = GenerationRequest(prompt="a", stream=stream)
    with RemoteJob(sent, body, asked(seconds), metrics, left.append) as job:
        try:
            result: Any = await job.result()
        except Exception as error:
            result = error
        events = []
        while (event := job.events.get_nowait()) is not None:
            events.append(event)
    assert left == [job]
    await asyncio.sleep(0)
    return result, events, metrics


def lost() -> ActorDiedError:
    return ActorDiedError()


def resends(metrics: ClusterMetrics) -> float:
    return metrics.registry.get_sample_value("offcut_resends_total") or 0.0


@pytest.mark.parametrize(
    "how",
    [lost, lambda: JobFailed(EngineFaultError("it broke")), lambda: JobFailed(WorkerClosedError("it ends"))],
    ids=["killed", "fault", "closing"],
)
def test_a_lost_replicas_request_is_drawn_by_another_with_the_same_seed(how: Callable[[], Any]) -> None:
    preview = Preview(0, 2, (8, 8), "png")
    sent = Sent([BEGUN, *STEPS[:2], preview, how()], [JobStarted("two"), *STEPS[:2], preview, STEPS[2], DRAWN])
    result, events, metrics = asyncio.run(outcome(sent))
    assert result.images == DRAWN.images
    assert [body["seed"] for body in sent.bodies] == [7, 7]
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3]
    assert sum(isinstance(event, Preview) for event in events) == 1
    assert resends(metrics) == 1
    assert sent.closed == 2


def test_messages_that_end_too_early_are_a_loss() -> None:
    result, _, _ = asyncio.run(outcome(Sent([BEGUN, STEPS[0]], [BEGUN, DRAWN])))
    assert result.images == DRAWN.images


def test_a_request_that_takes_replicas_with_it_is_given_up_and_may_be_sent_again() -> None:
    sent = Sent([BEGUN, lost()])
    result, _, _ = asyncio.run(outcome(sent))
    assert isinstance(result, ReplicaLostError)
    assert len(sent.bodies) == MAX_LOSSES
    told = problem_of(result, Statistics())
    assert (told.status, told.code) == (503, "replica_lost")
    assert told.retry_after


def test_replicas_that_take_nothing_are_waited_for() -> None:
    """As long as nobody has begun, nothing is lost: until the deadline."""
    turned_away = [JobFailed(WorkerClosedError("it ends"))]
    late = [turned_away] * (MAX_LOSSES + 1)
    result, _, metrics = asyncio.run(outcome(Sent(*late, [BEGUN, DRAWN])))
    assert result.images == DRAWN.images
    assert resends(metrics) == MAX_LOSSES + 1
    result, _, _ = asyncio.run(outcome(Sent(turned_away), seconds=0.3))
    assert isinstance(result, DeadlineError)


def test_a_deadline_holds_while_nothing_is_said() -> None:
    sent = Sent([BEGUN, ...])
    result, _, _ = asyncio.run(outcome(sent, seconds=0.2))
    assert isinstance(result, DeadlineError)
    assert sent.closed == 1


def test_what_a_replica_refuses_is_not_tried_elsewhere() -> None:
    for error in (LimitError("size", "too large"), QueueFullError("full"), ScheduleError("no")):
        sent = Sent([JobFailed(error)])
        result, _, _ = asyncio.run(outcome(sent))
        assert result is error
        assert len(sent.bodies) == 1


def test_a_bug_in_a_replica_is_not_tried_elsewhere() -> None:
    sent = Sent([BEGUN, RayTaskError("draw", "a traceback", KeyError("x"))])
    result, _, _ = asyncio.run(outcome(sent))
    assert isinstance(result, RayTaskError)
    assert problem_of(result, Statistics()).code == "internal_error"
    assert len(sent.bodies) == 1


def test_a_client_that_leaves_stops_the_try() -> None:
    sent = Sent([BEGUN, STEPS[0], ...])

    async def leave() -> str:
        body = GenerationRequest(prompt="a", stream=True)
        with RemoteJob(sent, body, asked(), ClusterMetrics(dict), lambda job: None) as job:
            assert isinstance(await job.events.get(), Progress)
        await asyncio.sleep(0.01)
        return job.outcome

    assert asyncio.run(leave()) == "cancelled"
    assert (len(sent.bodies), sent.closed) == (1, 1)


def test_a_call_that_the_replica_cancelled_is_a_loss_and_not_the_clients_end() -> None:
    result, _, _ = asyncio.run(outcome(Sent([BEGUN, asyncio.CancelledError()], [BEGUN, DRAWN])))
    assert result.images == DRAWN.images


def test_steps_are_told_to_streams_only_and_always_measured() -> None:
    result, events, metrics = asyncio.run(outcome(Sent([BEGUN, tuple(one for (one,) in STEPS), DRAWN]), stream=False))
    assert result.images == DRAWN.images
    assert events == []
    assert metrics.registry.get_sample_value("offcut_step_seconds_count", {"kind": "full"}) == 3


def test_errors_travel_between_processes() -> None:
    refused = pickle.loads(pickle.dumps(LimitError("size", "this is too large: ask for less")))
    assert isinstance(refused, LimitError)
    assert (refused.field, str(refused)) == ("size", "this is too large: ask for less")
