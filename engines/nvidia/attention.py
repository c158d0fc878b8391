"""Attentions to text and image that share a query, as an IP-Adapter makes them, in a form that TensorRT-RTX takes.

TensorRT-RTX 1.7's builder crashes, and the process with it, where two ``Attention`` read the same query. It builds when
all but the first of them are written out as the products and the softmax that they stand for. The attention to the text
stays whole; the other is over an image's few tokens (4, or 16 of an IP-Adapter Plus), where little is left to fuse.
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
def own_queries(onnx: Path) -> Iterator[Path]:
    """A file of this graph in which no two ``Attention`` have the same query; the file itself if it is so already.

    A new file lasts as long as the context, and its weights stay where they are. One that is no graph is given as it
    is: the builder says so in its own words.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = ir.load(onnx)
    except DecodeError:
        model = None
    if model is None or not write_out_shared(model):
        yield onnx
        return
    stored = [value.const_value for value in model.graph.initializers.values()]
    with TemporaryDirectory(prefix="offcut-") as folder:
        for name in {str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}:
            (Path(folder) / name).symlink_to(onnx.parent.resolve() / name)
        rewritten = Path(folder) / onnx.name
        ir.save(model, rewritten)
        yield rewritten


def write_out_shared(model: ir.Model) -> int:
    """Write out each ``Attention`` whose query another one before it reads, in place; gives how many."""
    queries: set[ir.Value] = set()
    written = 0
    for node in list(model.graph):
        query = node.inputs[0] if node.op_type == "Attention" and node.domain == "" else None
        if query is None:
            continue
        if query in queries:
            _write_out(node)
            written += 1
        queries.add(query)
    return written


def _write_out(attention: ir.Node) -> None:
    """softmax(q / sqrt(width) . k^T) . v, of tensors [batch, heads, tokens, width] without a mask."""
    import onnx_ir as ir

    graph, output = attention.graph, attention.outputs[0]
    query, key, value = attention.inputs
    assert graph is not None

    def made(kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        node.outputs[0].name = f"{output.name}_{kind.lower()}_{len(graph)}"
        graph.insert_before(attention, node)
        return node.outputs[0]

    width = made("CastLike", made("Shape", key, start=-1), query)
    scores = made("MatMul", made("Div", query, made("Sqrt", width)), made("Transpose", key, perm=[0, 1, 3, 2]))
    result = made("MatMul", made("Softmax", scores, axis=-1), value)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(attention, safe=True)
    result.name, output.name = output.name, None
