"""Growth as tables on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from rich.box import SIMPLE
from rich.table import Table

from ..schema.growth import Fit, Growth, Sweep

TITLES = {
    "steps": "scheduler steps",
    "images": "images a call",
    "pixels": "pixels of the image",
    "interval": "interval N",
}


def tables(growth: Growth) -> Iterator[Table]:
    """A table for each sweep, its exponents below the figures; then the commands on growing models."""
    for sweep in growth.sweeps:
        yield _sweep(sweep)
    if growth.made:
        table = _table("model", "parameters", "command", "seconds", "peak GiB", "GiB written")
        for row in growth.made:
            gib = (f"{size / 2**30:.2f}" for size in (row.host_peak_bytes, row.size_bytes))
            table.add_row(row.model, f"{row.parameters / 1e6:.1f} M", row.command, f"{row.seconds:.1f}", *gib)
        table.add_section()
        for law in growth.made_fits:
            table.add_row(law.of, f"^ {exponent(law)}")
        yield table


def exponent(law: Fit) -> str:
    """``1.02 ± 0.01``."""
    return f"{law.exponent:.2f}" + ("" if law.error is None else f" ± {law.error:.2f}")


def notes(growth: Growth) -> Iterator[str]:
    base = ", ".join(f"{name} {value}" for name, value in growth.base.items())
    yield f"{growth.model} on {growth.contestant}: {base}; {growth.rounds} round(s) a setting, each in its own process."
    yield "^: exponent of a power law fitted to the column, with its standard error."
    if growth.drift is not None:
        yield f"The first setting, measured again at the end, took {growth.drift:.3f} of its first time."


def _sweep(sweep: Sweep) -> Table:
    table = _table(TITLES[sweep.axis], "loop s", "full ms", "shallow ms", "peak GiB")
    for point in sweep.points:
        memory = point.device_peak_bytes or point.host_peak_bytes
        calls = ("" if not each else f"{1e3 * statistics.median(each):.1f}" for each in (point.full, point.shallow))
        gib = "" if memory is None else f"{memory / 2**30:.2f}"
        table.add_row(str(point.value), f"{point.loop:.3f}", *calls, gib)
    table.add_section()
    found = {law.of: f"^ {exponent(law)}" for law in sweep.fits}
    table.add_row("", *(found.get(of, "") for of in ("loop", "full call", "shallow call", "memory")))
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(box=SIMPLE)
    table.add_column(first, justify="right")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
