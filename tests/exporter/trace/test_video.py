"""Video UNets: exported with a symbolic number of frames, and cut where every skip connection joins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import new_unet
from support.unets import largest_difference, run
from support.videos import SKIPS, UNETS, random_inputs, save_video_unet

from offcut.engines.bundle.bundle import onnx_of
from offcut.errors import ModelError, ShapeError
from offcut.exporter.cut import GraphPair, find_cuts, split_all
from offcut.exporter.families import FEWEST_FRAMES, family_of
from offcut.exporter.graph import contract
from offcut.exporter.load import locate
from offcut.exporter.measure import measure_cuts
from offcut.exporter.trace.export import export

FAMILIES = list(SKIPS)
SIZES = [
    {"batch": 2, "frames": 3, "height": 8, "width": 12},
    {"batch": 1, "frames": 5, "height": 12, "width": 8},
]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def graph(name: str, video_bundle: Callable[[str], Path]) -> Path:
    return onnx_of(video_bundle(name))


@pytest.fixture(scope="module")
def pairs(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> list[GraphPair]:
    return split_all(graph, find_cuts(graph), tmp_path_factory.mktemp("video-cuts"))


# ---- without an export


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inputs_are_what_the_pipeline_passes(family: str, tmp_path: Path) -> None:
    source = locate(save_video_unet(family, tmp_path / "unet"))
    dims = {"batch": 2, "frames": 3, "height": 8, "width": 12, "sequence": 7}
    specs = source.family.specs(source.config, "float32")
    given = random_inputs(family, **{key: size for key, size in dims.items() if key != "sequence"})
    assert {spec.name: spec.resolve(dims) for spec in specs} == {key: tuple(t.shape) for key, t in given.items()}
    with torch.no_grad():
        output = new_unet(UNETS[family])(**given).sample
    assert source.family.noise(source.config, "float32").resolve(dims) == tuple(output.shape)


def test_more_frames_than_a_motion_module_supports_are_refused() -> None:
    config = {"_class_name": "UNetMotionModel", "motion_max_seq_length": 8}
    family = family_of(config)
    family.check_limits(config, {"frames": 8})
    with pytest.raises(ShapeError, match="UNetMotionModel supports at most 8 frames, not 9: make fewer"):
        family.check_limits(config, {"frames": 9})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_frame_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=f"a video has at least {FEWEST_FRAMES} frames, not 1"):
        export(save_video_unet(family, tmp_path / "unet"), tmp_path / "out", dims={"frames": 1})


@pytest.mark.parametrize(
    ("unet_class", "settings", "sentence"),
    [
        ("UNetSpatioTemporalConditionModel", {"cross_attention_dim": [8, 16]}, "differs from block to block"),
        ("UNetMotionModel", {"encoder_hid_dim_type": "ip_image_proj"}, "'ip_image_proj' cannot be exported yet"),
        ("UNetMotionModel", {"addition_embed_type": "text"}, "'text' cannot be exported yet"),
    ],
)
def test_unsupported_video_unets_are_refused(unet_class: str, settings: dict[str, Any], sentence: str) -> None:
    import diffusers

    config = {**getattr(diffusers, unet_class)(block_out_channels=(32, 64, 64, 64)).config, **settings}
    config["_class_name"] = unet_class
    with pytest.raises(ModelError, match=sentence):
        family_of(config).specs(config, "float32")


def test_a_video_unet_supports_no_adapter() -> None:
    config = {"_class_name": "UNetMotionModel"}
    with pytest.raises(ModelError, match="takes no adapter called 'controlnet'; it takes none"):
        family_of(config).specs(config, "float32", ["controlnet"])


# ---- cuts


@pytest.mark.slow
def test_every_skip_connection_is_a_cut_whose_features_are_all_frames_of_all_videos(name: str, graph: Path) -> None:
    cuts = find_cuts(graph)
    assert [cut.name for cut in cuts] == [*(f"deepcache:{k}" for k in range(SKIPS[name])), "mlperf"]
    assert [cut.cached[0].shape for cut in cuts[:4]] == [
        ("batch*frames", 32, "height", "width"),
        ("batch*frames", 64, "height", "width"),
        ("batch*frames", 64, "height/2", "width/2"),
        ("batch*frames", 64, "height/2", "width/2"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_shallow_with_fresh_features_equals_full_bit_for_bit_at_every_size(
    engine: str, name: str, pairs: list[GraphPair]
) -> None:
    unet = new_unet(UNETS[name])
    for size in SIZES:
        inputs = random_inputs(name, **size)
        with torch.no_grad():
            expected = unet(**inputs).sample
        for pair in pairs:
            full = run(engine, pair.full, inputs)
            noise_pred = full.pop("noise_pred")
            assert largest_difference(noise_pred, expected) < 2e-5
            shallow = run(engine, pair.shallow, {**inputs, **full})["noise_pred"]
            assert torch.equal(shallow, noise_pred), pair.cut.name
            for spec in pair.cached:
                assert tuple(full[spec.name].shape) == spec.resolve({**size, "sequence": 7})
                stale = {**inputs, **full, spec.name: torch.zeros_like(full[spec.name])}
                assert not torch.equal(run(engine, pair.shallow, stale)["noise_pred"], noise_pred), spec.name


@pytest.mark.slow
def test_the_shallow_graph_reads_the_number_of_frames_from_the_latent(pairs: list[GraphPair]) -> None:
    """Otherwise it would need the text for its shape alone, although it has no layers that read the text."""
    inputs = contract(pairs[-1].shallow)["inputs"]
    assert "frames" in inputs["sample"].shape
    assert inputs["deep_feature_1"].shape[0] == "batch*frames"


@pytest.mark.slow
def test_the_cost_of_a_cut_can_be_counted(graph: Path) -> None:
    dims = {"batch": 2, "frames": 4, "height": 16, "width": 16, "sequence": 7}
    costs = measure_cuts(graph, dims)
    assert 0 < costs[0].flops < costs[1].flops < costs[3].flops < 1
    assert costs[0].cache_bytes == 2 * 4 * 32 * 16 * 16 * 4


@pytest.mark.slow
def test_dimensions_may_be_fixed(tmp_path: Path) -> None:
    name = "svd"
    dims = {"batch": 2, "frames": 3}
    made = export(save_video_unet(name, tmp_path / "unet"), tmp_path / "out", dims=dims)
    assert made.outputs["noise_pred"].shape == (2, 3, 4, "height", "width")
    assert "frames" not in str(made.inputs["sample"])
    cut = find_cuts(made)[2]
    assert cut.cached[0].shape == (6, 64, "height/2", "width/2")
    inputs = random_inputs(name, batch=2, frames=3, height=8, width=12)
    pair = split_all(made, ["deepcache:2"])[0]
    full = run("onnxruntime", pair.full, inputs)
    with torch.no_grad():
        assert largest_difference(full["noise_pred"], new_unet(UNETS[name])(**inputs).sample) < 2e-5
    assert torch.equal(run("onnxruntime", pair.shallow, {**inputs, **full})["noise_pred"], full["noise_pred"])
