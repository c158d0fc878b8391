"""Start and end of commands that measure: the environment first, ``result.json`` and its page last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shell import err, out, print_bold, print_json

if TYPE_CHECKING:
    from ...benchmarks.record import Result


class BenchRun:
    """A measurement in progress.

    Args:
        packages: names of the packages whose versions matter to the figures.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        from ...benchmarks import record

        self._began, self._started = time.perf_counter(), record.now()
        self.environment = record.environment(packages)

    def save(self, output: Path, title: str, **measured: Any) -> tuple[Result, Path]:
        """Write ``result.json`` and its page into a folder; return the result and the path of its file.

        Where Jinja2 or matplotlib is missing, the page is left out and a message says so.

        Args:
            measured: the result's sections by name.
        """
        from ...benchmarks import record
        from ...benchmarks.report.page import write_report
        from ...errors import MissingExtraError

        result = record.Result(
            title=title,
            command=record.command_line(),
            started=self._started,
            seconds=round(time.perf_counter() - self._began, 1),
            environment=self.environment,
            **measured,
        )
        path = result.save(output)
        try:
            write_report([result], output)
        except MissingExtraError as error:
            err.print(f"{path} is written, its page is not: {error}", highlight=False, markup=False)
        return result, path

    def finish(self, output: Path, title: str, as_json: bool, **measured: Any) -> Result:
        """Do as `save` does, then print the result as JSON or as tables; return the result."""
        from ...benchmarks.report.blocks import for_terminal
        from ...benchmarks.report.page import sections_of

        result, path = self.save(output, title, **measured)
        if as_json:
            print_json(result.model_dump(mode="json"))
            return result
        for section in sections_of(result, output):
            for block in for_terminal(section):
                out.print(block, highlight=False, soft_wrap=isinstance(block, str), crop=False)
        print_bold(path)
        return result
