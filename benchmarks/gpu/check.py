"""What a check is: figures held to bounds, and one of four answers."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from ...errors import InternalError, ParityError

if TYPE_CHECKING:
    from .workbench import Workbench

Status = Literal["passed", "failed", "not run", "error"]
Sign = Literal["<=", ">=", ">", "=="]
Figure = float | int | str | bool

_HOLDS: dict[Sign, Callable[[float, float], bool]] = {
    "<=": lambda value, bound: value <= bound,
    ">=": lambda value, bound: value >= bound,
    ">": lambda value, bound: value > bound,
    "==": lambda value, bound: value == bound,
}


class NotRun(Exception):
    """A check found while running that it cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Claim:
    """One figure held to a bound. A value that is not a number holds to none.

    Attributes:
        name: what was measured, with its unit.
        value: what came out.
        sign, bound: the claim is ``value sign bound``.
    """

    name: str
    value: float
    sign: Sign
    bound: float

    @property
    def holds(self) -> bool:
        return not math.isnan(self.value) and _HOLDS[self.sign](self.value, self.bound)

    def __str__(self) -> str:
        return f"{self.name} is {self.value:.6g}, but {self.sign} {self.bound:.6g} is needed"


@dataclass(frozen=True)
class Outcome:
    """What a check measured.

    Attributes:
        claims: at least one.
        figures: beside them, for the report.
    """

    claims: tuple[Claim, ...]
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One question to a machine.

    Attributes:
        id: ``group/subject/...``, as ``--only`` matches it.
        title: the question as a statement that passes or fails.
        run: measures; raises ``NotRun`` where it turns out that it cannot.
        engine: whose check it is. Checks of different engines run in processes of their own.
        obstacle: why it cannot run here, known beforehand; None where nothing is known to stand in the way.
    """

    id: str
    title: str
    run: Callable[[Workbench], Outcome]
    engine: str
    obstacle: str | None = None

    @property
    def group(self) -> str:
        return self.id.partition("/")[0]


@dataclass(frozen=True)
class Result:
    """A check's answer.

    Attributes:
        reason: why it was not run, failed or broke off; empty where it passed.
        seconds: that it took.
        trace: the traceback of an error; empty otherwise.
    """

    id: str
    title: str
    status: Status
    reason: str = ""
    claims: tuple[Claim, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    seconds: float = 0.0
    trace: str = ""

    @property
    def group(self) -> str:
        return self.id.partition("/")[0]


def perform(check: Check, bench: Workbench) -> Result:
    """Run a check to its answer, whatever it raises short of an interrupt."""

    def answer(status: Status, reason: str = "", **rest: Any) -> Result:
        return Result(check.id, check.title, status, reason, seconds=time.perf_counter() - began, **rest)

    began = time.perf_counter()
    if check.obstacle is not None:
        return answer("not run", check.obstacle)
    try:
        outcome = check.run(bench)
        if not outcome.claims:
            raise InternalError(f"the check {check.id} claims nothing, so it could not fail")
    except NotRun as reason:
        return answer("not run", str(reason))
    except ParityError as error:  # a build that measured its engine and found it wrong
        return answer("failed", first_line(error), trace=traceback.format_exc())
    except Exception as error:
        return answer("error", first_line(error), trace=traceback.format_exc())
    broken = [str(claim) for claim in outcome.claims if not claim.holds]
    measured: dict[str, Any] = {"claims": outcome.claims, "figures": outcome.figures}
    return answer("failed", "; ".join(broken), **measured) if broken else answer("passed", **measured)


def select(checks: list[Check], pattern: str | None) -> list[Check]:
    """Those whose id matches a shell pattern, or lies below it: ``memory``, ``memory/*`` and ``*/onnxruntime``."""
    if pattern is None:
        return checks
    return [check for check in checks if any(fnmatchcase(check.id, each) for each in (pattern, f"{pattern}/*"))]


def first_line(error: BaseException) -> str:
    """The error's first line, with its class where that is not offcut's own."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    own = type(error).__module__.startswith("offcut.")
    return line if own and line else f"{type(error).__name__}: {line}".removesuffix(": ")
