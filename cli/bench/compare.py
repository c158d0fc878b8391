"""``offcut bench compare``: two results, for a user's own CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from ...errors import UserError
from ..options import Json
from ..shell import err, out, print_error, print_json

WORSE, TROUBLE = 1, 2
"""Exit codes, as diff has them: 1 for a difference, 2 where none could be made out."""

_STYLES = {"worse": "bold red", "vanished": "bold red", "better": "green", "small": "yellow", "unknown": "yellow"}


def compare(
    old: Annotated[
        Path, typer.Argument(metavar="OLD", help="Older result of offcut bench: its directory or result.json.")
    ],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Newer result: its directory or result.json.")],
    threshold: Annotated[str, typer.Option(help="Largest change beyond noise that is tolerated.")] = "5%",
    confidence: Annotated[str, typer.Option(help="Confidence of the intervals that estimate the noise.")] = "99%",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Do not fail for rows that are no longer measured.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Also list what did not change.")] = False,
    as_json: Json = False,
) -> None:
    """Print what changed beyond noise. Exit 0: nothing got worse past the threshold; 1: something did; 2: an error.

    Seconds count relatively, PSNR as its error does, SSIM and accuracy in points.
    """
    from ...benchmarks import record
    from ...benchmarks.report.compare import compare as run_compare

    limits = _share(threshold, "--threshold", 0, 10), _share(confidence, "--confidence", 0.5, 0.9999)
    try:
        comparison = run_compare(record.read(old), record.read(new), *limits)
    except UserError as error:
        print_error(error)
        raise typer.Exit(TROUBLE) from error
    worse = comparison.worse(allow_missing=allow_missing)
    if as_json:
        from dataclasses import asdict

        print_json({"failed": bool(worse), "threshold": limits[0], "confidence": limits[1], **asdict(comparison)})
    else:
        _print(comparison, limits[0], show_all)
    if worse:
        raise typer.Exit(WORSE)


def _print(comparison: Any, threshold: float, show_all: bool) -> None:
    for warning in comparison.warnings:
        err.print(Text.assemble(("warning", "yellow"), f": {warning}"), soft_wrap=True)
    shown = [change for change in comparison.changes if show_all or change.verdict != "noise"]
    if shown:
        table = Table("row", "figure", "old", "new", "change, interval", "", box=SIMPLE)
        for change in shown:
            style = _STYLES.get(change.verdict, "")
            table.add_row(*_cells(change), Text(change.verdict, style))
        out.print(table)
    counts = dict.fromkeys(("worse", "better", "small", "noise", "unknown", "appeared", "vanished"), 0)
    for change in comparison.changes:
        counts[change.verdict] += 1
    said = {
        "small": f"beyond noise but within {100 * threshold:g} %",
        "noise": "within noise",
        "unknown": "cannot tell",
    }
    parts = [f"{count} {said.get(verdict, verdict)}" for verdict, count in counts.items() if count]
    out.print("; ".join(parts), highlight=False)


def _cells(change: Any) -> list[str | Text]:
    name = Text.assemble(change.row, (f"\n{change.note}" if change.note else "", "dim"))
    figures = ["" if value is None else f"{value:.4g}" for value in (change.old, change.new)]
    moved = "" if change.percent is None else f"{change.percent:+.1f} % [{change.low:+.1f}, {change.high:+.1f}]"
    return [name, change.figure, *figures, moved]


def _share(text: str, option: str, least: float, most: float) -> float:
    """``5%``, ``5 %`` and ``0.05`` as 0.05."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not least <= value <= most:
        raise typer.BadParameter(
            f"{text!r} is not a share such as 5% or 0.05, from {least:g} to {most:g}", param_hint=option
        )
    return value
