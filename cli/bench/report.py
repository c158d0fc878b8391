"""``offcut bench report`` and ``offcut bench schema``: results as a page, and what a result holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..shell import out, print_json


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="What offcut bench wrote; several: one page.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to write to; the first DIR by default.")
    ] = None,
) -> None:
    """Write report.html, which needs nothing beside it, with latency.csv and quality.csv."""
    from ...benchmarks import record
    from ...benchmarks.report.page import write_report

    results = [record.read(folder) for folder in folders]
    samples = [folder if folder.is_dir() else folder.parent for folder in folders]
    path = write_report(results, output or samples[0], samples=samples)
    out.print(f"[bold]{path}[/]", highlight=False, soft_wrap=True)


def schema() -> None:
    """Print the JSON schema of result.json."""
    from ...benchmarks.record import json_schema

    print_json(json_schema())
