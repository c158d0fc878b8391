"""What the UNet of a pipeline does beyond its weights is taken over by ``attach``, or refused before it is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig

import offcut
from offcut.errors import BundleError, UserError

Generate = Callable[..., torch.Tensor]
Decibels = Callable[[torch.Tensor, torch.Tensor], float]
TARGETS = ["to_q", "to_k", "conv1", "proj_in"]


class OtherProcessor(AttnProcessor2_0):
    """A processor that offcut does not know."""


@pytest.fixture
def pipe(tiny_pipeline_dir: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_lora(pipe: Any, name: str = "style", seed: int = 1, **settings: Any) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, **settings)
    pipe.unet.add_adapter(config, adapter_name=name)


def no_change(pipe: Any) -> None:
    pass


def two_loras(pipe: Any) -> None:
    add_lora(pipe)
    add_lora(pipe, "other", 2)
    pipe.set_adapters(["style", "other"], [0.5, -1.0])


def disabled_lora(pipe: Any) -> None:
    add_lora(pipe)
    pipe.disable_lora()


TAKEN_OVER: dict[str, tuple[Callable[[Any], object], dict[str, float]]] = {
    "plain": (no_change, {}),
    "fused projections": (lambda pipe: pipe.fuse_qkv_projections(), {}),
    "LoRA": (add_lora, {"style": 1.0}),
    "rank-stabilized LoRA": (lambda pipe: add_lora(pipe, use_rslora=True), {"style": 1.0}),
    "two scaled LoRAs": (two_loras, {"style": 0.5, "other": -1.0}),
    "disabled LoRA": (disabled_lora, {"style": 0.0}),
}


@pytest.mark.parametrize("name", TAKEN_OVER)
def test_what_the_pipeline_has_is_taken_over(
    name: str, pipe: Any, one_cut_bundle: Path, generate: Generate, decibels: Decibels
) -> None:
    change, loras = TAKEN_OVER[name]
    change(pipe)
    expected = generate(pipe)
    offcut.attach(pipe, one_cut_bundle, "onnxruntime", threads=1)
    assert pipe.unet.loras == loras
    assert decibels(generate(pipe), expected) > 100
    pipe.unet.close()


def test_a_lora_that_was_taken_over_can_be_changed_and_unloaded(
    pipe: Any, tiny_pipeline_dir: Path, one_cut_bundle: Path, generate: Generate, decibels: Decibels
) -> None:
    eager = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    eager.set_progress_bar_config(disable=True)
    plain = generate(eager)
    for each in (pipe, eager):
        add_lora(each)
    offcut.attach(pipe, one_cut_bundle, "onnxruntime", threads=1)
    for each in (pipe, eager):
        each.set_adapters(["style"], [0.25])
    assert decibels(generate(pipe), generate(eager)) > 100
    pipe.unload_lora_weights()
    assert decibels(generate(pipe), plain) > 100
    pipe.unet.close()


def fuse(pipe: Any) -> None:
    add_lora(pipe)
    pipe.fuse_lora()


def fuse_and_unload(pipe: Any) -> None:
    fuse(pipe)
    pipe.unload_lora_weights()


def change_a_weight(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.01)


def enable_deepcache(pipe: Any) -> None:
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "fused LoRA": (fuse, r"LoRAs are fused .* pipe\.unfuse_lora\(\)"),
    "fused and unloaded LoRA": (fuse_and_unload, "other weights than the bundle"),
    "other weights": (change_a_weight, r"other weights than the bundle \(1 tensors, conv_in\.weight"),
    "DoRA": (lambda pipe: add_lora(pipe, use_dora=True), "the adapter style .* is no plain LoRA"),
    "FreeU": (lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), r"call pipe\.disable_freeu\(\)"),
    "processor": (
        lambda pipe: pipe.unet.set_attn_processor(OtherProcessor()),
        "the attention processor OtherProcessor",
    ),
    "hook": (lambda pipe: pipe.unet.mid_block.register_forward_hook(no_change), "the layer mid_block .* has hooks"),
    "DeepCache": (enable_deepcache, "has a forward of its own.*disable DeepCache's helper"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_engines_would_not_compute_is_refused_before_anything_is_replaced(
    name: str, pipe: Any, one_cut_bundle: Path
) -> None:
    change, message = REFUSED[name]
    change(pipe)
    unet, kind = pipe.unet, type(pipe)
    with pytest.raises((UserError, BundleError), match=message):
        offcut.attach(pipe, one_cut_bundle, "onnxruntime", threads=1)
    assert pipe.unet is unet
    assert type(pipe) is kind


def test_weights_that_were_cast_are_the_same_weights(pipe: Any, one_cut_bundle: Path, generate: Generate) -> None:
    pipe.unet.to(torch.bfloat16)
    offcut.attach(pipe, one_cut_bundle, "onnxruntime", threads=1)
    assert torch.isfinite(generate(pipe)).all()
    pipe.unet.close()


def test_loras_on_both_sides_are_refused(pipe: Any, one_cut_bundle: Path) -> None:
    add_lora(pipe)
    unet = offcut.UNet.load(one_cut_bundle, "onnxruntime", threads=1)
    other = offcut.attach(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False), unet)
    assert other.unet.loras == {"style": 1.0}
    with pytest.raises(UserError, match="unload those of one"):
        offcut.attach(pipe, unet)
    unet.close()
