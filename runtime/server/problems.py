"""Every error that a client can meet, in the form that OpenAI's clients read; none shows a traceback or a path."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from ...errors import (
    CapacityError,
    CutError,
    DeadlineError,
    EngineFaultError,
    LimitError,
    QueueFullError,
    ReplicaLostError,
    RequestCancelledError,
    ScheduleError,
    ShapeError,
    WorkerClosedError,
)
from ..batching import Statistics

INVALID, BUSY, SERVER = "invalid_request_error", "rate_limit_error", "server_error"


@dataclass(frozen=True)
class Problem:
    """An error as a client sees it.

    Attributes:
        status: of HTTP.
        message: one sentence.
        type, code, param: OpenAI's; the code is also the label of the metric.
        retry_after: seconds, where trying again may help.
        close: whether the connection ends, since the request was not read to its end.
        challenge: whether to ask for a key.
    """

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    retry_after: int | None = None
    close: bool = False
    challenge: bool = False

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {
            **({"retry-after": str(self.retry_after)} if self.retry_after is not None else {}),
            **({"connection": "close"} if self.close else {}),
            **({"www-authenticate": "Bearer"} if self.challenge else {}),
        }
        return json_response(self.body(), self.status, headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, which what a client sent cannot break: it may hold half a surrogate pair."""
    return Response(json.dumps(value), status, headers, "application/json")


_REQUESTS: dict[type[Exception], tuple[int, str, str]] = {
    LimitError: (422, INVALID, "limit_exceeded"),
    CapacityError: (422, INVALID, "limit_exceeded"),
    ShapeError: (422, INVALID, "unsupported_size"),
    ScheduleError: (422, INVALID, "invalid_schedule"),
    CutError: (422, INVALID, "unknown_cut"),
    QueueFullError: (429, BUSY, "queue_full"),
    DeadlineError: (504, SERVER, "deadline_exceeded"),
    RequestCancelledError: (503, SERVER, "cancelled"),
}

CODES = (
    *dict.fromkeys(code for _, _, code in _REQUESTS.values()),
    "draining",
    "engine_fault",
    "replica_lost",
    "internal_error",
    "invalid_request",
    "invalid_json",
    "body_too_large",
    "body_too_slow",
    "invalid_api_key",
    "cross_site",
    "unknown_host",
    "unsupported_media_type",
    "model_not_found",
    "not_found",
    "method_not_allowed",
)
"""Every code that a reply can have."""

DRAINING = Problem(503, "this server is shutting down: send the request to another one", SERVER, "draining", None, 5)
FAULT = Problem(503, "the engine failed, and the server restarts: try again", SERVER, "engine_fault", None, 10)
LOST = Problem(
    503, "the replicas that drew this were lost: send it again, with its seed", SERVER, "replica_lost", None, 5
)
INTERNAL = Problem(500, "the server failed on this request; its log says how", SERVER, "internal_error")


def problem_of(error: BaseException, statistics: Statistics) -> Problem:
    """What to tell the sender of a request that came to this error. What may hold paths is left to the log."""
    if isinstance(error, EngineFaultError):
        return FAULT
    if isinstance(error, WorkerClosedError):
        return DRAINING
    if isinstance(error, ReplicaLostError):
        return LOST
    for kind, (status, of_type, code) in _REQUESTS.items():
        if isinstance(error, kind):
            later = retry_after(statistics) if status == 429 else None
            field = error.field if isinstance(error, LimitError) else None
            return Problem(status, str(error), of_type, code, field, later)
    return INTERNAL


def invalid(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """The first of what pydantic found; what the client sent is not repeated, but for a field's name."""
    first = errors[0]
    where = [str(part)[:64] for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Problem(400, "the body is no JSON", INVALID, "invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field: leave it out"
    if first["type"] in ("model_attributes_type", "model_type", "missing") and not where:
        message = "the body must be a JSON object"
    name = ".".join(where) or None
    return Problem(422, f"{name}: {message}" if name else message, INVALID, "invalid_request", name)


def retry_after(statistics: Statistics) -> int:
    """Seconds, from 1 to 600, after which half of those who wait now should have been begun."""
    done = statistics.requests.get("done")
    if done is None or not done.count:
        return 5
    work = max(done.mean - statistics.queue_waits.mean, 0.0)  # of one request, once it is begun
    places = max(statistics.in_flight, 1)
    return min(max(math.ceil(work * statistics.queued / 2 / places), 1), 600)
