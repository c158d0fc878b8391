"""A pair on ONNX Runtime that watches its own tensors, for calibration: the runtime drives it as any other pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineError, MissingExtraError, ModelError
from ...exporter.cut import TwinGraph
from ...exporter.quantize.histogram import Histogram
from ...exporter.quantize.observe import observe
from ...exporter.specs import Shape, TensorSpec
from ..base import Graphs
from ..buffers import allocate_pair

if TYPE_CHECKING:
    import torch

_SAMPLES = 3


class CallSamples:
    """The inputs of a few full calls, spread over all that were made, in constant memory."""

    def __init__(self) -> None:
        self._kept: list[dict[str, torch.Tensor]] = []
        self._calls, self._every = 0, 1

    def add(self, inputs: Mapping[str, torch.Tensor]) -> None:
        if self._calls % self._every == 0:
            self._kept.append({name: tensor.clone() for name, tensor in inputs.items()})
        self._calls += 1
        if len(self._kept) == 2 * _SAMPLES:
            self._kept, self._every = self._kept[::2], 2 * self._every

    def chosen(self) -> list[dict[str, torch.Tensor]]:
        """At most three, of the beginning, the middle and the end."""
        last = len(self._kept) - 1
        return [self._kept[index] for index in sorted({0, last // 2, last})] if self._kept else []


class ObservingPair:
    """See ``base.EnginePair``. Calls are slow: every one hands out samples of the watched tensors.

    Attributes:
        histograms: of each watched tensor by its name in the graph that was cut, over full and shallow calls.
        call_samples: inputs of full calls.
    """

    name = "calibration"

    def __init__(
        self,
        twins: list[TwinGraph],
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        multiple: int,
        precision: str,
        strides: Mapping[str, int],
    ) -> None:
        """Open the graphs.

        Args:
            twins: of each cut.
            strides: of the tensors to watch, by their names in the graph that was cut; see ``exporter.observe``.
        """
        import torch

        self.device = torch.device("cpu")
        self.cuts: Mapping[str, tuple[str, ...]] = {
            twin.cut.name: tuple(spec.name for spec in twin.cached) for twin in twins
        }
        self.inputs, features = inputs, {spec.name: spec for twin in twins for spec in twin.cached}
        self.outputs: Mapping[str, TensorSpec] = {**outputs, **features}
        self.histograms: dict[str, Histogram] = defaultdict(Histogram)
        self.call_samples = CallSamples()
        shallow = {twin.cut.name: twin.shallow for twin in twins}
        self._graphs = Graphs(twins[0].full, shallow, inputs, self.outputs, self.cuts, multiple, precision)
        # A cached tensor has another name in the graphs of the pair than where it was cut.
        self._names = {tensor.spec.name: tensor.value for twin in twins for tensor in twin.cut.tensors}
        renamed = {value: name for name, value in self._names.items()}
        within = {renamed.get(name, name): step for name, step in strides.items()}
        self._full = _Watched(twins[0].full, within)
        self._shallow = {cut: _Watched(path, within) for cut, path in shallow.items()}

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundObservingPair:
        buffers, dims = allocate_pair(self._graphs, shapes, self.device)
        return BoundObservingPair(self, buffers, dims)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        raise EngineError("a pair that is observed keeps its weights: fuse LoRAs when the bundle is built")

    def close(self) -> None:
        self._full.close()
        for graph in self._shallow.values():
            graph.close()

    def run(self, cut: str | None, buffers: Mapping[str, torch.Tensor]) -> None:
        """One call of the full graph, or of this cut's shallow one."""
        import torch

        if cut is None:
            self.call_samples.add({name: buffers[name] for name in self.inputs})
        graph = self._full if cut is None else self._shallow[cut]
        outputs = graph.run({name: buffers[name].numpy() for name in graph.inputs})
        for name in graph.watched:
            low, high, sample = (outputs.pop(f"{name}/{kind}") for kind in ("low", "high", "sample"))
            known = self._names.get(name, name)
            try:
                self.histograms[known].add(sample, float(low), float(high))
            except ValueError as error:
                raise ModelError(f"{known} overflows while calibrating: try other prompts, or less guidance") from error
        for name, array in outputs.items():
            buffers[name].copy_(torch.from_numpy(array))


class BoundObservingPair:
    """See ``base.BoundPair``."""

    def __init__(self, pair: ObservingPair, buffers: Mapping[str, torch.Tensor], dims: Mapping[str, int]) -> None:
        self.buffers, self.dims, self._pair = buffers, dims, pair

    def full(self) -> None:
        self._pair.run(None, self.buffers)

    def shallow(self, cut: str) -> None:
        self._pair.run(cut, self.buffers)

    def close(self) -> None:
        self.buffers = {}


class _Watched:
    """A graph with the outputs that describe its tensors, opened."""

    def __init__(self, graph: Path, strides: Mapping[str, int]) -> None:
        observed = graph.with_name(f"observed-{graph.name}")
        self.watched = observe(graph, observed, strides)
        self._session = session(observed)
        self.inputs = [argument.name for argument in self._session.get_inputs()]
        self._outputs = [argument.name for argument in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def close(self) -> None:
        self._session = None


def session(graph: Path, optimize: bool = True) -> Any:
    """The graph opened in ONNX Runtime on the CPU.

    Args:
        optimize: False computes nothing ahead, so that a weight that is rounded in the graph is not kept twice.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("calibration", "onnxruntime", "cpu") from error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weights stay in the file, where the system pages them in, and are not laid out anew in memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
