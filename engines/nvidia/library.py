"""The two libraries TensorRT and TensorRT-RTX: their packages, and a probe of each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ...errors import EngineError, MissingExtraError
from ..base import EngineProbe


@dataclass(frozen=True)
class NvidiaLibrary:
    """One of NVIDIA's two libraries.

    Attributes:
        name: name of the engine and of the package.
        extra: extra of offcut that installs the library.
        rtx: whether the library is TensorRT-RTX, which builds for other GPUs and on machines without a GPU.
    """

    name: str
    extra: str
    rtx: bool

    @property
    def module(self) -> str:
        """Name of the Python module."""
        return self.name.replace("-", "_")


TENSORRT = NvidiaLibrary("tensorrt", "cuda", rtx=False)
TENSORRT_RTX = NvidiaLibrary("tensorrt-rtx", "rtx", rtx=True)


def load(library: NvidiaLibrary) -> Any:
    """Import the library, and make Polygraphy use it; return its Python module.

    Polygraphy chooses between the two libraries once, when it is imported, so a process can use only one of them.

    Raises:
        MissingExtraError: the library or Polygraphy is not installed.
        EngineError: this process already uses the other library.
    """
    try:
        from polygraphy import config
    except ImportError as error:
        raise MissingExtraError(f"the {library.name} engine", "polygraphy", library.extra) from error
    if "polygraphy.backend.trt" in sys.modules and library.rtx != config.USE_TENSORRT_RTX:
        other = TENSORRT if library.rtx else TENSORRT_RTX
        raise EngineError(
            f"this process already uses {other.name} and cannot use {library.name} too: use a separate process for each"
        )
    try:
        module = import_module(library.module)
    except ImportError as error:
        raise MissingExtraError(f"the {library.name} engine", library.name, library.extra) from error
    config.USE_TENSORRT_RTX = library.rtx
    import_module("polygraphy.backend.trt")
    return module


def probe(library: NvidiaLibrary) -> EngineProbe:
    """Return whether this library is installed, and whether there is a GPU for it."""
    installed = _installed(library)
    if installed is None:
        return EngineProbe(None, (), f"not installed: pip install 'offcut[{library.extra}]'")
    try:
        module = import_module(library.module)
    except ImportError as error:
        return EngineProbe(installed, (), f"installed, but it cannot be imported: {str(error).splitlines()[0]}")
    if find_spec("polygraphy") is None:
        return EngineProbe(installed, (), f"installed, but not polygraphy: pip install 'offcut[{library.extra}]'")
    target = this_gpu()
    if target is None:
        builds = "it can build for GPUs named in compute_capabilities" if library.rtx else "it needs one to build, too"
        return EngineProbe(installed, (), f"PyTorch sees no NVIDIA GPU here; {builds}", builds=library.rtx)
    if library.rtx and target not in supported(module):
        reason = f"it does not run on {target}, only on {', '.join(supported(module))}"
        return EngineProbe(installed, (), reason, targets={"cuda": target}, builds=True)
    return EngineProbe(installed, ("cuda",), f"GPU {target}", targets={"cuda": target}, builds=True)


def this_gpu() -> str | None:
    """Return the kind of PyTorch's current GPU, e.g. ``"sm_89"``; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def supported(module: Any) -> list[str]:
    """Return the kinds of GPU that TensorRT-RTX builds for."""
    members = module.ComputeCapability.__members__
    kinds = [f"sm_{name[2:]}" for name in members if name.startswith("SM")]
    return sorted(kinds, key=lambda kind: int(kind[3:]))


def _installed(library: NvidiaLibrary) -> str | None:
    # NVIDIA also publishes each under a name with its CUDA release.
    for package in (library.name, f"{library.name}-cu13", f"{library.name}-cu12"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
