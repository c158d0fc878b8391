"""CUDA graphs of ONNX Runtime; the tests for every engine are in ``test_pairs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from support.unets import random_inputs

import offcut
from offcut.engines.base import EngineOptions, EnginePair
from offcut.engines.onnxruntime import pair as engine_module
from offcut.engines.onnxruntime.pair import BoundOnnxRuntimePair, OnnxRuntimePair
from offcut.engines.precision import bounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in engine_module.probe().devices, reason="ONNX Runtime cannot use a GPU here"),
]

Tensors = Mapping[str, torch.Tensor]
CUT = "deepcache:2"


@pytest.fixture
def open_cuda(every_cut: Path) -> Callable[..., EnginePair]:
    bundle = offcut.Bundle.open(every_cut)
    return lambda **options: OnnxRuntimePair(
        bundle.graphs(bundle.entry("onnxruntime")), EngineOptions("cuda", **options)
    )


def bind(pair: EnginePair, inputs: Tensors) -> BoundOnnxRuntimePair:
    bound = pair.prepare({key: tuple(value.shape) for key, value in inputs.items()})
    assert isinstance(bound, BoundOnnxRuntimePair)
    return bound


def outputs_of_calls(bound: BoundOnnxRuntimePair, model: Path, calls: int) -> list[torch.Tensor]:
    """Return the outputs of full and shallow calls in turn, each on its own inputs."""
    outputs = []
    for seed in range(calls):
        for key, value in inputs_of(model, seed).items():
            bound.buffers[key].copy_(value)
        bound.full() if seed % 2 == 0 else bound.shallow(CUT)
        outputs.append(bound.buffers["noise_pred"].clone())
    return outputs


def inputs_of(model: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    return random_inputs(model, batch=2, height=8, width=12, seed=seed)


def relative_difference(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(outputs, expected, strict=True)
    return max(
        float((output - expected_output).abs().max() / expected_output.abs().max()) for output, expected_output in pairs
    )


def test_replayed_calls_equal_launched_calls(open_cuda: Callable[..., EnginePair], tiny_unet_dir: Path) -> None:
    """Two calls of each graph warm up, and the third is captured. Buffers of closed pairs stay allocated."""
    across = bounds("onnxruntime", "fp32", device="cuda").across
    plain = open_cuda(cuda_graphs=False)
    expected = outputs_of_calls(bind(plain, inputs_of(tiny_unet_dir)), tiny_unet_dir, 10)
    pair = open_cuda()
    closed_buffers: list[dict[str, torch.Tensor]] = []
    for _ in range(3):
        bound = bind(pair, inputs_of(tiny_unet_dir))
        assert relative_difference(outputs_of_calls(bound, tiny_unet_dir, 10), expected) <= across
        closed_buffers.append(dict(bound.buffers))
        bound.close()
        for buffer in closed_buffers[-1].values():
            buffer.fill_(7)
    assert all(bool((buffer == 7).all()) for buffers in closed_buffers for buffer in buffers.values())
    for opened in (plain, pair):
        opened.close()


def test_a_graph_id_replays_the_addresses_of_its_capture(
    open_cuda: Callable[..., EnginePair], tiny_unet_dir: Path
) -> None:
    """ONNX Runtime replays at the captured addresses, so each set of buffers needs its own graph id."""
    pair = open_cuda()
    first, second = (bind(pair, inputs_of(tiny_unet_dir)) for _ in range(2))
    outputs_of_calls(first, tiny_unet_dir, 8)
    session, _, number = first._bound[None]
    _, binding, _ = second._bound[None]
    for bound in (first, second):
        bound.buffers["noise_pred"].fill_(7)
    torch.cuda.synchronize()
    session.run_with_iobinding(binding, number)
    torch.cuda.synchronize()
    assert bool((second.buffers["noise_pred"] == 7).all())
    assert not bool((first.buffers["noise_pred"] == 7).any())
    pair.close()
