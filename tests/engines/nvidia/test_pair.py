"""Guarantees of a pair on a GPU, with the first of the two libraries that works here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.unets import eager, random_inputs

import offcut
from offcut.engines.base import BoundPair, EngineOptions
from offcut.engines.bundle.bundle import open_entry
from offcut.engines.nvidia.pair import NvidiaPair
from offcut.engines.precision import bounds
from offcut.engines.registry import engine
from offcut.errors import EngineError, ShapeError
from offcut.exporter.trace.export import ExportedUNet

from ..conftest import UNET_CUTS
from .conftest import PROFILES

NAME = next((name for name in ("tensorrt-rtx", "tensorrt") if engine(name).probe().usable), None)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NAME is None, reason="neither TensorRT-RTX nor TensorRT runs on this machine"),
]

Open = Callable[..., NvidiaPair]
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def build(tiny_unet_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., offcut.Bundle]:
    """Return a function that builds ``tiny_unet_dir`` for this GPU with the given settings, once for each choice."""
    bundles: dict[str, offcut.Bundle] = {}

    def make(**settings: Any) -> offcut.Bundle:
        assert NAME is not None
        key = repr(sorted(settings.items()))
        if key not in bundles:
            bundles[key] = offcut.build(
                tiny_unet_dir,
                tmp_path_factory.mktemp("gpu") / "tiny.offcut",
                engine=NAME,
                cuts=UNET_CUTS,
                opset=23,
                profiles=PROFILES,
                settings={NAME: settings},
                device="cuda",
            )
        return bundles[key]

    return make


@pytest.fixture
def open_gpu(build: Callable[..., offcut.Bundle]) -> Iterator[Open]:
    """Return a function that opens a pair of a build with the given settings; the pair is closed after the test."""
    opened: list[NvidiaPair] = []

    def get(settings: Mapping[str, Any] | None = None, **options: Any) -> NvidiaPair:
        bundle = build(**(settings or {}))
        pair = open_entry(bundle, bundle.entry(NAME or ""), EngineOptions("cuda", **options))
        assert isinstance(pair, NvidiaPair)
        opened.append(pair)
        return pair

    yield get
    for pair in opened:
        pair.close()


def bind(pair: NvidiaPair, inputs: Tensors) -> BoundPair:
    bound = pair.prepare({key: tuple(value.shape) for key, value in inputs.items()})
    for key, value in inputs.items():
        bound.buffers[key].copy_(value)
    return bound


def inputs_of(model: Path, seed: int = 0, **dims: int) -> dict[str, torch.Tensor]:
    return random_inputs(model, **{"batch": 2, "height": 8, "width": 12, "sequence": 7, **dims}, seed=seed)


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    output, expected = output.float().cpu(), expected.float().cpu()
    return float((output - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("dims", [(2, 8, 12, 7), (1, 4, 4, 1), (6, 16, 8, 77)])
def test_every_profile_is_near_pytorch_call_after_call(
    dims: tuple[int, ...], cuda_graphs: bool, open_gpu: Open, tiny_unet_dir: Path
) -> None:
    """Each graph runs four times: the warm-up, the recorded call and two replays."""
    sizes = dict(zip(("batch", "height", "width", "sequence"), dims, strict=True))
    limits = bounds(NAME or "", "fp32")
    pair = open_gpu(cuda_graphs=cuda_graphs)
    bound = bind(pair, inputs_of(tiny_unet_dir, **sizes))
    assert bound.dims == sizes
    for seed in range(4):
        inputs = inputs_of(tiny_unet_dir, seed=seed, **sizes)
        for key, value in inputs.items():
            bound.buffers[key].copy_(value)
        expected = eager(tiny_unet_dir, inputs)
        bound.full()
        full = bound.buffers["noise_pred"].clone()
        assert relative_difference(full, expected) <= limits.parity
        for cut in UNET_CUTS:
            bound.buffers["noise_pred"].fill_(float("nan"))
            bound.shallow(cut)
            assert relative_difference(bound.buffers["noise_pred"], full) <= limits.across, cut


def test_the_cached_feature_is_the_memory_that_the_shallow_graph_reads(open_gpu: Open, tiny_unet_dir: Path) -> None:
    pair = open_gpu()
    bound = bind(pair, inputs_of(tiny_unet_dir))
    bound.full()
    for cut, features in pair.cuts.items():
        bound.shallow(cut)
        before = bound.buffers["noise_pred"].clone()
        for feature in features:
            saved = bound.buffers[feature].clone()
            bound.buffers[feature].mul_(1.5)
            bound.shallow(cut)
            assert not torch.equal(bound.buffers["noise_pred"], before), (cut, feature)
            bound.buffers[feature].copy_(saved)
            bound.shallow(cut)
            assert torch.equal(bound.buffers["noise_pred"], before), (cut, feature)


def test_a_recording_is_not_replayed_after_a_buffer_has_moved(open_gpu: Open, tiny_unet_dir: Path) -> None:
    bound = bind(open_gpu(), inputs_of(tiny_unet_dir))
    for _ in range(3):
        bound.full()
    before = bound.buffers["noise_pred"].clone()
    moved = dict(bound.buffers)
    moved["noise_pred"] = torch.zeros_like(before)
    bound.buffers = moved
    bound.full()
    assert torch.equal(bound.buffers["noise_pred"], before)


def test_bound_pairs_of_two_shapes_run_in_turn_although_the_scratch_memory_moves(
    open_gpu: Open, tiny_unet_dir: Path
) -> None:
    pair = open_gpu()
    small = bind(pair, inputs_of(tiny_unet_dir, batch=1, height=4, width=4, sequence=1))
    for _ in range(3):
        small.full()
    expected = small.buffers["noise_pred"].clone()
    large = bind(pair, inputs_of(tiny_unet_dir, batch=6, height=16, width=16, sequence=77))
    for _ in range(4):
        large.full()
        small.full()
        small.shallow("deepcache:1")
        assert relative_difference(small.buffers["noise_pred"], expected) <= bounds(NAME or "", "fp32").across


def test_a_call_neither_waits_nor_allocates(open_gpu: Open, tiny_unet_dir: Path) -> None:
    bound = bind(open_gpu(), inputs_of(tiny_unet_dir))
    for _ in range(2):
        bound.full()
        bound.shallow("deepcache:0")
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            bound.full()
            bound.shallow("deepcache:0")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations


def test_the_callers_stream_and_the_pairs_stream_are_ordered(open_gpu: Open, tiny_unet_dir: Path) -> None:
    inputs_by_seed = [inputs_of(tiny_unet_dir, seed=seed) for seed in range(6)]
    bound = bind(open_gpu(), inputs_by_seed[0])
    serial = []
    for inputs in inputs_by_seed:
        bound.buffers["sample"].copy_(inputs["sample"])
        bound.full()
        torch.cuda.synchronize()
        serial.append(bound.buffers["noise_pred"].clone())
    busy = torch.ones(2048, 2048, device="cuda")
    outputs = []
    with torch.cuda.stream(torch.cuda.Stream()):
        samples = [inputs["sample"].to("cuda", non_blocking=True) for inputs in inputs_by_seed]
        for sample in samples:
            bound.buffers["sample"].copy_(sample + (busy @ busy).mean() * 0)
            bound.full()
            outputs.append(bound.buffers["noise_pred"].clone())
    torch.cuda.synchronize()
    assert all(torch.equal(output, expected_output) for output, expected_output in zip(outputs, serial, strict=True))


def test_two_threads_compute_the_same_bits_as_one(open_gpu: Open, tiny_unet_dir: Path) -> None:
    """Each thread has its own bound pair of its own shape; both use one block of scratch memory."""
    pair = open_gpu()
    runs = [inputs_of(tiny_unet_dir, seed=1), inputs_of(tiny_unet_dir, seed=2, batch=1, height=16)]

    def generate(inputs: Tensors) -> list[torch.Tensor]:
        bound = bind(pair, inputs)
        outputs = []
        for step in range(12):
            bound.buffers["timestep"].fill_(float(step))
            bound.full() if step % 3 == 0 else bound.shallow("deepcache:1")
            outputs.append(bound.buffers["noise_pred"].clone())
        torch.cuda.current_stream().synchronize()
        bound.close()
        return outputs

    serial = [generate(inputs) for inputs in runs]
    parallel: dict[int, list[torch.Tensor]] = {}

    def work(index: int) -> None:
        parallel[index] = generate(runs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for index, expected in enumerate(serial):
        assert all(
            torch.equal(output, expected_output)
            for output, expected_output in zip(parallel[index], expected, strict=True)
        )


def test_a_shape_outside_every_profile_is_refused_with_the_nearest(open_gpu: Open) -> None:
    shapes = {"sample": (2, 4, 8, 20), "timestep": (2,), "encoder_hidden_states": (2, 7, 16)}
    with pytest.raises(ShapeError, match=r"covers batch 2, height 8, width 20, .* width 16, sequence 7"):
        open_gpu().prepare(shapes)


def test_a_closed_pair_frees_its_memory_and_cannot_run(open_gpu: Open, tiny_unet_dir: Path) -> None:
    import weakref

    pair = open_gpu()
    bound = bind(pair, inputs_of(tiny_unet_dir))
    for _ in range(3):
        bound.full()
    buffer = weakref.ref(bound.buffers["noise_pred"])
    bound.close()
    assert not bound.buffers
    assert buffer() is None
    with pytest.raises((TypeError, AttributeError)):
        bound.full()
    open_bound = bind(pair, inputs_of(tiny_unet_dir))
    pair.close()
    with pytest.raises(EngineError, match="closed: open it again"):
        open_bound.full()


def test_a_file_that_is_not_a_plan_is_refused_with_tensorrts_message(
    build: Callable[..., offcut.Bundle], tmp_path: Path
) -> None:
    from dataclasses import replace

    bundle = build()
    broken = tmp_path / "full.plan"
    broken.write_bytes(b"not a plan" * 1000)
    graphs = replace(bundle.graphs(bundle.entry(NAME or "")), full=broken)
    with pytest.raises(EngineError, match=rf"{NAME} refuses full\.plan: \S") as caught:
        engine(NAME or "").open(graphs, EngineOptions("cuda"))
    assert "\n" not in str(caught.value)


# ---- weights


def test_new_weights_reach_both_graphs_and_the_built_ones_come_back_bit_for_bit(
    open_gpu: Open, tiny_unet_dir: Path, fp32_export: ExportedUNet
) -> None:
    pair = open_gpu({"refittable": True})
    bound = bind(pair, inputs_of(tiny_unet_dir))

    def both() -> list[torch.Tensor]:
        outputs = []
        for _ in range(3):  # the third call is a replay
            bound.full()
            outputs.append(bound.buffers["noise_pred"].clone())
            bound.shallow("deepcache:0")
            outputs.append(bound.buffers["noise_pred"].clone())
        return outputs

    before = both()
    bias = initializer(fp32_export, "conv_out.bias")
    pair.refit({"conv_out.bias": bias + 1})
    for old, new in zip(before, both(), strict=True):
        assert relative_difference(new, old + 1) <= 1e-3
    pair.restore()
    assert all(torch.equal(old, new) for old, new in zip(before, both(), strict=True))


def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    open_gpu: Open, tiny_unet_dir: Path, fp32_export: ExportedUNet
) -> None:
    pair = open_gpu({"refittable": True})
    bound = bind(pair, inputs_of(tiny_unet_dir))
    bound.full()
    before = bound.buffers["noise_pred"].clone()
    bias = initializer(fp32_export, "conv_out.bias")
    for weights, sentence in (
        ({"conv_out.bias": bias + 1, "no.such.weight": bias}, "the graphs have no weights no.such.weight"),
        ({"conv_out.bias": bias.repeat(2)}, "conv_out.bias are 8 values of float32, but the plan's are 4 of float32"),
        ({"conv_out.bias": bias.half()}, "conv_out.bias are 4 values of float16"),
    ):
        with pytest.raises(EngineError, match=sentence):
            pair.refit(weights)
        bound.full()
        assert torch.equal(bound.buffers["noise_pred"], before)


def test_plans_that_are_not_refittable_are_refused(open_gpu: Open, fp32_export: ExportedUNet) -> None:
    with pytest.raises(EngineError, match=r"full\.plan was not built to be refitted: build it with refittable"):
        open_gpu().refit({"conv_out.bias": initializer(fp32_export, "conv_out.bias")})


@pytest.mark.parametrize("budget", [0, 100_000, 1 << 30])
def test_outputs_with_streamed_weights_are_near_pytorch(budget: int, open_gpu: Open, tiny_unet_dir: Path) -> None:
    inputs = inputs_of(tiny_unet_dir)
    bound = bind(open_gpu({"weight_streaming": True}, weight_budget=budget), inputs)
    for _ in range(3):
        bound.full()
        assert (
            relative_difference(bound.buffers["noise_pred"], eager(tiny_unet_dir, inputs))
            <= bounds(NAME or "", "fp32").parity
        )


def test_a_weight_budget_needs_plans_that_stream(open_gpu: Open) -> None:
    with pytest.raises(EngineError, match="streams no weights of these plans: build them with weight_streaming"):
        open_gpu(weight_budget=0)


@pytest.mark.skipif(NAME != "tensorrt-rtx", reason="TensorRT-RTX compiles kernels where it runs")
def test_compiled_kernels_are_cached_for_the_next_start(open_gpu: Open, tiny_unet_dir: Path, tmp_path: Path) -> None:
    inputs = inputs_of(tiny_unet_dir)
    outputs = []
    for _ in range(2):
        pair = open_gpu(runtime_cache=tmp_path / "kernels")
        bound = bind(pair, inputs)
        bound.full()
        outputs.append(bound.buffers["noise_pred"].clone())
        pair.close()
        assert len(list((tmp_path / "kernels").rglob("*.cache"))) == 1 + len(UNET_CUTS)
    assert torch.equal(*outputs)


def initializer(fp32_export: ExportedUNet, name: str) -> torch.Tensor:
    """Return a weight of the ONNX graph."""
    import onnx

    model = onnx.load(fp32_export.path)
    tensor_proto = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return torch.from_numpy(onnx.numpy_helper.to_array(tensor_proto, base_dir=str(fp32_export.path.parent)).copy())
