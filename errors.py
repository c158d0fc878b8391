"""Every exception that offcut raises, in one place.

    OffcutError
    ├── UserError                 something to mend outside offcut; the message names the remedy
    │   ├── ModelError            a model directory or hub id that cannot be exported
    │   ├── CutError              no such cut in this graph
    │   ├── BundleError           a bundle that is damaged, altered, too new, or does not fit
    │   ├── EngineError           an engine that is missing, unusable here, or of another machine
    │   │   └── MissingExtraError     a package that an extra would install
    │   ├── ShapeError            an input outside the shapes that the engine was built for
    │   ├── ScheduleError         a schedule that cannot be followed
    │   ├── ParityError           an engine's result is further from PyTorch's than its bound
    │   └── RequestError          a request that a worker does not carry out
    │       ├── QueueFullError        too many wait already
    │       ├── CapacityError         more memory than the worker has for requests
    │       ├── LimitError            more than a server allows
    │       ├── DeadlineError         its deadline passed
    │       ├── RequestCancelledError somebody cancelled it
    │       ├── ReplicaLostError      the replicas of a cluster that drew it ended
    │       └── WorkerClosedError     the worker takes no more
    └── InternalError             a fault of offcut itself: please report it, with the traceback
        └── EngineFaultError      an engine failed under requests in flight; their worker is unhealthy

The command line prints a ``UserError`` as one sentence without a traceback and exits with 1; everything
else keeps its traceback.
"""

from __future__ import annotations


class OffcutError(Exception):
    """Root of the tree."""


class UserError(OffcutError):
    """Something that the user can mend; the message says what is wrong and then how to mend it."""


class ModelError(UserError):
    """A model that cannot be read or whose architecture is not supported."""


class CutError(UserError):
    """The graph has no such cut."""


class BundleError(UserError):
    """The bundle is damaged, altered, written by a newer offcut, or not a bundle."""


class EngineError(UserError):
    """The engine is unknown, unusable on this machine, or was built for another one."""


class MissingExtraError(EngineError):
    """A package is not installed that one of offcut's extras would bring."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package {package}, which is not installed: pip install 'offcut[{extra}]'")


class ShapeError(UserError):
    """An input's shape or dtype is outside what the engine accepts."""


class ScheduleError(UserError):
    """A schedule's parameters are out of range, or it needs to know the number of calls and does not."""


class ParityError(UserError):
    """A graph's output differs from the reference by more than the stated bound."""


class RequestError(UserError):
    """A worker did not carry out a request."""


class QueueFullError(RequestError):
    """As many requests wait as may: try again later, or elsewhere."""


class CapacityError(RequestError):
    """The request needs more device memory than the worker has for all requests."""


class LimitError(RequestError):
    """The request asks for more than the server allows, or for what it does not do; ``field`` says where."""

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type[LimitError], tuple[str | None, str]]:
        return type(self), (self.field, str(self))


class DeadlineError(RequestError):
    """The request's deadline passed before it was done."""


class RequestCancelledError(RequestError):
    """The request was cancelled."""


class ReplicaLostError(RequestError):
    """Each replica of a cluster that drew the request ended before it was done; another try may succeed."""


class WorkerClosedError(RequestError):
    """The worker is closing and takes no requests."""


class InternalError(OffcutError):
    """A fault of offcut itself."""


class EngineFaultError(InternalError):
    """An engine failed; every request in flight has this error, and the worker takes no more."""
