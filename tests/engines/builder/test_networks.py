"""Networks around the UNet, compiled by inductor; ``nvidia/test_components.py`` compiles them with TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

import offcut
from offcut.engines.base import EngineOptions
from offcut.engines.builder.networks import compile_components
from offcut.engines.builder.request import BuildRequest
from offcut.engines.builder.resolve import resolve
from offcut.engines.builder.verify import verify_bundle
from offcut.engines.bundle.networks import components_of, engine_for, open_component
from offcut.engines.bundle.store import commit, staging
from offcut.errors import BundleError, EngineError

from ..conftest import _quick_host_code

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(small_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> offcut.Bundle:
    """A bundle of all networks for ONNX Runtime, and of the text encoder for inductor (a minute to compile)."""
    path = tmp_path_factory.mktemp("bundles") / "all.offcut"
    with _quick_host_code():
        first = offcut.build(small_pipeline_dir, path, engine="onnxruntime", compile_all=True)
        request = BuildRequest(str(small_pipeline_dir), engines=("inductor",), compile_all=True)
        plan = resolve(request, lambda sentence: None)
        unet = first.entry("onnxruntime").model_copy(update={"engine": "inductor"})
        text = [entry for entry in first.manifest.components if entry.name == "text_encoder"]
        with staging(path) as staged:
            (compiled,) = compile_components(plan, unet, text, path, staged, lambda sentence: None)
            commit(
                path,
                staged,
                lambda manifest, files: manifest.model_copy(
                    update={
                        "components": tuple(
                            compiled if entry.name == compiled.name else entry for entry in manifest.components
                        ),
                        "files": {**manifest.files, **files},
                    }
                ),
            )
    return offcut.Bundle.open(path, trust=True)  # ``offcut.build`` would trust it


def test_the_text_encoder_computes_the_outputs_of_eager_transformers(
    bundle: offcut.Bundle, small_pipeline_dir: Path
) -> None:
    entry = components_of(bundle, "fp32")["text_encoder"]
    (build,) = entry.engines
    assert build.verified
    assert {Path(name).name for name in build.files} == {"full.pt2", "full.json"}
    pair = open_component(bundle, entry, "inductor", EngineOptions())
    assert pair.name == "inductor"
    eager = CLIPTextModel.from_pretrained(small_pipeline_dir / "text_encoder").eval()
    for batch in (1, 3):
        ids = torch.randint(0, 26, (batch, 16), generator=torch.Generator().manual_seed(batch))
        bound = pair.prepare({"input_ids": tuple(ids.shape)})
        bound.buffers["input_ids"].copy_(ids)
        bound.full()
        with torch.no_grad():
            expected = eager(ids, output_hidden_states=True)
        torch.testing.assert_close(bound.buffers["last_hidden_state"], expected.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(bound.buffers["pooler_output"], expected.pooler_output, rtol=0, atol=1e-5)
        torch.testing.assert_close(bound.buffers["hidden_states_1"], expected.hidden_states[1], rtol=0, atol=1e-5)
        bound.close()
    pair.close()


def test_verify_bundle_checks_the_text_encoder_too(bundle: offcut.Bundle) -> None:
    results = verify_bundle(bundle)
    (key,) = (key for key in results if key.startswith("text_encoder of inductor-"))
    (check,) = results[key]
    assert check.name == "text_encoder against PyTorch"
    assert check.passed


def test_engine_for_returns_an_engine_that_has_all_networks(bundle: offcut.Bundle) -> None:
    entries = components_of(bundle, "fp32")
    assert engine_for(bundle, "inductor", [entries["text_encoder"]]) == "inductor"
    assert engine_for(bundle, "inductor", entries.values()) == "onnxruntime"
    with pytest.raises(EngineError, match="has no vae_decoder for inductor: build it with --compile-all"):
        open_component(bundle, entries["vae_decoder"], "inductor", EngineOptions())


def test_an_altered_package_is_not_loaded(bundle: offcut.Bundle) -> None:
    entry = components_of(bundle, "fp32")["text_encoder"]
    package = bundle.path / entry.engines[0].full
    content = package.read_bytes()
    try:
        package.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"full\.pt2 was altered"):
            open_component(bundle, entry, "inductor", EngineOptions())
    finally:
        package.write_bytes(content)
