"""The four results of a check, the report of a run, and the processes in which checks run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from offcut.benchmarks.gpu.check import (
    BoundedFigure,
    CheckOutcome,
    CheckResult,
    GpuCheck,
    NotRun,
    first_line,
    perform,
    select,
)
from offcut.benchmarks.gpu.isolated import perform_isolated
from offcut.benchmarks.gpu.report import GpuReport, markdown, read, write
from offcut.benchmarks.gpu.workbench import GpuOptions, Workbench
from offcut.errors import EngineError, ParityError


def report_of(results: list[CheckResult], machine: dict[str, str] | None = None) -> GpuReport:
    return GpuReport(date="2026-01-01T00:00:00+00:00", command="python -m x", machine=machine or {}, checks=results)


def check(
    identifier: str, *claims: BoundedFigure, error: Exception | None = None, obstacle: str | None = None
) -> GpuCheck:
    def run(bench: Workbench) -> CheckOutcome:
        if error is not None:
            raise error
        return CheckOutcome(claims, {"closeness": math.inf})

    return GpuCheck(identifier, f"title of {identifier}", run, "onnxruntime", obstacle)


TRUE, FALSE = BoundedFigure("one, apples", 1.0, "<=", 1.0), BoundedFigure("two, apples", 2.0, "<=", 1.0)


@pytest.fixture
def results(tmp_path: Path) -> list[CheckResult]:
    checks = [
        check("a/passes", TRUE),
        check("a/fails", TRUE, FALSE),
        check("a/raises", error=ValueError("the first line\nthe second")),
        check("b/was-refused", error=NotRun("the package x is not installed")),
        check("b/has-an-obstacle", FALSE, obstacle="no GPU"),
        check("b/built-wrongly", error=ParityError("differs by 0.5")),
        check("b/claims-nothing"),
    ]
    bench = Workbench(GpuOptions(), tmp_path)
    return [perform(check_, bench) for check_ in checks]


def test_each_check_has_a_result_and_the_next_one_runs(results: list[CheckResult]) -> None:
    assert [result.status for result in results] == [
        "passed",
        "failed",
        "error",
        "not run",
        "not run",
        "failed",
        "error",
    ]
    assert [result.reason for result in results[:6]] == [
        "",
        "two, apples is 2, but <= 1 is needed",
        "ValueError: the first line",
        "the package x is not installed",
        "no GPU",
        "differs by 0.5",
    ]
    assert "could not fail" in results[6].reason
    assert "ValueError" in results[2].trace
    assert not results[0].trace


@pytest.mark.parametrize(
    ("value", "sign", "bound", "holds"),
    [
        (1, "<=", 1, True),
        (2, "<=", 1, False),
        (1, ">=", 1, True),
        (1, ">", 1, False),
        (1, "==", 1, True),
        (math.inf, ">=", 80, True),
        (-math.inf, ">=", 80, False),
        (math.nan, "<=", 1, False),
        (math.nan, ">=", 1, False),
    ],
)
def test_a_claim_holds_if_its_value_meets_the_bound(value: float, sign: str, bound: float, holds: bool) -> None:
    assert BoundedFigure("x", value, sign, bound).holds is holds  # type: ignore[arg-type]


def test_the_first_line_of_an_error_names_a_class_of_another_package() -> None:
    assert first_line(EngineError("no engine\nmore")) == "no engine"
    assert first_line(KeyError("x")) == "KeyError: 'x'"
    assert first_line(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        (None, ["a/x/1", "a/y/1", "b/x/2"]),
        ("a", ["a/x/1", "a/y/1"]),
        ("a/*", ["a/x/1", "a/y/1"]),
        ("*/x/*", ["a/x/1", "b/x/2"]),
        ("b/x/2", ["b/x/2"]),
        ("c", []),
    ],
)
def test_a_pattern_selects_checks_by_id(pattern: str | None, chosen: list[str]) -> None:
    checks = [check(identifier, TRUE) for identifier in ("a/x/1", "a/y/1", "b/x/2")]
    assert [check_.id for check_ in select(checks, pattern)] == chosen


def test_a_report_is_read_back_unchanged(results: list[CheckResult], tmp_path: Path) -> None:
    report = report_of(results, {"gpu": "none", "odd": "a|b"})
    write(report, tmp_path)
    back = read(tmp_path / "result.json")
    assert back.as_json()["checks"][0] == report.as_json()["checks"][0]
    assert [(r.id, r.status, r.reason, r.claims, r.seconds) for r in back.checks] == [
        (r.id, r.status, r.reason, r.claims, r.seconds) for r in results
    ]
    raw = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert raw["schema_version"] == 1
    assert raw["counts"] == {"passed": 1, "failed": 2, "error": 2, "not run": 2}
    assert raw["checks"][0]["figures"] == {"closeness": "inf"}
    assert raw["checks"][1]["claims"][1] == {
        "name": "two, apples",
        "value": 2.0,
        "sign": "<=",
        "bound": 1.0,
        "holds": False,
    }
    assert raw["checks"][2]["traceback"] == "tracebacks.txt"
    traces = (tmp_path / "tracebacks.txt").read_text()
    assert "a/raises" in traces
    assert "the second" in traces


def test_the_reports_tables_have_every_check_claim_and_reason(results: list[CheckResult]) -> None:
    text = markdown(report_of(results, {"gpu": "a|b"}))
    for result in results:
        assert f"`{result.id}`" in text
        assert result.reason in text
        for claim in result.claims:
            assert claim.name in text
    assert "**FAILED** two, apples: 2 (<= 1)" in text
    assert "| gpu | a\\|b |" in text
    assert text.count("## ") == 2
    assert "A check failed or ended with an error: 1 passed, 2 failed, 2 error, 2 not run" in text


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        (["not run", "not run"], "No check was run: no GPU"),
        (["passed", "not run"], "All checks that ran passed: 1 passed, 1 not run"),
        ([], "No check was run: no check was chosen"),
    ],
)
def test_a_verdict_covers_only_checks_that_were_run(statuses: list[str], verdict: str) -> None:
    reasons = {"not run": "no GPU", "passed": ""}
    results = [CheckResult(id="a/b", title="t", status=status, reason=reasons[status]) for status in statuses]  # type: ignore[arg-type]
    assert report_of(results).verdict == verdict


WORKER = """
import json, os, signal, sys
for line in sys.stdin:
    name = json.loads(line)["id"]
    if name == "a/crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "a/hangs":
        import time
        time.sleep(60)
    print(json.dumps({"progress": "slow"}), flush=True)
    print(json.dumps({"ok": {"id": name, "title": "t", "status": "passed", "seconds": 1.0}}), flush=True)
"""


def results_from_worker(identifiers: list[str], worker: str, tmp_path: Path) -> dict[str, CheckResult]:
    results: list[CheckResult] = []
    perform_isolated(
        [check(identifier, TRUE) for identifier in identifiers],
        GpuOptions(device="cpu"),
        tmp_path,
        tmp_path / "log.txt",
        timeout=2,
        progress=lambda step: None,
        finished=results.append,
        command=(sys.executable, "-c", worker),
    )
    assert len(results) == len(identifiers)
    return {result.id: result for result in results}


def test_a_crash_is_an_error_of_its_check_and_the_others_run(tmp_path: Path) -> None:
    by_id = results_from_worker(["a/one", "a/crashes", "a/hangs", "a/two"], WORKER, tmp_path)
    assert [by_id[name].status for name in ("a/one", "a/crashes", "a/hangs", "a/two")] == [
        "passed",
        "error",
        "error",
        "passed",
    ]
    assert by_id["a/crashes"].reason.startswith("its process was ended by SIGSEGV")
    assert by_id["a/crashes"].reason.endswith("; see log.txt")
    assert "2 s were exceeded" in by_id["a/hangs"].reason


def test_a_process_that_does_not_start_is_an_error_of_every_check(tmp_path: Path) -> None:
    by_id = results_from_worker(["a/one", "a/two"], "raise SystemExit(3)", tmp_path)
    assert all(result.reason.startswith("its process ended with exit code 3") for result in by_id.values())
    assert {result.status for result in by_id.values()} == {"error"}
