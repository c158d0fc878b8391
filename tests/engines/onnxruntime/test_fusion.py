"""Replacement of attention by ONNX Runtime's own operator: every attention is replaced, and the outputs are equal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from offcut.engines.onnxruntime.fusion import with_own_attention

HEADS, WIDTH = 2, 8


def attention(
    path: Path,
    *,
    perm: tuple[int, ...] = (0, 2, 1, 3),
    computed: bool = False,
    also_output: str | None = None,
    **settings: float,
) -> Path:
    """Save self-attention as the exporter writes it, on ``x`` [batch, sequence, heads x width].

    Args:
        perm: permutation of the transposes before the attention.
        computed: whether the graph concatenates the shape of the split.
        also_output: an inner tensor that becomes a graph output too.
    """
    split = np.array([0, -1, HEADS, WIDTH], np.int64)
    constants = {"split": split, "joined": np.array([0, -1, HEADS * WIDTH], np.int64)}
    nodes = []
    if computed:
        constants |= {f"size_{place}": split[place : place + 1] for place in range(4)}
        del constants["split"]
        nodes.append(helper.make_node("Concat", [f"size_{place}" for place in range(4)], ["split"], axis=0))
    for name in "qkv":
        constants[f"w{name}"] = np.random.default_rng(ord(name)).normal(size=(16, 16)).astype(np.float32)
        nodes += [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}0"]),
            helper.make_node("Reshape", [f"{name}0", "split"], [f"{name}1"]),
            helper.make_node("Transpose", [f"{name}1"], [name], perm=perm),
        ]
    nodes += [
        helper.make_node("Attention", ["q", "k", "v"], ["a"], **settings),
        helper.make_node("Transpose", ["a"], ["a1"], perm=(0, 2, 1, 3)),
        helper.make_node("Reshape", ["a1", "joined"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", HEADS * WIDTH])]
    if also_output:
        outputs.append(helper.make_tensor_value_info(also_output, TensorProto.FLOAT, [None] * 4))
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", HEADS * WIDTH])],
        outputs,
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def output_of(model: str | bytes) -> np.ndarray:  # type: ignore[type-arg]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(3, 11, HEADS * WIDTH)).astype(np.float32)
    return np.asarray(session.run(["y"], {"x": x})[0])


def operators(content: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(content).graph.node)


@pytest.mark.parametrize("computed", [False, True])
def test_attention_is_replaced_with_its_reshapes_and_transposes(computed: bool, tmp_path: Path) -> None:
    path = attention(tmp_path / "a.onnx", computed=computed)
    content = with_own_attention(path)
    assert content is not None
    assert operators(content) == {"MatMul": 3, "MultiHeadAttention": 1}
    np.testing.assert_allclose(output_of(content), output_of(str(path)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"is_causal": 1}, {"scale": 0.5}, {"softcap": 2.0}, {"also_output": "a"}, {"also_output": "a1"}],
    ids=str,
)
def test_attention_without_an_equivalent_is_left_alone(settings: dict[str, object], tmp_path: Path) -> None:
    assert with_own_attention(attention(tmp_path / "a.onnx", **settings)) is None  # type: ignore[arg-type]


def test_other_transposes_are_left_alone(tmp_path: Path) -> None:
    assert with_own_attention(attention(tmp_path / "a.onnx", perm=(0, 2, 3, 1))) is None


def test_a_file_that_is_not_a_graph_is_left_to_the_engine(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xff not a graph")
    assert with_own_attention(tmp_path / "a.onnx") is None


def test_every_attention_of_a_unet_is_replaced_and_its_output_is_equal(unet_bundle: Path) -> None:
    from support.unets import largest_difference, random_inputs, run

    import offcut

    bundle = offcut.Bundle.open(unet_bundle)
    graphs = bundle.graphs(bundle.entry("onnxruntime"))
    before = Counter(node.op_type for node in onnx.load(str(graphs.full), load_external_data=False).graph.node)
    assert before["Attention"] > 0
    for path in (graphs.full, *graphs.shallow.values()):
        if content := with_own_attention(path):
            after = operators(content)
            assert after["Attention"] == 0
            assert after["MultiHeadAttention"] > 0
    pair = bundle.open_pair("onnxruntime")
    inputs = random_inputs(unet_bundle / "unet", batch=2, height=8, width=12)
    bound = pair.prepare({name: tuple(value.shape) for name, value in inputs.items()})
    for name, value in inputs.items():
        bound.buffers[name].copy_(value)
    bound.full()
    noise_pred = bound.buffers["noise_pred"]
    assert largest_difference(noise_pred, run("onnxruntime", graphs.full, inputs)["noise_pred"]) <= 1e-5
    pair.close()
