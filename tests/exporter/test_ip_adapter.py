"""IP-Adapters in a graph: its inputs, parity with diffusers layer by layer, which shallow graphs read images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from support.ip_adapters import IMAGE_WIDTH, save_ip_adapter
from support.models import save_unet
from support.unets import SDXL, largest_difference, random_inputs, run, save_family

import offcut
from offcut.errors import ModelError
from offcut.exporter.ip_adapter import IPAdapter, with_adapters
from offcut.exporter.load import load_unet, locate
from offcut.exporter.trace.export import ExportedUNet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL-like UNet, whose outermost level has no attention, and two IP-Adapters for it."""
    folder = tmp_path_factory.mktemp("ip-adapter")
    unet = UNet2DConditionModel.from_pretrained(save_unet(folder / "unet", **SDXL))
    save_ip_adapter(folder / "plain.safetensors", unet, seed=1)
    save_ip_adapter(folder / "plus.safetensors", unet, seed=2, plus=True)
    return folder


def adapters(model: Path) -> list[IPAdapter]:
    return [
        IPAdapter(model / "plain.safetensors", 0.5, images=2),
        IPAdapter(model / "plus.safetensors", tokens=5),
    ]


@pytest.fixture(scope="module")
def exported(model: Path) -> ExportedUNet:
    return offcut.export(model / "unet", model / "graph", ip_adapters=adapters(model))


def test_the_inputs_follow_the_files(model: Path) -> None:
    source = locate(model / "unet", ip_adapters=adapters(model))
    inputs = {spec.name: spec.shape for spec in source.family.specs(source.config, "float32")}
    assert list(inputs)[-3:] == ["image_embeds_0", "image_embeds_1", "ip_adapter_scale"]
    assert inputs["image_embeds_0"] == ("batch", 2, IMAGE_WIDTH)
    assert inputs["image_embeds_1"] == ("batch", 1, 5, IMAGE_WIDTH)
    names = source.config["ip_adapter_layers"]
    assert inputs["ip_adapter_scale"] == (len(names), 2)
    unet = load_unet(source)
    ours = [name for name, each in unet.attn_processors.items() if hasattr(each, "to_k_ip")]  # type: ignore[operator,union-attr]
    assert names == ours


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_full_and_shallow_graphs_compute_what_diffusers_does(
    model: Path, exported: ExportedUNet, engine: str, tmp_path: Path
) -> None:
    inputs = random_inputs(model / "unet", batch=3, height=8, width=12)
    generator = torch.Generator().manual_seed(4)
    for name in ("image_embeds_0", "image_embeds_1", "ip_adapter_scale"):
        shape = exported.inputs[name].resolve({"batch": 3})
        inputs[name] = torch.randn(shape, generator=generator)

    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet").eval()
    unet._load_ip_adapter_weights([each.weights() for each in adapters(model)])
    layers = [each for each in unet.attn_processors.values() if hasattr(each, "to_k_ip") and hasattr(each, "scale")]
    for layer, scales in zip(layers, inputs["ip_adapter_scale"].tolist(), strict=True):
        layer.scale = scales
    with torch.no_grad():
        expected = unet(
            inputs["sample"],
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            added_cond_kwargs={
                "text_embeds": inputs["text_embeds"],
                "time_ids": inputs["time_ids"],
                "image_embeds": [inputs["image_embeds_0"], inputs["image_embeds_1"]],
            },
        ).sample

    reads = {}
    for cut in ("deepcache:0", "deepcache:8"):
        pair = offcut.split(exported, cut, tmp_path / cut.replace(":", "-"))
        full = run(engine, pair.full, inputs)
        assert largest_difference(full["noise_pred"], expected) < 2e-5
        shallow = run(engine, pair.shallow, inputs | full)
        assert torch.equal(shallow["noise_pred"], full["noise_pred"])
        graph = onnx.load(str(pair.shallow), load_external_data=False).graph
        reads[cut] = {value.name for value in graph.input} & {"image_embeds_0", "image_embeds_1", "ip_adapter_scale"}
    assert reads["deepcache:0"] == set()  # no attention out there
    assert len(reads["deepcache:8"]) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, 1)),
        ("a.safetensors:0.6", ("a.safetensors", 0.6, 1)),
        ("a.safetensors:0.6:3", ("a.safetensors", 0.6, 3)),
        ("c:/a.safetensors", ("c:/a.safetensors", 1.0, 1)),
        ("c:/a.safetensors:2", ("c:/a.safetensors", 2.0, 1)),
    ],
)
def test_the_syntax_of_an_ip_adapter_option(text: str, expected: tuple[str, float, int]) -> None:
    adapter = IPAdapter.parse(text)
    assert (adapter.path.as_posix(), adapter.scale, adapter.images) == expected


def test_an_existing_file_wins_over_the_syntax(tmp_path: Path) -> None:
    odd = tmp_path / "a:1"
    odd.touch()
    assert IPAdapter.parse(str(odd)) == IPAdapter(odd)


def test_invalid_ip_adapters_are_refused(model: Path, tmp_path: Path, tiny_unet_dir: Path) -> None:
    for text, message in (("a:1:1.5", "whole number of images"), ("a:1:0", "at least one image")):
        with pytest.raises(ModelError, match=message):
            IPAdapter.parse(text)
    (tmp_path / "no.safetensors").write_bytes(b"no")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    lora = {"ip_adapter.1.to_k_lora.down.weight": torch.zeros(1)}
    save_ip_adapter(tmp_path / "face.safetensors", unet, **lora)
    for name, message in (
        ("missing.safetensors", "cannot be read"),
        ("no.safetensors", "cannot be read"),
        ("other.safetensors", "is not an IP-Adapter"),
        ("face.safetensors", "FaceID"),
    ):
        with pytest.raises(ModelError, match=message):
            locate(model / "unet", ip_adapters=[IPAdapter(tmp_path / name)])
    other = locate(tiny_unet_dir, ip_adapters=[IPAdapter(model / "plain.safetensors")])
    with pytest.raises(ModelError, match="was made for another UNet"):
        load_unet(other)


def test_a_unet_without_attention_to_text_supports_no_ip_adapter(model: Path, tmp_path: Path) -> None:
    folder = save_family("unconditional", tmp_path / "unet")
    with pytest.raises(ModelError, match="UNet2DModel takes no IP-Adapter"):
        locate(folder, ip_adapters=adapters(model))
    with_image_projection = copy.deepcopy(locate(model / "unet").config) | {"encoder_hid_dim_type": "text_proj"}
    with pytest.raises(ModelError, match="without encoder_hid_dim"):
        with_adapters(with_image_projection, adapters(model), model)
