"""ONNX Runtime, on the CPU and on CUDA, bound to PyTorch's memory.

On CUDA the pair owns a stream, since ONNX Runtime takes its stream when a session is made and takes stream 0 for
none.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, MissingExtraError
from ..exporter.specs import Shape
from .base import EngineOptions, Graphs, Probe, check_contract
from .buffers import allocate_pair
from .cuda import PairStream

if TYPE_CHECKING:
    import torch

name = "onnxruntime"
extra = "cpu"
default_opset = 23

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# onnx.TensorProto's numbers, which io_binding takes for every dtype; NumPy has no bfloat16.
_ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


def probe() -> Probe:
    installed = _installed_version()
    if installed is None:
        return Probe(None, (), "not installed: pip install 'offcut[cpu]' (or 'offcut[cuda]')")
    try:
        import onnxruntime
    except ImportError as error:
        return Probe(installed, (), f"installed, but it cannot be imported: {_first_line(error)}")
    import torch

    available = onnxruntime.get_available_providers()
    devices = ["cpu"] if _PROVIDERS["cpu"] in available else []
    if _PROVIDERS["cuda"] in available and torch.cuda.is_available():
        devices.append("cuda")
    return Probe(installed, tuple(devices), f"providers {', '.join(available)}")


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
    """A session for the full graph and one for each cut; see ``base.EnginePair``."""

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
        self._graphs = graphs
        self._stream = PairStream(self.device) if self.device.type == "cuda" else None
        self._full = self._session(graphs.full, options)
        self._shallow = {cut: self._session(path, options) for cut, path in graphs.shallow.items()}
        for cut, session in ((None, self._full), *self._shallow.items()):
            inputs, outputs = session.get_inputs(), session.get_outputs()
            check_contract(graphs, cut, [i.name for i in inputs], [o.name for o in outputs])

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundOnnxRuntimePair:
        buffers, dims = allocate_pair(self._graphs, shapes, self.device)
        return BoundOnnxRuntimePair(self._full, self._shallow, buffers, dims, self.device, self._stream)

    def close(self) -> None:
        self._full = None
        self._shallow = {}

    def _session(self, path: Any, options: EngineOptions) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("the onnxruntime engine", "onnxruntime", extra) from error

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # its warnings are about its own fusions
        # Each session has its own threads; without this one's idle threads spin while the other graph runs.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        if options.threads:
            settings.intra_op_num_threads = options.threads
        provider = _PROVIDERS[self.device.type]
        if provider not in onnxruntime.get_available_providers():
            raise EngineError(
                f"this onnxruntime has no {provider}: pip uninstall onnxruntime, then pip install 'offcut[cuda]'"
            )
        provider_options: dict[str, str] = {}
        if self._stream is not None:
            index = self.device.index or 0
            provider_options = {"device_id": str(index), "user_compute_stream": str(self._stream.stream.cuda_stream)}
            provider_options["use_tf32"] = "0"  # fp32 graphs are computed in fp32
        try:
            session = onnxruntime.InferenceSession(path, settings, providers=[(provider, provider_options)])
        except Exception as error:  # its exceptions share no public base
            raise EngineError(f"onnxruntime refuses {path.name}: {_first_line(error)}") from error
        if provider not in session.get_providers():
            raise EngineError(f"onnxruntime could not start {provider}; its libraries do not fit this driver or CUDA")
        return session


class BoundOnnxRuntimePair:
    """See ``base.BoundPair``."""

    def __init__(
        self,
        full: Any,
        shallow: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        dims: Mapping[str, int],
        device: torch.device,
        stream: PairStream | None,
    ) -> None:
        import onnxruntime

        self.buffers = buffers
        self.dims = dims
        self._device = device
        self._stream = stream
        self._full: Any = (full, self._bind(full))
        self._shallow: Any = {cut: (session, self._bind(session)) for cut, session in shallow.items()}
        self._run_options = onnxruntime.RunOptions()
        if stream is not None:
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def full(self) -> None:
        self._run(*self._full)

    def shallow(self, cut: str) -> None:
        self._run(*self._shallow[cut])

    def close(self) -> None:
        self._full = self._shallow = None  # their bindings hold the buffers' addresses
        self.buffers = {}

    def _run(self, session: Any, binding: Any) -> None:
        if self._stream is None:
            session.run_with_iobinding(binding, self._run_options)
            return
        with self._stream.ordered():
            session.run_with_iobinding(binding, self._run_options)

    def _bind(self, session: Any) -> Any:
        binding = session.io_binding()
        for bind, arguments in (
            (binding.bind_input, session.get_inputs()),
            (binding.bind_output, session.get_outputs()),
        ):
            for argument in arguments:
                buffer = self.buffers[argument.name]
                bind(
                    name=argument.name,
                    device_type=self._device.type,
                    device_id=self._device.index or 0,
                    element_type=_ELEMENT_TYPES[str(buffer.dtype).removeprefix("torch.")],
                    shape=tuple(buffer.shape),
                    buffer_ptr=buffer.data_ptr(),
                )
        return binding


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
