"""The metrics of a server with replicas."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter

from ..metrics import Metrics, Workers


class ClusterMetrics(Metrics):
    """Of the ingress; the replicas' own have the labels ``replica`` and ``model``.

    Attributes:
        resends: requests that were sent again, since a replica had been lost or took nothing.
    """

    def __init__(self, workers: Callable[[], Workers]) -> None:
        super().__init__(workers, ("replica", "model"))
        self.resends = Counter(
            "offcut_resends_total",
            "Requests that were sent again, since a replica had been lost or took nothing.",
            registry=self.registry,
        )
