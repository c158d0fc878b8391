"""The table of engines, and the rule by which ``auto`` chooses an engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from ..errors import EngineError
from .base import CompilingEngine, Engine, EngineProbe

# A new engine: one module, one line here, one row in precision.BOUNDS, one parameter in the tests.
_MODULES = {
    "tensorrt": "nvidia.tensorrt",
    "tensorrt-rtx": "nvidia.tensorrt_rtx",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime.pair",
    "inductor": "inductor",
}
ENGINES = tuple(_MODULES)

_COMPILED_FOR_CUDA = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Choice:
    """An engine, and the reason why it was chosen."""

    name: str
    reason: str


def engine(name: str) -> Engine:
    """Return the engine's module.

    Raises:
        EngineError: no engine has this name.
    """
    if name not in ENGINES:
        raise EngineError(f"there is no engine {name!r}; choose auto or one of {', '.join(ENGINES)}")
    return cast(Engine, import_module(f".{_MODULES[name]}", __package__))


def compiler(name: str) -> CompilingEngine | None:
    """Return the engine's module if it compiles; None if it opens the ONNX graphs as they are."""
    module = engine(name)
    return module if isinstance(module, CompilingEngine) else None


def probe_all() -> dict[str, EngineProbe]:
    """Probe every engine on this machine."""
    return {name: engine(name).probe() for name in ENGINES}


def machine() -> dict[str, str]:
    """Return the facts about this machine that decide which engines work, for a report."""
    import platform

    import diffusers
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability() + (" with AMX" if _has_amx() else ""),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def choose(device: str = "cpu", among: Iterable[str] = ENGINES) -> Choice:
    """Choose the best engine for a device and say why; ``engine="auto"`` uses this function.

    On CUDA the order is TensorRT, TensorRT-RTX (both compile the graphs for the GPU), ONNX Runtime. On a CPU with AMX
    (bf16 matrix units) the choice is OpenVINO, which was measured fastest there even on fp32 graphs. On other CPUs it
    is ONNX Runtime.

    Args:
        among: names of engines to choose from.

    Raises:
        EngineError: no engine is usable; the message gives the reason for each.
    """
    among = list(among)
    probes = {name: engine(name).probe() for name in among}
    kind = device.partition(":")[0]  # "cuda:1" is a device of the kind "cuda"
    usable = [name for name, probe in probes.items() if kind in probe.devices]
    if not usable:
        reasons = "; ".join(f"{name}: {probe.reason}" for name, probe in probes.items()) or "none was built"
        raise EngineError(f"no engine can run on {device} here ({reasons})")
    if len(among) == 1:
        return Choice(usable[0], "the only engine to choose from")
    if len(usable) == 1:
        left_out = [name for name in among if name not in usable]
        suffix = f"; {', '.join(left_out)} cannot run there" if left_out else ""
        return Choice(usable[0], f"the only engine usable on {device}{suffix}")
    if device == "cpu" and "openvino" in usable and _has_amx():
        return Choice("openvino", "this CPU has AMX, where OpenVINO was measured faster than ONNX Runtime")
    if kind == "cuda" and (compiled := [name for name in _COMPILED_FOR_CUDA if name in usable]):
        return Choice(compiled[0], "compiles the graphs for this GPU")
    if "onnxruntime" in usable:
        return Choice(
            "onnxruntime", f"measured fastest on a {device} without AMX" if device == "cpu" else "runs on CUDA"
        )
    return Choice(usable[0], "the first usable engine in the table")


def _has_amx() -> bool:
    import torch

    return bool(torch.cpu._is_amx_tile_supported())
