"""The measured times of a device, in a file that other machines can read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from ...errors import UserError
from ..record import write_whole

Seconds = dict[PositiveInt, float]


@dataclass(frozen=True)
class StepTimes:
    """Durations of engine calls by their number of rows, interpolated between the measured numbers.

    Attributes:
        tables: for each cut of shallow calls, and None for full calls, the seconds by number of rows.
    """

    tables: Mapping[str | None, Mapping[int, float]]

    def seconds(self, cut: str | None, rows: int) -> float:
        """Return the seconds of one call by linear interpolation, and by extrapolation beyond the measured numbers.

        Args:
            cut: cut of a shallow call; None for a full call.
            rows: number of rows of the call.
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
        # Noise can make the slope negative, but every call takes some time.
        return estimate if estimate > 0 else table[high if rows > high else low]


class DeviceCosts(BaseModel):
    """The times of one device in seconds; each table has them by the number of rows of an engine call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    engine: str
    device: str = Field(description="description of the measured machine")
    height: int = Field(description="image height in pixels")
    width: int
    cut: str = Field(description="cut of the shallow calls")
    rows: int = Field(ge=1, description="rows of one request in an engine call; with guidance two for each image")
    full: Seconds = Field(min_length=1, description="time of a full engine call")
    shallow: Seconds = Field(min_length=1, description="time of a shallow engine call")
    between: Seconds = Field(min_length=1, description="time between two engine calls: schedulers, copies, threads")
    encode: float = Field(ge=0, description="time of a request before its first UNet call, e.g. in the text encoder")
    decode: float = Field(ge=0, description="time of a request after its last UNet call, e.g. in the autoencoder")

    @model_validator(mode="after")
    def _takes_time(self) -> DeviceCosts:
        if any(seconds <= 0 for table in (self.full, self.shallow) for seconds in table.values()):
            raise ValueError("an engine call takes more than 0 seconds")
        return self

    @cached_property
    def times(self) -> StepTimes:
        """Durations of engine calls."""
        return StepTimes({None: self.full, self.cut: self.shallow})

    @cached_property
    def gaps(self) -> StepTimes:
        """Durations between engine calls."""
        return StepTimes({None: {rows: max(seconds, 1e-9) for rows, seconds in self.between.items()}})

    def save(self, path: Path) -> Path:
        """Write the times to a file; an older file is replaced once the new one is complete."""
        return write_whole(path, self.model_dump_json(indent=1) + "\n")


def read(path: Path) -> DeviceCosts:
    """Read a file that ``DeviceCosts.save`` wrote.

    Raises:
        UserError: the file cannot be read, or has another content.
    """
    try:
        return DeviceCosts.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the file that --export-times wrote") from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} holds no times of offcut bench plan: {where} {first['msg']}") from error
