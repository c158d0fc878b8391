"""offcut: DeepCache for compiled engines.

A diffusion UNet is exported once and cut into a full and a shallow graph. Each graph becomes an engine, and the runtime
alternates between the two engines while the cached features stay in device memory.

The names below are the public API. They are imported on first use, so that ``import offcut`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.builder.build import build
    from .engines.bundle.bundle import Bundle
    from .errors import OffcutError
    from .exporter.cut import find_cuts, split
    from .exporter.trace.export import export
    from .runtime.batching.worker import Worker
    from .runtime.calibration import Calibration
    from .runtime.deepcache import DeepCacheSDHelper
    from .runtime.generation.forecast import Extrapolate
    from .runtime.generation.schedule import Quad, Steps, Uniform
    from .runtime.pipeline import attach, load
    from .runtime.tuning.artifact import Tuned
    from .runtime.unet import UNet

_MODULES = {
    "Bundle": "engines.bundle.bundle",
    "Calibration": "runtime.calibration",
    "DeepCacheSDHelper": "runtime.deepcache",
    "Extrapolate": "runtime.generation.forecast",
    "OffcutError": "errors",
    "Quad": "runtime.generation.schedule",
    "Steps": "runtime.generation.schedule",
    "Tuned": "runtime.tuning.artifact",
    "UNet": "runtime.unet",
    "Uniform": "runtime.generation.schedule",
    "Worker": "runtime.batching.worker",
    "attach": "runtime.pipeline",
    "build": "engines.builder.build",
    "export": "exporter.trace.export",
    "find_cuts": "exporter.cut",
    "load": "runtime.pipeline",
    "split": "exporter.cut",
}

__all__ = [
    "Bundle",
    "Calibration",
    "DeepCacheSDHelper",
    "Extrapolate",
    "OffcutError",
    "Quad",
    "Steps",
    "Tuned",
    "UNet",
    "Uniform",
    "Worker",
    "attach",
    "build",
    "export",
    "find_cuts",
    "load",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
