"""The figures of results as CSV: ``latency.csv``, ``quality.csv``, and every single time of a latency run."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..record import Result
from ..schema.latency import TIMES, Contestant, Latency
from .findings import Rivals, gain, reference, speed


def write_csv(results: Sequence[Result], folder: Path) -> None:
    """Write ``latency.csv`` and ``quality.csv``, a line for each row; in seconds, bytes and the metrics' own units.

    Raises:
        UserError: a file cannot be written.
    """
    files = {
        "latency.csv": [line for result in results for line in _latency_lines(result)],
        "quality.csv": [line for result in results for line in _quality_lines(result)],
    }
    for name, lines in files.items():
        if not lines:
            continue
        path = folder / name
        # A figure that only some rows have, such as an interval, keeps its columns together.
        columns = dict.fromkeys([*max(lines, key=len), *(column for line in lines for column in line)])
        try:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(columns), lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; give another directory with -o") from error


def _latency_lines(result: Result) -> list[Mapping[str, Any]]:
    latency = result.latency
    if latency is None:
        return []
    rivals = Rivals.of(latency)
    others = {"base": rivals.base, "best_peer": rivals.peer, "best_caching_peer": rivals.caching_peer}

    def line(row: Contestant) -> dict[str, Any]:
        ranks = row.percentiles()
        fields = row.model_dump(exclude={"settings", "speed_ups", "loop", "best_peer", "best_caching_peer"})
        figures: dict[str, Any] = {}
        for name, value in fields.items():
            if name == "loops":
                figures["rounds"] = len(value)
                figures |= {f"loop_p{rank}": ranks.get(rank) for rank in (50, 90, 99)}
                figures |= {f"times_faster_than_{name}": gain(row, other) if other else None for name, other in
                            others.items()}  # fmt: skip
            elif isinstance(value, list):
                figures[f"t_{name}"] = statistics.median(value) if value else None
            else:
                figures[name] = value
        return {"run": result.title, "started": result.started.isoformat(), **figures}

    return [line(row) for row in latency.contestants]


def _quality_lines(result: Result) -> list[Mapping[str, Any]]:
    rows = result.quality.rows if result.quality else []
    lines: list[Mapping[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {"run": result.title, "started": result.started.isoformat()}
        for name, value in row.model_dump(exclude={"samples"}).items():
            if isinstance(value, Mapping):  # an estimate has its mean under the field's own name
                line |= {name if key == "mean" else f"{name}_{key}": figure for key, figure in value.items()}
            else:
                line[name] = value
        against = reference(rows, row)
        lines.append(line | {"times_cheaper": speed(rows, row), "reference": against.name if against else None})
    return lines


def write_times(latency: Latency, path: Path) -> None:
    """Write every time of a run: contestant, kind, its index in that kind, seconds.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("contestant", "kind", "index", "seconds"))
            for row in latency.contestants:
                for kind in TIMES:
                    writer.writerows((row.name, kind, *each) for each in enumerate(getattr(row, kind)))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file with --export-times") from error
