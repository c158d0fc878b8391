"""Guarantees of every engine's pair, tested for each engine. A new engine is one name in ``conftest.CPU_ENGINES``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from support.unets import eager, largest_difference, random_inputs, run

import offcut
from offcut.engines.base import BoundPair, EngineOptions, EnginePair
from offcut.engines.precision import bounds
from offcut.engines.registry import engine
from offcut.errors import EngineError, ShapeError

from .conftest import COMPILED_CUTS, CPU_ENGINES, ONNX_ENGINES, UNET_CUTS

OpenPair = Callable[..., EnginePair]
Tensors = Mapping[str, torch.Tensor]

pytestmark = pytest.mark.parametrize("name", CPU_ENGINES)


def bind(pair: EnginePair, inputs: Tensors) -> BoundPair:
    """Bind a pair to the shapes of these inputs, and copy the inputs into its buffers."""
    bound = pair.prepare({key: tuple(value.shape) for key, value in inputs.items()})
    for key, value in inputs.items():
        bound.buffers[key].copy_(value)
    return bound


def inputs_of(model: Path, seed: int = 0, **dims: int) -> dict[str, torch.Tensor]:
    return random_inputs(model, **{"batch": 2, "height": 8, "width": 12, **dims}, seed=seed)


def equals_across_cut(name: str, output: torch.Tensor, full: torch.Tensor) -> bool:
    """Return whether an output is within the engine's bound across the cut: bit for bit if it opens the ONNX graphs."""
    return float((output - full).abs().max() / full.abs().max()) <= bounds(name, "fp32").across


def equals_graph(name: str, output: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether an output is near the graph's. ONNX Runtime's own attention operator may differ by 1e-5."""
    allowed = max(bounds(name, "fp32").across, 1e-5 if name == "onnxruntime" else 0.0)
    return float((output - expected).abs().max() / expected.abs().max()) <= allowed


def reference_library(name: str) -> str:
    """Return the library that runs the same ONNX graph without offcut: the engine's own if it opens ONNX."""
    return name if name in ONNX_ENGINES else "onnxruntime"


@pytest.mark.smoke
def test_a_pair_has_the_bundles_inputs_outputs_and_cuts(name: str, open_pair: OpenPair) -> None:
    pair = open_pair(name)
    assert pair.name == name
    assert pair.device == torch.device("cpu")
    assert list(pair.inputs) == ["sample", "timestep", "encoder_hidden_states"]
    assert next(iter(pair.outputs)) == "noise_pred"
    assert list(pair.cuts) == (UNET_CUTS if name in ONNX_ENGINES else COMPILED_CUTS)
    assert pair.cuts["deepcache:0"] == ("deep_feature_0",)
    if "mlperf" in pair.cuts:
        assert pair.cuts["mlperf"] == ("deep_feature_1", "skip_feature_1")


@pytest.mark.parametrize("dims", [(1, 4, 4, 1), (2, 8, 12, 77), (6, 16, 4, 7)])
def test_one_pair_serves_every_shape(
    dims: tuple[int, int, int, int], name: str, open_pair: OpenPair, tiny_unet_dir: Path
) -> None:
    sizes = dict(zip(("batch", "height", "width", "sequence"), dims, strict=True))
    inputs = inputs_of(tiny_unet_dir, **sizes)
    pair = open_pair(name)
    bound = bind(pair, inputs)
    assert bound.dims == sizes
    bound.full()
    full = bound.buffers["noise_pred"].clone()
    assert largest_difference(full, eager(tiny_unet_dir, inputs)) <= 1e-4
    for cut in pair.cuts:
        bound.buffers["noise_pred"].fill_(float("nan"))
        bound.shallow(cut)
        assert equals_across_cut(name, bound.buffers["noise_pred"], full), cut


@pytest.mark.smoke
def test_the_cached_feature_is_the_memory_that_the_shallow_graph_reads(
    name: str, open_pair: OpenPair, tiny_unet_dir: Path
) -> None:
    """A change of the buffer between the two calls changes the shallow graph's output."""
    inputs = inputs_of(tiny_unet_dir)
    pair = open_pair(name)
    bound = bind(pair, inputs)
    bound.full()
    full = bound.buffers["noise_pred"].clone()
    for cut, features in pair.cuts.items():
        for feature in features:
            saved = bound.buffers[feature].clone()
            assert float(saved.abs().max()) > 0
            bound.buffers[feature].mul_(1.5)
            bound.shallow(cut)
            assert not equals_across_cut(name, bound.buffers["noise_pred"], full), (cut, feature)
            bound.buffers[feature].copy_(saved)
            bound.shallow(cut)
            assert equals_across_cut(name, bound.buffers["noise_pred"], full), (cut, feature)


def test_full_writes_the_outputs_of_its_graph(
    name: str, open_pair: OpenPair, tiny_unet_dir: Path, every_cut: Path
) -> None:
    inputs = inputs_of(tiny_unet_dir)
    pair = open_pair(name)
    bound = bind(pair, inputs)
    bound.full()
    outputs = run(reference_library(name), every_cut / "unet" / "fp32-opset23" / "full.onnx", inputs)
    for output in pair.outputs:
        assert equals_graph(name, bound.buffers[output], outputs[output]), output


def test_a_shallow_call_leaves_the_features_as_they_are(name: str, open_pair: OpenPair, tiny_unet_dir: Path) -> None:
    pair = open_pair(name)
    bound = bind(pair, inputs_of(tiny_unet_dir))
    bound.full()
    before = {key: value.clone() for key, value in bound.buffers.items() if key != "noise_pred"}
    bound.buffers["sample"].add_(1)
    for cut in pair.cuts:
        bound.shallow(cut)
    for key, value in before.items():
        assert torch.equal(bound.buffers[key], value + 1 if key == "sample" else value), key


def test_a_shallow_call_computes_from_new_inputs_and_old_features(
    name: str, open_pair: OpenPair, tiny_unet_dir: Path, every_cut: Path
) -> None:
    first, second = inputs_of(tiny_unet_dir, seed=1), inputs_of(tiny_unet_dir, seed=2)
    bound = bind(open_pair(name), first)
    bound.full()
    feature = bound.buffers["deep_feature_0"].clone()
    for key, value in second.items():
        bound.buffers[key].copy_(value)
    bound.shallow("deepcache:0")
    graph = every_cut / "unet" / "fp32-opset23" / "shallow-deepcache-0.onnx"
    expected = run(reference_library(name), graph, {**second, "deep_feature_0": feature})["noise_pred"]
    assert equals_graph(name, bound.buffers["noise_pred"], expected)


def test_buffers_keep_their_addresses(name: str, open_pair: OpenPair, tiny_unet_dir: Path) -> None:
    pair = open_pair(name)
    bound = bind(pair, inputs_of(tiny_unet_dir))
    assert set(bound.buffers) == {*pair.inputs, *pair.outputs}
    addresses = {key: buffer.data_ptr() for key, buffer in bound.buffers.items()}
    assert len(set(addresses.values())) == len(addresses)
    for _ in range(3):
        bound.full()
        for cut in pair.cuts:
            bound.shallow(cut)
    assert {key: buffer.data_ptr() for key, buffer in bound.buffers.items()} == addresses
    assert all(buffer.is_contiguous() for buffer in bound.buffers.values())


def test_two_bound_pairs_share_nothing(name: str, open_pair: OpenPair, tiny_unet_dir: Path) -> None:
    pair = open_pair(name)
    first_bound, second_bound = (
        bind(pair, inputs_of(tiny_unet_dir, seed=1)),
        bind(pair, inputs_of(tiny_unet_dir, seed=2)),
    )
    assert not {b.data_ptr() for b in first_bound.buffers.values()} & {
        b.data_ptr() for b in second_bound.buffers.values()
    }
    first_bound.full()
    expected = first_bound.buffers["noise_pred"].clone()
    second_bound.full()
    first_bound.shallow(list(pair.cuts)[-1])
    assert equals_across_cut(name, first_bound.buffers["noise_pred"], expected)


def test_two_threads_compute_the_same_bits_as_one(name: str, open_pair: OpenPair, tiny_unet_dir: Path) -> None:
    """Each thread has its own bound pair of its own shape; both are bound from one pair."""
    pair = open_pair(name)
    runs = [inputs_of(tiny_unet_dir, seed=1), inputs_of(tiny_unet_dir, seed=2, batch=1, height=16)]

    def generate(inputs: Tensors, start: Callable[[], object]) -> list[torch.Tensor]:
        bound = bind(pair, inputs)
        start()
        outputs = []
        for step in range(12):
            bound.buffers["timestep"].fill_(float(step))
            bound.full() if step % 3 == 0 else bound.shallow(list(pair.cuts)[-1])
            outputs.append(bound.buffers["noise_pred"].clone())
        bound.close()
        return outputs

    serial = [generate(inputs, lambda: None) for inputs in runs]
    barrier = threading.Barrier(2, timeout=60)
    parallel: dict[int, list[torch.Tensor]] = {}

    def work(index: int) -> None:
        parallel[index] = generate(runs[index], barrier.wait)

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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sample": (1, 4, 9, 8)}, "the latent's height is 9, but this UNet needs a multiple of 2: the nearest is 8"),
        ({"sample": (1, 4, 8, 1)}, "the latent's width is 1, .*: the nearest is 2"),
        ({"sample": (1, 9, 8, 8)}, r"sample has shape \[1, 9, 8, 8\]"),
        ({"timestep": (2,)}, "timestep has shape"),
        ({"encoder_hidden_states": (1, 7, 768)}, "encoder_hidden_states has shape"),
        ({"sample": (0, 4, 8, 8), "timestep": (0,), "encoder_hidden_states": (0, 7, 16)}, "batch .* is empty"),
    ],
)
def test_a_shape_that_the_engine_does_not_take_is_refused(
    change: dict[str, tuple[int, ...]], sentence: str, name: str, open_pair: OpenPair
) -> None:
    shapes = {"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 7, 16), **change}
    with pytest.raises(ShapeError, match=sentence):
        open_pair(name).prepare(shapes)


def test_a_closed_pair_frees_its_memory_and_cannot_run(
    name: str, bundle_of: Callable[[str], Path], tiny_unet_dir: Path
) -> None:
    """A closed pair must not write to memory that was freed."""
    import weakref

    pair = offcut.Bundle.open(bundle_of(name)).open_pair(name)
    bound = bind(pair, inputs_of(tiny_unet_dir))
    bound.full()
    buffer = weakref.ref(bound.buffers["noise_pred"])
    bound.close()
    assert not bound.buffers
    assert buffer() is None
    with pytest.raises((TypeError, AttributeError)):
        bound.full()
    with pytest.raises((TypeError, AttributeError)):
        bound.shallow("deepcache:0")
    pair.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_an_option(
    threads: int, name: str, bundle_of: Callable[[str], Path], tiny_unet_dir: Path
) -> None:
    inputs = inputs_of(tiny_unet_dir)
    pair = offcut.Bundle.open(bundle_of(name)).open_pair(name, threads=threads)
    bound = bind(pair, inputs)
    bound.full()
    assert largest_difference(bound.buffers["noise_pred"], eager(tiny_unet_dir, inputs)) <= 1e-4
    pair.close()
    torch.set_num_threads(1)  # inductor's number is PyTorch's own


def test_a_file_that_is_not_a_graph_is_refused_with_the_engines_message(
    name: str, bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    bundle = offcut.Bundle.open(bundle_of(name))
    graphs = bundle.graphs(bundle.entry(name))
    broken = tmp_path / graphs.full.name
    if graphs.full.with_suffix(".json").exists():
        (tmp_path / "full.json").write_bytes(graphs.full.with_suffix(".json").read_bytes())
    broken.write_bytes(b"\x08\x07not a graph")
    with pytest.raises(EngineError, match=rf"{name} refuses {broken.name}: \S") as caught:
        engine(name).open(replace(graphs, full=broken), EngineOptions())
    assert "\n" not in str(caught.value)


def test_a_hint_that_the_engine_does_not_have_is_refused(name: str, bundle_of: Callable[[str], Path]) -> None:
    bundle = offcut.Bundle.open(bundle_of(name))
    with pytest.raises(EngineError):
        engine(name).open(bundle.graphs(bundle.entry(name)), EngineOptions(inference_precision="int4"))
