"""The measured times of one device, in a file that another machine can read."""

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
    """Durations of engine calls by the number of rows: measured, and interpolated in between.

    Attributes:
        tables: seconds by number of rows, at least one; of full calls under None, of shallow calls under their cut.
    """

    tables: Mapping[str | None, Mapping[int, float]]

    def seconds(self, cut: str | None, rows: int) -> float:
        """Return the duration of one call: linear between measured numbers of rows, and extended beyond the last two.

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
        # Noise can give a short table a negative slope; a call with more rows always takes some time.
        return estimate if estimate > 0 else table[high if rows > high else low]


class DeviceCosts(BaseModel):
    """Seconds on one device; tables are by the number of rows of an engine call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    engine: str
    device: str = Field(description="the machine that was measured, in words")
    height: int = Field(description="of the images, in pixels")
    width: int
    cut: str = Field(description="of the shallow calls")
    rows: int = Field(ge=1, description="of one request in an engine call: with guidance two for each image")
    full: Seconds = Field(min_length=1, description="of a full engine call")
    shallow: Seconds = Field(min_length=1, description="of a shallow engine call")
    between: Seconds = Field(min_length=1, description="from one engine call to the next: schedulers, copies, threads")
    encode: float = Field(ge=0, description="of one request before its first UNet call, e.g. the text encoder")
    decode: float = Field(ge=0, description="of one request after its last one, e.g. the autoencoder")

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
        """Write the times; an older file is replaced when the new one is complete."""
        return write_whole(path, self.model_dump_json(indent=1) + "\n")


def read(path: Path) -> DeviceCosts:
    """Read a file that ``DeviceCosts.save`` wrote.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        return DeviceCosts.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give what --export-times wrote") from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} holds no times of offcut bench plan: {where} {first['msg']}") from error
