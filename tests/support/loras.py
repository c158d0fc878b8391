"""LoRA files of every kind, as trainers write them, and the weights that diffusers with PEFT computes from them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv_in",
    "conv_shortcut",
)
KINDS = ("diffusers", "peft", "kohya", "processors")
_PEFT_FILE = "adapter_model.safetensors"


def save_lora(kind: str, pipeline: Path, out: Path, *, seed: int = 0, rank: int = 3, alpha: float = 6.0) -> Path:
    """Save a LoRA with random weights for a pipeline's UNet; return the file, for ``peft`` the directory.

    Args:
        kind: ``diffusers`` and ``peft`` as these save it; ``kohya`` with its names and alphas, and with a text encoder;
            ``processors`` as diffusers wrote attention processors before it took PEFT.
    """
    out.mkdir(parents=True, exist_ok=True)
    unet = _adapted(pipeline, seed, rank, alpha)
    if kind == "diffusers":
        from diffusers import StableDiffusionPipeline
        from peft.utils import get_peft_model_state_dict

        StableDiffusionPipeline.save_lora_weights(
            out,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=dict(unet.peft_config["default"].to_dict()),
        )
        return out / "pytorch_lora_weights.safetensors"
    pairs = {
        name.removesuffix(".lora_A.default"): (module.weight.detach(), unet.get_submodule(_other(name)).weight.detach())
        for name, module in unet.named_modules()
        if name.endswith(".lora_A.default")
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in pairs.items():
        if kind == "peft":
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        elif kind == "kohya":
            flat = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
        elif ".to_" in name:
            head, _, layer = name.removesuffix(".0").rpartition(".")
            tensors |= {f"unet.{head}.processor.{layer}_lora.{side}.weight": half for side, half in _sides(down, up)}
    if kind == "kohya":
        config = pipeline / "text_encoder" / "config.json"
        width = json.loads(config.read_text(encoding="utf-8"))["hidden_size"] if config.is_file() else 32
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer = f"lora_te_text_model_encoder_layers_0_self_attn_{part}"
            tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, width)
            tensors[f"{layer}.lora_up.weight"] = torch.randn(width, rank)
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if kind == "peft":
        save_file(tensors, out / _PEFT_FILE)
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(TARGETS)}
        (out / "adapter_config.json").write_text(json.dumps(settings))
        return out
    save_file(tensors, out / f"{kind}.safetensors")
    return out / f"{kind}.safetensors"


PATTERNS = (
    "to_q",
    "o_q",
    "to_[kv]",
    "attn1.to_k",
    "attn2",
    "conv.",
    "resnets.*",
    ".*attn1.*",
    "^mid_block.*",
    r"down_blocks\.\d+\..*to_out\.0",
    "net.0.proj|net.2",
    "(up|mid)_block.*conv1",
    "proj",
)
"""Keys of PEFT's patterns: names of layers, ends of names, and regular expressions that match names or their ends."""


def random_adapter(unet: Any, random: Random, *, dora: bool = False, layers: int | None = None) -> Any:
    """Add a PEFT LoRA with random settings and weights to some layers of a UNet; return its ``LoraConfig``.

    Args:
        layers: number of layers, out of the first 12; None for a random number of any layers.
    """
    from peft import LoraConfig

    names = [name for name, module in unet.named_modules() if type(module).__name__ in ("Linear", "Conv2d")]
    targets = random.sample(names[:12], layers) if layers else random.sample(names, random.randint(1, 12))
    patterns = [*PATTERNS, *targets, *(f"^{name}" for name in targets)]

    def values(choices: list[Any]) -> dict[str, Any]:
        # PEFT saves its settings with sorted keys, and the first key that matches counts.
        return {pattern: random.choice(choices) for pattern in sorted(random.sample(patterns, random.randint(0, 6)))}

    config = LoraConfig(
        r=random.choice([1, 3, 4]),
        lora_alpha=random.choice([1, 2.5, 4, 16]),
        rank_pattern=values([1, 2, 5, 8]),
        alpha_pattern=values([0.5, 1, 3, 20]),
        use_rslora=random.random() < 0.3,
        use_dora=dora,
        target_modules=targets,
    )
    unet.add_adapter(config)
    _fill(unet, random.randint(0, 2**31))
    return config


def merged_by_peft(unet: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a UNet's layers with their active PEFT adapters added, by the parameters' names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"{name}.weight": module.get_base_layer().weight.detach()
        + sum(module.get_delta_weight(adapter).detach() for adapter in module.active_adapters)
        for name, module in unet.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def save_adapter(kind: str, unet: Any, config: Any, out: Path) -> Path:
    """Save a UNet's PEFT LoRA ``default``; return the file, for ``peft`` the directory.

    Args:
        kind: ``diffusers`` and ``peft`` as these save it; ``kohya`` with the same scales by alphas of its own;
            ``scaled`` as diffusers without PEFT's settings, so that the scales are part of the products.
    """
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(unet)
    out.mkdir(parents=True, exist_ok=True)
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    scales = {name: unet.get_submodule(name).scaling["default"] for name in layers}
    if kind == "peft":
        save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, out / _PEFT_FILE)
        config.save_pretrained(out)
        return out
    if kind == "kohya":
        kohya: dict[str, torch.Tensor] = {}
        for name in layers:
            flat, down = f"lora_unet_{name.replace('.', '_')}", tensors[f"{name}.lora_A.weight"]
            kohya[f"{flat}.lora_down.weight"] = down
            kohya[f"{flat}.lora_up.weight"] = tensors[f"{name}.lora_B.weight"]
            kohya[f"{flat}.alpha"] = torch.tensor(scales[name] * down.shape[0])
        save_file(kohya, out / "kohya.safetensors")
        return out / "kohya.safetensors"
    if kind == "scaled":
        for name in layers:
            tensors[f"{name}.lora_B.weight"] = tensors[f"{name}.lora_B.weight"] * scales[name]
    metadata = {} if kind == "scaled" else {"unet_lora_adapter_metadata": dict(config.to_dict())}
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=tensors, **metadata)
    return out / "pytorch_lora_weights.safetensors"


def tensors_by_diffusers(file: Path, config: Any) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Return what ``pipe.load_lora_weights`` reads from a file: tensors, alphas and PEFT's settings."""
    from diffusers import StableDiffusionPipeline

    tensors, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        file.parent, weight_name=file.name, unet_config=config, return_lora_metadata=True
    )
    return tensors, alphas, metadata


def save_lora_for_both(pipeline: Path, out: Path, *, seed: int = 0, rank: int = 4, alpha: float = 2.0) -> Path:
    """Save a LoRA for a pipeline's UNet and text encoder as diffusers with PEFT does; return the file."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from transformers import CLIPTextModel

    unet = _adapted(pipeline, seed, rank, alpha)
    text = CLIPTextModel.from_pretrained(pipeline / "text_encoder")
    text.add_adapter(LoraConfig(r=rank + 1, lora_alpha=3 * alpha, target_modules=["q_proj", "v_proj", "fc1"]))
    _fill(text, seed)
    StableDiffusionPipeline.save_lora_weights(
        out,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=dict(unet.peft_config["default"].to_dict()),
        text_encoder_lora_adapter_metadata=dict(text.peft_config["default"].to_dict()),
    )
    return out / "pytorch_lora_weights.safetensors"


def text_encoder_by_diffusers(pipeline: Path, loras: list[tuple[Path, float]]) -> Any:
    """Return the text encoder into which diffusers and PEFT fused these files."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    names = [f"lora{index}" for index in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in loras])
    pipe.fuse_lora(components=["text_encoder"], adapter_names=names)
    pipe.unload_lora_weights()
    return pipe.text_encoder


def fused_by_diffusers(pipeline: Path, loras: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """Return the UNet's weights after diffusers and PEFT fused these files."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    names = [f"lora{index}" for index in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        if path.is_dir():
            from peft import PeftModel

            merged = PeftModel.from_pretrained(pipe.unet, path).merge_and_unload()
            return {key: value.detach().clone() for key, value in merged.named_parameters()}
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in loras])
    pipe.fuse_lora(components=["unet"], adapter_names=names)
    pipe.unload_lora_weights()
    return {key: value.detach().clone() for key, value in pipe.unet.named_parameters()}


def _adapted(pipeline: Path, seed: int, rank: int, alpha: float) -> Any:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS)))
    _fill(unet, seed)
    return unet


def _fill(model: Any, seed: int) -> None:
    """Fill the LoRA factors with random values; PEFT initializes some of them with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def _other(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")


def _sides(down: torch.Tensor, up: torch.Tensor) -> tuple[tuple[str, torch.Tensor], ...]:
    return (("down", down), ("up", up))
