"""The engine ``onnxruntime``: ONNX Runtime on the CPU and on CUDA, bound to PyTorch's memory.

On CUDA the pair owns a stream, because ONNX Runtime fixes its stream when a session is created, and treats stream 0 as
no stream. The CUDA provider captures the calls as CUDA graphs itself; the TensorRT providers compile the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineError, MissingExtraError
from ...exporter.specs import Shape
from ..base import EngineOptions, EngineProbe, Graphs, check_contract
from ..buffers import allocate_pair, check_buffer
from ..cuda import GraphIds, PairStream
from .fusion import with_own_attention
from .initializers import add_weights, with_weights
from .providers import (
    PROVIDERS,
    Provider,
    cache_folder,
    covering,
    first_line,
    load_provider,
    locked_cache,
    provider_of,
    provider_options,
)

if TYPE_CHECKING:
    import torch

name = "onnxruntime"
extra = "cpu"
default_opset = 23

_CPU = "CPUExecutionProvider"
# Numbers of onnx.TensorProto, which io_binding takes for every dtype; NumPy has no bfloat16.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}
_ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


def probe() -> EngineProbe:
    installed = _installed_version()
    if installed is None:
        return EngineProbe(None, (), "not installed: pip install 'offcut[cpu]' (or 'offcut[cuda]')")
    try:
        import onnxruntime
    except ImportError as error:
        return EngineProbe(installed, (), f"installed, but it cannot be imported: {first_line(error)}")
    import torch

    available = onnxruntime.get_available_providers()
    devices = ["cpu"] if _CPU in available else []
    if PROVIDERS["cuda"].name in available and torch.cuda.is_available():
        devices.append("cuda")
    return EngineProbe(installed, tuple(devices), f"providers {', '.join(available)}")


def open(graphs: Graphs, options: EngineOptions) -> OnnxRuntimePair:
    return OnnxRuntimePair(graphs, options)


def _installed_version() -> str | None:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


class OnnxRuntimePair:
    """One session for the full graph and one for each cut; see ``base.EnginePair``."""

    name = name

    def __init__(self, graphs: Graphs, options: EngineOptions) -> None:
        import torch

        if options.inference_precision not in (None, "fp32"):
            raise EngineError(
                "onnxruntime computes in the precision that was exported; "
                f"build with precision={options.inference_precision!r}, or with the openvino engine for its hint"
            )
        self.device = torch.device(options.device)
        self.inputs, self.outputs, self.cuts = graphs.inputs, graphs.outputs, graphs.cuts
        self._graphs, self._options = graphs, options
        self._provider = provider_of(options.provider, self.device.type)
        self._devices: Any = None if self._provider is None else load_provider(self._provider)
        self._cache = cache_folder(self._provider, _installed_version(), graphs, options.runtime_cache)
        self._stream = PairStream(self.device) if self._provider is not None else None
        captures = self._provider is not None and self._provider.graph_id is not None and options.cuda_graphs
        self._ids = GraphIds() if captures else None
        with self._locked_cache():
            self._full = self._session(None)
            self._shallow: dict[str | None, Any] = {cut: self._session(cut) for cut in graphs.shallow}
        for cut, session in ((None, self._full), *self._shallow.items()):
            inputs, outputs = session.get_inputs(), session.get_outputs()
            check_contract(graphs, cut, [i.name for i in inputs], [o.name for o in outputs])

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundOnnxRuntimePair:
        buffers, dims = allocate_pair(self._graphs, shapes, self.device)
        sessions: dict[str | None, Any] = {None: self._full, **self._shallow}
        ids = self._ids.take(sessions) if self._ids is not None else dict.fromkeys(sessions, GraphIds.OFF)
        return BoundOnnxRuntimePair(sessions, buffers, dims, self._provider, self._stream, ids)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self._cache is not None and weights:
            raise EngineError(
                f"ONNX Runtime's {self._options.provider} provider compiles the weights into its engines: "
                "open the bundle with provider cuda to replace weights"
            )
        stored = self._graphs.as_stored(weights) if weights else {}
        with self._locked_cache():
            full = self._session(None, stored)
            shallow: dict[str | None, Any] = {cut: self._session(cut, stored) for cut in self._graphs.shallow}
        self._full, self._shallow = full, shallow

    def close(self) -> None:
        self._full = None
        self._shallow = {}

    def _locked_cache(self) -> AbstractContextManager[None]:
        return nullcontext() if self._cache is None else locked_cache(self._cache)

    def _session(self, cut: str | None, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("the onnxruntime engine", "onnxruntime", extra) from error

        path = self._graphs.full if cut is None else self._graphs.shallow[cut]
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # errors; the warnings concern ONNX Runtime's own fusions
        # Each session has its own threads. Without this, idle threads of one session spin while the other one runs.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        if self._options.threads:
            settings.intra_op_num_threads = self._options.threads
        provider = self._provider
        content = with_own_attention(path) if provider is None and self._graphs.precision == "fp32" else None
        values: list[Any] = []
        if weights:
            content, external = with_weights(content or path.read_bytes(), weights)
            values = add_weights(settings, external, _ELEMENT_TYPES)
        if content is not None:  # the weights stay in their file
            key = "session.model_external_initializers_file_folder_path"
            settings.add_session_config_entry(key, str(path.parent))
        session = self._open_on(provider, path, cut, settings, content)
        del values  # they had to live until the session was open
        return session

    def _open_on(
        self,
        provider: Provider | None,
        path: Path,
        cut: str | None,
        settings: Any,
        content: bytes | None,
    ) -> Any:
        if provider is None:
            return _open(path, settings, _CPU, content, providers=[_CPU])
        options = self._provider_options(provider, cut, None if self._cache is None else self._cache / path.stem)
        if provider.caches:  # nodes that it cannot compile must not run on the CPU unnoticed
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if provider.plugin is not None:
            settings.add_provider_for_devices([self._devices[self.device.index or 0]], options)
            return _open(path, settings, provider.name, content)
        providers: list[tuple[str, dict[str, str]]] = [(provider.name, options)]
        if provider.caches:  # CUDA runs the nodes that TensorRT cannot
            cuda = PROVIDERS["cuda"]
            providers.append((cuda.name, self._provider_options(cuda, cut, None)))
        return _open(path, settings, provider.name, content, providers=providers, captures=self._ids is not None)

    def _provider_options(self, provider: Provider, cut: str | None, cache: Path | None) -> dict[str, str]:
        assert self._stream is not None
        if cache is not None:
            cache.mkdir(exist_ok=True)
        features = () if cut is None else (self.outputs[name] for name in self.cuts[cut])
        return provider_options(
            provider,
            device=self.device.index or 0,
            stream=self._stream.stream.cuda_stream,
            precision=self._graphs.precision,
            cuda_graphs=self._ids is not None,
            cache=cache,
            profile=covering(self._graphs.profiles),
            inputs=(*self.inputs.values(), *features),
        )


class BoundOnnxRuntimePair:
    """See ``base.BoundPair``.

    Args:
        sessions: session of each cut, and of the full graph under the key None.
        buffers, dims: see ``base.BoundPair``.
        provider, stream: None on the CPU.
        ids: number of each session's CUDA graph.
    """

    def __init__(
        self,
        sessions: Mapping[str | None, Any],
        buffers: Mapping[str, torch.Tensor],
        dims: Mapping[str, int],
        provider: Provider | None,
        stream: PairStream | None,
        ids: Mapping[str | None, int],
    ) -> None:
        self.buffers = buffers
        self.dims = dims
        self._stream = stream
        self._ids = ids
        self._bound: Any = {
            cut: (session, _bind(session, buffers), _run_options(provider, ids[cut]))
            for cut, session in sessions.items()
        }

    def full(self) -> None:
        self._run(None)

    def shallow(self, cut: str) -> None:
        self._run(cut)

    def close(self) -> None:
        if self._bound is not None and self._stream is not None:
            self._stream.synchronize()
            for cut, (session, _, _) in self._bound.items():
                # Older versions of ONNX Runtime cannot release a graph; it lives as long as its session.
                if self._ids[cut] != GraphIds.OFF and hasattr(session, "release_captured_graph"):
                    session.release_captured_graph(self._ids[cut])
        self._bound = None  # the bindings hold addresses of the buffers
        self.buffers = {}

    def _run(self, cut: str | None) -> None:
        session, binding, options = self._bound[cut]
        if self._stream is None:
            session.run_with_iobinding(binding, options)
            return
        with self._stream.ordered():
            session.run_with_iobinding(binding, options)


def _open(
    path: Path, settings: Any, provider: str, content: bytes | None = None, captures: bool = False, **how: Any
) -> Any:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(content or path, settings, **how)
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        remedy = "; open it with cuda_graphs=False" if captures and "graph capture" in str(error) else ""
        raise EngineError(f"onnxruntime refuses {path.name}: {first_line(error)}{remedy}") from error
    if provider not in session.get_providers():
        raise EngineError(f"onnxruntime could not start {provider}; its libraries do not fit this driver or CUDA")
    return session


def _run_options(provider: Provider | None, graph_id: int) -> Any:
    import onnxruntime

    if provider is None:
        return None  # reading run options costs ONNX Runtime 0.1 ms per call
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if provider.graph_id is not None:
        options.add_run_config_entry(provider.graph_id, str(graph_id))
    return options


def _bind(session: Any, buffers: Mapping[str, torch.Tensor]) -> Any:
    binding = session.io_binding()
    for bind, arguments in ((binding.bind_input, session.get_inputs()), (binding.bind_output, session.get_outputs())):
        for argument in arguments:
            buffer = buffers[argument.name]
            dtype = _DTYPES.get(argument.type, argument.type)
            check_buffer(argument.name, buffer, argument.shape, dtype)
            bind(
                name=argument.name,
                device_type=buffer.device.type,
                device_id=buffer.device.index or 0,
                element_type=_ELEMENT_TYPES[dtype],
                shape=tuple(buffer.shape),
                buffer_ptr=buffer.data_ptr(),
            )
    return binding
