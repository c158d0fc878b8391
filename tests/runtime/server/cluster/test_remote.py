"""A job is sent again with the same seed if its replica is lost; other errors are passed on."""

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
"""Messages of one try, with an exception at its end if it fails."""

STARTED = JobStarted("one")
RESULT = ImageResult(images=("png",), seconds=1.0, queue_seconds=0.0, timeline="#.")
STEPS = [(Progress(step, 3, "full", 0.1, 1),) for step in (1, 2, 3)]


class ScriptedReplicas:
    """Replicas that send the messages of the next script at each try; the last script repeats."""

    def __init__(self, *tries: Script) -> None:
        self.tries = list(tries)
        self.bodies: list[Mapping[str, Any]] = []
        self.closed = 0

    async def __call__(self, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        script = self.tries[min(len(self.bodies), len(self.tries) - 1)]
        self.bodies.append(body)
        try:
            for message in script:
                await asyncio.sleep(0)
                if isinstance(message, BaseException):
                    raise message
                if message is ...:
                    await asyncio.Event().wait()
                yield message
        finally:
            self.closed += 1


def params(seconds: float = 60.0) -> ImageParams:
    return ImageParams({}, CachingParams(), seed=7, images=1, size=(64, 64), timeout=seconds, stream=True)


async def run_job(
    replicas: ScriptedReplicas, seconds: float = 60.0, stream: bool = True
) -> tuple[Any, list[Any], ClusterMetrics]:
    """Return a job's result or exception, its events, and the metrics."""
    metrics = ClusterMetrics(dict)
    closed: list[Any] = []
    body = GenerationRequest(prompt="a", stream=stream)
    with RemoteJob(replicas, body, params(seconds), metrics, closed.append) as job:
        try:
            result: Any = await job.result()
        except Exception as error:
            result = error
        events = []
        while (event := job.events.get_nowait()) is not None:
            events.append(event)
    assert closed == [job]
    await asyncio.sleep(0)
    return result, events, metrics


def actor_died() -> ActorDiedError:
    return ActorDiedError()


def resends(metrics: ClusterMetrics) -> float:
    return metrics.registry.get_sample_value("offcut_resends_total") or 0.0


@pytest.mark.parametrize(
    "loss",
    [actor_died, lambda: JobFailed(EngineFaultError("it broke")), lambda: JobFailed(WorkerClosedError("it ends"))],
    ids=["killed", "fault", "closing"],
)
def test_a_job_of_a_lost_replica_is_sent_to_another_with_the_same_seed(loss: Callable[[], Any]) -> None:
    preview = Preview(0, 2, (8, 8), "png")
    replicas = ScriptedReplicas(
        [STARTED, *STEPS[:2], preview, loss()], [JobStarted("two"), *STEPS[:2], preview, STEPS[2], RESULT]
    )
    result, events, metrics = asyncio.run(run_job(replicas))
    assert result.images == RESULT.images
    assert [body["seed"] for body in replicas.bodies] == [7, 7]
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3]
    assert sum(isinstance(event, Preview) for event in events) == 1
    assert resends(metrics) == 1
    assert replicas.closed == 2


def test_messages_that_end_too_early_are_a_loss() -> None:
    result, _, _ = asyncio.run(run_job(ScriptedReplicas([STARTED, STEPS[0]], [STARTED, RESULT])))
    assert result.images == RESULT.images


def test_a_job_that_loses_too_many_replicas_is_given_up() -> None:
    replicas = ScriptedReplicas([STARTED, actor_died()])
    result, _, _ = asyncio.run(run_job(replicas))
    assert isinstance(result, ReplicaLostError)
    assert len(replicas.bodies) == MAX_LOSSES
    problem = problem_of(result, Statistics())
    assert (problem.status, problem.code) == (503, "replica_lost")
    assert problem.retry_after


def test_a_job_that_no_replica_accepts_waits_until_its_deadline() -> None:
    """A replica that refuses a job is not lost, so the number of tries is not limited."""
    refusal = [JobFailed(WorkerClosedError("it ends"))]
    refusals = [refusal] * (MAX_LOSSES + 1)
    result, _, metrics = asyncio.run(run_job(ScriptedReplicas(*refusals, [STARTED, RESULT])))
    assert result.images == RESULT.images
    assert resends(metrics) == MAX_LOSSES + 1
    result, _, _ = asyncio.run(run_job(ScriptedReplicas(refusal), seconds=0.3))
    assert isinstance(result, DeadlineError)


def test_a_deadline_holds_while_no_message_arrives() -> None:
    replicas = ScriptedReplicas([STARTED, ...])
    result, _, _ = asyncio.run(run_job(replicas, seconds=0.2))
    assert isinstance(result, DeadlineError)
    assert replicas.closed == 1


def test_a_job_that_a_replica_refuses_is_not_sent_again() -> None:
    for error in (LimitError("size", "too large"), QueueFullError("full"), ScheduleError("no")):
        replicas = ScriptedReplicas([JobFailed(error)])
        result, _, _ = asyncio.run(run_job(replicas))
        assert result is error
        assert len(replicas.bodies) == 1


def test_a_job_that_meets_a_bug_is_not_sent_again() -> None:
    replicas = ScriptedReplicas([STARTED, RayTaskError("generate", "a traceback", KeyError("x"))])
    result, _, _ = asyncio.run(run_job(replicas))
    assert isinstance(result, RayTaskError)
    assert problem_of(result, Statistics()).code == "internal_error"
    assert len(replicas.bodies) == 1


def test_a_client_that_disconnects_stops_the_try() -> None:
    replicas = ScriptedReplicas([STARTED, STEPS[0], ...])

    async def disconnect() -> str:
        body = GenerationRequest(prompt="a", stream=True)
        with RemoteJob(replicas, body, params(), ClusterMetrics(dict), lambda job: None) as job:
            assert isinstance(await job.events.get(), Progress)
        await asyncio.sleep(0.01)
        return job.outcome

    assert asyncio.run(disconnect()) == "cancelled"
    assert (len(replicas.bodies), replicas.closed) == (1, 1)


def test_a_call_that_the_replica_cancelled_is_a_loss() -> None:
    result, _, _ = asyncio.run(run_job(ScriptedReplicas([STARTED, asyncio.CancelledError()], [STARTED, RESULT])))
    assert result.images == RESULT.images


def test_steps_are_sent_to_streams_only_and_always_measured() -> None:
    result, events, metrics = asyncio.run(
        run_job(ScriptedReplicas([STARTED, tuple(one for (one,) in STEPS), RESULT]), stream=False)
    )
    assert result.images == RESULT.images
    assert events == []
    assert metrics.registry.get_sample_value("offcut_step_seconds_count", {"kind": "full"}) == 3


def test_errors_travel_between_processes() -> None:
    refused = pickle.loads(pickle.dumps(LimitError("size", "this is too large: ask for less")))
    assert isinstance(refused, LimitError)
    assert (refused.field, str(refused)) == ("size", "this is too large: ask for less")
