from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.loras import (
    KINDS,
    fused_by_diffusers,
    merged_by_peft,
    random_adapter,
    save_adapter,
    save_lora,
    tensors_by_diffusers,
)

from offcut.errors import ModelError
from offcut.exporter.lora import Lora, ScaledLora, from_tensors, fuse, merged, read


def config_of(pipeline: Path) -> dict[str, object]:
    return dict(json.loads((pipeline / "unet" / "config.json").read_text()))


def fused(pipeline: Path, loras: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    fuse(unet, [ScaledLora(path, scale) for path, scale in loras], config_of(pipeline))
    return dict(unet.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_lora_is_what_diffusers_and_peft_make_of_it(kind: str, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    path = save_lora(kind, tiny_pipeline_dir, tmp_path / kind)
    got, expected = fused(tiny_pipeline_dir, [(path, 1.0)]), fused_by_diffusers(tiny_pipeline_dir, [(path, 1.0)])
    plain = UNet2DConditionModel.from_pretrained(tiny_pipeline_dir / "unet").state_dict()
    assert set(got) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2e-6, msg=name)
    changed = [name for name in expected if not torch.equal(got[name], plain[name])]
    assert len(changed) == len(read(path, config_of(tiny_pipeline_dir)).layers) > 20


def weights_with(lora: Lora, unet: Any) -> dict[str, torch.Tensor]:
    return {name: merged(unet.get_parameter(name), [(low_rank, 1.0)]) for name, low_rank in lora.layers.items()}


def loaded_by_diffusers(kind: str, file: Path, unet: Any) -> dict[str, torch.Tensor]:
    """Return the weights that PEFT, for a directory, or diffusers computes from a file."""
    unet = copy.deepcopy(unet)
    if kind == "peft":
        weights = merged_by_peft(PeftModel.from_pretrained(unet, file))
        return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    tensors, alphas, metadata = tensors_by_diffusers(file, unet.config)
    unet.load_lora_adapter(tensors, prefix="unet", network_alphas=alphas, metadata=metadata)
    return merged_by_peft(unet)


@pytest.mark.parametrize("kind", ["peft", "diffusers", "kohya", "scaled"])
def test_random_settings_of_peft(kind: str, tiny_unet_dir: Path, tmp_path: Path) -> None:
    """Random layers, ranks, alphas, patterns and rsLoRA, from a file and from the tensors that a pipeline loads.

    diffusers does not find the alphas of attention layers in kohya's files if they differ, so that the weights of these
    files are compared with PEFT's alone.
    """
    plain = UNet2DConditionModel.from_pretrained(tiny_unet_dir)
    config = json.loads((tiny_unet_dir / "config.json").read_text())
    for seed in range(25):
        trained = copy.deepcopy(plain)
        settings = random_adapter(trained, Random(seed))
        expected = merged_by_peft(trained)
        file = save_adapter(kind, trained, settings, tmp_path / str(seed))
        results = {"read": weights_with(read(file, config), plain)}
        if kind != "peft":
            tensors, alphas, metadata = tensors_by_diffusers(file, plain.config)
            results["from_tensors"] = weights_with(from_tensors("a", tensors, alphas or {}, metadata or {}), plain)
        if kind != "kohya":
            results["diffusers"] = loaded_by_diffusers(kind, file, plain)
        for source, weights in results.items():
            assert set(weights) == set(expected)
            for name, weight in expected.items():
                message = f"{source} {seed} {name} {settings.alpha_pattern}"
                torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=message)


def test_dora_is_refused_from_a_file_and_from_a_pipelines_tensors(tiny_unet_dir: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_unet_dir)
    settings = random_adapter(unet, Random(0), dora=True)
    for kind in ("peft", "diffusers"):
        file = save_adapter(kind, unet, settings, tmp_path / kind)
        with pytest.raises(ModelError, match="is DoRA, which offcut cannot add to weights"):
            read(file, dict(unet.config))
    tensors, alphas, metadata = tensors_by_diffusers(file, unet.config)
    with pytest.raises(ModelError, match="the LoRA a is DoRA"):
        from_tensors("a", tensors, alphas or {}, metadata or {})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's weights: save it with path_initial_model"),
        ({"init_lora_weights": "olora"}, "changes the model's weights"),
        ({"peft_type": "LOHA"}, "is LOHA, which offcut cannot add"),
        ({"use_dora": True}, "is DoRA"),
        ({"alpha_pattern": {"to_q(": 3}}, "not a regular expression"),
    ],
)
def test_settings_that_are_not_a_low_rank_product_are_refused(
    setting: dict[str, Any], message: str, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    folder = save_lora("peft", tiny_pipeline_dir, tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    with pytest.raises(ModelError, match=message):
        read(folder, config_of(tiny_pipeline_dir))


def test_several_are_added_with_their_scales(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    loras = [
        (save_lora("kohya", tiny_pipeline_dir, tmp_path / "a", seed=1, rank=2, alpha=1.0), 0.5),
        (save_lora("diffusers", tiny_pipeline_dir, tmp_path / "b", seed=2, rank=5, alpha=10.0), -1.25),
    ]
    got, expected = fused(tiny_pipeline_dir, loras), fused_by_diffusers(tiny_pipeline_dir, loras)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2e-6, msg=name)


def test_a_text_encoders_layers_are_kept_apart(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    lora = read(save_lora("kohya", tiny_pipeline_dir, tmp_path), config_of(tiny_pipeline_dir))
    assert lora.text_layer_count == 4
    assert not [name for name in lora.layers if "text" in name]
    assert set(lora.text_layers["text_encoder"]) == {
        f"text_model.encoder.layers.0.self_attn.to_{part}" for part in ("q", "k", "v", "out")
    }
    assert {low_rank.factor for low_rank in lora.text_layers["text_encoder"].values()} == {6.0 / 3}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks_8_1_proj_in", "down_blocks.2.attentions.1.proj_in"),
        (
            "middle_block_1_transformer_blocks_0_attn2_to_out_0",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        ),
        (
            "output_blocks_1_1_transformer_blocks_0_ff_net_0_proj",
            "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
        ),
        ("output_blocks_5_1_proj_out", "up_blocks.1.attentions.2.proj_out"),
    ],
)
def test_kohyas_names_of_sdxl_are_those_of_the_original_code(theirs: str, ours: str, tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    save_file({f"lora_unet_{theirs}.lora_{side}.weight": torch.zeros(2, 2) for side in ("down", "up")}, file)
    assert set(read(file, {"layers_per_block": 2}).layers) == {f"{ours}.weight"}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w1", "LoKr"),
        ("lora_unet_conv_in.dora_scale", "DoRA"),
        ("lora_unet_conv_in.lora_mid.weight", "Tucker"),
    ],
)
def test_other_kinds_are_named(key: str, said: str, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2)}, file)
    with pytest.raises(ModelError, match=said):
        read(file, config_of(tiny_pipeline_dir))


def test_a_lora_of_another_model_is_refused_and_nothing_changed(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    good = save_lora("peft", tiny_pipeline_dir, tmp_path / "good")
    tensors = load_file(good / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("attn2.to_k.lora_A.weight"))
    tensors[name] = torch.randn(3, 768)
    save_file(tensors, tmp_path / "bad.safetensors")
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_dir / "unet")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(ModelError, match=r"bad is for another model: its .*to_k is 16 x 768"):
        fuse(unet, [ScaledLora(good), ScaledLora(tmp_path / "bad.safetensors")], config_of(tiny_pipeline_dir))
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"text_encoder.a.lora_A.weight": (2, 4), "text_encoder.a.lora_B.weight": (4, 2)}, "no layers of a UNet"),
        ({"unet.conv_in.lora_A.weight": (2, 4)}, "half of a product"),
        ({"unet.conv_in.lora_A.weight": (2, 4), "unet.conv_in.lora_B.weight": (4, 3)}, "two ranks"),
        ({"unet.conv_in.weight": (2, 4)}, "not part of a LoRA"),
    ],
)
def test_a_damaged_file_is_refused(
    tensors: dict[str, tuple[int, ...]], said: str, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(ModelError, match=said):
        read(file, config_of(tiny_pipeline_dir))


def test_a_path_that_holds_none_is_refused(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    config = config_of(tiny_pipeline_dir)
    (tmp_path / "lora.bin").write_bytes(b"")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for path, said in (
        (tmp_path / "none.safetensors", "not there"),
        (tmp_path, "holds no LoRA"),
        (tmp_path / "lora.bin", "not a safetensors file"),
        (tmp_path / "short.safetensors", "not a readable safetensors"),
    ):
        with pytest.raises(ModelError, match=said):
            read(path, config)


def test_a_scale_is_written_behind_the_file(tmp_path: Path) -> None:
    assert ScaledLora.parse("a/b.safetensors") == ScaledLora(Path("a/b.safetensors"), 1.0)
    assert ScaledLora.parse("a/b.safetensors:0.5") == ScaledLora(Path("a/b.safetensors"), 0.5)
    assert ScaledLora.parse("C:/b.safetensors") == ScaledLora(Path("C:/b.safetensors"))
    with pytest.raises(ModelError, match="not a scale"):
        ScaledLora.parse("b.safetensors:half")
