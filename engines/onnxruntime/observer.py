"""A pair for calibration on ONNX Runtime, which records the ranges of its tensors at each call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineError, MissingExtraError, ModelError
from ...exporter.cut import GraphPair
from ...exporter.quantize.histogram import Histogram
from ...exporter.quantize.observe import write_observed_graph
from ...exporter.specs import Shape, TensorSpec
from ..base import Graphs
from ..buffers import allocate_pair

if TYPE_CHECKING:
    import torch

_SAMPLES = 3


class CallSamples:
    """The inputs of a few full calls, spread evenly over all calls, in constant memory."""

    def __init__(self) -> None:
        self._samples: list[dict[str, torch.Tensor]] = []
        self._calls, self._interval = 0, 1

    def add(self, inputs: Mapping[str, torch.Tensor]) -> None:
        if self._calls % self._interval == 0:
            self._samples.append({name: tensor.clone() for name, tensor in inputs.items()})
        self._calls += 1
        if len(self._samples) == 2 * _SAMPLES:
            self._samples, self._interval = self._samples[::2], 2 * self._interval

    def chosen(self) -> list[dict[str, torch.Tensor]]:
        """Return at most three samples: from the beginning, the middle and the end of the calls."""
        last = len(self._samples) - 1
        return [self._samples[index] for index in sorted({0, last // 2, last})] if self._samples else []


class ObservingPair:
    """A pair that observes its tensors; see ``base.EnginePair``. Calls are slow, because each one copies samples.

    Attributes:
        histograms: histogram of each observed tensor over all calls, by its name in the graph before the cut.
        call_samples: inputs of a few full calls.
    """

    name = "calibration"

    def __init__(
        self,
        twins: list[GraphPair],
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        multiple: int,
        precision: str,
        strides: Mapping[str, int],
    ) -> None:
        """Open the graphs.

        Args:
            twins: the pair of graphs of each cut.
            strides: sampling stride of each tensor to observe, by its name in the graph before the cut; see
                ``exporter.quantize.observe.stride``.
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
        # A cached tensor has another name in the graphs of the pair than in the graph before the cut.
        self._names = {tensor.spec.name: tensor.value for twin in twins for tensor in twin.cut.tensors}
        renamed = {value: name for name, value in self._names.items()}
        pair_strides = {renamed.get(name, name): stride for name, stride in strides.items()}
        self._full = _ObservedGraph(twins[0].full, pair_strides)
        self._shallow = {cut: _ObservedGraph(path, pair_strides) for cut, path in shallow.items()}

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundObservingPair:
        buffers, dims = allocate_pair(self._graphs, shapes, self.device)
        return BoundObservingPair(self, buffers, dims)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        raise EngineError("weights cannot be replaced during calibration: fuse LoRAs when the bundle is built")

    def close(self) -> None:
        self._full.close()
        for graph in self._shallow.values():
            graph.close()

    def run(self, cut: str | None, buffers: Mapping[str, torch.Tensor]) -> None:
        """Run the full graph if ``cut`` is None, else this cut's shallow graph, and record the observed tensors."""
        import torch

        if cut is None:
            self.call_samples.add({name: buffers[name] for name in self.inputs})
        graph = self._full if cut is None else self._shallow[cut]
        outputs = graph.run({name: buffers[name].numpy() for name in graph.inputs})
        for name in graph.tensors:
            low, high, sample = (outputs.pop(f"{name}/{kind}") for kind in ("low", "high", "sample"))
            original = self._names.get(name, name)
            try:
                self.histograms[original].add(sample, float(low), float(high))
            except ValueError as error:
                raise ModelError(
                    f"{original} overflows while calibrating: try other prompts, or less guidance"
                ) from error
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


class _ObservedGraph:
    """A session of a graph that also outputs the range and a sample of its observed tensors."""

    def __init__(self, graph: Path, strides: Mapping[str, int]) -> None:
        observed = graph.with_name(f"observed-{graph.name}")
        self.tensors = write_observed_graph(graph, observed, strides)
        self._session = session(observed)
        self.inputs = [argument.name for argument in self._session.get_inputs()]
        self._outputs = [argument.name for argument in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def close(self) -> None:
        self._session = None


def session(graph: Path, optimize: bool = True) -> Any:
    """Open a graph in ONNX Runtime on the CPU.

    Args:
        optimize: False folds no constants, so that memory holds one copy of a weight that the graph rounds.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("calibration", "onnxruntime", "cpu") from error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Without prepacking, the weights stay in the file and are paged in, and are not copied in another layout.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
