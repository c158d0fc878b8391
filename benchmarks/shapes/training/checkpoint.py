"""Parts that all training stages share: atomic checkpoints, a loss log, progress, and averaged weights."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import UserError

if TYPE_CHECKING:
    import torch


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint to a temporary file and rename it, so that `path` always holds a complete checkpoint."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(dict(state), temporary)
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are read, no pickled code.

    Raises:
        UserError: there is no checkpoint at `path`.
    """
    import torch

    if not path.exists():
        raise UserError(f"{path} does not exist: run `python -m offcut.benchmarks.shapes.training.train` first")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Average:
    """The exponential moving average of a module's parameters (EMA), as fp32 tensors on the module's device.

    At step n the decay is (1 + n) / (10 + n), at most `limit`, so that a short run is averaged over its last part only.
    """

    def __init__(self, module: torch.nn.Module, limit: float = 0.999) -> None:
        self._module = module
        self._limit = limit
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def update(self, step: int) -> None:
        """Move the average towards the module's current parameters; `step` counts from 0."""
        import torch

        decay = min(self._limit, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in self._module.state_dict().items():
                if value.is_floating_point():
                    self.state[name].lerp_(value, 1 - decay)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a saved `state`."""
        for name, value in state.items():
            self.state[name].copy_(value)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the rate of a step: a linear warm-up to `peak`, then half a cosine down to 2 % of `peak` at `steps`."""
    import math

    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


class LossLog:
    """A file with one JSON line for each interval: step, mean loss, seconds per step, and the caller's own fields."""

    def __init__(self, path: Path, start: int) -> None:
        """Open the log to continue after step `start`; later lines, from an interrupted run, are deleted."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_log(path) if row["step"] <= start]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._losses: list[float] = []
        self._since = time.perf_counter()

    def add(self, loss: float) -> None:
        """Add the loss of one step to the current interval."""
        self._losses.append(loss)

    def resume(self) -> None:
        """Exclude the time since the last line from the next line's seconds per step."""
        self._since = time.perf_counter()

    def write(self, step: int, **more: float) -> dict[str, float]:
        """Write a line with the mean loss of the steps since the last line, and return it."""
        now = time.perf_counter()
        count = max(1, len(self._losses))
        row = {
            "step": step,
            "loss": round(sum(self._losses) / count, 6),
            "seconds_per_step": round((now - self._since) / count, 4),
            **more,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._losses, self._since = [], now
        return row

    def line(self, step: int, **more: float) -> str:
        """Write a line like ``write``, and return its text for the progress bar."""
        row = self.write(step, **more)
        return f"loss {row['loss']:.4f}, {row['seconds_per_step']:.2f} s/step"


def read_log(path: Path) -> list[dict[str, float]]:
    """Return all lines of a loss log, oldest first; empty where the file does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


@contextmanager
def progress(title: str, start: int, steps: int) -> Iterator[Any]:
    """Show a progress bar on a terminal, or else print a line for each log interval; yield `report(step, text)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    counters = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    columns = (TextColumn(title), *counters, TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=steps, completed=start, text="")

        def report(step: int, text: str | None = None) -> None:
            if console.is_terminal:
                bar.update(task, completed=step)
                if text is not None:
                    bar.update(task, text=text)
            elif text is not None:
                print(f"{title} {step}/{steps} {text}", flush=True)

        yield report
