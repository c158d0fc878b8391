"""A load test as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.box import SIMPLE
from rich.table import Table

from ..schema.serving import Percentiles, ServingLoad

WORDS = {"steps": "offcut", "single": "one at a time", "whole": "whole requests"}
"""Names of the ways to batch."""


def tables(measured: ServingLoad) -> Iterator[Table]:
    """Yield a table for each part that was measured, then the goals."""
    if measured.batches:
        yield _batches(measured)
    if measured.closed:
        table = _table("Closed loops: each client waits for its image", "clients", "images/s", "p50 s", "p99 s")
        for row in sorted(measured.closed, key=lambda row: row.clients):
            table.add_row(str(row.clients), WORDS[row.way], f"{median(row.throughput):.2f}", *_ends(row.latency))
        yield table
    if measured.open:
        table = _table("Open loops: requests at random moments", "load", "requests/s", "p50 s", "p99 s", "refused")
        for each in sorted(measured.open, key=lambda row: row.load):
            figures = (f"{median(each.rates):.2f}", *_ends(each.latency), str(each.refused))
            table.add_row(f"{each.load:.0%}", WORDS[each.way], *figures)
        yield table
    if measured.overload is not None:
        yield _overload(measured)
    if measured.soak is not None or measured.control is not None:
        yield _soak(measured)
    table = Table("goal", "wanted", "found", "", box=SIMPLE, title="Goals")
    for goal in measured.goals:
        table.add_row(goal.name, goal.wanted, goal.found, "[green]met[/]" if goal.met else "[red]missed[/]")
    yield table


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(box=SIMPLE, title=title)
    for heading in (first, "batching", *headings):
        table.add_column(heading, justify="left" if heading == "batching" else "right")
    return table


def _batches(measured: ServingLoad) -> Table:
    allowed = "" if measured.allowed is None else f"; {measured.allowed:.2f}x is the most that sharing calls can gain"
    table = Table(box=SIMPLE, title=f"Engine calls by the requests that share them, ms a request{allowed}")
    for heading in ("requests", "full", "shallow", "between"):
        table.add_column(heading, justify="right")
    for row in measured.batches:
        each = (row.full, row.shallow, row.between)
        table.add_row(str(row.requests), *(f"{seconds * 1000 / row.requests:.2f}" for seconds in each))
    return table


def _overload(measured: ServingLoad) -> Table:
    load = measured.overload
    assert load is not None
    table = Table(box=SIMPLE, title=f"Overload: {load.title}")
    for heading in ("", "images/s", "p50 s", "p99 s"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("every place taken", f"{load.capacity:.2f}", *_ends(load.at_capacity))
    table.add_row("overload", f"{load.throughput:.2f}", *_ends(load.accepted))
    table.add_row("refusals", "", *_ends(load.refusals, 4))
    return table


def _soak(measured: ServingLoad) -> Table:
    table = Table(box=SIMPLE, title="Soak: several sizes and lengths, clients that disconnect")
    for heading in ("", "minutes", "requests", "disconnected", "MB after warm-up", "at the end", "more"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, soak in (("offcut", measured.soak), ("with a leak on purpose", measured.control)):
        if soak is not None:
            memory = (f"{soak.first_bytes / 1e6:.0f}", f"{soak.last_bytes / 1e6:.0f}", f"{soak.growth / 1e6:+.1f}")
            table.add_row(name, f"{soak.seconds / 60:.1f}", str(soak.requests), str(soak.left), *memory)
    return table


def _ends(latency: Percentiles | None, places: int = 2) -> tuple[str, str]:
    return ("", "") if latency is None else (f"{latency.p50:.{places}f}", f"{latency.p99:.{places}f}")
