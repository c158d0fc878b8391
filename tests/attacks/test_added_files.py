"""Attack: files that are added to a bundle or exchanged in it, while the digests of the listed files stay right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import offcut
from offcut.engines.bundle import bundle as bundle_module
from offcut.engines.bundle.view import view
from offcut.errors import BundleError

Copy = Callable[[Path], Path]


@contextmanager
def forged(bundle: Path, *changed: str) -> Iterator[dict[str, Any]]:
    """Yield the manifest to alter, then write it with the right digests of the files that were changed."""
    manifest = json.loads((bundle / "offcut.json").read_text())
    yield manifest
    for name in changed:
        file = bundle / name
        manifest["files"][name] = {"size": file.stat().st_size, "sha256": bundle_module.digest_file(file)}
    (bundle / "offcut.json").write_text(json.dumps(manifest))


@pytest.fixture
def bundle(tiny_bundle: Path, copied: Copy) -> Path:
    """A bundle whose tokenizer consists of vocabulary and merges, as those of Stable Diffusion do."""
    bundle = copied(tiny_bundle)
    name = "tokenizer/tokenizer.json"
    (bundle / name).unlink()
    with forged(bundle) as manifest:
        manifest["parts"].remove(name)
        del manifest["files"][name]
    return bundle


def image_of(bundle: Path) -> torch.Tensor:
    pipe: Any = offcut.load(bundle, "onnxruntime", threads=1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red cat", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    pipe.unet.close()
    return torch.as_tensor(image)


def swap_letters_of_the_tokenizer(bundle: Path) -> None:
    tokenizer = json.loads(CLIPTokenizer.from_pretrained(bundle / "tokenizer").backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["r"], vocabulary["b"] = vocabulary["b"], vocabulary["r"]
    (bundle / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))


def add_a_token(bundle: Path) -> None:
    (bundle / "tokenizer" / "added_tokens.json").write_text(json.dumps({"red": 3}))


def add_a_chat_template_and_code(bundle: Path) -> None:
    for folder in ("tokenizer", "text_encoder", "vae", "scheduler", "."):
        (bundle / folder / "pipeline.py").write_text("raise SystemExit('code of the bundle ran')")
        (bundle / folder / "modeling.py").write_text("raise SystemExit('code of the bundle ran')")


def add_another_autoencoder_in_shards(bundle: Path) -> None:
    weights = load_file(bundle / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, bundle / "vae" / "evil.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "evil.safetensors")}
    (bundle / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def add_an_adapter_of_the_text_encoder(bundle: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (bundle / "text_encoder" / "adapter_config.json").write_text(json.dumps(config))


def add_pickled_weights(bundle: Path) -> None:
    for folder, name in (("text_encoder", "pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin")):
        torch.save({}, bundle / folder / name)


@pytest.mark.parametrize(
    "attack",
    [
        swap_letters_of_the_tokenizer,
        add_a_token,
        add_a_chat_template_and_code,
        add_another_autoencoder_in_shards,
        add_an_adapter_of_the_text_encoder,
        add_pickled_weights,
    ],
)
def test_a_file_that_the_manifest_does_not_list_has_no_effect(attack: Callable[[Path], None], bundle: Path) -> None:
    digest, expected = offcut.Bundle.open(bundle).digest, image_of(bundle)
    attack(bundle)
    offcut.Bundle.open(bundle, expect_digest=digest).verify_files()
    assert torch.equal(image_of(bundle), expected)


def test_the_attacks_have_an_effect_on_diffusers_alone(bundle: Path) -> None:
    """Control: without offcut's view, the added weights would be loaded."""
    words = CLIPTokenizer.from_pretrained(bundle / "tokenizer")("red").input_ids
    swap_letters_of_the_tokenizer(bundle)
    assert CLIPTokenizer.from_pretrained(bundle / "tokenizer")("red").input_ids != words
    before = diffusers.AutoencoderKL.from_pretrained(bundle / "vae").decoder.conv_in.weight.detach().clone()
    add_another_autoencoder_in_shards(bundle)
    after = diffusers.AutoencoderKL.from_pretrained(bundle / "vae").decoder.conv_in.weight
    assert torch.equal(after, -before)


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_is_exchanged_after_its_check_has_no_effect(
    large: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offcut.engines.bundle import view as view_module

    if large:
        monkeypatch.setattr(view_module, "_COPIED_BYTES", 0)
    name = "vae/diffusion_pytorch_model.safetensors"
    original = (bundle / name).read_bytes()
    with view(offcut.Bundle.open(bundle), [name]) as folder:
        (bundle / "other").write_bytes(b"evil" * 100)
        os.replace(bundle / "other", bundle / name)
        assert (folder / name).read_bytes() == original
        assert sorted(path.name for path in folder.rglob("*") if not path.is_dir()) == [Path(name).name]
    with pytest.raises(BundleError, match="has 400 bytes, not"), view(offcut.Bundle.open(bundle), [name]):
        pass


def test_a_graph_that_is_exchanged_while_it_is_opened_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = offcut.Bundle.open(bundle)
    name = opened.entry("onnxruntime").full
    content = (bundle / name).read_bytes()
    real_engine = bundle_module.engine

    def exchange(kind: str) -> Any:
        (bundle / "other").write_bytes(content)
        os.replace(bundle / "other", bundle / name)
        return real_engine(kind)

    opened.open_pair("onnxruntime").close()
    monkeypatch.setattr(bundle_module, "engine", exchange)
    with pytest.raises(BundleError, match="was changed while it was opened; open the bundle again"):
        opened.pair(opened.entry("onnxruntime"))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_weights_in_a_file_that_the_manifest_does_not_list_are_refused(engine: str, bundle: Path) -> None:
    name = offcut.Bundle.open(bundle).entry(engine).full
    model = onnx.load(str(bundle / name), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "unlisted.data"
    shutil.copyfile((bundle / name).with_name("weights.data"), (bundle / name).with_name("unlisted.data"))
    (bundle / name).write_bytes(model.SerializeToString())
    with forged(bundle, name):
        pass
    opened = offcut.Bundle.open(bundle)
    opened.verify_files()
    with pytest.raises(BundleError, match=r"takes weights from unlisted\.data"):
        opened.open_pair(engine)


@pytest.mark.parametrize("name", ["vae/pytorch_model.bin", "tokenizer/run.py", "scheduler/x.pkl", "vae/weights"])
def test_a_listed_component_file_that_could_hold_code_is_refused(name: str, bundle: Path) -> None:
    (bundle / name).write_bytes(b"code")
    with forged(bundle, name) as manifest:
        manifest["parts"].append(name)
    with pytest.raises(BundleError, match="is not a kind of file that components have"):
        offcut.Bundle.open(bundle)
