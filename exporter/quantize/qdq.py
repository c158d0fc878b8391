"""Quantization of an exported graph: its convolutions and linear layers read their inputs through Q/DQ pairs.

A pair is a ``QuantizeLinear`` and a ``DequantizeLinear``. Each tensor that such layers read has one pair, which these
layers share; no other node reads the quantized value. So the residual stream and the cached features keep the graph's
precision, and the cut finds the same joins. ONNX Runtime's quantizer quantizes a tensor for all its readers, including
skip connections, or repeats the pair for each reader; it also holds the whole model in memory twice.

Weights are stored quantized, symmetric and per output channel, in a quarter of the bytes of fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from .histogram import Range

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir

_LARGEST_FP8 = 448.0  # of float8e4m3fn

# Layers that read the latent or write the noise prediction, and the embeddings of timestep and size, which all layers
# read. They are small, and their errors spread through the whole UNet.
ALWAYS_HIGH_PRECISION = ("conv_in", "conv_out", "time_*", "*time_emb_proj*", "class_embedding*", "add_embedding*")


@dataclass(frozen=True)
class Scheme:
    """Quantization scheme of a graph.

    Attributes:
        name: value of ``--precision``: ``int8`` or ``fp8``.
        base: precision of the graph around the quantized layers.
        activations: ``uint8`` with a zero point, ``int8`` without a zero point, or ``float8e4m3fn``.
        outputs: whether the outputs of convolutions are quantized too.
    """

    name: str
    base: str
    activations: str
    outputs: bool

    @property
    def label(self) -> str:
        """Unique name of the scheme, for file names."""
        return self.name + ("" if self.base == "fp32" else f"-{self.base}") + ("-outputs" if self.outputs else "")

    @property
    def symmetric(self) -> bool:
        return self.activations != "uint8"

    @property
    def floating(self) -> bool:
        return self.activations.startswith("float8")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        name: name of the module in PyTorch.
        weight: name of the initializer with its weight.
        input, output: names of the tensors that it reads and writes.
    """

    name: str
    weight: str
    input: str
    output: str


def find_layers(model: ir.Model) -> list[Layer]:
    """Return all layers with a weight of their own, in the graph's order."""
    return [_layer(node) for node in model.graph if _is_layer(node)]


def high_precision_layers(layers: Iterable[Layer], patterns: Sequence[str] = ()) -> set[str]:
    """Return the names of the layers to leave unquantized: ``ALWAYS_HIGH_PRECISION``, and those that patterns match.

    Args:
        patterns: patterns as for file names, e.g. ``"mid_block*"``.

    Raises:
        ModelError: a pattern matches no layer.
    """
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(f"no layer is called {pattern!r}: write e.g. 'mid_block*' or '{names[len(names) // 2]}'")
    all_patterns = (*ALWAYS_HIGH_PRECISION, *patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in all_patterns)}


def quantize(graph: Path, out: Path, scheme: Scheme, ranges: Mapping[str, Range], names: Collection[str]) -> None:
    """Write a copy of the graph with these layers quantized, and its weights file.

    Args:
        graph: ONNX file of the export.
        out: ONNX file to write, in another directory.
        ranges: ranges of the tensors that these layers read, and that they write if the scheme quantizes outputs.
        names: names of the layers to quantize.
    """
    import onnx_ir as ir

    from ..trace.convert import WEIGHTS_FILE

    model = ir.load(graph)
    _QdqRewriter(model, scheme, ranges).rewrite(names)
    out.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, out, external_data=WEIGHTS_FILE)


def write_error_graph(
    graph: Path, out: Path, scheme: Scheme, ranges: Mapping[str, Range], names: Collection[str]
) -> list[str]:
    """Write a copy of the graph that measures the error of each quantized layer.

    Each of these layers gets a quantized copy, whose output only the measurement reads. The outputs of the graph are,
    for each layer, the sum of squares of the layer's output and the sum of squares of the copy's difference from it.

    Args:
        out: ONNX file to write, in the graph's directory, because it refers to the same weights.

    Returns:
        The names of the layers in the order of the outputs.
    """
    import onnx_ir as ir

    model = ir.load(graph)
    while model.graph.outputs:
        model.graph.outputs.pop()
    order = _QdqRewriter(model, scheme, ranges).add_quantized_copies(names)
    ir.save(model, out)
    return order


class _QdqRewriter:
    """Adds Q/DQ pairs to a model."""

    def __init__(self, model: ir.Model, scheme: Scheme, ranges: Mapping[str, Range]) -> None:
        self._graph, self._scheme, self._ranges = model.graph, scheme, ranges
        self._activations: dict[ir.Value, ir.Value] = {}
        self._weights: dict[ir.Value, ir.Value] = {}

    def rewrite(self, names: Collection[str]) -> None:
        """Make these layers read quantized activations and weights."""
        nodes = self._nodes(names)
        if self._scheme.outputs:
            for node in nodes:
                if node.op_type == "Conv" and not node.outputs[0].is_graph_output():
                    self._replace_output(node.outputs[0])
        for node in nodes:
            weight = node.inputs[1]
            assert weight is not None
            node.replace_input_with(0, self._quantized_activation(node.inputs[0]))
            node.replace_input_with(1, self._quantized_weight(node, weight))
        for value in list(self._graph.initializers.values()):
            if not value.uses():
                self._graph.initializers.pop(str(value.name))

    def add_quantized_copies(self, names: Collection[str]) -> list[str]:
        """Add a quantized copy of these layers and outputs that measure its error; see ``write_error_graph``."""
        import onnx_ir as ir

        order = []
        for node in self._nodes(names):
            exact = node.outputs[0]
            weight = node.inputs[1]
            assert weight is not None
            inputs = [
                self._quantized_activation(node.inputs[0]),
                self._weight_quantized_at_run_time(node, weight),
                *node.inputs[2:],
            ]
            copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=1)
            difference = ir.node("Sub", [exact, copy.outputs[0]])
            nodes = [copy, difference]
            for kind, value in (("signal", exact), ("error", difference.outputs[0])):
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
                total = ir.node("ReduceSumSquare", [cast.outputs[0]], {"keepdims": 0})
                total.outputs[0].name = f"{_layer(node).name}/{kind}"
                total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                total.outputs[0].shape = ir.Shape([])
                nodes += [cast, total]
                self._graph.outputs.append(total.outputs[0])
            self._graph.insert_after(node, nodes)
            order.append(_layer(node).name)
        return order

    def _nodes(self, names: Collection[str]) -> list[ir.Node]:
        return [node for node in self._graph if _is_layer(node) and _layer(node).name in names]

    def _replace_output(self, value: ir.Value) -> None:
        uses = list(value.uses())
        rounded = self._quantized_activation(value)
        self._activations[rounded] = rounded  # layers that read the rounded value need no further pair
        for use in uses:
            use.node.replace_input_with(use.idx, rounded)

    def _quantized_activation(self, value: ir.Value | None) -> ir.Value:
        """Return a tensor after its Q/DQ pair, which is inserted directly after the tensor's producer."""
        import numpy as np

        assert value is not None
        if value in self._activations:
            return self._activations[value]
        name = str(value.name)
        step, zero = _step_and_zero_point(self._ranges[name], self._scheme)
        scale = self._constant(f"{name}_scale", np.array(_round_up(step, self._float)))
        point = self._constant(f"{name}_zero", _to_dtype([zero], self._scheme.activations).reshape(()))
        pair = self._pair(value, scale, point, {}, f"{name}_rounded")
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], pair)
        else:
            self._graph.insert_after(producer, pair)
        self._activations[value] = pair[1].outputs[0]
        return pair[1].outputs[0]

    def _quantized_weight(self, node: ir.Node, weight: ir.Value) -> ir.Value:
        """Store a quantized weight, and return the output of its ``DequantizeLinear``."""
        import numpy as np
        import onnx_ir as ir

        if weight in self._weights:
            return self._weights[weight]
        assert weight.const_value is not None
        exact = weight.const_value.numpy().astype(np.float32)
        axis = _channel_axis(node, exact.ndim)
        scale, point = self._weight_constants(weight, exact, axis)
        shape = [1] * exact.ndim
        shape[axis] = -1
        assert scale.const_value is not None
        steps = exact / scale.const_value.numpy().astype(np.float32).reshape(shape)
        stored = self._constant(f"{weight.name}_rounded", _to_dtype(steps, self._weight_type))
        back = ir.node("DequantizeLinear", [stored, scale, point], {"axis": axis})
        back.outputs[0].name = f"{weight.name}_restored"
        self._graph.insert_before(node, back)
        self._weights[weight] = back.outputs[0]
        return back.outputs[0]

    def _weight_quantized_at_run_time(self, node: ir.Node, weight: ir.Value) -> ir.Value:
        """Return a weight after a Q/DQ pair that quantizes it at run time, so that no second copy is stored."""
        import numpy as np

        if weight in self._weights:
            return self._weights[weight]
        assert weight.const_value is not None
        exact = weight.const_value.numpy().astype(np.float32)
        axis = _channel_axis(node, exact.ndim)
        scale, point = self._weight_constants(weight, exact, axis)
        pair = self._pair(weight, scale, point, {"axis": axis}, f"{weight.name}_rounded")
        self._graph.insert_before(node, pair)
        self._weights[weight] = pair[1].outputs[0]
        return pair[1].outputs[0]

    def _weight_constants(
        self, weight: ir.Value, exact: npt.NDArray[np.float32], axis: int
    ) -> tuple[ir.Value, ir.Value]:
        import numpy as np

        others = tuple(other for other in range(exact.ndim) if other != axis)
        largest = np.maximum(np.abs(exact).max(axis=others), 1e-6)
        scales = _round_up(largest / (_LARGEST_FP8 if self._scheme.floating else 127), self._float)
        return (
            self._constant(f"{weight.name}_scale", scales),
            self._constant(f"{weight.name}_zero", _to_dtype(np.zeros(len(scales)), self._weight_type)),
        )

    def _pair(
        self, value: ir.Value, scale: ir.Value, point: ir.Value, attributes: dict[str, Any], name: str
    ) -> tuple[ir.Node, ir.Node]:
        import onnx_ir as ir

        down = ir.node("QuantizeLinear", [value, scale, point], attributes)
        up = ir.node("DequantizeLinear", [down.outputs[0], scale, point], attributes)
        down.outputs[0].name, up.outputs[0].name = name, f"{value.name}_restored"
        return down, up

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        import onnx_ir as ir

        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    @property
    def _float(self) -> str:
        return {"fp32": "float32", "fp16": "float16"}[self._scheme.base]

    @property
    def _weight_type(self) -> str:
        return self._scheme.activations if self._scheme.floating else "int8"


def _is_layer(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return False
    activation, weight = node.inputs[:2]
    return weight is not None and weight.is_initializer() and activation is not None and not activation.is_initializer()


def _layer(node: ir.Node) -> Layer:
    activation, weight = node.inputs[:2]
    assert activation is not None
    assert weight is not None
    name = str(weight.name)
    return Layer(name.removesuffix(".weight"), name, str(activation.name), str(node.outputs[0].name))


def _channel_axis(node: ir.Node, dims: int) -> int:
    """Return the axis of the output channels in a layer's weight."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1):
        return 0
    return dims - 1


def _step_and_zero_point(value_range: Range, scheme: Scheme) -> tuple[float, int]:
    """Return the step and the zero point to quantize a tensor of this range with."""
    if scheme.floating:
        return max(value_range.largest, 1e-6) / _LARGEST_FP8, 0
    if scheme.symmetric:
        return max(value_range.largest, 1e-6) / 127, 0
    step = max(value_range.high - value_range.low, 1e-6) / 255
    return step, round(-value_range.low / step)


def _round_up(exact: Any, dtype: str) -> Any:
    """Round a scale up to the dtype, so that the largest value is not clipped."""
    import numpy as np

    exact = np.asarray(exact, np.float64)
    near = exact.astype(dtype)
    return np.where(near < exact, np.nextafter(near, np.array(np.inf, dtype)), near).astype(dtype)


def _to_dtype(steps: Any, dtype: str) -> npt.NDArray[Any]:
    """Round values in steps to a quantized dtype, and clip them to its range."""
    import ml_dtypes
    import numpy as np

    steps = np.asarray(steps)
    if dtype.startswith("float8"):
        rounded = np.clip(steps, -_LARGEST_FP8, _LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
    else:
        lowest, highest = (-127, 127) if dtype == "int8" else (0, 255)
        rounded = np.clip(np.rint(steps), lowest, highest).astype(dtype)
    return np.asarray(rounded)
