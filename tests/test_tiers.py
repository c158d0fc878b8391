"""The tiers: every file is in one part of the slow tier, long tests are reported, and the list of them is current."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiers import LONG, parse_part, part_of, unlisted

TESTS = Path(__file__).parent


def test_the_parts_are_about_as_large() -> None:
    files = [path.relative_to(TESTS.parent).as_posix() for path in TESTS.rglob("test_*.py")]
    counts = {part: sum(part_of(file, 3) == part for file in files) for part in (1, 2, 3)}
    assert sum(counts.values()) == len(files)
    assert min(counts.values()) > len(files) / 5


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "a/b"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match="is not a part"):
        parse_part(text)
    assert parse_part("2/3") == (2, 3)


def report(when: str, nodeid: str, duration: float, **properties: Any) -> Any:
    return SimpleNamespace(when=when, nodeid=nodeid, duration=duration, user_properties=list(properties.items()))


def test_long_tests_and_fixtures_of_the_default_tier_are_reported() -> None:
    fixture = report("setup", "tests/test_a.py::test_one", 30.0)
    fixture.user_properties.append(("long fixture", ("tests/conftest.py::bundle", 29.0)))
    listed = next(iter(LONG))
    reports = [
        fixture,
        report("call", "tests/test_a.py::test_one", 19.0),
        report("call", "tests/test_a.py::test_two[x]", 21.0),
        report("call", "tests/test_a.py::test_two[y]", 25.0),
        report("call", "tests/test_a.py::test_three", 100.0, slow=True),
        report("call", listed, 100.0),
    ]
    assert unlisted(reports) == {"tests/conftest.py::bundle": 29.0, "tests/test_a.py::test_two": 25.0}


@pytest.mark.parametrize("name", LONG)
def test_what_is_listed_exists_and_is_not_slow(name: str) -> None:
    file, _, function = name.partition("::")
    module = ast.parse((TESTS.parent / file).read_text(encoding="utf-8"))
    found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(found) == 1, "tests/support/tiers.py lists what is not there"
    marks = [ast.unparse(decorator) for decorator in found[0].decorator_list]
    assert "pytest.mark.slow" not in marks, "a slow test needs no place in the list"
    assert len(LONG[name]) > 20, "the reason is missing"
