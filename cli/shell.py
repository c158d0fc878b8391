"""What the commands share besides options: consoles, progress, parsing of texts, and printing."""

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
from rich.markup import escape

from ..runtime.quiet import quiet_libraries as quiet_libraries
from .options import Adapters as Adapters
from .options import Attention as Attention
from .options import BundleArgument as BundleArgument
from .options import Cuts as Cuts
from .options import Device as Device
from .options import EngineName as EngineName
from .options import Fix as Fix
from .options import IPAdapters as IPAdapters
from .options import Json as Json
from .options import Loras as Loras
from .options import Model as Model
from .options import Opset as Opset
from .options import Precision as Precision
from .options import Provider as Provider
from .options import Revision as Revision
from .options import Subfolder as Subfolder
from .options import Threads as Threads
from .options import Variant as Variant

out = Console()
err = Console(stderr=True)


def complain(error: Exception) -> None:
    """Print an error; in ``pip install 'offcut[cpu]'`` the brackets are its own, not rich's."""
    err.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)


def loras_of(given: list[str] | None) -> dict[str | Path, float]:
    """``FILE[:SCALE]`` as paths with scales."""
    from ..exporter.lora import Scaled

    return {each.path: each.scale for each in map(Scaled.parse, given or ())}


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A spinner on standard error with the present stage; finished stages stay, with their seconds.

    A sentence that is indented is a detail of the present stage, and is gone with the next one.
    """
    began: list[tuple[str, float]] = []

    def finish() -> None:
        if began:
            stage, start = began.pop()
            err.print(f"[green]✓[/] {stage} [dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)

    with err.status("...") as status:

        def begin(stage: str) -> None:
            if stage.startswith(" ") and began:
                status.update(f"{began[0][0]}[dim]{stage}[/]")
                return
            finish()
            began.append((stage, time.perf_counter()))
            status.update(stage)

        yield begin
        finish()


@contextmanager
def bar(total: int) -> Iterator[Callable[[], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("denoise"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("denoise", total=total)
        yield lambda: progress.advance(task)


@contextmanager
def long_bar(total: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """A bar over the UNet calls, with the time that is left; what is being done stands before it."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, speed_estimate_period=300) as progress:
        task = progress.add_task("", total=total)
        yield (
            lambda count: progress.advance(task, count),
            lambda text: progress.update(task, description=text),
        )


def dims_of(text: str | None) -> dict[str, int]:
    """``"batch=2,height=64"`` as a dict."""
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


def settings_of(texts: list[str], engines: list[str]) -> dict[str, dict[str, Any]]:
    """``["inductor.max_autotune=true"]`` by engine; the engine may be left out where only one is built.

    A value is ``true``, ``false``, a number, several separated by commas, or text.
    """
    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        engine, dot, setting = name.rpartition(".")
        if not equals or not setting or (not dot and len(engines) > 1):
            raise typer.BadParameter(f"{text!r} is not ENGINE.NAME=VALUE", param_hint="--set")
        settings.setdefault(engine or engines[0], {})[setting] = _value(value)
    return settings


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if "," in text:
        return tuple(part for part in text.split(",") if part)
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text or None


def print_contract(contract: dict[str, Any]) -> None:
    for direction, specs in contract.items():
        for spec in specs.values():
            out.print(f"  {direction[:-1]:6} {spec}", highlight=False, markup=False)


def contract_json(contract: dict[str, Any]) -> dict[str, Any]:
    return {
        direction: [{"name": spec.name, "dtype": spec.dtype, "shape": spec.shape} for spec in specs.values()]
        for direction, specs in contract.items()
    }


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")
