"""Many requests at once on one pair of engines: they share calls although they are at different steps.

``Worker`` is all that a server needs; ``policy`` decides who shares a call; ``batcher`` makes the calls. The names
below are imported on first use: a simulator needs policies without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .policy import POLICIES, Aligned, Deadline, Largest, Policy
    from .request import OnStep, Step, Ticket
    from .statistics import Statistics, Total
    from .worker import Worker

_WHERE = {
    "POLICIES": "policy",
    "Aligned": "policy",
    "Deadline": "policy",
    "Largest": "policy",
    "OnStep": "request",
    "Policy": "policy",
    "Statistics": "statistics",
    "Step": "request",
    "Ticket": "request",
    "Total": "statistics",
    "Worker": "worker",
}

__all__ = [
    "POLICIES",
    "Aligned",
    "Deadline",
    "Largest",
    "OnStep",
    "Policy",
    "Statistics",
    "Step",
    "Ticket",
    "Total",
    "Worker",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
