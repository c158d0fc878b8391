"""Command that runs every GPU check on this machine and writes ``result.json`` and ``report.md``."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import UserError

if TYPE_CHECKING:
    from .gpu.check import CheckResult

out = Console()
err = Console(stderr=True)

_LOG = "log.txt"
_COLOURS = {"passed": "green", "failed": "bold red", "error": "bold red", "not run": "yellow"}
_EXAMPLES = """Examples:

python -m offcut.benchmarks.gpu_check --output gpu-check

python -m offcut.benchmarks.gpu_check --engines inductor,tensorrt --precisions fp16 --only 'streams/*'

python -m offcut.benchmarks.gpu_check --performance --architectures sd15,sdxl --batches 1,8 --only performance

python -m offcut.benchmarks.gpu_check --list --performance
"""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog=_EXAMPLES)
def gpu_check(
    output: Annotated[Path, typer.Option(help="Directory for result.json, report.md and the log.")] = Path("gpu-check"),
    only: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Run only checks whose id matches; --list shows the ids.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Only print the checks, with the reasons why some cannot run.")
    ] = False,
    engines: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Engines under test; by default all that support CUDA.")
    ] = None,
    precisions: Annotated[
        str, typer.Option(help="Precisions of the correctness checks; performance is measured in the first.")
    ] = "fp16,bf16,fp32",
    every_cut: Annotated[
        bool, typer.Option("--every-cut", help="Compare all 13 cuts instead of four; takes longer.")
    ] = False,
    performance: Annotated[bool, typer.Option("--performance", help="Also measure speed; takes minutes.")] = False,
    architectures: Annotated[str, typer.Option(help="For --performance: sd15, sdxl, small.")] = "sd15",
    batches: Annotated[str, typer.Option(help="For --performance: numbers of images in one call.")] = "1",
    steps: Annotated[int, typer.Option(min=2, help="For --performance: steps of the denoising loop.")] = 50,
    interval: Annotated[int, typer.Option(min=2, help="For --performance: one full UNet call in every N calls.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="For --performance: measured loops of each model.")] = 5,
    device: Annotated[
        str, typer.Option(help="cuda or cuda:1; cpu tests the checks, and proves nothing about a GPU.")
    ] = "cuda",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one check may take.")] = 3600,
    work: Annotated[
        Path | None,
        typer.Option(help="Directory for models and engines to reuse; a temporary one by default."),
    ] = None,
    require_gpu: Annotated[bool, typer.Option("--require-gpu", help="Exit with 1 if no check could run.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print result.json, and nothing else on standard output.")
    ] = False,
) -> None:
    """Run every GPU check on this machine and write [bold]result.json[/] and [bold]report.md[/].

    A check passes, fails, ends with an error, or is not run for a stated reason.
    Without a GPU no check runs. The exit code is 1 if a check failed or ended with an error.
    The command creates its models with random weights, so that it needs no network.
    """
    from ..engines.registry import ENGINES as KNOWN
    from .gpu.catalog import catalog
    from .gpu.check import perform, select
    from .gpu.isolated import perform_isolated
    from .gpu.models import DTYPES, SIDE
    from .gpu.report import REPORT, GpuReport, facts, write
    from .gpu.workbench import ENGINES, GpuOptions, Workbench

    options = GpuOptions(
        device=device,
        engines=_names("--engines", engines, KNOWN) if engines else ENGINES,
        precisions=_names("--precisions", precisions, tuple(DTYPES)),
        every_cut=every_cut,
        performance=performance,
        architectures=_names("--architectures", architectures, tuple(SIDE)),
        batches=tuple(_number(batch) for batch in batches.split(",")),
        steps=steps,
        interval=interval,
        rounds=rounds,
    )
    checks = select(catalog(options), only)
    if not checks:
        raise UserError(f"no check matches {only!r}: --list shows the checks, with --performance also those of speed")
    if list_only:
        for check in checks:
            obstacle = f"  [not run: {check.obstacle}]" if check.obstacle else ""
            out.print(check.id + obstacle, markup=False, soft_wrap=True)
        return

    output.mkdir(parents=True, exist_ok=True)
    (output / _LOG).unlink(missing_ok=True)
    results: dict[str, CheckResult] = {}
    began = time.perf_counter()

    def finished(result: CheckResult) -> None:
        results[result.id] = result
        reason = f" [dim]{escape(result.reason)}[/]" if result.reason else ""
        err.print(f"[{_COLOURS[result.status]}]{result.status}[/] {result.id}{reason}", highlight=False, soft_wrap=True)

    def progress(step: str) -> None:
        err.print(f"[dim]{time.perf_counter() - began:6.0f} s  {escape(step)}[/]", highlight=False, soft_wrap=True)

    with nullcontext(str(work)) if work else tempfile.TemporaryDirectory(prefix="offcut-") as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for check in checks:
            if check.obstacle is not None:
                finished(perform(check, Workbench(options, folder)))
        runnable = [check for check in checks if check.obstacle is None]
        runnable.sort(key=lambda check: options.engines.index(check.engine))
        for _, group in groupby(runnable, key=lambda check: check.engine):
            log = output / _LOG
            perform_isolated(list(group), options, folder, log, timeout=timeout, progress=progress, finished=finished)

    report = GpuReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "offcut.benchmarks.gpu_check", *sys.argv[1:]]),
        machine=facts(device),
        checks=[results[check.id] for check in checks],
    )
    write(report, output)
    if as_json:
        sys.stdout.write(json.dumps(report.as_json(), indent=1) + "\n")
    else:
        _print(report.checks)
        out.print(f"{report.verdict}\n{output / REPORT}", highlight=False, markup=False, soft_wrap=True)
    counts = report.counts
    if counts["failed"] or counts["error"] or (require_gpu and not counts["passed"]):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; print a user's error as one sentence and exit with code 1."""
    try:
        app()
    except UserError as error:
        err.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{', '.join(unknown)} is not one of {', '.join(known)}", param_hint=option)
    return names


def _number(text: str) -> int:
    if not text.strip().isdigit() or not int(text):
        raise typer.BadParameter(f"{text!r} is not a number of images", param_hint="--batches")
    return int(text)


def _print(results: Sequence[CheckResult]) -> None:
    """Print every figure with its bound, then the checks that were not run, grouped by reason."""
    not_run: dict[str, list[str]] = {}
    for result in results:
        if result.status == "not run":
            not_run.setdefault(result.reason, []).append(result.id)
            continue
        _line(f"[{_COLOURS[result.status]}]{result.status:7}[/] [bold]{result.id}[/] [dim]{result.seconds:.1f} s[/]")
        if result.status == "error":
            _line(f"        {escape(result.reason)}")
        for claim in result.claims:
            text = escape(f"{claim.name}: {claim.value:.4g} ({claim.sign} {claim.bound:.4g})")
            _line(f"        {text}" if claim.holds else f"        [bold red]{text}[/]")
    for reason, identifiers in not_run.items():
        _line(f"[yellow]not run[/] {len(identifiers)} checks: {escape(reason)}")


def _line(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
