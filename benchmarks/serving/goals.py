"""The goals of a server under load."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from ..schema.serving import Goal, OpenRow, ServingLoad, WayName

AGAINST_SINGLE = 1.3
"""Throughput over that of one request at a time, unless the engine's own times allow less."""

OF_ALLOWED = 0.95
"""Share to reach of the ratio that the engine's own times allow."""

AT_LOAD = 0.7
LATENCY = 2.0
"""p50 of batches of whole requests over that of the server, at that share of the capacity."""

REFUSED_P99 = 0.05
ACCEPTED_P99 = 1.2
GROWTH = 50_000_000
"""Bytes."""


def goals(measured: ServingLoad) -> list[Goal]:
    """Return the goals of the measured parts, in order."""
    return [*_throughput(measured), *_latency(measured), *_overload(measured), *_soak(measured)]


def ratios(measured: ServingLoad, clients: int, other: WayName) -> list[float]:
    """Return throughput over that of another way to batch, by round; empty if one of them was not run."""
    rows = {row.way: row.throughput for row in measured.closed if row.clients == clients}
    if "steps" not in rows or other not in rows:
        return []
    return [ours / theirs for ours, theirs in zip(rows["steps"], rows[other], strict=True)]


def _throughput(measured: ServingLoad) -> Iterator[Goal]:
    clients = max((row.clients for row in measured.closed), default=0)
    single, whole = ratios(measured, clients, "single"), ratios(measured, clients, "whole")
    name = f"throughput of {clients} clients, compared with"
    if single:
        least, wanted, allowed = AGAINST_SINGLE, f"at least {AGAINST_SINGLE:g}x", measured.allowed
        if allowed is not None and allowed < AGAINST_SINGLE:
            least = allowed * OF_ALLOWED
            wanted += f", or {OF_ALLOWED:.0%} of the {allowed:.2f}x that the engine's times allow"
        yield _goal(f"{name} one request at a time", wanted, _times(single), statistics.median(single) >= least)
    if whole:
        yield _goal(f"{name} batches of whole requests", "at least 1x", _times(whole), statistics.median(whole) >= 1)


def _latency(measured: ServingLoad) -> Iterator[Goal]:
    rows: dict[str, OpenRow] = {row.way: row for row in measured.open if row.load == AT_LOAD}
    if {"steps", "whole"} <= rows.keys():
        better = [theirs / ours for theirs, ours in zip(rows["whole"].p50, rows["steps"].p50, strict=True)]
        allowed = measured.allowed_latency
        limit = "" if allowed is None else f"; the engine's times alone allow {allowed:.2f}x"
        yield _goal(
            f"p50 of batches of whole requests at {AT_LOAD:.0%} load, over the server's",
            f"at least {LATENCY:g}x{limit}",
            _times(better),
            statistics.median(better) >= LATENCY,
        )


def _overload(measured: ServingLoad) -> Iterator[Goal]:
    if (load := measured.overload) is None:
        return
    name = f"requests in the server at {load.times:g} times its capacity"
    yield _goal(name, f"at most {load.places}", str(load.taken), load.taken <= load.places)
    refusals = load.refusals
    yield _goal(
        "refusals, p99",
        f"under {REFUSED_P99 * 1000:g} ms",
        "none" if refusals is None else f"{refusals.p99 * 1000:.1f} ms",
        refusals is not None and refusals.p99 < REFUSED_P99,
    )
    if load.accepted is None or load.at_capacity is None:
        yield _goal("images under overload", "some", "none", False)
    else:
        ratio = load.accepted.p99 / load.at_capacity.p99
        name = "p99 of the accepted, over that at capacity"
        yield _goal(name, f"at most {ACCEPTED_P99:g}x", f"{ratio:.2f}x", ratio <= ACCEPTED_P99)
    yield _goal("other replies under overload", "none", str(load.unexpected), load.unexpected == 0)


def _soak(measured: ServingLoad) -> Iterator[Goal]:
    if (soak := measured.soak) is not None:
        name, growth = f"memory after {soak.seconds / 60:.0f} minutes", f"{soak.growth / 1e6:+.1f} MB"
        yield _goal(name, f"at most {GROWTH / 1e6:g} MB more", growth, soak.growth <= GROWTH)
        yield _goal("held for clients that disconnected", "nothing", str(soak.held), soak.held == 0)
        yield _goal("other replies in the soak", "none", str(soak.unexpected), soak.unexpected == 0)
    if (control := measured.control) is not None:
        name, growth = f"a leak of {control.leak} bytes a request is noticed", f"{control.growth / 1e6:+.1f} MB"
        yield _goal(name, f"more than {GROWTH / 1e6:g} MB more", growth, control.growth > GROWTH)


def _goal(name: str, wanted: str, found: str, met: bool) -> Goal:
    return Goal(name=name, wanted=wanted, found=found, met=met)


def _times(values: list[float]) -> str:
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}x{spread}"
