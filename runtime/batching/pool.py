"""Cached features of the requests in flight, in device memory with a limit in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...errors import CapacityError, InternalError
from ...exporter.specs import Shape


@dataclass(frozen=True)
class FeatureSpec:
    """Shape and dtype of one cached feature of one trajectory.

    Attributes:
        shape: shape with all rows of the trajectory.
    """

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Layout:
    """Features that a trajectory keeps from its full calls for its shallow calls.

    Attributes:
        features: shape and dtype by name.
        copies: number of full calls whose features are kept: 1, or 2 for a forecast.
    """

    features: Mapping[str, FeatureSpec]
    copies: int = 1

    @property
    def bytes(self) -> int:
        return self.copies * sum(spec.bytes for spec in self.features.values())


@dataclass(frozen=True, eq=False)
class Slot:
    """Memory of one trajectory for its cached features; no other trajectory reads or writes it.

    Attributes:
        layout: the features that it has room for.
        copies: for each copy, contiguous tensors on the device by name.
    """

    layout: Layout
    copies: tuple[Mapping[str, torch.Tensor], ...]


class SlotPool:
    """Slots whose total size stays within a limit.

    The memory of a new slot is not cleared: the first call of a trajectory is full, and writes all of the slot before
    anything is read.

    Args:
        limit: total size of all slots in bytes.
        device: device of the slots.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.device = device
        self.used = 0
        """Bytes of the slots in use."""
        self._in_use: set[Slot] = set()

    @property
    def slots(self) -> int:
        """Number of slots in use."""
        return len(self._in_use)

    def take(self, layout: Layout) -> Slot | None:
        """Return a new slot for these features; None if there is no room at the moment.

        Raises:
            CapacityError: the features are larger than the limit.
        """
        size = layout.bytes
        if size > self.limit:
            raise CapacityError(
                f"this request keeps {size / 2**20:.1f} MiB of features between its steps, and all requests together "
                f"may keep {self.limit / 2**20:.1f}: ask for fewer or smaller images, or give the worker a larger "
                "cache_bytes"
            )
        if self.used + size > self.limit:
            return None
        with torch.inference_mode(False):
            copies = tuple(
                {
                    name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
                    for name, spec in layout.features.items()
                }
                for _ in range(layout.copies)
            )
        slot = Slot(layout, copies)
        self._in_use.add(slot)
        self.used += size
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free the bytes of a slot for other requests."""
        if slot not in self._in_use:
            raise InternalError("a slot of the feature pool was given back twice")
        self._in_use.remove(slot)
        self.used -= slot.layout.bytes
