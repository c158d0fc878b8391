"""How commands that measure begin and end: machine and clock at first, ``result.json`` and its page at last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...benchmarks.record import Result


class Outcome:
    """A run that has begun.

    Args:
        packages: whose versions matter to the figures.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        from ...benchmarks import record

        self._began, self._started = time.perf_counter(), record.now()
        self.environment = record.environment(packages)

    def save(self, output: Path, title: str, **measured: Any) -> tuple[Result, Path]:
        """Write ``result.json``, the page and its CSV into a folder. Returns the result and the path of its file.

        Args:
            measured: the result's sections by name.
        """
        from ...benchmarks import record
        from ...benchmarks.report.page import write_report

        result = record.Result(
            title=title,
            command=record.command_line(),
            started=self._started,
            seconds=round(time.perf_counter() - self._began, 1),
            environment=self.environment,
            **measured,
        )
        path = result.save(output)
        write_report([result], output)
        return result, path
