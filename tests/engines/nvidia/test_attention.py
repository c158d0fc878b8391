"""Attentions that share a query are expanded for TensorRT-RTX, and the graph's output does not change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from offcut.engines.nvidia.attention import separate_queries

HEADS, WIDTH, TOKENS = 2, 8, 6
IMAGES = 2


def save(path: Path, keys: Mapping[str, int], *, share: bool = True) -> dict[str, np.ndarray]:
    """Save a graph that sums one attention for each of these keys, and return inputs for it.

    The query is an input times a weight, and the weight is stored in another file, as in a UNet's graph.
    """
    random = np.random.default_rng(0)

    def tensor(name: str, tokens: int) -> ir.Value:
        return ir.Value(
            name=name, shape=ir.Shape(["batch", HEADS, tokens, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT)
        )

    weight = ir.tensor(random.standard_normal((WIDTH, WIDTH)).astype(np.float32), name="to_q")
    stored = ir.Value(name="to_q", shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight)
    inputs = {name: tensor(name, tokens) for name, tokens in {"hidden": TOKENS, **keys}.items()}
    nodes: list[ir.Node] = []

    def add_node(kind: str, *values: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, values, attributes))
        nodes[-1].outputs[0].name = f"{kind.lower()}_{len(nodes)}"
        return nodes[-1].outputs[0]

    shared = add_node("MatMul", inputs["hidden"], stored)
    total = None
    for name in keys:
        query = shared if share else add_node("MatMul", inputs["hidden"], stored)
        result = add_node("Attention", query, inputs[name], inputs[name])
        total = result if total is None else add_node("Add", total, result)
    assert total is not None
    total.shape, total.type = ir.Shape(["batch", HEADS, TOKENS, WIDTH]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(list(inputs.values()), [total], nodes=nodes, initializers=[stored], opset_imports={"": 23})
    ir.save(ir.Model(graph, ir_version=10), path, external_data="weights.data")
    shapes = {name: (IMAGES, HEADS, tokens, WIDTH) for name, tokens in {"hidden": TOKENS, **keys}.items()}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def run(path: Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(inputs))[0])


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph]


@pytest.mark.parametrize("images", [{"image": 4}, {"image": 4, "another": 16}], ids=["one", "two"])
def test_all_attentions_but_the_first_are_expanded(images: dict[str, int], tmp_path: Path) -> None:
    graph = tmp_path / "unet.onnx"
    inputs = save(graph, {"text": 7, **images})
    before = graph.read_bytes()
    with separate_queries(graph) as file:
        assert file.name == graph.name
        assert file != graph
        assert kinds(file).count("Attention") == 1
        assert kinds(file).count("Softmax") == len(images)
        np.testing.assert_allclose(run(file, inputs), run(graph, inputs), rtol=1e-5, atol=1e-5)
    assert not file.exists()
    assert graph.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"unet.onnx", "weights.data"}


def test_a_graph_without_shared_queries_is_left_alone(tmp_path: Path) -> None:
    graph = tmp_path / "unet.onnx"
    save(graph, {"text": 7, "image": 4}, share=False)
    with separate_queries(graph) as file:
        assert file == graph


def test_an_attention_whose_output_is_the_graphs_can_be_expanded(tmp_path: Path) -> None:
    graph = tmp_path / "unet.onnx"
    inputs = save(graph, {"text": 7, "image": 4})
    model = ir.load(graph)
    last = [node for node in model.graph if node.op_type == "Attention"][-1].outputs[0]
    last.shape, last.type = model.graph.outputs[0].shape, model.graph.outputs[0].type
    model.graph.outputs[:] = [last]
    ir.save(model, graph)
    with separate_queries(graph) as file:
        np.testing.assert_allclose(run(file, inputs), run(graph, inputs), rtol=1e-5, atol=1e-5)
