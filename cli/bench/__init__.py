"""``offcut bench``: its commands, one line each in the table below."""

from __future__ import annotations

from collections.abc import Callable

import typer

from . import compare, mlperf

app = typer.Typer(
    name="bench",
    help="Measure: speed beside peers, what caching costs in quality, load, reports and their comparison.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_COMMANDS: dict[Callable[..., None], str] = {
    compare.compare: "offcut bench compare before/ after/ --threshold 5%",
    mlperf.mlperf: "offcut bench mlperf --scenario SingleStream --interval 5",
}
for _command, _example in _COMMANDS.items():
    app.command(epilog=f"Example:  {_example}")(_command)
