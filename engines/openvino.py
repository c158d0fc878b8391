"""The engine ``openvino``: OpenVINO on the CPU, which reads and writes PyTorch's memory without a copy."""

from __future__ import annotations

from collections.abc import Container, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, MissingExtraError
from ..exporter.specs import Shape
from .base import EngineOptions, EngineProbe, Graphs, check_contract
from .buffers import allocate_pair, check_buffer

if TYPE_CHECKING:
    import torch

name = "openvino"
extra = "cpu"
default_opset = 23

_DTYPES = {"f32": "float32", "i64": "int64", "f16": "float16", "bf16": "bfloat16"}
_HINTS = {None: "f32", "fp32": "f32", "bf16": "bf16"}


def probe() -> EngineProbe:
    try:
        installed = version("openvino")
    except PackageNotFoundError:
        return EngineProbe(None, (), "not installed: pip install 'offcut[cpu]'")
    try:
        import openvino
    except ImportError as error:
        return EngineProbe(installed, (), f"installed, but it cannot be imported: {error}")

    core = openvino.Core()
    if "CPU" not in core.available_devices:
        return EngineProbe(installed, (), "OpenVINO's CPU plugin does not load here")
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    features = frozenset({"bf16"} if "BF16" in capabilities else ())
    return EngineProbe(installed, ("cpu",), f"CPU with {', '.join(capabilities)}", features)


def open(graphs: Graphs, options: EngineOptions) -> OpenVinoPair:
    return OpenVinoPair(graphs, options)


class OpenVinoPair:
    """A compiled model for the full graph and one for each cut; see ``base.EnginePair``."""

    name = name

    def __init__(self, graphs: Graphs, options: EngineOptions) -> None:
        import torch

        if options.device != "cpu":
            raise EngineError(f"the openvino engine runs on the CPU, not on {options.device}")
        self.device = torch.device("cpu")
        self.inputs, self.outputs, self.cuts = graphs.inputs, graphs.outputs, graphs.cuts
        self._graphs = graphs
        try:
            import openvino
        except ImportError as error:
            raise MissingExtraError("the openvino engine", "openvino", extra) from error

        if options.inference_precision not in _HINTS:
            hints = ", ".join(hint for hint in _HINTS if hint)
            raise EngineError(f"openvino has no inference precision {options.inference_precision!r}: choose {hints}")
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[options.inference_precision],
        }
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        self._settings = settings
        self._core = openvino.Core()
        self._full = self._compile(graphs.full)
        self._shallow = {cut: self._compile(path) for cut, path in graphs.shallow.items()}
        names = {*graphs.inputs, *graphs.outputs}
        for cut, model in ((None, self._full), *self._shallow.items()):
            inputs, outputs = ([_name(port, names) for port in ports] for ports in (model.inputs, model.outputs))
            check_contract(graphs, cut, inputs, outputs)

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundOpenVinoPair:
        buffers, dims = allocate_pair(self._graphs, shapes, self.device)
        return BoundOpenVinoPair(self._full, self._shallow, buffers, dims)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        stored = self._graphs.as_stored(weights) if weights else {}
        full = self._compile(self._graphs.full, stored)
        shallow = {cut: self._compile(path, stored) for cut, path in self._graphs.shallow.items()}
        self._full, self._shallow = full, shallow

    def close(self) -> None:
        self._full = None
        self._shallow = {}

    def _compile(self, path: Path, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
        try:
            model = self._core.read_model(path)
            for node in model.get_ops() if weights else ():
                value = (weights or {}).get(node.get_friendly_name())
                if value is not None and node.get_type_name() == "Constant":
                    node.output(0).replace(_constant(value).output(0))
            return self._core.compile_model(model, "CPU", self._settings)
        except RuntimeError as error:
            raise EngineError(f"openvino refuses {path.name}: {_reason(error)}") from error


class BoundOpenVinoPair:
    """See ``base.BoundPair``."""

    def __init__(
        self,
        full: Any,
        shallow: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        dims: Mapping[str, int],
    ) -> None:
        self.buffers = buffers
        self.dims = dims
        self._full: Any = _request(full, buffers)
        self._shallow: Any = {cut: _request(model, buffers) for cut, model in shallow.items()}

    def full(self) -> None:
        self._full.infer()

    def shallow(self, cut: str) -> None:
        self._shallow[cut].infer()

    def close(self) -> None:
        self._full = self._shallow = None
        self.buffers = {}


def _request(model: Any, buffers: Mapping[str, torch.Tensor]) -> Any:
    request = model.create_infer_request()
    for port in (*model.inputs, *model.outputs):
        name = _name(port, buffers)
        sizes = [size.get_length() if size.is_static else "any" for size in port.partial_shape]
        kind = port.element_type.get_type_name()
        check_buffer(name, buffers[name], sizes, _DTYPES.get(kind, kind))
        request.set_tensor(port, _view(buffers[name]))
    return request


def _name(port: Any, names: Container[str]) -> str:
    """Return a port's name in the ONNX file; OpenVINO adds names of its own."""
    return next((name for name in port.names if name in names), str(port.any_name))


def _constant(value: torch.Tensor) -> Any:
    import openvino

    return openvino.op.Constant(_view(value), shared_memory=False)


def _view(buffer: torch.Tensor) -> Any:
    """Return an OpenVINO tensor over the same memory."""
    import openvino
    import torch

    if buffer.dtype == torch.bfloat16:  # NumPy has no bfloat16
        return openvino.Tensor(buffer.view(torch.uint16).numpy(), list(buffer.shape), openvino.Type.bf16)
    return openvino.Tensor(buffer.numpy(), shared_memory=True)


def _reason(error: RuntimeError) -> str:
    """Return the line of OpenVINO's message that gives the reason; the lines before it name source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if not line.startswith(("Exception from", "Check "))), "no reason given"
    )
