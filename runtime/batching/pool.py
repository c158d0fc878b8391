"""Cached features of the requests in flight, in device memory, counted by bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...errors import CapacityError, InternalError
from ...exporter.specs import Shape


@dataclass(frozen=True)
class FeatureSpec:
    """One cached feature of one request.

    Attributes:
        shape: with all the request's rows.
    """

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


Layout = Mapping[str, FeatureSpec]
"""What a request keeps from a full step for its shallow ones, by the feature's name."""


def before(feature: str) -> str:
    """The name in a slot of what the full step before the last left of a feature."""
    return f"{feature}, before"


@dataclass(frozen=True, eq=False)
class Slot:
    """A request's place in the pool; no other request reads or writes it.

    Attributes:
        features: by name, contiguous, on the device.
        bytes: of all of them.
    """

    features: Mapping[str, torch.Tensor]
    bytes: int

    def fits(self, layout: Layout) -> bool:
        """Whether it is one for these features."""
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.features.items()} == {
            name: (tuple(spec.shape), spec.dtype) for name, spec in layout.items()
        }


class SlotPool:
    """Gives slots while they fit into a limit.

    A slot's memory is not cleared: a request's first step is full and writes all of it before anything is read.

    Args:
        limit: bytes that all slots together may take.
        device: where they are.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.device = device
        self.used = 0
        """Bytes of the slots that are given out."""
        self._given: set[Slot] = set()

    @property
    def slots(self) -> int:
        """How many are given out."""
        return len(self._given)

    def take(self, layout: Layout) -> Slot | None:
        """A slot for these features; None while there is no room.

        Raises:
            CapacityError: there will never be.
        """
        needed = sum(spec.bytes for spec in layout.values())
        if needed > self.limit:
            raise CapacityError(
                f"this request keeps {needed / 2**20:.1f} MiB of features between its steps, and all requests together "
                f"may keep {self.limit / 2**20:.1f}: ask for fewer or smaller images, or give the worker a larger "
                "cache_bytes"
            )
        if self.used + needed > self.limit:
            return None
        with torch.inference_mode(False):
            features = {
                name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for name, spec in layout.items()
            }
        slot = Slot(features, needed)
        self._given.add(slot)
        self.used += needed
        return slot

    def give_back(self, slot: Slot) -> None:
        """Its bytes are free for others."""
        if slot not in self._given:
            raise InternalError("a slot of the feature pool was given back twice")
        self._given.remove(slot)
        self.used -= slot.bytes
