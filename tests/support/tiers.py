"""The tiers of the test suite: parts of the slow tier, and the tests of the default tier that take long.

A test is in the default tier unless it is marked ``slow``. This module is a pytest plugin.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

LONG_SECONDS = 20.0

LONG: dict[str, str] = {
    "tests/conftest.py::tiny_bundle": "exports and cuts a UNet of Stable Diffusion's topology, for most runtime tests",
    "tests/conftest.py::foreign_bundle": "imports and verifies every network of a pipeline on both engines",
    "tests/runtime/test_components.py::whole": "exports the text encoder and the autoencoder, verified on both engines",
    "tests/benchmarks/shapes/training/test_training.py::finished": "trains every stage once, for the resumed runs",
    "tests/exporter/test_cut.py::test_the_mlperf_cut_keeps_the_features_of_the_whole_last_block": (
        "exports a UNet of SDXL's topology"
    ),
    "tests/exporter/test_program.py::test_every_cut_computes_the_same_as_pytorch": "traces a program for each cut",
    "tests/exporter/trace/test_export.py::test_exporting_again_replaces_the_export": "exports in a process of its own",
}
"""Tests and fixtures of the default tier that may take over ``LONG_SECONDS`` on an idle machine, with the reason."""

_PROPERTY = "long fixture"
_measured: list[tuple[str, float]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="N/M", help="Of the test files, run only part N of M; each file is in exactly one part."
    )


def part_of(path: str, parts: int) -> int:
    """Return the part, from 1, that a test file is in; it depends on the file's path alone."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % parts + 1


def parse_part(text: str) -> tuple[int, int]:
    """Return ``(2, 3)`` for ``2/3``.

    Raises:
        pytest.UsageError: the text is not a part.
    """
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise pytest.UsageError(f"--part {text} is not a part: write 1/3, 2/3 or 3/3")
    return int(number), int(parts)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of the other parts."""
    text = config.getoption("--part")
    if text is None:
        return
    number, parts = parse_part(text)
    chosen: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        path = item.path.relative_to(config.rootpath).as_posix()
        chosen[part_of(path, parts) == number].append(item)
    config.hook.pytest_deselected(items=chosen[False])
    items[:] = chosen[True]


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Iterator[None]:
    """Measure the set-up of each fixture, without the fixtures that it depends on."""
    began = time.perf_counter()
    try:
        return (yield)
    finally:
        seconds = time.perf_counter() - began
        if seconds > LONG_SECONDS:
            file = Path(fixturedef.func.__code__.co_filename)
            if file.is_relative_to(request.config.rootpath):
                name = f"{file.relative_to(request.config.rootpath).as_posix()}::{fixturedef.argname}"
                _measured.append((name, seconds))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Put what the fixtures took into the test's report, which reaches the controller of several workers."""
    try:
        return (yield)
    finally:
        if item.get_closest_marker("slow") is None:
            item.user_properties += [(_PROPERTY, measured) for measured in _measured]
        else:
            item.user_properties.append(("slow", True))
        _measured.clear()


def unlisted(reports: Iterable[pytest.TestReport]) -> dict[str, float]:
    """Return the tests and fixtures of the default tier that took over ``LONG_SECONDS`` and are not in ``LONG``."""
    seconds: dict[str, float] = {}
    for report in reports:
        properties = list(report.user_properties)
        if report.when == "setup":
            for kind, value in properties:
                if kind == _PROPERTY:
                    name, took = value  # type: ignore[misc]  # see pytest_runtest_setup
                    seconds[name] = max(took, seconds.get(name, 0.0))
        elif report.when == "call" and ("slow", True) not in properties:
            name = report.nodeid.partition("[")[0]
            seconds[name] = max(report.duration, seconds.get(name, 0.0))
    return {name: took for name, took in seconds.items() if took > LONG_SECONDS and name not in LONG}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that should be shorter, marked slow, or listed. Time fails no test."""
    reports = [
        report for group in terminalreporter.stats.values() for report in group if isinstance(report, pytest.TestReport)
    ]
    if not (found := unlisted(reports)):
        return
    terminalreporter.section(f"over {LONG_SECONDS:.0f} s, not listed in tests/support/tiers.py")
    for name, took in sorted(found.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{took:6.1f} s  {name}")
