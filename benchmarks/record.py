"""``result.json``: the figures, the command and the environment of one run of ``offcut bench``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError
from .schema.controlnet import ControlNetReuse
from .schema.latency import Latency
from .schema.mlperf import MlPerf
from .schema.precision import Precision
from .schema.quality import Quality
from .schema.serving import ServingLoad
from .swap import Swap

SCHEMA: Literal[1] = 1
"""Schema version of ``result.json``; files with another version are refused."""

NAME = "result.json"

_FORMER = ("growth", "drift")  # sections of removed benchmarks


class Environment(BaseModel):
    """The machine and its installed packages."""

    model_config = ConfigDict(extra="forbid")

    cpu: str
    cores: int
    memory_gib: float
    system: str
    python: str
    gpu: str | None = None
    packages: dict[str, str] = Field(
        description="versions of the packages that influence the figures, by distribution name"
    )
    load: float | None = Field(None, description="the system's 1-minute load average at the start of the run")


class Result(BaseModel):
    """One run of ``offcut bench``."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA
    title: str
    command: str = Field(description="command line of the run")
    started: datetime
    seconds: float = Field(ge=0, description="duration of the whole run")
    environment: Environment
    latency: Latency | None = None
    quality: Quality | None = None
    mlperf: MlPerf | None = None
    swap: Swap | None = None
    serving: ServingLoad | None = None
    controlnet: ControlNetReuse | None = None
    precision: Precision | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_former_fields(cls, fields: Any) -> Any:
        """Remove the empty sections and the verdicts on claims that earlier versions wrote."""
        if not isinstance(fields, dict):
            return fields
        fields = {name: value for name, value in fields.items() if name not in _FORMER or value is not None}
        if isinstance(quality := fields.get("quality"), dict):
            fields["quality"] = {name: value for name, value in quality.items() if name != "claims"}
        return fields

    def save(self, folder: Path) -> Path:
        """Write ``result.json`` into a folder, replacing an older one atomically; return its path."""
        return write_whole(folder / NAME, self.model_dump_json(indent=1) + "\n")


def write_whole(path: Path, text: str) -> Path:
    """Write a file and its folder, replacing an older file atomically; return its path.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; give another directory with -o") from error
    return path


def read(path: Path) -> Result:
    """Read a ``result.json`` file, or the ``result.json`` in a folder.

    Raises:
        UserError: the file is missing, or this version of offcut cannot read it.
    """
    file = path / NAME if path.is_dir() else path
    try:
        return Result.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give the directory that offcut bench wrote") from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{file} is not a result of this version's offcut bench: {first}") from error


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of ``result.json``."""
    return Result.model_json_schema()


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Return ``sys.argv`` as one command line, without the directory of its program."""
    program, *options = sys.argv if arguments is None else arguments
    return shlex.join([Path(program).name, *options])


def now() -> datetime:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def environment(packages: Sequence[str]) -> Environment:
    """Return a description of this machine, with the versions of the packages that are installed."""
    import platform

    import psutil
    import torch

    return Environment(
        cpu=_cpu(),
        cores=available_cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        packages=installed_versions(packages),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of each package that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _cpu() -> str:
    """Return the processor's name, with the matrix and vector extensions that influence its speed."""
    import platform

    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    values = {name.strip(): value.lstrip("\t: ").strip() for name, value in fields.items()}
    flags = set(values.get("flags", "").split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    extensions = ", ".join(flag for flag in known if flag in flags)
    name = values.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({extensions})" if extensions else name
