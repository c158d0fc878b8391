"""One self-contained HTML page for one or several results: no script, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from ...errors import UserError
from ..record import Result, write_whole
from . import controlnet, cost, drift, growth, load, precision, serving, speed, swap, tables, words
from .markup import Markup, join, tag

NAME = "report.html"

BUSY = 0.5
"""The load average above which a machine was not idle."""


def write_report(results: Sequence[Result], folder: Path, *, samples: Sequence[Path] | None = None) -> Path:
    """Write ``report.html``, ``latency.csv`` and ``quality.csv`` into a folder. Returns the page's path.

    Args:
        results: in the order in which they are shown.
        folder: made if it is not there.
        samples: the folder of each result's sample images; ``folder`` itself by default.

    Raises:
        UserError: there is nothing to show, or a file cannot be written.
    """
    text = page(results, samples or [folder] * len(results))
    path = write_whole(folder / NAME, text)
    tables.write_csv(results, folder)
    return path


def page(results: Sequence[Result], samples: Sequence[Path]) -> str:
    """The page's text; ``samples`` are the folders of each result's images."""
    sections: list[Markup] = []
    links: list[tuple[str, str]] = []
    shown = [
        list(_sections(result, folder, index))
        for index, (result, folder) in enumerate(zip(results, samples, strict=True))
    ]
    if not any(shown):
        raise UserError("these results have no figures that a report could show: no latency, no quality, nor any other")
    for result, parts in zip(results, shown, strict=True):
        of = f": {result.title}" if len(results) > 2 else ""
        for key, name, section in parts:
            sections.append(section)
            links.append((key, f"{name}{of}"))
    links.append(("runs", "How it was measured"))
    title = " · ".join(dict.fromkeys(result.title for result in results))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", **{"http-equiv": "Content-Security-Policy"}, content=_POLICY),
        tag("title", f"{title} | offcut bench"),
        tag("style", Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))),
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#main", class_="skip"),
        tag("header", _themes(), tag("p", "offcut bench", class_="kicker"), tag("h1", title), _when(results)),
        tag("nav", [tag("a", text, href=f"#{key}") for key, text in links], aria_label="Sections"),
        tag("main", _warnings(results), sections, _runs(results), id="main"),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _sections(result: Result, folder: Path, index: int) -> Iterator[tuple[str, str, Markup]]:
    """What there is of one result: each with its key in the page and its name."""
    if result.latency:
        yield f"latency-{index}", "Latency", speed.section(result.latency, f"latency-{index}")
    if result.quality:
        yield f"quality-{index}", "Quality", cost.section(result.quality, folder, f"quality-{index}")
    if result.drift:
        yield f"drift-{index}", "Drift", drift.section(result.drift, folder, f"drift-{index}")
    if result.controlnet:
        yield (
            f"controlnet-{index}",
            "ControlNet",
            controlnet.section(result.controlnet, f"controlnet-{index}"),
        )
    if result.precision:
        yield f"precision-{index}", "Precision", precision.section(result.precision, f"precision-{index}")
    if result.mlperf:
        yield f"load-{index}", "Load", load.section(result.mlperf, f"load-{index}")
    if result.growth:
        yield f"growth-{index}", "Growth", growth.section(result.growth, f"growth-{index}")
    if result.swap:
        yield f"swap-{index}", "LoRAs", swap.section(result.swap, f"swap-{index}")
    if result.serving:
        yield f"serving-{index}", "Serving", serving.section(result.serving, f"serving-{index}")


def _themes() -> Markup:
    """Three radio buttons that the style sheet reads: the page has no script."""
    choices = [
        tag("label", tag("input", type="radio", name="theme", id=f"theme-{key}", checked=key == "auto"), text)
        for key, text in (("auto", "Auto"), ("light", "Light"), ("dark", "Dark"))
    ]
    return tag("fieldset", tag("legend", "Colours"), choices, class_="themes")


def _when(results: Sequence[Result]) -> Markup:
    days = dict.fromkeys(f"{result.started:%d %B %Y, %H:%M} UTC".lstrip("0") for result in results)
    machines = dict.fromkeys(result.environment.gpu or result.environment.cpu for result in results)
    return tag("p", f"{words.listed(list(days))} · {words.listed(list(machines))}", class_="note")


def _warnings(results: Sequence[Result]) -> Markup | None:
    said = list(dict.fromkeys(_doubts(results)))
    return (
        tag("ul", [tag("li", sentence) for sentence in said], class_="warnings", aria_label="Warnings")
        if said
        else None
    )


_TIMED = ("latency", "quality", "mlperf", "growth", "swap", "serving", "controlnet", "precision")
"""The sections that have times."""


def _doubts(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        load = result.environment.load
        timed = any(getattr(result, section) for section in _TIMED)
        if timed and load is not None and load > BUSY:
            yield (
                f"The machine was not idle: load average {load:g} when “{result.title}” began. Ratios within a round "
                "suffer less than seconds, but do suffer."
            )
        if result.latency and result.latency.rounds < 3:
            rounds = "one round" if result.latency.rounds == 1 else f"{result.latency.rounds} rounds"
            yield f"“{result.title}” has {rounds}: too few to know its noise."
    if len({(result.environment.cpu, result.environment.gpu) for result in results}) > 1:
        yield "These results are of different machines: seconds of one cannot be set against seconds of another."


def _runs(results: Sequence[Result]) -> Markup:
    blocks = []
    for result in results:
        machine = result.environment
        facts = {
            "Command": tag("code", result.command),
            "Began": f"{result.started:%Y-%m-%d %H:%M:%S} UTC",
            "Took": words.seconds(result.seconds),
            "Clock": next((each.clock for each in (result.latency, result.growth) if each), None),
            "Processor": f"{machine.cpu}, {machine.cores} core{'s' if machine.cores != 1 else ''} for this run",
            "GPU": machine.gpu or "none",
            "Memory": f"{machine.memory_gib:g} GiB",
            "Load at the start": words.NONE if machine.load is None else f"{machine.load:g}",
            "System": machine.system,
            "Python": machine.python,
            "Packages": ", ".join(f"{name} {version}" for name, version in sorted(machine.packages.items())),
        }
        listed = [join(tag("dt", name), tag("dd", value)) for name, value in facts.items() if value]
        blocks.append(join(tag("h3", result.title), tag("dl", listed, class_="facts")))
    return tag(
        "section",
        tag("h2", "How it was measured"),
        blocks,
        tag("h3", "Limits"),
        tag("ul", [tag("li", sentence) for sentence in _limits(results)]),
        id="runs",
    )


def _limits(results: Sequence[Result]) -> Iterator[str]:
    yield "One machine: ratios carry over to others better than seconds, and neither is sure to."
    latencies = [result.latency for result in results if result.latency]
    if latencies:
        fewest = min(latency.rounds for latency in latencies)
        yield (
            f"{fewest} round{'s' if fewest != 1 else ''}: the ranges shown are of the rounds, and hold no noise that "
            "differs between runs only."
        )
        if any("random" in latency.model.lower() for latency in latencies):
            yield "Random weights: the time of a call does not depend on them, the images mean nothing."
        if skipped := sum(not row.loops for latency in latencies for row in latency.contestants):
            yield f"{skipped} contestant{'s were' if skipped != 1 else ' was'} not run; the reasons stand above."
    for quality in (result.quality for result in results if result.quality):
        yield (
            f"Quality is that of {words.model(quality.model)}, over {quality.images} images a row: PSNR and SSIM say "
            "how far an image moved, not whether it got worse."
        )
