"""A worker that serves many requests on one pair of engines. Requests at different steps share engine calls.

``Worker`` is the entry point; ``policy`` chooses the requests that share a call; ``batcher`` makes the calls. The names
below are imported on first use: the simulator and the cluster need some of them without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .policy import Policy
    from .request import OnStep, Step, Ticket
    from .statistics import Statistics, Total
    from .worker import Worker

_MODULES = {
    "OnStep": "request",
    "Policy": "policy",
    "Statistics": "statistics",
    "Step": "request",
    "Ticket": "request",
    "Total": "statistics",
    "Worker": "worker",
}

__all__ = ["OnStep", "Policy", "Statistics", "Step", "Ticket", "Total", "Worker"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
