"""A replica whose engine has failed reports it to Ray and refuses jobs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

from offcut.errors import EngineFaultError
from offcut.runtime.server.cluster.cluster_plan import ClusterPlan
from offcut.runtime.server.cluster.remote import JobFailed
from offcut.runtime.server.cluster.replica import Replica
from offcut.runtime.server.settings import ServeSettings, WorkerConfig

QUICK = ServeSettings(steps=4, interval=2, warmup=0, linger=3.0)


def replica_of(service: Any) -> Replica:
    """Return a replica without Ray, with one model open."""
    replica = Replica.__new__(Replica)
    opened = SimpleNamespace(service=service)

    async def load(name: str) -> Any:
        return opened

    replica._plan, replica._version, replica._name = ClusterPlan({"tiny": WorkerConfig("tiny.offcut")}), "1", "replica"
    replica._load, replica._open, replica._models = load, {"tiny": opened}, {"tiny": service.model.info()}  # type: ignore[assignment]
    replica._report_task = asyncio.Future(loop=asyncio.new_event_loop())  # type: ignore[assignment]
    return replica


async def messages(replica: Replica, name: str | None = None) -> list[Any]:
    return [message async for message in replica.generate(name, {"prompt": "a"}, True)]


def test_a_failed_engine_fails_the_health_check(start_server: Any, gate: Any) -> None:
    with start_server(QUICK) as server:
        replica = replica_of(server.service)
        replica.check_health()
        gate.error = RuntimeError("cannot read /secret/engine.plan")
        assert server.post({"prompt": "a"}).status_code == 503
        with pytest.raises(EngineFaultError, match="tiny"):
            replica.check_health()
        (message,) = asyncio.run(messages(replica))
        assert isinstance(message, JobFailed)
        assert isinstance(message.error, EngineFaultError)
        assert "secret" not in str(message.error)
        server.thread.join(60)


def test_a_job_for_a_replaced_model_is_sent_back(start_server: Any) -> None:
    with start_server(QUICK) as server:
        replica = replica_of(server.service)
        (message,) = asyncio.run(messages(replica, "older"))
        assert isinstance(message, JobFailed)
        assert type(message.error).__name__ == "ReplicaLostError"
        assert asyncio.run(replica.describe("0")) is None
        description = asyncio.run(replica.describe("1"))
        assert description is not None
        (model,) = description.models.values()
        assert description.status.statistics["tiny"].healthy
        assert model.size == server.service.model.size
