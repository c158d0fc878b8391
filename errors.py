"""All exceptions that offcut raises.

    OffcutError
    ├── UserError                 a cause outside offcut; the message names the remedy
    │   ├── ModelError            a model directory or hub id that cannot be exported
    │   ├── CutError              no such cut in this graph
    │   ├── BundleError           a bundle that is damaged, altered, too new, or does not fit
    │   ├── EngineError           an engine that is missing, unusable here, or built for another machine
    │   │   └── MissingExtraError     a package of one of offcut's extras is not installed
    │   ├── MissingLayerError     code that uses the layers of a compiled UNet
    │   ├── ShapeError            an input outside the shapes that the engine was built for
    │   ├── ScheduleError         a schedule that cannot be followed
    │   ├── ParityError           an engine's output differs from PyTorch's by more than its bound
    │   └── RequestError          a request that a worker did not complete
    │       ├── QueueFullError        too many requests are waiting
    │       ├── CapacityError         a request that needs more memory than the worker has
    │       ├── LimitError            a request beyond a server's limits
    │       ├── DeadlineError         the deadline passed
    │       ├── RequestCancelledError the request was cancelled
    │       ├── ReplicaLostError      the cluster's replicas ended during the request
    │       └── WorkerClosedError     the worker accepts no more requests
    └── InternalError             a bug of offcut: please report it with the traceback
        └── EngineFaultError      an engine failed during requests; the worker is unhealthy

The command line prints a ``UserError`` as one sentence without a traceback and exits with 1; everything
else keeps its traceback.
"""

from __future__ import annotations


class OffcutError(Exception):
    """Base class of all errors that offcut raises."""


class UserError(OffcutError):
    """An error with a cause outside offcut; the message names the cause, then the remedy."""


class ModelError(UserError):
    """The model cannot be read, or its architecture is not supported."""


class CutError(UserError):
    """The graph has no such cut."""


class BundleError(UserError):
    """The bundle is damaged, altered, written by a newer offcut, or not a bundle."""


class EngineError(UserError):
    """The engine is unknown, unusable on this machine, or was built for another machine."""


class MissingExtraError(EngineError):
    """A package of one of offcut's extras is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package}, which is not installed: pip install 'offcut[{extra}]'"
        )


class MissingLayerError(UserError, AttributeError):
    """The code uses a layer of a UNet whose layers are compiled into engines; ``hasattr`` is False for such a layer."""


class ShapeError(UserError):
    """The engine does not accept an input's shape or dtype."""


class ScheduleError(UserError):
    """A schedule's parameters are out of range, or it needs the number of calls, which is unknown."""


class ParityError(UserError):
    """A graph's output differs from the reference by more than the stated bound."""


class RequestError(UserError):
    """A worker did not complete a request."""


class QueueFullError(RequestError):
    """The queue of waiting requests is full: try again later, or on another server."""


class CapacityError(RequestError):
    """The request needs more device memory than the worker has for all requests."""


class LimitError(RequestError):
    """The request exceeds a limit of the server, or uses an unsupported feature; ``field`` names the field."""

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type[LimitError], tuple[str | None, str]]:
        return type(self), (self.field, str(self))


class DeadlineError(RequestError):
    """The request's deadline passed before the request was completed."""


class RequestCancelledError(RequestError):
    """The request was cancelled."""


class ReplicaLostError(RequestError):
    """Every replica that worked on the request ended before completing it; a retry may succeed."""


class WorkerClosedError(RequestError):
    """The worker is closing or closed, and accepts no requests."""


class InternalError(OffcutError):
    """A bug of offcut."""


class EngineFaultError(InternalError):
    """An engine failed; every request in progress gets this error, and the worker accepts no more requests."""
