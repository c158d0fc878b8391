"""A replica whose engine is of no use says so to Ray, and takes nothing."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

from offcut.errors import EngineFaultError
from offcut.runtime.server.cluster.plan import ClusterPlan
from offcut.runtime.server.cluster.remote import JobFailed
from offcut.runtime.server.cluster.replica import Replica
from offcut.runtime.server.settings import ServeSettings, WorkerConfig

QUICK = ServeSettings(steps=4, interval=2, warmup=0, linger=3.0)


def replica_of(service: Any) -> Replica:
    """Without Ray around it, and with one model open."""
    made = Replica.__new__(Replica)
    opened = SimpleNamespace(service=service)

    async def load(name: str) -> Any:
        return opened

    made._plan, made._version, made._name = ClusterPlan({"tiny": WorkerConfig("tiny.offcut")}), "1", "replica"
    made._load, made._open, made._models = load, {"tiny": opened}, {"tiny": service.model.info()}  # type: ignore[assignment]
    made._report_task = asyncio.Future(loop=asyncio.new_event_loop())  # type: ignore[assignment]
    return made


async def messages(replica: Replica, name: str | None = None) -> list[Any]:
    return [message async for message in replica.generate(name, {"prompt": "a"}, True)]


def test_an_engine_that_failed_is_no_health(begin: Any, gate: Any) -> None:
    with begin(QUICK) as server:
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


def test_a_request_for_a_model_that_was_replaced_is_sent_back(begin: Any) -> None:
    with begin(QUICK) as server:
        replica = replica_of(server.service)
        (message,) = asyncio.run(messages(replica, "older"))
        assert isinstance(message, JobFailed)
        assert type(message.error).__name__ == "ReplicaLostError"
        assert asyncio.run(replica.describe("0")) is None
        described = asyncio.run(replica.describe("1"))
        assert described is not None
        (model,) = described.models.values()
        assert described.status.statistics["tiny"].healthy
        assert model.size == server.service.model.size
