"""Real builds of all networks of a pipeline as plans, for a GPU that this machine does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import offcut
from offcut.errors import EngineError

from .conftest import PROFILES

pytestmark = [pytest.mark.usefixtures("trt"), pytest.mark.slow]
NETWORKS = ["text_encoder", "vae_decoder", "vae_encoder"]


@pytest.fixture
def build(small_pipeline_dir: Path, tmp_path: Path) -> Any:
    def run(engine: str, **options: Any) -> tuple[offcut.Bundle, list[str]]:
        messages: list[str] = []
        bundle = offcut.build(
            small_pipeline_dir,
            tmp_path / "all.offcut",
            engine=engine,
            compile_all=True,
            progress=messages.append,
            **options,
        )
        return bundle, messages

    return run


def test_a_deployed_bundle_holds_plans_only_and_gets_graphs_from_a_later_build(build: Any) -> None:
    options = {"profiles": PROFILES, "settings": {"tensorrt-rtx": {"compute_capabilities": ("89",)}}}
    bundle, messages = build("tensorrt-rtx", deploy=True, **options)
    assert [entry.name for entry in bundle.manifest.components] == NETWORKS
    weight_files = [path.name for path in bundle.path.rglob("*") if path.suffix in (".onnx", ".data", ".safetensors")]
    assert {name.partition("-")[0].partition(".")[0] for name in weight_files} == {"reference", "final_layer_norm"}
    sizes = {}
    for entry in bundle.manifest.components:
        assert entry.graph is entry.weights is None
        (plan,) = entry.engines
        assert (bundle.path / plan.full).stat().st_size > 10_000
        assert plan.targets == ("sm_89",)
        sizes[entry.name] = [each.profile() for each in plan.profiles]
        reference = load_file(bundle.path / plan.references[0])
        first_input = entry.inputs[0]
        assert tuple(reference[first_input.name].shape) == first_input.spec().resolve(sizes[entry.name][0].min)
        assert set(reference) == {first_input.name, *(tensor.name for tensor in entry.outputs)}
    assert [each.max for each in sizes["text_encoder"]] == [{"batch": 2}, {"batch": 6}]
    assert sizes["vae_decoder"][1].min == {"batch": 1, "height": 4, "width": 4}
    assert sizes["vae_encoder"][1].max == {"batch": 6, "height": 16 * 4, "width": 16 * 4}
    bundle.verify_files()
    if not torch.cuda.is_available():
        assert [plan.verified for entry in bundle.manifest.components for plan in entry.engines] == [False] * 3
        assert sum("is left unverified" in sentence for sentence in messages) == 4
        with pytest.raises(EngineError, match="cannot run on cuda here"):
            offcut.load(bundle, "tensorrt-rtx", device="cuda")

    with_graphs, _ = build("onnxruntime")
    assert [entry.name for entry in with_graphs.manifest.components] == NETWORKS
    for before, after in zip(bundle.manifest.components, with_graphs.manifest.components, strict=True):
        assert after.engines == before.engines
        assert after.graph is not None
    pipe: Any = offcut.load(with_graphs, "onnxruntime", threads=1)
    assert pipe("a cat", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    assert pipe.vae.network.engine == "onnxruntime"
    pipe.unet.close()

    again, messages = build("tensorrt-rtx", **options)
    assert sum(sentence.startswith("reuse") and " of tensorrt-rtx-" in sentence for sentence in messages) == 3
    assert again.manifest.components == with_graphs.manifest.components
