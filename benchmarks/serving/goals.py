"""What a server is held to under load."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from ..schema.serving import Goal, OpenRow, ServingLoad, Soak, WayName

AGAINST_SINGLE = 1.3
"""Throughput over that of one request at a time, unless the engine's own times allow less."""

OF_ALLOWED = 0.95
"""Of the ratio that the engine's own times allow."""

AT_LOAD = 0.7
LATENCY = 2.0
"""At that share of the capacity, p50 of whole-request batches over that of the server."""

REFUSED_P99 = 0.05
ACCEPTED_P99 = 1.2
GROWTH = 50_000_000
"""Bytes."""


def goals(measured: ServingLoad) -> list[Goal]:
    """Of what was measured, in order; parts that were not run have none."""
    return [*_throughput(measured), *_latency(measured), *_overload(measured), *_soak(measured)]


def ratios(measured: ServingLoad, clients: int, other: WayName) -> list[float]:
    """Throughput over that of another way, by round; empty if one of them was not run."""
    rows = {row.way: row.throughput for row in measured.closed if row.clients == clients}
    if "steps" not in rows or other not in rows:
        return []
    return [mine / its for mine, its in zip(rows["steps"], rows[other], strict=True)]


def _throughput(measured: ServingLoad) -> Iterator[Goal]:
    clients = max((row.clients for row in measured.closed), default=0)
    single, whole = ratios(measured, clients, "single"), ratios(measured, clients, "whole")
    if single:
        found, allowed = statistics.median(single), measured.allowed
        least, wanted = AGAINST_SINGLE, f"at least {AGAINST_SINGLE:g}x"
        if allowed is not None and allowed < AGAINST_SINGLE:
            least = allowed * OF_ALLOWED
            wanted += f", or {OF_ALLOWED:.0%} of the {allowed:.2f}x that the engine's times allow"
        yield Goal(
            name=f"throughput of {clients} clients, beside one request at a time",
            wanted=wanted,
            found=_times(single),
            met=found >= least,
        )
    if whole:
        yield Goal(
            name=f"throughput of {clients} clients, beside batches of whole requests",
            wanted="at least 1x",
            found=_times(whole),
            met=statistics.median(whole) >= 1,
        )


def _latency(measured: ServingLoad) -> Iterator[Goal]:
    rows: dict[str, OpenRow] = {row.way: row for row in measured.open if row.load == AT_LOAD}
    if {"steps", "whole"} <= rows.keys():
        pairs = zip(rows["whole"].p50, rows["steps"].p50, strict=True)
        better = [theirs / mine for theirs, mine in pairs]
        allowed = measured.allowed_latency
        limit = "" if allowed is None else f"; the engine's times alone allow {allowed:.2f}x"
        yield Goal(
            name=f"p50 at {AT_LOAD:.0%} load, batches of whole requests beside it",
            wanted=f"at least {LATENCY:g}x{limit}",
            found=_times(better),
            met=statistics.median(better) >= LATENCY,
        )


def _overload(measured: ServingLoad) -> Iterator[Goal]:
    found = measured.overload
    if found is None:
        return
    yield Goal(
        name=f"requests in the server at {found.times:g} times its capacity",
        wanted=f"at most {found.places}",
        found=str(found.taken),
        met=found.taken <= found.places,
    )
    yield Goal(
        name="refusals, p99",
        wanted=f"under {REFUSED_P99 * 1000:g} ms",
        found="none" if found.refusals is None else f"{found.refusals.p99 * 1000:.1f} ms",
        met=found.refusals is not None and found.refusals.p99 < REFUSED_P99,
    )
    if found.accepted is None or found.at_capacity is None:
        yield Goal(name="images under overload", wanted="some", found="none", met=False)
    else:
        grown = found.accepted.p99 / found.at_capacity.p99
        yield Goal(
            name="p99 of the accepted, beside that at capacity",
            wanted=f"at most {ACCEPTED_P99:g}x",
            found=f"{grown:.2f}x",
            met=grown <= ACCEPTED_P99,
        )
    yield Goal(
        name="other replies under overload", wanted="none", found=str(found.unexpected), met=found.unexpected == 0
    )


def _soak(measured: ServingLoad) -> Iterator[Goal]:
    if (soak := measured.soak) is not None:
        yield Goal(
            name=f"memory after {soak.seconds / 60:.0f} minutes",
            wanted=f"at most {GROWTH / 1e6:g} MB more",
            found=f"{soak.growth / 1e6:+.1f} MB",
            met=soak.growth <= GROWTH,
        )
        yield Goal(name="held for clients that went away", wanted="nothing", found=str(soak.held), met=soak.held == 0)
        yield Goal(
            name="other replies in the soak", wanted="none", found=str(soak.unexpected), met=soak.unexpected == 0
        )
    if (control := measured.control) is not None:
        yield _tripped(control)


def _tripped(control: Soak) -> Goal:
    return Goal(
        name=f"a server that keeps {control.leak} bytes a request is noticed",
        wanted=f"more than {GROWTH / 1e6:g} MB more",
        found=f"{control.growth / 1e6:+.1f} MB",
        met=control.growth > GROWTH,
    )


def _times(values: list[float]) -> str:
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}x{spread}"
