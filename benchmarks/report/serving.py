"""The page's section on the server under load."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from ..serving.record import Percentiles, ServingLoad
from ..serving.table import WORDS
from . import words
from .markup import Markup, tag
from .tables import Cell, Column, table

_ENDS = (
    Column("p50", "half of the images took at most so long"),
    Column("p99", "99 % of the images took at most so long"),
)


def section(measured: ServingLoad, key: str) -> Markup:
    """``key`` makes its id unique on the page."""
    request = ", ".join(f"{name} {value:g}" for name, value in measured.request.items() if not isinstance(value, str))
    task = (
        f"{words.model(measured.model)} on {measured.engine}; a request has {request}. At most {measured.in_flight} "
        f"requests in flight, {measured.queue} waiting, {measured.rows} rows a call. Servers run in processes of their "
        "own and are asked over HTTP; the ways to batch take turns."
    )
    return tag(
        "section",
        tag("h2", "The server under load"),
        tag("p", task, class_="lead"),
        list(_tables(measured)),
        id=key,
    )


def _tables(measured: ServingLoad) -> Iterator[Markup]:
    heads: tuple[Column, ...]
    columns = (Column("Goal", numeric=False), Column("Wanted"), Column("Found"), Column("Verdict", numeric=False))
    rows = [(goal.name, goal.wanted, goal.found, "met" if goal.met else "missed") for goal in measured.goals]
    yield table("Goals", columns, rows)
    if measured.batches:
        heads = (Column("Requests that share a call"), Column("Full"), Column("Shallow"), Column("Between calls"))
        lines = [
            (str(row.requests), *(words.seconds(each / row.requests) for each in (row.full, row.shallow, row.between)))
            for row in measured.batches
        ]
        yield table("Engine calls, seconds divided by the requests", heads, lines)
        if measured.allowed is not None:
            said = f"By these times sharing calls can gain {words.times(measured.allowed)} at most in throughput."
            yield tag("p", said, class_="note")
    way = Column("Batching", numeric=False)
    if measured.closed:
        heads = (Column("Clients"), way, Column("Images a second", "the median of the rounds"), *_ENDS)
        yield table(
            "Closed loops: each client waits for its image",
            heads,
            [
                (str(row.clients), WORDS[row.way], f"{median(row.throughput):.2f}", *_ends(row.latency))
                for row in sorted(measured.closed, key=lambda row: row.clients)
            ],
        )
    if measured.open:
        heads = (Column("Load"), way, Column("Requests a second"), *_ENDS, Column("Refused"))
        yield table(
            "Open loops: requests come at random moments",
            heads,
            [
                (
                    words.percent(row.load),
                    WORDS[row.way],
                    f"{median(row.rates):.2f}",
                    *_ends(row.latency),
                    str(row.refused),
                )
                for row in sorted(measured.open, key=lambda row: row.load)
            ],
        )
    yield from _long(measured)


def _long(measured: ServingLoad) -> Iterator[Markup]:
    if (found := measured.overload) is not None:
        yield table(
            f"Overload: {found.title}",
            (Column("", numeric=False), Column("Images a second"), *_ENDS),
            [
                ("Every place taken", f"{found.capacity:.2f}", *_ends(found.at_capacity)),
                ("Overload", f"{found.throughput:.2f}", *_ends(found.accepted)),
                ("Refusals", words.NONE, *_ends(found.refusals)),
            ],
        )
    runs = [("offcut", measured.soak), ("With a leak on purpose", measured.control)]
    heads = (
        Column("", numeric=False),
        Column("Time"),
        Column("Requests"),
        Column("Clients gone"),
        Column("After warm-up"),
        Column("At the end"),
    )
    lines: list[tuple[Cell, ...]] = [
        (
            name,
            words.seconds(soak.seconds),
            str(soak.requests),
            str(soak.left),
            words.size(soak.first_bytes),
            words.size(soak.last_bytes),
        )
        for name, soak in runs
        if soak is not None
    ]
    if lines:
        yield table("Soak: resident memory", heads, lines)


def _ends(latency: Percentiles | None) -> tuple[str, str]:
    return (words.NONE, words.NONE) if latency is None else (words.seconds(latency.p50), words.seconds(latency.p99))
