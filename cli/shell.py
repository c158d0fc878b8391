"""Output of the commands (consoles, errors, progress, JSON), and parsers of option texts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ..runtime.quiet import quiet_libraries as quiet_libraries

_LONGEST_MESSAGE = 1000


class _PlainConsole(Console):
    """Console that prints texts as they are: names from a bundle or a client may hold markup or control characters."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text without control characters, which could steer the terminal."""
        return super().render_str(printable(text), **options)


def printable(text: str) -> str:
    """Return a text with control characters and half surrogate pairs as escapes, except for line breaks and tabs."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


out = _PlainConsole()
err = _PlainConsole(stderr=True)


def print_error(error: Exception | str) -> None:
    """Print an error on standard error, in one paragraph of limited length."""
    message = printable(str(error))
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE - 200]} ... {message[-200:]}"
    err.print(Text.assemble(("error", "bold red"), f": {message}"), soft_wrap=True)


def print_bold(subject: object, rest: str = "") -> None:
    """Print a name or path in bold, and what is said about it."""
    out.print(Text.assemble((printable(str(subject)), "bold"), printable(rest)), soft_wrap=True)


def parse_loras(texts: list[str] | None) -> dict[str | Path, float]:
    """Return the scale of each LoRA file by path, from texts ``FILE[:SCALE]``."""
    from ..exporter.lora import ScaledLora

    return {lora.path: lora.scale for lora in map(ScaledLora.parse, texts or ())}


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Show the current stage with a spinner on standard error; finished stages remain, with their seconds.

    Yields:
        A function that begins a stage. An indented text is a detail of the current stage, shown until the next text.
    """
    current: list[tuple[str, float]] = []  # the stage and the time when it began

    def finish() -> None:
        if current:
            stage, start = current.pop()
            seconds = time.perf_counter() - start
            err.print(Text.assemble(("✓", "green"), f" {printable(stage)} ", (f"{seconds:.1f} s", "dim")))

    with err.status("...") as status:

        def begin(stage: str) -> None:
            if stage.startswith(" ") and current:
                status.update(Text.assemble(printable(current[0][0]), (printable(stage), "dim")))
                return
            finish()
            current.append((stage, time.perf_counter()))
            status.update(Text(printable(stage)))

        yield begin
        finish()


@contextmanager
def steps_bar(total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar of denoising steps; yields a function that counts a step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("denoise"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("denoise", total=total)
        yield lambda: progress.advance(task)


@contextmanager
def calls_bar(total: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """Show a progress bar of UNet calls with the remaining time.

    Yields:
        A function that counts calls, and a function that sets the text before the bar.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, speed_estimate_period=300) as progress:
        task = progress.add_task("", total=total)
        yield (
            lambda count: progress.advance(task, count),
            lambda text: progress.update(task, description=text),
        )


def parse_dims(text: str | None) -> dict[str, int]:
    """Return the sizes of dimensions by name, from a text such as ``"batch=2,height=64"``."""
    dims = {}
    for part in (text or "").split(","):
        name, _, size = part.partition("=")
        if not part:
            continue
        if name not in ("batch", "frames", "height", "width", "sequence") or not size.isdigit() or int(size) < 1:
            raise typer.BadParameter(
                f"{part!r} is not batch=, frames=, height=, width= or sequence= with a size", param_hint="--fix"
            )
        dims[name] = int(size)
    return dims


def parse_settings(texts: list[str], engines: list[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of each engine, from texts such as ``"inductor.max_autotune=true"``.

    The engine may be left out if only one is built. A value is ``true``, ``false``, a number, a text, or several
    texts separated by commas.
    """
    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        engine, dot, setting = name.rpartition(".")
        if not equals or not setting or (not dot and len(engines) > 1):
            raise typer.BadParameter(f"{text!r} is not ENGINE.NAME=VALUE", param_hint="--set")
        settings.setdefault(engine or engines[0], {})[setting] = _parse_value(value)
    return settings


def _parse_value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if "," in text:
        return tuple(part for part in text.split(",") if part)
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text or None


def print_contract(contract: dict[str, Any]) -> None:
    """Print the inputs and outputs of a graph."""
    for direction, specs in contract.items():
        for spec in specs.values():
            out.print(f"  {direction[:-1]:6} {spec}", highlight=False, markup=False)


def contract_json(contract: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs and outputs of a graph as JSON values."""
    return {
        direction: [{"name": spec.name, "dtype": spec.dtype, "shape": spec.shape} for spec in specs.values()]
        for direction, specs in contract.items()
    }


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")
