"""A rewrite of attentions that share a query, as in an IP-Adapter, into a form that TensorRT-RTX builds.

TensorRT-RTX 1.7's builder crashes, and the process with it, where two ``Attention`` nodes read the same query. It
builds if all but the first are expanded into matrix products and a softmax. The attention to the text stays whole. The
attention to an image has few tokens (4, or 16 for an IP-Adapter Plus), so fusing it would gain little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


@contextmanager
def separate_queries(onnx: Path) -> Iterator[Path]:
    """Yield a file of this graph in which no two ``Attention`` nodes read the same query.

    The file is the given one if nothing has to change, or if it is not a graph, which the builder then reports itself.
    A new file lives as long as the context; its weights stay in their file.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = ir.load(onnx)
    except DecodeError:
        model = None
    if model is None or not expand_shared(model):
        yield onnx
        return
    stored = [value.const_value for value in model.graph.initializers.values()]
    with TemporaryDirectory(prefix="offcut-") as folder:
        for name in {str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}:
            (Path(folder) / name).symlink_to(onnx.parent.resolve() / name)
        rewritten = Path(folder) / onnx.name
        ir.save(model, rewritten)
        yield rewritten


def expand_shared(model: ir.Model) -> int:
    """Expand, in place, each ``Attention`` whose query an earlier one reads; return the number of expanded nodes."""
    queries: set[ir.Value] = set()
    expanded = 0
    for node in list(model.graph):
        query = node.inputs[0] if node.op_type == "Attention" and node.domain == "" else None
        if query is None:
            continue
        if query in queries:
            _expand(node)
            expanded += 1
        queries.add(query)
    return expanded


def _expand(attention: ir.Node) -> None:
    """Replace an attention without mask by softmax(q / sqrt(width) . k^T) . v; q is [batch, heads, tokens, width]."""
    import onnx_ir as ir

    graph, output = attention.graph, attention.outputs[0]
    query, key, value = attention.inputs
    assert graph is not None

    def add(kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        node.outputs[0].name = f"{output.name}_{kind.lower()}_{len(graph)}"
        graph.insert_before(attention, node)
        return node.outputs[0]

    width = add("CastLike", add("Shape", key, start=-1), query)
    scores = add("MatMul", add("Div", query, add("Sqrt", width)), add("Transpose", key, perm=[0, 1, 3, 2]))
    result = add("MatMul", add("Softmax", scores, axis=-1), value)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(attention, safe=True)
    result.name, output.name = output.name, None
