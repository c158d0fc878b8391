"""TensorRT or TensorRT-RTX: which package, and what it can do here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ...errors import EngineError, MissingExtraError
from ..base import Probe


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's two libraries.

    Attributes:
        name: the engine's name; its module has underscores in it.
        extra: of offcut, that installs it.
        rtx: TensorRT-RTX, which builds for other GPUs and on machines without one.
    """

    name: str
    extra: str
    rtx: bool

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")


TENSORRT = Flavour("tensorrt", "cuda", rtx=False)
TENSORRT_RTX = Flavour("tensorrt-rtx", "rtx", rtx=True)


def load(flavour: Flavour) -> Any:
    """The library's Python module, with Polygraphy set to it.

    Polygraphy chooses between the two once, as it is imported, so a process works with one of them.

    Raises:
        MissingExtraError: it or Polygraphy is not installed.
        EngineError: this process works with the other one.
    """
    try:
        from polygraphy import config
    except ImportError as error:
        raise MissingExtraError(f"the {flavour.name} engine", "polygraphy", flavour.extra) from error
    if "polygraphy.backend.trt" in sys.modules and flavour.rtx != config.USE_TENSORRT_RTX:
        other = TENSORRT if flavour.rtx else TENSORRT_RTX
        raise EngineError(
            f"this process already works with {other.name}, and cannot with {flavour.name} too: "
            "use a process of its own for each"
        )
    try:
        module = import_module(flavour.module)
    except ImportError as error:
        raise MissingExtraError(f"the {flavour.name} engine", flavour.name, flavour.extra) from error
    config.USE_TENSORRT_RTX = flavour.rtx
    import_module("polygraphy.backend.trt")
    return module


def probe(flavour: Flavour) -> Probe:
    """Look whether this library is installed, and whether there is a GPU for it."""
    installed = _installed(flavour)
    if installed is None:
        return Probe(None, (), f"not installed: pip install 'offcut[{flavour.extra}]'")
    try:
        module = import_module(flavour.module)
    except ImportError as error:
        return Probe(installed, (), f"installed, but it cannot be imported: {str(error).splitlines()[0]}")
    if find_spec("polygraphy") is None:
        return Probe(installed, (), f"installed, but not polygraphy: pip install 'offcut[{flavour.extra}]'")
    target = this_gpu()
    if target is None:
        without = "it builds for others, with compute_capabilities" if flavour.rtx else "it needs one to build, too"
        return Probe(installed, (), f"PyTorch sees no NVIDIA GPU here; {without}", builds=flavour.rtx)
    if flavour.rtx and target not in supported(module):
        reason = f"it does not run on {target}, only on {', '.join(supported(module))}"
        return Probe(installed, (), reason, targets={"cuda": target}, builds=True)
    return Probe(installed, ("cuda",), f"a GPU of {target}", targets={"cuda": target}, builds=True)


def this_gpu() -> str | None:
    """The kind of PyTorch's current GPU, e.g. ``"sm_89"``."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def supported(module: Any) -> list[str]:
    """The kinds of GPU that TensorRT-RTX builds for."""
    members = module.ComputeCapability.__members__
    kinds = [f"sm_{name[2:]}" for name in members if name.startswith("SM")]
    return sorted(kinds, key=lambda kind: int(kind[3:]))


def _installed(flavour: Flavour) -> str | None:
    # NVIDIA also publishes each under a name that says its CUDA release.
    for package in (flavour.name, f"{flavour.name}-cu13", f"{flavour.name}-cu12"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
