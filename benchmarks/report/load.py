"""The page's section on load: what MLPerf's LoadGen said of each scenario."""

from __future__ import annotations

from ..mlperf.record import MlPerf, ScenarioRun
from . import words
from .markup import Markup, tag
from .tables import Column, table

_COLUMNS = (
    Column("Scenario", numeric=False),
    Column("Caching", numeric=False),
    Column("LoadGen says", "its own verdict, for the shortened setting", numeric=False),
    Column("Result"),
    Column("of", "what LoadGen calls it", numeric=False),
    Column("Images"),
    Column("Prompts right", "share of the library's prompts that the judge found obeyed"),
    Column("Setting", "where MLPerf's own rules ask for something else", numeric=False),
)


def section(mlperf: MlPerf, key: str) -> Markup:
    """``key`` makes its id unique on the page."""
    task = (
        f"{words.model(mlperf.model)} on {mlperf.engine}, {mlperf.steps} steps of {mlperf.scheduler}, guidance "
        f"{mlperf.guidance:g}, at most {mlperf.batch} images a UNet call, LoadGen {mlperf.loadgen}. Model, data set, "
        "durations and numbers of queries are not MLPerf's: this is no submission."
    )
    rows = [_row(run) for run in mlperf.runs]
    return tag(
        "section",
        tag("h2", "MLPerf's load generator"),
        tag("p", task, class_="lead"),
        table("What LoadGen measured", _COLUMNS, rows),
        id=key,
    )


def _row(run: ScenarioRun) -> list[Markup | str]:
    seconds = "latency" in run.metric
    return [
        run.scenario,
        run.caching or "none",
        "VALID" if run.valid else f"INVALID: {'; '.join(run.reasons) or 'no reason given'}",
        words.seconds(run.value) if seconds else f"{run.value:.2f} images/s",
        run.metric,
        str(run.images),
        words.NONE if run.accuracy is None else f"{run.accuracy:.0%} of {run.accuracy_images}",
        "; ".join(f"{name}: {value}" for name, value in run.settings.items()),
    ]
