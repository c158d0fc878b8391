"""Runs MLPerf's LoadGen in this process and reads its verdict.

LoadGen (``mlcommons-loadgen``) draws the queries, times them and judges the run; its logs stay beside the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import MissingExtraError, UserError
from .system import Draw, Picture, System

if TYPE_CHECKING:
    from ..schema.mlperf import Scenario


# Single-stream, offline, server; the first that LoadGen prints is the scenario's result.
_METRIC = re.compile(r"[\d.]+th percentile latency \(ns\)|Samples per second|Completed samples per second")

_LATENCY = r"^\s*([\d.]+ percentile|Mean|Min|Max) latency \(ns\)\s*:\s*(\d+)"


@dataclass(frozen=True)
class Shortened:
    """What is asked of LoadGen, where MLPerf's own text-to-image rules ask for more.

    Attributes:
        seconds: least duration; MLPerf: 600.
        queries: least number of queries; MLPerf: 1024 single-stream, 5000 offline samples.
        percentile: of the latency that single-stream reports and server holds to its limit; MLPerf: 90 and 99.
        latency: limit of a server's queries in seconds; MLPerf: 20.
        rate: images per second that are expected offline and offered to the server.
    """

    seconds: float = 10.0
    queries: int = 64
    percentile: float = 90.0
    latency: float = 20.0
    rate: float = 1.0

    def words(self, scenario: Scenario) -> dict[str, str]:
        """The settings that matter to a scenario, for the report, with MLPerf's own in brackets."""
        common = {"least duration": f"{self.seconds:g} s (MLPerf: 600 s)"}
        if scenario == "Offline":
            return {"samples": f"{self.queries} or more (MLPerf: 5000)", **common}
        if scenario == "SingleStream":
            return {
                "least queries": f"{self.queries} (MLPerf: 1024)",
                **common,
                "latency reported": f"{self.percentile:g} % (MLPerf: 90 %)",
            }
        return {
            "least queries": f"{self.queries} (MLPerf: as many as its early stopping needs)",
            **common,
            "latency limit": f"{self.latency:g} s at {self.percentile:g} % (MLPerf: 20 s at 99 %)",
            "offered load": f"{self.rate:.3g} images/s, Poisson arrivals",
        }


@dataclass(frozen=True)
class Verdict:
    """LoadGen's summary of a performance run; see ``record.ScenarioRun`` for the fields."""

    valid: bool
    reasons: list[str]
    metric: str
    value: float
    latencies: dict[str, float]


def version() -> str:
    """LoadGen's version.

    Raises:
        MissingExtraError: it is not installed.
    """
    import importlib.metadata

    try:
        return importlib.metadata.version("mlcommons-loadgen")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError("MLPerf's LoadGen", "mlcommons-loadgen", "bench") from error


def performance(
    scenario: Scenario, draw: Draw, samples: int, settings: Shortened, batch: int, logs: Path
) -> tuple[Verdict, list[int]]:
    """One performance run.

    Args:
        draw: makes pictures for indices into the sample library.
        samples: in that library.
        batch: most samples drawn together.
        logs: folder for LoadGen's logs; must exist.

    Returns:
        The verdict, and the sizes of the batches that were drawn.
    """
    batches = _run(scenario, "PerformanceOnly", draw, samples, settings, batch, logs)
    return summary(_read(logs / "mlperf_log_summary.txt")), batches


def accuracy(
    scenario: Scenario, draw: Draw, samples: int, settings: Shortened, batch: int, logs: Path, shape: tuple[int, ...]
) -> dict[int, Picture]:
    """One accuracy run: every sample of the library once.

    Args:
        shape: of a picture.

    Returns:
        The pictures by index, as LoadGen logged them.
    """
    _run(scenario, "AccuracyOnly", draw, samples, settings, batch, logs)
    rows = json.loads(_read(logs / "mlperf_log_accuracy.json"))
    return {row["qsl_idx"]: np.frombuffer(bytes.fromhex(row["data"]), np.uint8).reshape(shape) for row in rows}


def summary(text: str) -> Verdict:
    """Reads ``mlperf_log_summary.txt``.

    Raises:
        UserError: it has no verdict.
    """
    fields = {name.strip(): value.strip() for name, value in re.findall(r"^\s*([^:\n]+?)\s*:\s*(.*)$", text, re.M)}
    metric = next((name for name in fields if _METRIC.fullmatch(name)), None)
    if "Result is" not in fields or metric is None:
        raise UserError("LoadGen left no verdict: see mlperf_log_detail.txt beside its summary")
    valid = fields["Result is"] == "VALID"
    nanoseconds = metric.endswith("(ns)")
    return Verdict(
        valid=valid,
        reasons=re.findall(r"^\s*\* (.+)$", text.partition("Recommendations:")[2], re.M) if not valid else [],
        metric=metric.removesuffix(" (ns)"),
        value=float(fields[metric]) * (1e-9 if nanoseconds else 1.0),
        latencies={
            name: float(value) * 1e-9
            for name, value in re.findall(
                r"^\s*([\d.]+ percentile|Mean|Min|Max) latency \(ns\)\s*:\s*(\d+)", text, re.M
            )
        },
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"LoadGen left no {path.name} in {path.parent}: {error.strerror}") from error


def _run(
    scenario: Scenario, mode: str, draw: Draw, samples: int, settings: Shortened, batch: int, logs: Path
) -> list[int]:
    version()
    import mlperf_loadgen

    system = System(draw, partial(_complete, mlperf_loadgen), batch)
    under_test = mlperf_loadgen.ConstructSUT(system.issue, _nothing)
    library = mlperf_loadgen.ConstructQSL(samples, samples, _nothing, _nothing)
    output = mlperf_loadgen.LogOutputSettings()
    output.outdir = str(logs)
    output.copy_summary_to_stdout = False
    log = mlperf_loadgen.LogSettings()
    log.log_output = output
    log.enable_trace = False
    try:
        mlperf_loadgen.StartTestWithLogSettings(
            under_test, library, _settings(mlperf_loadgen, scenario, mode, settings), log
        )
    finally:
        try:
            system.close()
        finally:
            mlperf_loadgen.DestroyQSL(library)
            mlperf_loadgen.DestroySUT(under_test)
    return system.batches


def _settings(loadgen: Any, scenario: Scenario, mode: str, wanted: Shortened) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, scenario)
    settings.mode = getattr(loadgen.TestMode, mode)
    settings.min_duration_ms = round(wanted.seconds * 1000)
    settings.min_query_count = wanted.queries
    settings.single_stream_expected_latency_ns = round(1e9 / wanted.rate)
    settings.single_stream_target_latency_percentile = wanted.percentile / 100
    settings.offline_expected_qps = wanted.rate
    settings.server_target_qps = wanted.rate
    settings.server_target_latency_ns = round(wanted.latency * 1e9)
    settings.server_target_latency_percentile = wanted.percentile / 100
    return settings


def _complete(loadgen: Any, pictures: Sequence[tuple[int, Picture | None]]) -> None:
    # The arrays must live until LoadGen has copied them.
    kept = [(name, np.zeros(0, np.uint8) if p is None else np.ascontiguousarray(p)) for name, p in pictures]
    responses = [loadgen.QuerySampleResponse(name, array.ctypes.data, array.nbytes) for name, array in kept]
    loadgen.QuerySamplesComplete(responses)


def _nothing(*_: Any) -> None:
    """LoadGen's other callbacks: the library is in memory, and no query waits for a flush."""
