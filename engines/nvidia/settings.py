"""How TensorRT builds: the settings that a user gives, checked, and what Polygraphy makes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...errors import EngineError
from ..base import Setting, Settings
from .library import NvidiaLibrary, supported, this_gpu

_COMMON: dict[str, Setting] = {
    "optimization_level": None,  # 0..5: how long to look for faster kernels
    "workspace_mib": None,  # most scratch memory that one layer may use
    "tf32": False,  # multiply fp32 with ten-bit mantissas: faster, can cost image quality
    # Weights may stay on the host: see EngineOptions.weight_budget. TensorRT-RTX then has no CUDA graphs.
    "weight_streaming": False,
    "refittable": False,  # weights can be replaced in the built plan
    "strip_plan": False,  # refittable, and the plan has no weights: they are given when it is opened
    "version_compatible": False,  # with later versions of the library
}
SETTINGS: dict[str, Setting] = {
    **_COMMON,
    "timing_cache": None,  # a file that remembers how fast kernels were, for later builds on this kind of GPU
    "hardware_compatibility": None,  # "ampere_plus" or "same_compute_capability": runs on more GPUs, more slowly
}
SETTINGS_RTX: dict[str, Setting] = {
    **_COMMON,
    "compute_capabilities": (),  # of the GPUs to build for, e.g. ("89", "120"); by default this machine's
}
HELPERS = frozenset({"timing_cache"})

_AMPERE_PLUS = ("80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121")


def targets(library: NvidiaLibrary, trt: Any, settings: Settings) -> tuple[str, ...]:
    """The machines that a build with these settings is for, e.g. ``("sm_89", "sm_120")``.

    Raises:
        EngineError: there is no GPU and none was named, or one was named that the library does not build for.
    """
    here = this_gpu()
    named_by_user = settings.get("compute_capabilities") or ()
    asked = named_by_user if isinstance(named_by_user, tuple | list) else (str(named_by_user),)
    if not asked:
        if here is None:
            remedy = "name the GPUs to build for with --compute-capability, e.g. 89" if library.rtx else "build there"
            raise EngineError(f"{library.name} builds for the GPU of the machine, and here is none: {remedy}")
        asked = _AMPERE_PLUS if settings.get("hardware_compatibility") == "ampere_plus" else (here,)
    named = tuple(dict.fromkeys(_target(library, capability) for capability in asked))
    if library.rtx and (strange := [target for target in named if target not in supported(trt)]):
        raise EngineError(
            f"{library.name} does not build for {', '.join(strange)}: choose from {', '.join(supported(trt))}"
        )
    if library.rtx and (settings["refittable"] or settings["strip_plan"]):
        if len(named) > 1:
            raise EngineError(f"a refittable plan of {library.name} is for one kind of GPU: name one")
        if here is None:
            raise EngineError(f"a refittable plan of {library.name} is built with a GPU, and here is none: build there")
    return named


def config(
    library: NvidiaLibrary, trt: Any, settings: Settings, named: Sequence[str], profiles: list[Any], monitor: Any
) -> Any:
    """Polygraphy's loader of the builder configuration.

    Args:
        named: from ``targets``.
        profiles: Polygraphy's.

    Raises:
        EngineError: a setting has no such value.
    """
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig

    def finish(builder: Any, network: Any, config: Any) -> None:
        (config.set_flag if settings["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
        # Scratch memory for the shapes in use, not for a profile's largest; some versions always do so.
        if feature := getattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None):
            config.set_preview_feature(feature, True)
        if library.rtx and recordable(library, settings):
            # Without it the plan may allocate while it runs, which a CUDA graph cannot record.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    common: dict[str, Any] = {
        "profiles": profiles,
        "progress_monitor": monitor,
        # The default keeps every layer's details in the plan and slows its launches.
        "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "builder_optimization_level": _number(library, settings, "optimization_level", 0, 5),
        "load_timing_cache": timing_cache(settings),
        "weight_streaming": bool(settings["weight_streaming"]),
        "refittable": bool(settings["refittable"] or settings["strip_plan"]),
        "strip_plan": bool(settings["strip_plan"]),
        "version_compatible": bool(settings["version_compatible"]),
    }
    if (workspace := _number(library, settings, "workspace_mib", 1, 1 << 30)) is not None:
        common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: workspace << 20}
    if not library.rtx:
        return PostprocessConfig(CreateConfig(**common, **_hardware(trt, settings)), finish)
    from polygraphy.backend.tensorrt_rtx.config import CreateConfigRTX

    common["exclude_lean_runtime"] = bool(settings["version_compatible"])  # it is not in the package
    capabilities = [divmod(int(target.removeprefix("sm_")), 10) for target in named]
    return PostprocessConfig(CreateConfigRTX(compute_capabilities=capabilities, **common), finish)


def recordable(library: NvidiaLibrary, settings: Settings) -> bool:
    """Whether plans with these settings can be recorded in a CUDA graph."""
    return not (library.rtx and settings.get("weight_streaming"))


def timing_cache(settings: Settings) -> str | None:
    """The timing cache's file. TensorRT-RTX, which compiles its kernels where they run, has none."""
    file = settings.get("timing_cache")
    return str(file) if file else None


def _hardware(trt: Any, settings: Settings) -> dict[str, Any]:
    asked = settings["hardware_compatibility"]
    if asked is None:
        return {}
    levels = {name.lower(): level for name, level in trt.HardwareCompatibilityLevel.__members__.items()}
    if asked not in levels:
        raise EngineError(f"tensorrt has no hardware_compatibility {asked}: choose from {', '.join(levels)}")
    return {"hardware_compatibility_level": levels[str(asked)]}


def _target(library: NvidiaLibrary, capability: str) -> str:
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", str(capability), re.IGNORECASE)
    if match is None:
        raise EngineError(f"{library.name}: {capability!r} is no compute capability: write e.g. 89")
    return f"sm_{match[1]}{match[2]}"


def _number(library: NvidiaLibrary, settings: Settings, name: str, least: int, most: int) -> int | None:
    value = settings[name]
    if value is None:
        return None
    if not isinstance(value, int) or not least <= value <= most:
        raise EngineError(f"{library.name}: {name} is a whole number from {least} to {most}, not {value!r}")
    return value
