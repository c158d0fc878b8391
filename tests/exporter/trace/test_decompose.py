"""Decomposition of traced programs: equal results, and a second trace only where an operator needs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.unets import random_inputs, run

import offcut
from offcut.exporter.trace import convert
from offcut.exporter.trace.decompose import decomposed
from offcut.exporter.trace.export import ExportedUNet


class Trivial(torch.nn.Module):
    """Each operator that is replaced node by node, on tensors whose strides need a copy."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        first, second = sample.chunk(2, dim=1)
        first = torch.nn.functional.dropout(first.permute(0, 2, 3, 1), training=False)
        second = second.transpose(2, 3).contiguous().to(torch.float64).to(torch.float64)
        second = second.to("cpu", torch.float64)
        return torch.cat([first.reshape(first.shape[0], -1).double(), second.reshape(second.shape[0], -1)], 1)


class Reversed(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.rsub(sample.reshape(-1), 1.0)


class Flattened(torch.nn.Module):
    """A composite operator whose result is a view, which no table of decompositions lists."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample.flatten(1) + 1


class InPlace(torch.nn.Module):
    """Writes to a tensor of which ``contiguous`` may have given the tensor itself."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        scaled = sample * 2
        scaled.contiguous().add_(1)
        return scaled


def traced(module: torch.nn.Module, sample: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), (sample,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def operators(program: torch.export.ExportedProgram) -> set[object]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def test_trivial_operators_are_replaced_without_a_second_trace() -> None:
    sample = torch.randn(2, 6, 4, 8)
    program = traced(Trivial(), sample)
    aten = torch.ops.aten
    trivial = (
        aten.dropout.default,
        aten.contiguous.default,
        aten.reshape.default,
        aten.to.dtype,
        aten.to.device,
        aten.chunk.default,
    )
    table: dict[Any, Callable[..., Any]] = dict.fromkeys(trivial, lambda *_: None)
    assert operators(program) >= table.keys()
    result = decomposed(program)
    assert not operators(result) & table.keys()
    assert result.run_decompositions(table) is result
    for batch in (2, 3):
        sample = torch.randn(batch, 6, 4, 8)
        assert torch.equal(result.module()(sample), Trivial()(sample))


def test_a_composite_operator_that_returns_a_view_is_left_to_pytorch() -> None:
    sample = torch.randn(2, 3, 4)
    program = traced(Flattened(), sample)
    assert torch.ops.aten.flatten.using_ints in operators(program)
    result = decomposed(program).run_decompositions({})
    assert torch.ops.aten.flatten.using_ints not in operators(result)
    assert torch.equal(result.module()(sample), Flattened()(sample))


def test_a_program_that_writes_to_an_input_is_left_to_pytorch() -> None:
    sample = torch.randn(2, 3)
    program = traced(InPlace(), sample)
    assert torch.ops.aten.add_.Tensor in operators(program)
    assert decomposed(program) is program
    functional = program.run_decompositions({})
    assert torch.ops.aten.add_.Tensor not in operators(functional)
    assert torch.equal(functional.module()(sample), sample * 2 + 1)


def test_other_operators_are_left_to_pytorch() -> None:
    sample = torch.randn(2, 3)
    result = decomposed(traced(Reversed(), sample))
    again = result.run_decompositions(torch.export.default_decompositions())
    assert torch.ops.aten.rsub.Scalar in operators(result)
    assert torch.ops.aten.rsub.Scalar not in operators(again)
    assert torch.equal(again.module()(sample), 1 - sample.reshape(-1))


@pytest.mark.slow
def test_the_graph_computes_what_pytorchs_decomposition_gives(
    unet_export: Callable[[str], tuple[Path, ExportedUNet]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ours = unet_export("plain")
    monkeypatch.setattr(convert, "decomposed", lambda program: program)
    theirs = offcut.export(model, tmp_path / "theirs")
    assert ours.weights.read_bytes() == theirs.weights.read_bytes()
    first, second = (onnx.load(str(graph.path), load_external_data=False).graph for graph in (ours, theirs))
    assert sorted(node.op_type for node in first.node) == sorted(node.op_type for node in second.node)
    inputs = random_inputs(model, batch=3, height=6, width=8)
    outputs = [run("onnxruntime", graph.path, inputs)["noise_pred"] for graph in (ours, theirs)]
    assert torch.equal(*outputs)
