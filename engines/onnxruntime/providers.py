"""ONNX Runtime's providers for NVIDIA GPUs: their names, their options and their cache of compiled engines.

``cuda`` runs the operators of a graph one by one. ``tensorrt`` and ``tensorrt-rtx`` compile each graph into an engine
when it is opened or first run, which takes minutes, and cache the engine for the next time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...errors import EngineError
from ...exporter.cache_dir import cache_dir
from ...exporter.specs import Shape, TensorSpec
from ..base import Graphs
from ..profiles import Profile


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's execution providers for GPUs.

    Attributes:
        name: ONNX Runtime's name of the provider.
        install: the command that installs the provider.
        graph_id: run option with the number of the CUDA graph to capture or replay. None for TensorRT's provider, which
            keeps one graph per session and waits for the device after each replay.
        plugin: module that registers the provider, if it is not part of ONNX Runtime.
        caches: whether the provider compiles engines, and can cache them.
    """

    name: str
    install: str
    graph_id: str | None = None
    plugin: str | None = None
    caches: bool = False


PROVIDERS = {
    "cuda": Provider(
        "CUDAExecutionProvider",
        "pip uninstall onnxruntime, then pip install 'offcut[cuda]'",
        graph_id="gpu_graph_id",
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "pip uninstall onnxruntime, then pip install 'offcut[cuda]', and the TensorRT that onnxruntime-gpu is made for",
        caches=True,
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "pip install onnxruntime-ep-nv-tensorrt-rtx",
        graph_id="cuda_graph_annotation_id",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        caches=True,
    ),
}


def provider_of(name: str | None, device: str) -> Provider | None:
    """Return the provider for a kind of device; None on the CPU, which has only one.

    Raises:
        EngineError: no provider has this name, or it is not for this device.
    """
    if name is not None and name not in PROVIDERS:
        raise EngineError(f"onnxruntime has no provider {name!r} here; choose one of {', '.join(PROVIDERS)}")
    if device != "cuda":
        if name is not None:
            raise EngineError(f"the provider {name} runs on cuda, not on {device}: choose the device, or leave it out")
        return None
    return PROVIDERS[name or "cuda"]


def load_provider(provider: Provider) -> Any:
    """Load a provider, and return its devices if it is a plugin, else None.

    Raises:
        EngineError: the provider is not installed, cannot be loaded, or finds no device.
    """
    import onnxruntime

    if provider.plugin is None:
        if provider.name not in onnxruntime.get_available_providers():
            raise EngineError(f"this onnxruntime has no {provider.name}: {provider.install}")
        return None
    try:
        plugin = import_module(provider.plugin)
    except ImportError as error:
        raise EngineError(f"this onnxruntime has no {provider.name}: {provider.install}") from error
    if not _devices(provider):
        try:
            onnxruntime.register_execution_provider_library(provider.name, plugin.get_library_path())
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise EngineError(f"onnxruntime cannot load {provider.name}: {first_line(error)}") from error
    if not (devices := _devices(provider)):
        raise EngineError(f"{provider.name} finds no GPU that it supports here")
    return devices


def _devices(provider: Provider) -> list[Any]:
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.name]


def provider_options(
    provider: Provider,
    *,
    device: int,
    stream: int,
    precision: str,
    cuda_graphs: bool = False,
    cache: Path | None = None,
    profile: Profile | None = None,
    inputs: Iterable[TensorSpec] = (),
) -> dict[str, str]:
    """Return the options of a session's provider.

    Args:
        device: index of the GPU.
        stream: handle of the CUDA stream to run on; not 0, which means none.
        precision: precision of the graph.
        cuda_graphs: whether to capture CUDA graphs. Ignored by a provider that keeps one graph per session.
        cache: directory for compiled engines.
        profile: sizes to compile for. Without it an engine is compiled for the sizes of the first run, and again
            whenever a run has other sizes.
        inputs: inputs of the graph, cached features included.
    """
    shapes = _profile_shapes(profile, inputs)
    if provider.plugin is not None:  # the session is given a device object, not an index
        options = {
            "has_user_compute_stream": "1",
            "user_compute_stream": str(stream),
            "enable_cuda_graph": str(int(cuda_graphs)),
        }
        options |= {f"nv_profile_{bound}_shapes": text for bound, text in shapes.items()}
        return options if cache is None else options | {"nv_runtime_cache_path": str(cache)}
    options = {"device_id": str(device), "user_compute_stream": str(stream)}
    if not provider.caches:
        # fp32 graphs are computed in fp32, not in TF32
        return options | {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graphs))}
    options |= {f"trt_{kind}_enable": str(kind == precision) for kind in ("fp16", "bf16")}
    options |= {f"trt_profile_{bound}_shapes": text for bound, text in shapes.items()}
    if cache is not None:
        for kind in ("engine", "timing"):
            options |= {f"trt_{kind}_cache_enable": "True", f"trt_{kind}_cache_path": str(cache)}
    return options


def cache_folder(
    provider: Provider | None, version: str | None, graphs: Graphs, runtime_cache: Path | None
) -> Path | None:
    """Return the directory for the engines that a provider compiles from these graphs; None if it compiles none.

    Args:
        version: version of ONNX Runtime.
        runtime_cache: directory that the user named; None for the user's cache directory.

    Raises:
        EngineError: the graphs are in no bundle, so they have no digest.
    """
    if provider is None or not provider.caches:
        return None
    if graphs.digest is None:
        raise EngineError("these graphs have no digest to cache compiled engines by: open them as part of a bundle")
    build = f"{graphs.precision} {covering(graphs.profiles)}"
    build_digest = hashlib.sha256(build.encode()).hexdigest()[:8]
    root = runtime_cache or cache_dir() / "engines"
    return root / graphs.digest[:32] / f"{provider.name}-{version}-{build_digest}"


@contextmanager
def locked_cache(folder: Path) -> Iterator[None]:
    """Make a directory for compiled engines, and hold its lock.

    Another process that needs the same engines waits until they are compiled.

    Raises:
        EngineError: the directory cannot be written.
    """
    try:
        # Engines are machine code, so nobody else may write there.
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        (folder / ".lock").touch()
    except OSError as error:
        raise EngineError(
            f"compiled engines cannot be cached in {folder} ({error.strerror}): "
            "name a directory for them with runtime_cache"
        ) from error
    with FileLock(folder / ".lock"):
        yield


def covering(profiles: Sequence[Profile]) -> Profile | None:
    """Return one profile that covers all of several and is tuned for the first; None if there are none."""
    if not profiles:
        return None
    names = profiles[0].min
    return Profile(
        min={name: min(profile.min[name] for profile in profiles) for name in names},
        opt=profiles[0].opt,
        max={name: max(profile.max[name] for profile in profiles) for name in names},
    )


def _profile_shapes(profile: Profile | None, inputs: Iterable[TensorSpec]) -> dict[str, str]:
    """Return ``sample:2x4x64x64,...`` for ``min``, ``opt`` and ``max``; inputs of fixed shape are left out."""
    dynamic = [spec for spec in inputs if any(isinstance(dim, str) for dim in spec.shape)]
    if profile is None or not dynamic:
        return {}
    shapes = profile.shapes(dynamic)
    return {
        bound: _spell({name: bounds[index] for name, bounds in shapes.items()})
        for index, bound in enumerate(("min", "opt", "max"))
    }


def _spell(shapes: dict[str, Shape]) -> str:
    return ",".join(f"{name}:{'x'.join(str(size) for size in shape)}" for name, shape in shapes.items())


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if it has no message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
