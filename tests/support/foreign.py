"""Pipelines as ``optimum-cli export onnx`` writes them: PyTorch's older exporter, optimum's names, a folder a network.

optimum itself holds transformers below 4.58; where that is installed, ``exported_by_optimum`` is the real thing.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

Axes = Mapping[str, Mapping[int, str]]


def save_as_optimum(pipeline: Path, out: Path, *, opset: int = 18, timestep: torch.Tensor | None = None) -> Path:
    """Export every network of a Stable Diffusion or SDXL pipeline to ONNX, without PyTorch weights.

    Args:
        timestep: an example; by default a float32 scalar, as optimum-onnx 0.1 has it. Older ones had ``[steps]``.
    """
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    is_xl = hasattr(pipe, "text_encoder_2")
    for part in [path for path in pipeline.iterdir() if path.is_dir() and path.name not in ("unet", "vae")]:
        kept = [file for file in part.iterdir() if file.suffix in (".json", ".txt")]
        (out / part.name).mkdir(parents=True)
        for file in kept:
            shutil.copyfile(file, out / part.name / file.name)
    shutil.copyfile(pipeline / "model_index.json", out / "model_index.json")
    for name in ("unet", "vae_decoder", "vae_encoder"):
        (out / name).mkdir()
        shutil.copyfile(pipeline / name.partition("_")[0] / "config.json", out / name / "config.json")
    save_unet_as_optimum(pipe.unet, out / "unet" / "model.onnx", opset=opset, timestep=timestep)
    for name in ("text_encoder", "text_encoder_2"):
        if encoder := getattr(pipe, name, None):
            save_text_encoder_as_optimum(encoder, out / name / "model.onnx", opset=opset, hidden_states=is_xl)
    _save_autoencoder(pipe.vae, out, opset)
    return out


def save_unet_as_optimum(
    unet: Any, path: Path, *, opset: int = 18, timestep: torch.Tensor | None = None, dynamic: bool = True
) -> None:
    """Export one UNet; its graph takes ``timestep`` in this shape and dtype, and every size if ``dynamic``."""
    config = unet.config
    inputs = {
        "sample": torch.randn(2, config.in_channels, 16, 16),
        "timestep": torch.tensor(3.0) if timestep is None else timestep,
        "encoder_hidden_states": torch.randn(2, 7, config.cross_attention_dim),
    }
    axes: dict[str, dict[int, str]] = {
        "sample": {0: "batch_size", 2: "height", 3: "width"},
        "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
    }
    if inputs["timestep"].ndim:
        axes["timestep"] = {0: "steps"}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": torch.randn(2, width), "time_ids": torch.randn(2, 6)}
        axes |= {"text_embeds": {0: "batch_size"}, "time_ids": {0: "batch_size"}}
    axes["out_sample"] = axes["sample"]
    forward = unet.forward

    def flat(sample: Any, timestep: Any, encoder_hidden_states: Any, *added: Any) -> Any:
        given = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        return forward(sample, timestep, encoder_hidden_states, added_cond_kwargs=given, return_dict=False)[0]

    _save(unet, flat, inputs, ["out_sample"], axes if dynamic else {}, path, opset)


def save_text_encoder_as_optimum(encoder: Any, path: Path, *, opset: int = 18, hidden_states: bool = False) -> None:
    """Export one text encoder; those of SDXL also output their hidden states."""
    config = encoder.config
    ids = torch.randint(0, config.vocab_size, (2, config.max_position_embeddings))
    whole = "text_embeds" if type(encoder).__name__.endswith("WithProjection") else "pooler_output"
    names = [whole, "last_hidden_state"] if whole == "text_embeds" else ["last_hidden_state", whole]
    count = config.num_hidden_layers + 1 if hidden_states else 0
    forward = encoder.forward

    def flat(input_ids: Any) -> Any:
        answer = forward(input_ids, output_hidden_states=True, return_dict=True)
        return (*(answer[name] for name in names), *answer.hidden_states[:count])

    outputs = [*names, *(f"hidden_states.{index}" for index in range(count))]
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", *outputs) if name != whole}
    _save(encoder, flat, {"input_ids": ids}, outputs, {**axes, whole: {0: "batch_size"}}, path, opset)


def _save_autoencoder(vae: Any, out: Path, opset: int) -> None:
    channels = vae.config.latent_channels
    halves = {
        "vae_decoder": ("latent_sample", "sample", torch.randn(2, channels, 8, 8)),
        "vae_encoder": ("sample", "latent_parameters", torch.randn(2, 3, 32, 32)),
    }
    for name, (given, answer, example) in halves.items():

        def flat(tensor: Any, decodes: bool = name == "vae_decoder") -> Any:
            return vae.decode(tensor, return_dict=False)[0] if decodes else vae.encode(tensor)[0].parameters

        axes = {each: {0: "batch_size", 2: f"{each}_height", 3: f"{each}_width"} for each in (given, answer)}
        _save(vae, flat, {given: example}, [answer], axes, out / name / "model.onnx", opset)


def _save(
    model: Any, forward: Any, inputs: Mapping[str, torch.Tensor], outputs: list[str], axes: Axes, path: Path, opset: int
) -> None:
    """Replace the model's ``forward`` while it is traced, as optimum does, so that nodes get its layers' names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    had = model.forward
    model.forward = forward
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(),
                tuple(inputs.values()),
                str(path),
                dynamo=False,
                opset_version=opset,
                do_constant_folding=True,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_axes={name: dict(axes[name]) for name in (*inputs, *outputs) if name in axes},
            )
    finally:
        model.forward = had


def exported_by_optimum(pipeline: Path, out: Path) -> Path:
    """Export a pipeline with optimum itself; needs optimum-onnx."""
    from optimum.exporters.onnx import main_export

    main_export(str(pipeline), out, task="text-to-image", do_validation=False)
    return out
