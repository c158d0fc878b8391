"""A GPU check, which compares figures with bounds, and its result."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, computed_field

from ...errors import InternalError, ParityError

if TYPE_CHECKING:
    from .workbench import Workbench

Status = Literal["passed", "failed", "not run", "error"]
Sign = Literal["<=", ">=", ">", "=="]
_HOLDS: dict[Sign, Callable[[float, float], bool]] = {
    "<=": lambda value, bound: value <= bound,
    ">=": lambda value, bound: value >= bound,
    ">": lambda value, bound: value > bound,
    "==": lambda value, bound: value == bound,
}


def _finite_or_text(figure: Any) -> Any:
    """Return the figure for JSON, which has no infinity and no NaN: those become text."""
    return str(figure) if isinstance(figure, float) and not math.isfinite(figure) else figure


Figure = float | int | str | bool
_Number = Annotated[float, PlainSerializer(_finite_or_text)]
_Figure = Annotated[Figure, PlainSerializer(_finite_or_text)]


class NotRun(Exception):
    """A running check found that it cannot run here; the message is the reason."""


class BoundedFigure(BaseModel):
    """A measured figure with its bound. NaN meets no bound.

    Attributes:
        name: name of the figure, with its unit.
        value: measured value.
        sign, bound: the check passes if ``value sign bound`` holds, e.g. ``value <= 2``.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    value: _Number
    sign: Sign
    bound: _Number

    def __init__(self, name: str, value: float, sign: Sign, bound: float, **derived: Any) -> None:
        super().__init__(name=name, value=value, sign=sign, bound=bound, **derived)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def holds(self) -> bool:
        """Whether the value meets the bound."""
        return not math.isnan(self.value) and _HOLDS[self.sign](self.value, self.bound)

    def __str__(self) -> str:
        return f"{self.name} is {self.value:.6g}, but {self.sign} {self.bound:.6g} is needed"


@dataclass(frozen=True)
class CheckOutcome:
    """The measurements of a check.

    Attributes:
        claims: figures with bounds, at least one.
        figures: further figures for the report.
    """

    claims: tuple[BoundedFigure, ...]
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuCheck:
    """One check of the catalogue.

    Attributes:
        id: ``group/subject/...``, as ``--only`` matches it.
        title: the statement that passes or fails.
        run: function that measures; it raises ``NotRun`` where it cannot run here.
        engine: the engine under test. Checks of different engines run in different processes.
        obstacle: why the check cannot run here, where this is known beforehand; else None.
    """

    id: str
    title: str
    run: Callable[[Workbench], CheckOutcome]
    engine: str
    obstacle: str | None = None


class CheckResult(BaseModel):
    """The result of a check.

    Attributes:
        reason: why the check was not run, failed or ended with an error; empty where it passed.
        seconds: duration.
        trace: the traceback of an error; empty otherwise.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    title: str
    status: Status
    reason: str = ""
    claims: tuple[BoundedFigure, ...] = ()
    figures: dict[str, _Figure] = {}
    seconds: float = 0.0
    trace: str = ""

    @property
    def group(self) -> str:
        return self.id.partition("/")[0]


def perform(check: GpuCheck, bench: Workbench) -> CheckResult:
    """Run a check and return its result; an exception other than an interrupt becomes a result too."""
    began = time.perf_counter()

    def result(status: Status, reason: str = "", **measured: Any) -> CheckResult:
        seconds = time.perf_counter() - began
        return CheckResult(id=check.id, title=check.title, status=status, reason=reason, seconds=seconds, **measured)

    if check.obstacle is not None:
        return result("not run", check.obstacle)
    try:
        outcome = check.run(bench)
        if not outcome.claims:
            raise InternalError(f"the check {check.id} has no bounded figure, so it could not fail")
    except NotRun as reason:
        return result("not run", str(reason))
    except ParityError as error:  # the build compared its engine with the reference and found a difference
        return result("failed", first_line(error), trace=traceback.format_exc())
    except Exception as error:
        return result("error", first_line(error), trace=traceback.format_exc())
    failures = "; ".join(str(claim) for claim in outcome.claims if not claim.holds)
    measured: dict[str, Any] = {"claims": outcome.claims, "figures": dict(outcome.figures)}
    return result("failed", failures, **measured) if failures else result("passed", **measured)


def select(checks: list[GpuCheck], pattern: str | None) -> list[GpuCheck]:
    """Return the checks whose id matches a shell pattern or begins with it, e.g. ``memory``, ``*/inductor``."""
    if pattern is None:
        return checks
    return [check for check in checks if any(fnmatchcase(check.id, glob) for glob in (pattern, f"{pattern}/*"))]


def first_line(error: BaseException) -> str:
    """Return the first line of an error; the class is named unless it is offcut's own."""
    line, _, _ = str(error).strip().partition("\n")
    own = type(error).__module__.startswith("offcut.")
    return line if own and line else f"{type(error).__name__}: {line}".removesuffix(": ")
