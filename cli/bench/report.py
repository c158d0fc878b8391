"""``offcut bench report`` and ``offcut bench schema``: results as a page, and the schema of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..shell import print_bold, print_json


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Directories or result.json files of offcut bench; several give one page."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Output directory; the first DIR by default.")
    ] = None,
) -> None:
    """Write report.html, a self-contained page."""
    from ...benchmarks import record
    from ...benchmarks.report.page import write_report

    results = [record.read(folder) for folder in folders]
    samples = [folder if folder.is_dir() else folder.parent for folder in folders]
    path = write_report(results, output or samples[0], samples=samples)
    print_bold(path)


def schema() -> None:
    """Print the JSON schema of result.json."""
    from ...benchmarks.record import json_schema

    print_json(json_schema())
