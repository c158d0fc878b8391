"""Report page of one or several results: an HTML file without scripts and downloads, light and dark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..record import Result, write_whole
from ..stats import require
from . import latency, plots, quality, sections
from .blocks import NONE, Section
from .formatting import count, listed, model, seconds

NAME = "report.html"

BUSY = 0.5
"""Load average above which a machine does not count as idle."""

_TIMED = ("latency", "quality", "mlperf", "swap", "serving", "controlnet", "precision")
"""Sections with times."""


def write_report(results: Sequence[Result], folder: Path, *, samples: Sequence[Path] | None = None) -> Path:
    """Write ``report.html`` into a folder; return its path.

    Args:
        results: in the order in which the page shows them.
        folder: output directory, created if missing.
        samples: directory of each result's sample images; ``folder`` by default.

    Raises:
        UserError: there is nothing to show, or the file cannot be written.
        MissingExtraError: Jinja2 or matplotlib is missing.
    """
    return write_whole(folder / NAME, page(results, samples or [folder] * len(results)))


def page(results: Sequence[Result], samples: Sequence[Path]) -> str:
    """Return the page's HTML; ``samples`` are the folders of each result's images."""
    require("a report's page", "jinja2", "matplotlib")
    parts = [sections_of(result, folder) for result, folder in zip(results, samples, strict=True)]
    if not any(parts):
        raise UserError("these results have no figures to show: give the directories of other results")
    named = [
        (f"{section.name.lower()}-{index}", f"{section.name}{f': {result.title}' if len(results) > 2 else ''}", section)
        for index, (result, sections) in enumerate(zip(results, parts, strict=True))
        for section in sections
    ]
    days = dict.fromkeys(f"{result.started:%d %B %Y, %H:%M} UTC".lstrip("0") for result in results)
    machines = dict.fromkeys(result.environment.gpu or result.environment.cpu for result in results)
    html: str = _template().render(
        title=" · ".join(dict.fromkeys(result.title for result in results)),
        when=f"{listed(list(days))} · {listed(list(machines))}",
        warnings=list(dict.fromkeys(_warnings(results))),
        sections=named,
        runs={f"{index}": (result.title, _facts(result)) for index, result in enumerate(results)},
        limits=list(_limits(results)),
        svg=_Plots(),
    )
    return html


def sections_of(result: Result, folder: Path) -> list[Section]:
    """Return the report sections of a result, in the page's order; ``folder`` holds its images."""
    builders: dict[str, Callable[[Any], Section]] = {
        "latency": latency.section,
        "quality": lambda measured: quality.section(measured, folder),
        "controlnet": sections.controlnet,
        "precision": sections.precision,
        "mlperf": sections.mlperf,
        "swap": sections.swap,
        "serving": sections.serving,
    }
    return [section(measured) for name, section in builders.items() if (measured := getattr(result, name)) is not None]


class _Plots:
    """A page's function for plots, which numbers the identifiers in each plot to make them unique on the page."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, plot: Any) -> Any:
        from markupsafe import Markup

        self._count += 1
        svg = plots.to_svg(plot.draw(), plot.title)
        return Markup(re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>plot{self._count}-", svg))


@cache
def _template() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = files(__package__)
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["NONE"] = NONE
    return environment.get_template("page.html.jinja")


def _warnings(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        load = result.environment.load
        if load is not None and load > BUSY and any(getattr(result, section) for section in _TIMED):
            yield (
                f"The machine was not idle: load average {load:g} when “{result.title}” began. Ratios within a round "
                "are affected less than seconds."
            )
        if result.latency and result.latency.rounds < 3:
            yield f"“{result.title}” has {count(result.latency.rounds, 'round')}: too few to estimate the noise."
    if len({(result.environment.cpu, result.environment.gpu) for result in results}) > 1:
        yield "These results come from different machines, whose seconds cannot be compared."


def _facts(result: Result) -> dict[str, str]:
    machine = result.environment
    facts = {
        "Command": result.command,
        "Began": f"{result.started:%Y-%m-%d %H:%M:%S} UTC",
        "Took": seconds(result.seconds),
        "Clock": result.latency.clock if result.latency else "",
        "Processor": f"{machine.cpu}, {count(machine.cores, 'core')} for this run",
        "GPU": machine.gpu or "none",
        "Memory": f"{machine.memory_gib:g} GiB",
        "Load at the start": NONE if machine.load is None else f"{machine.load:g}",
        "System": machine.system,
        "Python": machine.python,
        "Packages": ", ".join(f"{name} {version}" for name, version in sorted(machine.packages.items())),
    }
    return {name: value for name, value in facts.items() if value}


def _limits(results: Sequence[Result]) -> Iterator[str]:
    yield "One machine: on others, ratios may differ, and seconds differ more."
    latencies = [result.latency for result in results if result.latency]
    if latencies:
        fewest = min(run.rounds for run in latencies)
        yield f"{count(fewest, 'round')}: the ranges show the noise between rounds, not between runs."
        if any("random" in run.model.lower() for run in latencies):
            yield "Random weights: they do not change the time of a call, but the images are meaningless."
        if skipped := sum(not row.loops for run in latencies for row in run.contestants):
            yield f"{count(skipped, 'contestant')} did not run; the reasons are listed above."
    for measured in (result.quality for result in results if result.quality):
        yield (
            f"Quality is that of {model(measured.model)}, over {measured.images} images a row: PSNR and SSIM say how "
            "much an image changed, not whether it got worse."
        )
