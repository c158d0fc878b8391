"""Tables: as HTML inside a frame of their own that scrolls, and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..latency.record import TIMES, Contestant
from ..quality.record import QualityRow
from ..record import Result
from .findings import Rivals, gain, reference, speed
from .markup import Markup, tag
from .words import NONE


@dataclass(frozen=True)
class Column:
    """A heading, what it means where that is not plain, and whether numbers stand below it."""

    heading: str
    meaning: str | None = None
    numeric: bool = True


Cell = Markup | str

_PROSE = 60
"""Characters from which on a cell keeps the width of a sentence, however narrow the page."""


def table(
    caption: str, columns: Sequence[Column], rows: Iterable[Sequence[Cell]], marks: Sequence[str | None] = ()
) -> Markup:
    """The first column names the row. ``marks`` are CSS classes of the rows. The frame can be scrolled by keyboard.

    Columns in which no row has anything are left out.
    """
    lines = list(rows)
    kept = [index for index in range(len(columns)) if index == 0 or any(line[index] != NONE for line in lines)]
    columns = [columns[index] for index in kept]
    head = [
        tag("th", column.heading, scope="col", title=column.meaning, class_=None if column.numeric else "words")
        for column in columns
    ]
    body = []
    for index, line in enumerate(lines):
        row = [line[place] for place in kept]
        cells = [tag("th", row[0], scope="row")]
        for column, cell in zip(columns[1:], row[1:], strict=True):
            words = "prose" if len(str(cell)) > _PROSE else None
            cells.append(tag("td", cell, class_="number" if column.numeric else words))
        body.append(tag("tr", cells, class_=marks[index] if index < len(marks) else None))
    inner = tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", body))
    return tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex=0)


def write_csv(results: Sequence[Result], folder: Path) -> list[Path]:
    """``latency.csv`` and ``quality.csv``, a line for each row; in seconds, bytes and the metrics' own units.

    Raises:
        UserError: a file cannot be written.
    """
    latency = [line for result in results for line in latency_lines(result)]
    quality = [line for result in results for line in quality_lines(result)]
    written = []
    for name, lines in (("latency.csv", latency), ("quality.csv", quality)):
        if lines:
            path = folder / name
            try:
                with path.open("w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, _columns(lines), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(lines)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}; give another directory with -o") from error
            written.append(path)
    return written


def _columns(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """All that some line has; an estimate that only some have keeps its three columns together."""
    fullest = max(lines, key=len)
    return list(dict.fromkeys([*fullest, *(name for line in lines for name in line)]))


def latency_lines(result: Result) -> list[Mapping[str, Any]]:
    """A contestant a line."""
    latency = result.latency
    if latency is None:
        return []
    rivals = Rivals.of(latency)

    def line(row: Contestant) -> dict[str, Any]:
        ranks = row.percentiles()
        medians = {name: _median(getattr(row, name)) for name in TIMES if name not in ("loops", "images")}
        against = {
            f"times_faster_than_{name}": getattr(gain(row, other), "times", None) if other else None
            for name, other in (
                ("base", rivals.base),
                ("best_peer", rivals.peer),
                ("best_caching_peer", rivals.caching_peer),
            )
        }
        return {
            "run": result.title,
            "started": result.started.isoformat(),
            "name": row.name,
            "family": row.family,
            "engine": row.engine,
            "precision": row.precision,
            "caching": row.caching,
            "rounds": len(row.loops),
            **{f"loop_p{percent}": ranks.get(percent) for percent in (50, 90, 99)},
            **against,
            **{f"t_{name}": value for name, value in medians.items()},
            "full_calls": row.full_calls,
            "shallow_calls": row.shallow_calls,
            "wall_over_ideal": row.wall_over_ideal,
            "wall_over_ideal_alone": row.wall_over_ideal_alone,
            "image_p50": _median(row.images),
            "load_seconds": row.load_seconds,
            "warm_up_seconds": row.warm_up_seconds,
            "host_peak_bytes": row.host_peak_bytes,
            "device_peak_bytes": row.device_peak_bytes,
            "size_bytes": row.size_bytes,
            "difference": row.difference,
            "not_run": row.not_run,
        }

    return [line(row) for row in latency.contestants]


def quality_lines(result: Result) -> list[Mapping[str, Any]]:
    """A setting a line."""
    quality = result.quality
    if quality is None:
        return []

    def line(row: QualityRow) -> dict[str, Any]:
        against = reference(quality.rows, row)
        return {
            "run": result.title,
            "started": result.started.isoformat(),
            **flat(row.model_dump(exclude={"samples"})),
            "times_cheaper": speed(quality.rows, row),
            "reference": against.name if against else None,
        }

    return [line(row) for row in quality.rows]


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An estimate as three columns, its mean under the field's own name; another mapping as a column for each entry."""
    line: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            line |= {name if key == "mean" else f"{name}_{key}": each for key, each in value.items()}
        else:
            line[name] = value
    return line


def _median(values: Sequence[float]) -> float | None:
    import statistics

    return statistics.median(values) if values else None
