"""Many requests at once on one pair of engines: they share engine calls although they are at different steps.

``Worker`` is all that a server needs; ``policy`` decides who shares a call; ``batcher`` makes the calls.
"""

from .policy import POLICIES, Aligned, Deadline, Largest, Policy
from .request import OnStep, Step, Ticket
from .statistics import Statistics, Total
from .worker import Worker

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
