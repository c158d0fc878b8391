"""The files of a run: ``result.json`` for programs, ``report.md`` for people, and ``tracebacks.txt``."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field

from ...engines.registry import machine, probe_all
from ..record import installed_versions
from .check import CheckResult, Figure

RESULT, REPORT, TRACEBACKS = "result.json", "report.md", "tracebacks.txt"
STATUSES = ("passed", "failed", "error", "not run")
_PACKAGES = ("offcut", "onnx", "onnxscript", "polygraphy", "triton", "DeepCache")


class GpuReport(BaseModel):
    """The report of a run.

    Attributes:
        date: start in UTC, as ISO 8601.
        command: the command line.
        machine: facts about the machine, by name.
        checks: results of all selected checks.
    """

    model_config = ConfigDict(extra="ignore")

    schema_version: Literal[1] = 1
    date: str
    command: str
    machine: dict[str, str]
    checks: list[CheckResult]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def counts(self) -> dict[str, int]:
        """Number of checks by status."""
        counted = Counter(result.status for result in self.checks)
        return {status: counted[status] for status in STATUSES}  # type: ignore[index]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> str:
        """One sentence about the whole run."""
        counts = self.counts
        if counts["failed"] or counts["error"]:
            return "A check failed or ended with an error: " + ", ".join(f"{counts[name]} {name}" for name in STATUSES)
        if not counts["passed"]:
            reasons = Counter(result.reason for result in self.checks)
            why = reasons.most_common(1)[0][0] if reasons else "no check was chosen"
            return f"No check was run: {why}"
        return f"All checks that ran passed: {counts['passed']} passed, {counts['not run']} not run"

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``result.json``, which names the file of tracebacks instead of repeating them."""
        content = self.model_dump(mode="json")
        for check in content["checks"]:
            if check.pop("trace"):
                check["traceback"] = TRACEBACKS
        return content


def write(report: GpuReport, folder: Path) -> None:
    """Write all three files; without tracebacks an old ``tracebacks.txt`` is removed."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(markdown(report), encoding="utf-8")
    traces = [f"{result.id}\n\n{result.trace}" for result in report.checks if result.trace]
    if traces:
        (folder / TRACEBACKS).write_text("\n\n".join(traces), encoding="utf-8")
    else:
        (folder / TRACEBACKS).unlink(missing_ok=True)


def read(file: Path) -> GpuReport:
    """Read ``result.json``; it holds no tracebacks."""
    return GpuReport.model_validate_json(file.read_text(encoding="utf-8"))


def facts(device: str) -> dict[str, str]:
    """Return facts about the machine: the GPU, its driver, and the versions of the libraries."""
    import torch

    known = {"device": device, **machine()}
    if device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        known |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "gpu memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
        }
    known |= {
        "driver": _driver(),
        "cuda": torch.version.cuda or "none: PyTorch was built without it",
        "cudnn": str(torch.backends.cudnn.version() or "none"),  # type: ignore[no-untyped-call]
    }
    known |= {f"engine {name}": f"{probe.version or 'absent'} ({probe.reason})" for name, probe in probe_all().items()}
    versions = installed_versions(_PACKAGES)
    return known | {package: versions.get(package, "not installed") for package in _PACKAGES}


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: there is no nvidia-smi"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return f"unknown: nvidia-smi ended with {done.returncode}"
    return ", ".join(dict.fromkeys(done.stdout.split()))


def markdown(report: GpuReport) -> str:
    """Return the report in Markdown: a table of the machine and one for each group of checks."""
    lines = ["# offcut: GPU check", "", f"**{report.verdict}.**", "", f"`{report.command}`, {report.date}", ""]
    lines += ["| machine | |", "|---|---|", *(f"| {name} | {_cell(fact)} |" for name, fact in report.machine.items())]
    for group in dict.fromkeys(result.group for result in report.checks):
        lines += ["", f"## {group}", "", "| check | status | measured | s |", "|---|---|---|---|"]
        for result in report.checks:
            if result.group == group:
                title = f"{result.title}<br>`{result.id}`"
                lines.append(f"| {title} | {_status(result)} | {_measured(result)} | {result.seconds:.1f} |")
    return "\n".join(lines) + "\n"


def _status(result: CheckResult) -> str:
    mark = result.status if result.status in ("passed", "not run") else f"**{result.status}**"
    return f"{mark}: {_cell(result.reason)}" if result.reason else mark


def _measured(result: CheckResult) -> str:
    """Return the figures with bounds, then the other figures; failed ones are marked in bold."""
    claims = [
        f"{'' if claim.holds else '**FAILED** '}{_cell(claim.name)}: {claim.value:.4g} ({claim.sign} {claim.bound:.4g})"
        for claim in result.claims
    ]
    return "<br>".join([*claims, *(_cell(f"{name}: {_short(figure)}") for name, figure in result.figures.items())])


def _short(figure: Figure) -> str:
    return f"{figure:.4g}" if isinstance(figure, float) else str(figure)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
