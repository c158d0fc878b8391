"""What a replica tells the ingress, beside the events of a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...batching import Statistics
from ..going import Drawn, Preview, Progress
from ..model import Model


@dataclass(frozen=True)
class Begun:
    """The first message of a request: a replica has taken it.

    Attributes:
        replica: which.
    """

    replica: str


@dataclass(frozen=True)
class Failed:
    """The last message of a request that came to nothing.

    Attributes:
        error: one of offcut's own, which any process can read.
    """

    error: Exception


Message = Begun | tuple[Progress, ...] | Preview | Drawn | Failed
"""Of one request, in this order. Steps come one by one only for clients that read a stream."""


@dataclass(frozen=True)
class Look:
    """A replica at one moment.

    Attributes:
        replica: its name.
        statistics: of each model that it has open.
    """

    replica: str
    statistics: Mapping[str, Statistics]


@dataclass(frozen=True)
class Description:
    """What a replica is.

    Attributes:
        models: what each can draw, the first one first.
        look: at this moment.
    """

    models: Mapping[str, Model]
    look: Look
