"""What the commands share: consoles, options that mean the same everywhere, progress, and printing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..runtime.quiet import quiet_libraries as quiet_libraries

out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A hub id, a diffusers pipeline directory, or a bare UNet's directory.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle that offcut build made.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, and nothing else on standard output.")]
Precision = Annotated[str, typer.Option(help="Of the graphs: fp32, fp16 or bf16. The last two can cost image quality.")]
Opset = Annotated[int | None, typer.Option(help="ONNX opset; the engine's best by default.")]
Fix = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=SIZE,...", help="Fix dimensions: batch, frames, height and width of the latent, sequence."
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="controlnet or t2i-adapter: gives the graphs their inputs; again for both. "
        "A bundle has those of the model's own pipeline by default.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:SCALE]", help="A LoRA of kohya, diffusers or PEFT; again for several."),
]
IPAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--ip-adapter",
        metavar="FILE[:SCALE[:IMAGES]]",
        help="Weights of an IP-Adapter to build in (safetensors); again for several.",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="cross-frame, for Text2Video-Zero: each frame attends to the first. "
        "A bundle has what the model's own pipeline uses by default."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Variant = Annotated[str | None, typer.Option(help="Of the weight files, e.g. fp16.")]
Subfolder = Annotated[str | None, typer.Option(help="Of the UNet inside the model; 'unet' in a pipeline.")]
Cuts = Annotated[list[str] | None, typer.Option("--cut", help="deepcache:K, paper:K or mlperf; again for several.")]
EngineName = Annotated[str, typer.Option("--engine", help="auto, or one of those that offcut doctor lists.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda as PyTorch spells it.")]
Provider = Annotated[
    str | None,
    typer.Option(help="Of ONNX Runtime on cuda: cuda, tensorrt or tensorrt-rtx. The last two compile first."),
]
Threads = Annotated[int | None, typer.Option(help="Of a CPU engine; one a core by default.")]


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
