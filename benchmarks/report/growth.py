"""The page's section on growth: a plot and a table for each quantity varied, and for commands on growing models."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..growth.record import Fit, Growth, Sweep
from ..growth.table import TITLES, exponent
from . import words
from .curves import Curve, curves
from .markup import Markup, join, tag
from .tables import Column, table

_POINTS = (
    Column("value"),
    Column("loop", "median denoising loop"),
    Column("t_full", "median full call in it"),
    Column("t_shallow", "median shallow call in it"),
    Column("peak memory", "largest resident memory of the setting's own process; the device's on a GPU"),
)
_SERIES = (("loop", "rest"), ("full call", "full"), ("shallow call", "shallow"))


def section(growth: Growth, key: str) -> Markup:
    """``key`` makes its id unique on the page."""
    base = ", ".join(f"{name} {value}" for name, value in growth.base.items())
    task = (
        f"{words.model(growth.model)} on {growth.contestant}: one quantity at a time is varied from this setting: "
        f"{base}. {growth.rounds} loop{'s' if growth.rounds != 1 else ''} a setting, each setting in a process of its "
        "own. The exponents are of power laws, with their standard errors: 1 is proportional, 2 quadratic."
    )
    drift = None
    if growth.drift is not None:
        drift = tag(
            "p", f"The first setting, measured again at the end: {growth.drift:.3f} of its time.", class_="note"
        )
    return tag(
        "section",
        tag("h2", "Growth"),
        tag("p", task, class_="lead"),
        drift,
        [_sweep(sweep) for sweep in growth.sweeps],
        _made(growth),
        id=key,
    )


def _sweep(sweep: Sweep) -> Markup:
    title = TITLES[sweep.axis]
    medians: dict[str, Sequence[float | None]] = {
        "loop": [point.loop for point in sweep.points],
        "full call": [_median(point.full) for point in sweep.points],
        "shallow call": [_median(point.shallow) for point in sweep.points],
    }
    series = [
        Curve(name, kind, [(p.value, y) for p, y in zip(sweep.points, medians[name], strict=True) if y is not None])
        for name, kind in _SERIES
    ]
    said = {law.of: exponent(law) for law in sweep.fits}
    names = [f"{name}{f' ^ {said[name]}' if name in said else ''}" for name, _ in _SERIES]
    keys = [tag("li", tag("i", class_=kind), name) for (_, kind), name in zip(_SERIES, names, strict=True)]
    rows = [
        [
            str(point.value),
            *(words.seconds(medians[name][index]) for name, _ in _SERIES),
            words.size(point.device_peak_bytes or point.host_peak_bytes),
        ]
        for index, point in enumerate(sweep.points)
    ]
    rows.append(["exponent", *(said.get(of, words.NONE) for of in ("loop", "full call", "shallow call", "memory"))])
    plot = curves([curve for curve in series if curve.points], f"Seconds against {title}", title, "seconds")
    return join(
        tag("h3", title[0].upper() + title[1:]),
        tag("figure", tag("ul", keys, class_="legend"), plot, class_="growth"),
        table(f"Growth with {title}", _POINTS, rows),
    )


def _made(growth: Growth) -> Markup | None:
    if not growth.made and not growth.not_made:
        return None
    columns = (
        Column("model"),
        Column("parameters", "of the UNet"),
        Column("command", numeric=False),
        Column("seconds"),
        Column("peak memory", "largest resident memory of its process; files that it maps count"),
        Column("written"),
    )
    rows = [
        [
            made.model,
            f"{words.digits(made.parameters / 1e6)} M",
            f"offcut {made.command}",
            words.seconds(made.seconds),
            words.size(made.host_peak_bytes),
            words.size(made.size_bytes),
        ]
        for made in growth.made
    ]
    failed = [join(tag("dt", model), tag("dd", reason)) for model, reason in growth.not_made.items()]
    return join(
        tag("h3", "Exports and builds"),
        tag("p", f"Whole commands, built for {growth.made_with}. {_laws(growth.made_fits)}", class_="note"),
        table("Commands on models of growing size", columns, rows) if rows else None,
        tag("dl", failed, class_="facts") if failed else None,
    )


def _laws(laws: Sequence[Fit]) -> str:
    if not laws:
        return ""
    said = words.listed([f"{law.of} ^ {exponent(law)}" for law in laws])
    return f"Exponents in the number of parameters: {said}."


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
