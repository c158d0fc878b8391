"""Seconds and memory of ``offcut export`` and ``offcut build`` on models of growing size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import OffcutError, UserError
from ...exporter.load import locate
from ..architectures import UNETS
from ..latency.resolve import parameters
from ..schema.growth import Fit, Made
from ..shapes.model import model_path
from .sweeps import power_law

SHAPES = "shapes"
"""Name of the bundled model. Those of ``architectures.UNETS`` are made with random weights."""


def build_all(
    models: Sequence[str], engine: str, precision: str, log: Path, progress: Callable[[str], None]
) -> tuple[list[Made], dict[str, str]]:
    """Export and build each model in processes of their own; the exports and bundles are deleted.

    Args:
        models: diffusers directories, ``shapes``, or names of ``architectures.UNETS``.
        engine, precision: options of ``offcut build``.
        log: file to which the commands' output is appended.

    Returns:
        The measurements, and the reason for each model that could not be built.
    """
    made: list[Made] = []
    failed: dict[str, str] = {}
    for name in models:
        with tempfile.TemporaryDirectory(prefix="offcut-growth-") as scratch:
            try:
                made += _export_and_build(name, engine, precision, Path(scratch), log, progress)
            except OffcutError as error:
                failed[_label(name)] = str(error)
    return made, failed


def laws(made: Sequence[Made]) -> list[Fit]:
    """Fit how seconds and memory of each command grow with the model's parameters."""
    fits = []
    for command in ("export", "build"):
        rows = [row for row in made if row.command == command]
        sizes = [row.parameters for row in rows]
        for of, values in (
            (f"{command}, seconds", [row.seconds for row in rows]),
            (f"{command}, memory", [float(row.host_peak_bytes) for row in rows]),
        ):
            fits.append(power_law(of, sizes, values))
    return [fit for fit in fits if fit is not None]


def _label(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name


def _export_and_build(
    name: str, engine: str, precision: str, scratch: Path, log: Path, progress: Callable[[str], None]
) -> list[Made]:
    folder = _model(name, scratch, log, progress)
    count = parameters(locate(folder))
    rows = []
    for command, options in (("export", ()), ("build", ("--engine", engine))):
        progress(f"{command} {_label(name)}")
        out = scratch / command
        arguments = ["-m", "offcut", command, str(folder), "-o", str(out), "--precision", precision, *options]
        seconds, peak = _run(arguments, log)
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        shutil.rmtree(out)
        rows.append(
            Made(
                model=_label(name),
                parameters=count,
                command=command,  # type: ignore[arg-type]  # mypy widens the tuple's literals
                seconds=seconds,
                host_peak_bytes=peak,
                size_bytes=written,
            )
        )
    return rows


def _model(name: str, scratch: Path, log: Path, progress: Callable[[str], None]) -> Path:
    if Path(name).is_dir():
        return Path(name).resolve()
    if name == SHAPES:
        return model_path()
    if name not in UNETS:
        known = ", ".join([SHAPES, *UNETS])
        raise UserError(f"{name} is not a directory: give a diffusers directory, or one of {known}")
    progress(f"make {name} with random weights")
    folder = scratch / name
    _run(["-m", "offcut.benchmarks.architectures", name, str(folder)], log)
    return folder


def _run(arguments: Sequence[str], log: Path) -> tuple[float, int]:
    """Run a Python process; return its seconds and its peak resident memory in bytes.

    Raises:
        UserError: the process failed; the message has its last line.
    """
    with log.open("ab") as messages:
        offset = messages.tell()
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=messages, stderr=messages)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - began
    process.returncode = code = os.waitstatus_to_exitcode(status)
    if code:
        lines = log.read_bytes()[offset:].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {code}")
        raise UserError(f"offcut {' '.join(arguments[2:3])} failed with {code}: {last}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
