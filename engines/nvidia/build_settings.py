"""Settings of TensorRT builds: defaults, checks, and the builder configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...errors import EngineError
from ..base import Setting, Settings
from .library import NvidiaLibrary, supported, this_gpu

_COMMON: dict[str, Setting] = {
    "optimization_level": None,  # 0..5: time spent on finding faster kernels
    "workspace_mib": None,  # largest scratch memory of one layer
    "tf32": False,  # multiply fp32 with 10-bit mantissas: faster, can cost image quality
    # Weights may stay on the host: see EngineOptions.weight_budget. TensorRT-RTX then has no CUDA graphs.
    "weight_streaming": False,
    "refittable": False,  # weights can be replaced in the built plan
    "strip_plan": False,  # refittable, and the plan holds no weights: refit sets them
    "version_compatible": False,  # runs with later versions of the library too
}
SETTINGS: dict[str, Setting] = {
    **_COMMON,
    "timing_cache": None,  # file with measured kernel times, for later builds on this kind of GPU
    "hardware_compatibility": None,  # "ampere_plus" or "same_compute_capability": runs on more GPUs, more slowly
}
SETTINGS_RTX: dict[str, Setting] = {
    **_COMMON,
    "compute_capabilities": (),  # compute capabilities to build for, e.g. ("89", "120"); by default this machine's
}
HELPERS = frozenset({"timing_cache"})

_AMPERE_PLUS = ("80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121")


def targets(library: NvidiaLibrary, trt: Any, settings: Settings) -> tuple[str, ...]:
    """Return the kinds of GPU that these settings build for, e.g. ``("sm_89", "sm_120")``.

    Raises:
        EngineError: there is no GPU and none was named, or the library does not build for a named one.
    """
    here = this_gpu()
    setting = settings.get("compute_capabilities") or ()
    capabilities = setting if isinstance(setting, tuple | list) else (str(setting),)
    if not capabilities:
        if here is None:
            remedy = (
                "name the GPUs to build for with --compute-capability, e.g. 89"
                if library.rtx
                else "build on one with a GPU"
            )
            raise EngineError(f"{library.name} builds for the GPU of this machine, which has none: {remedy}")
        capabilities = _AMPERE_PLUS if settings.get("hardware_compatibility") == "ampere_plus" else (here,)
    gpus = tuple(dict.fromkeys(_target(library, capability) for capability in capabilities))
    if library.rtx and (unsupported := [gpu for gpu in gpus if gpu not in supported(trt)]):
        raise EngineError(
            f"{library.name} does not build for {', '.join(unsupported)}: choose from {', '.join(supported(trt))}"
        )
    if library.rtx and (settings["refittable"] or settings["strip_plan"]):
        if len(gpus) > 1:
            raise EngineError(f"a refittable plan of {library.name} is for one kind of GPU: name one")
        if here is None:
            raise EngineError(f"a refittable plan of {library.name} is built on a machine with a GPU, not here")
    return gpus


def config(
    library: NvidiaLibrary, trt: Any, settings: Settings, gpus: Sequence[str], profiles: list[Any], monitor: Any
) -> Any:
    """Return Polygraphy's loader of the builder configuration.

    Args:
        gpus: kinds of GPU, from ``targets``.
        profiles: Polygraphy's profiles.

    Raises:
        EngineError: a setting has an invalid value.
    """
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig

    def finish(builder: Any, network: Any, config: Any) -> None:
        (config.set_flag if settings["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
        # Scratch memory for the shapes in use, not for the largest of a profile; some versions always do so.
        if feature := getattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None):
            config.set_preview_feature(feature, True)
        if library.rtx and recordable(library, settings):
            # Without this the plan may allocate while it runs, which a CUDA graph cannot record.
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

    common["exclude_lean_runtime"] = bool(settings["version_compatible"])  # the package does not contain it
    capabilities = [divmod(int(target.removeprefix("sm_")), 10) for target in gpus]
    return PostprocessConfig(CreateConfigRTX(compute_capabilities=capabilities, **common), finish)


def recordable(library: NvidiaLibrary, settings: Settings) -> bool:
    """Return whether plans with these settings can be recorded in a CUDA graph."""
    return not (library.rtx and settings.get("weight_streaming"))


def timing_cache(settings: Settings) -> str | None:
    """Return the timing cache's file. TensorRT-RTX has none, because it compiles its kernels where they run."""
    file = settings.get("timing_cache")
    return str(file) if file else None


def _hardware(trt: Any, settings: Settings) -> dict[str, Any]:
    level = settings["hardware_compatibility"]
    if level is None:
        return {}
    levels = {name.lower(): value for name, value in trt.HardwareCompatibilityLevel.__members__.items()}
    if level not in levels:
        raise EngineError(f"tensorrt has no hardware_compatibility {level}: choose from {', '.join(levels)}")
    return {"hardware_compatibility_level": levels[str(level)]}


def _target(library: NvidiaLibrary, capability: str) -> str:
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", str(capability), re.IGNORECASE)
    if match is None:
        raise EngineError(f"{library.name}: {capability!r} is not a compute capability: write e.g. 89")
    return f"sm_{match[1]}{match[2]}"


def _number(library: NvidiaLibrary, settings: Settings, name: str, least: int, most: int) -> int | None:
    value = settings[name]
    if value is None:
        return None
    if not isinstance(value, int) or not least <= value <= most:
        raise EngineError(f"{library.name}: {name} is a whole number from {least} to {most}, not {value!r}")
    return value
