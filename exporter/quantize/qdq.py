"""Low precision: convolutions and linear layers of an exported graph between QuantizeLinear and DequantizeLinear.

Only what such a layer reads is rounded: one pair for each tensor, shared by the layers that read it, and nothing else
of the graph sees the rounded value. So the residual stream and the cached features keep the graph's own precision, and
the cut finds every join as before. ONNX Runtime's own quantizer rounds a tensor for all that read it, the skip
connections among them, or repeats the pair for each reader; and it holds the whole model in memory twice.

Weights are stored rounded, symmetric and per output channel: a quarter of the bytes of fp32.
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

# What reads the latent and writes the noise prediction, and what all layers take from the timestep and the size: small,
# and a fault in it is a fault everywhere.
ALWAYS_HIGH_PRECISION = ("conv_in", "conv_out", "time_*", "*time_emb_proj*", "class_embedding*", "add_embedding*")


@dataclass(frozen=True)
class Scheme:
    """How a graph is rounded.

    Attributes:
        name: as ``--precision`` takes it.
        base: precision of the graph around the rounded layers.
        activations: ``uint8`` with a zero point, ``int8`` without, or ``float8e4m3fn``.
        outputs: whether what a convolution writes is rounded too.
    """

    name: str
    base: str
    activations: str
    outputs: bool

    @property
    def label(self) -> str:
        """Tells the graphs of different schemes apart."""
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
        name: of the module in PyTorch.
        weight: initializer.
        input, output: the tensors that it reads and writes.
    """

    name: str
    weight: str
    input: str
    output: str


def find_layers(model: ir.Model) -> list[Layer]:
    """Every layer with a weight of its own, in the graph's order."""
    return [_layer(node) for node in model.graph if _is_layer(node)]


def high_precision_layers(layers: Iterable[Layer], patterns: Sequence[str] = ()) -> set[str]:
    """The names of the layers to keep higher: those that always are, and those that the patterns match.

    Args:
        patterns: as in file names, e.g. ``"mid_block*"``.

    Raises:
        ModelError: a pattern matches no layer.
    """
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(f"no layer is called {pattern!r}: write e.g. 'mid_block*' or '{names[len(names) // 2]}'")
    return {name for name in names if any(fnmatchcase(name, each) for each in (*ALWAYS_HIGH_PRECISION, *patterns))}


def quantize(graph: Path, out: Path, scheme: Scheme, ranges: Mapping[str, Range], names: Collection[str]) -> None:
    """Write the graph with these layers rounded, and its weights beside it.

    Args:
        graph: ONNX file of the export.
        out: the ONNX file to write, in another directory.
        ranges: of the tensors that these layers read, and write if the scheme rounds outputs.
        names: of the layers to round.
    """
    import onnx_ir as ir

    from ..trace.convert import WEIGHTS_FILE

    model = ir.load(graph)
    _Rewriter(model, scheme, ranges).rewrite(names)
    out.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, out, external_data=WEIGHTS_FILE)


def shadow(graph: Path, out: Path, scheme: Scheme, ranges: Mapping[str, Range], names: Collection[str]) -> list[str]:
    """Write the graph with a rounded twin beside each of these layers, which nothing else reads.

    Args:
        out: an ONNX file in the graph's directory: it uses the same weights.

    Returns:
        Names of the layers in the order of the file's outputs: for each the sum of squares of what it computes, then
        that of the twin's difference from it.
    """
    import onnx_ir as ir

    model = ir.load(graph)
    while model.graph.outputs:
        model.graph.outputs.pop()
    order = _Rewriter(model, scheme, ranges).add_twins(names)
    ir.save(model, out)
    return order


class _Rewriter:
    """Adds Q/DQ pairs to a model."""

    def __init__(self, model: ir.Model, scheme: Scheme, ranges: Mapping[str, Range]) -> None:
        self._graph, self._scheme, self._ranges = model.graph, scheme, ranges
        self._activations: dict[ir.Value, ir.Value] = {}
        self._weights: dict[ir.Value, ir.Value] = {}

    def rewrite(self, names: Collection[str]) -> None:
        nodes = self._nodes(names)
        if self._scheme.outputs:
            for node in nodes:
                if node.op_type == "Conv" and not node.outputs[0].is_graph_output():
                    self._replace_output(node.outputs[0])
        for node in nodes:
            weight = node.inputs[1]
            assert weight is not None
            node.replace_input_with(0, self._activation(node.inputs[0]))
            node.replace_input_with(1, self._weight(node, weight))
        for value in list(self._graph.initializers.values()):
            if not value.uses():
                self._graph.initializers.pop(str(value.name))

    def add_twins(self, names: Collection[str]) -> list[str]:
        import onnx_ir as ir

        order = []
        for node in self._nodes(names):
            exact = node.outputs[0]
            weight = node.inputs[1]
            assert weight is not None
            inputs = [self._activation(node.inputs[0]), self._rounded_at_run_time(node, weight), *node.inputs[2:]]
            twin = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=1)
            difference = ir.node("Sub", [exact, twin.outputs[0]])
            nodes = [twin, difference]
            for kind, value in (("signal", exact), ("error", difference.outputs[0])):
                whole = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
                total = ir.node("ReduceSumSquare", [whole.outputs[0]], {"keepdims": 0})
                total.outputs[0].name = f"{_layer(node).name}/{kind}"
                total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                total.outputs[0].shape = ir.Shape([])
                nodes += [whole, total]
                self._graph.outputs.append(total.outputs[0])
            self._graph.insert_after(node, nodes)
            order.append(_layer(node).name)
        return order

    def _nodes(self, names: Collection[str]) -> list[ir.Node]:
        return [node for node in self._graph if _is_layer(node) and _layer(node).name in names]

    def _replace_output(self, value: ir.Value) -> None:
        uses = list(value.uses())
        rounded = self._activation(value)
        self._activations[rounded] = rounded  # a layer that reads it needs no other pair
        for use in uses:
            use.node.replace_input_with(use.idx, rounded)

    def _activation(self, value: ir.Value | None) -> ir.Value:
        """The tensor after its pair, which stands right behind what computes it."""
        import numpy as np

        assert value is not None
        if value in self._activations:
            return self._activations[value]
        name = str(value.name)
        step, zero = _encode(self._ranges[name], self._scheme)
        scale = self._constant(f"{name}_scale", np.array(_up(step, self._float)))
        point = self._constant(f"{name}_zero", _array([zero], self._scheme.activations).reshape(()))
        pair = self._pair(value, scale, point, {}, f"{name}_rounded")
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], pair)
        else:
            self._graph.insert_after(producer, pair)
        self._activations[value] = pair[1].outputs[0]
        return pair[1].outputs[0]

    def _weight(self, node: ir.Node, weight: ir.Value) -> ir.Value:
        """The stored weight, rounded, behind its DequantizeLinear."""
        import numpy as np
        import onnx_ir as ir

        if weight in self._weights:
            return self._weights[weight]
        assert weight.const_value is not None
        exact = weight.const_value.numpy().astype(np.float32)
        axis = _channels(node, exact.ndim)
        scale, point = self._weight_constants(weight, exact, axis)
        shape = [1] * exact.ndim
        shape[axis] = -1
        assert scale.const_value is not None
        steps = exact / scale.const_value.numpy().astype(np.float32).reshape(shape)
        stored = self._constant(f"{weight.name}_rounded", _array(steps, self._weight_type))
        back = ir.node("DequantizeLinear", [stored, scale, point], {"axis": axis})
        back.outputs[0].name = f"{weight.name}_restored"
        self._graph.insert_before(node, back)
        self._weights[weight] = back.outputs[0]
        return back.outputs[0]

    def _rounded_at_run_time(self, node: ir.Node, weight: ir.Value) -> ir.Value:
        """The same of the weight as it is, so that no other is stored."""
        import numpy as np

        if weight in self._weights:
            return self._weights[weight]
        assert weight.const_value is not None
        exact = weight.const_value.numpy().astype(np.float32)
        axis = _channels(node, exact.ndim)
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
        scales = _up(largest / (_LARGEST_FP8 if self._scheme.floating else 127), self._float)
        return (
            self._constant(f"{weight.name}_scale", scales),
            self._constant(f"{weight.name}_zero", _array(np.zeros(len(scales)), self._weight_type)),
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


def _channels(node: ir.Node, dims: int) -> int:
    """The weight's axis of output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1):
        return 0
    return dims - 1


def _encode(within: Range, scheme: Scheme) -> tuple[float, int]:
    """A tensor's step and zero point."""
    if scheme.floating:
        return max(within.largest, 1e-6) / _LARGEST_FP8, 0
    if scheme.symmetric:
        return max(within.largest, 1e-6) / 127, 0
    step = max(within.high - within.low, 1e-6) / 255
    return step, round(-within.low / step)


def _up(exact: Any, dtype: str) -> Any:
    """Rounded up to the dtype, so that the largest value is not clipped."""
    import numpy as np

    exact = np.asarray(exact, np.float64)
    near = exact.astype(dtype)
    return np.where(near < exact, np.nextafter(near, np.array(np.inf, dtype)), near).astype(dtype)


def _array(steps: Any, dtype: str) -> npt.NDArray[Any]:
    import ml_dtypes
    import numpy as np

    steps = np.asarray(steps)
    if dtype.startswith("float8"):
        rounded = np.clip(steps, -_LARGEST_FP8, _LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
    else:
        lowest, highest = (-127, 127) if dtype == "int8" else (0, 255)
        rounded = np.clip(np.rint(steps), lowest, highest).astype(dtype)
    return np.asarray(rounded)
