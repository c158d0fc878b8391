"""What a run leaves behind: ``result.json`` for machines, ``report.md`` for people, ``tracebacks.txt``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .check import Claim, Figure, Result

SCHEMA_VERSION = 1
RESULT, REPORT, TRACEBACKS = "result.json", "report.md", "tracebacks.txt"
STATUSES = ("passed", "failed", "error", "not run")


@dataclass(frozen=True)
class Report:
    """A run.

    Attributes:
        date: in UTC, ISO 8601.
        command: as it was called.
        machine: its facts, by name.
        results: of every check that was listed.
    """

    date: str
    command: str
    machine: Mapping[str, str]
    results: Sequence[Result]

    @property
    def counts(self) -> dict[str, int]:
        """How many checks ended in each status."""
        counted = Counter(result.status for result in self.results)
        return {status: counted[status] for status in STATUSES}  # type: ignore[index]

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts = self.counts
        if counts["failed"] or counts["error"]:
            return "Disproven or broken: " + ", ".join(f"{counts[status]} {status}" for status in STATUSES)
        if not counts["passed"]:
            reasons = Counter(result.reason for result in self.results)
            why = f": {reasons.most_common(1)[0][0]}" if reasons else ": no check was chosen"
            return f"Nothing was proven, no check was run{why}"
        return f"All that was run passed: {counts['passed']} passed, {counts['not run']} not run"


def write(report: Report, folder: Path) -> None:
    """Write all three files; an old ``tracebacks.txt`` goes where there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(report_as_json(report), indent=1) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(markdown(report), encoding="utf-8")
    traces = [f"{result.id}\n\n{result.trace}" for result in report.results if result.trace]
    if traces:
        (folder / TRACEBACKS).write_text("\n\n".join(traces), encoding="utf-8")
    else:
        (folder / TRACEBACKS).unlink(missing_ok=True)


def read(file: Path) -> Report:
    """What ``write`` wrote, without the tracebacks."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    return Report(raw["date"], raw["command"], raw["machine"], [result_of_json(each) for each in raw["checks"]])


def report_as_json(report: Report) -> dict[str, Any]:
    """As it stands in ``result.json``."""
    checks = []
    for result in report.results:
        check = result_as_json(result)
        if check.pop("trace"):
            check["traceback"] = TRACEBACKS
        checks.append(check)
    return {
        "schema_version": SCHEMA_VERSION,
        "date": report.date,
        "command": report.command,
        "verdict": report.verdict,
        "counts": report.counts,
        "machine": dict(report.machine),
        "checks": checks,
    }


def result_as_json(result: Result) -> dict[str, Any]:
    """A result as JSON, in which numbers that JSON does not know are words."""
    claims = [
        {
            "name": claim.name,
            "value": _word(claim.value),
            "sign": claim.sign,
            "bound": _word(claim.bound),
            "holds": claim.holds,
        }
        for claim in result.claims
    ]
    return {
        "id": result.id,
        "title": result.title,
        "status": result.status,
        "reason": result.reason,
        "claims": claims,
        "figures": {name: _word(figure) for name, figure in result.figures.items()},
        "seconds": result.seconds,
        "trace": result.trace,
    }


def result_of_json(raw: Mapping[str, Any]) -> Result:
    """The inverse of ``result_as_json``."""
    claims = [Claim(each["name"], float(each["value"]), each["sign"], float(each["bound"])) for each in raw["claims"]]
    return Result(
        raw["id"],
        raw["title"],
        raw["status"],
        raw["reason"],
        tuple(claims),
        dict(raw["figures"]),
        raw["seconds"],
        raw.get("trace", ""),
    )


def markdown(report: Report) -> str:
    """A table for the machine and one for each group of checks."""
    lines = ["# offcut: GPU check", "", f"**{report.verdict}.**", "", f"`{report.command}`, {report.date}", ""]
    lines += ["| machine | |", "|---|---|", *(f"| {name} | {_cell(fact)} |" for name, fact in report.machine.items())]
    for group in dict.fromkeys(result.group for result in report.results):
        lines += ["", f"## {group}", "", "| check | status | measured | s |", "|---|---|---|---|"]
        for result in report.results:
            if result.group == group:
                cells = (
                    f"{result.title}<br>`{result.id}`",
                    _status(result),
                    _measured(result),
                    f"{result.seconds:.1f}",
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _status(result: Result) -> str:
    mark = result.status if result.status in ("passed", "not run") else f"**{result.status}**"
    return f"{mark}: {_cell(result.reason)}" if result.reason else mark


def _measured(result: Result) -> str:
    """Claims that failed stand out; figures follow."""
    claims = [
        f"{'' if claim.holds else '**FAILED** '}{_cell(claim.name)}: {claim.value:.4g} ({claim.sign} {claim.bound:.4g})"
        for claim in result.claims
    ]
    figures = [f"{name}: {_short(figure)}" for name, figure in result.figures.items()]
    return "<br>".join([*claims, *(_cell(figure) for figure in figures)])


def _short(figure: Figure) -> str:
    return f"{figure:.4g}" if isinstance(figure, float) else str(figure)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _word(figure: Figure) -> Figure:
    return str(figure) if isinstance(figure, float) and not math.isfinite(figure) else figure
