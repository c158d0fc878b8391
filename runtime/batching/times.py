"""How long an engine call takes, by its kind and its number of rows: measured, and interpolated between."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

Table = Mapping[int, float]
"""Seconds by the number of rows."""


@dataclass(frozen=True)
class StepTimes:
    """Of one lane.

    Attributes:
        tables: of full calls by None, of shallow ones by their cut; each with at least one number of rows.
    """

    tables: Mapping[str | None, Table]

    def knows(self, cut: str | None) -> bool:
        """Whether such a call was measured."""
        return bool(self.tables.get(cut))

    def seconds(self, cut: str | None, rows: int) -> float:
        """Of one call: linear between the nearest numbers of rows, and beyond them as between the last two.

        Args:
            cut: None for a full call.
            rows: of its batch.
        """
        table = self.tables[cut]
        sizes = sorted(table)
        if rows in table:
            return table[rows]
        if len(sizes) == 1:
            return table[sizes[0]] * rows / sizes[0]
        place = min(max(bisect_left(sizes, rows), 1), len(sizes) - 1)
        low, high = sizes[place - 1], sizes[place]
        slope = (table[high] - table[low]) / (high - low)
        estimate = table[low] + slope * (rows - low)
        # Noise can make a short table slope downwards; a call of more rows is never free.
        return estimate if estimate > 0 else table[high if rows > high else low]
