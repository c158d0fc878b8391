"""Small UNets of every family, and functions that run them in PyTorch, ONNX Runtime and OpenVINO without offcut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from support.models import save_unet, with_lively_weights

Tensors = Mapping[str, torch.Tensor]

SDXL = {
    # Three levels of two layers: 9 skip connections, as in Stable Diffusion XL.
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
UNCONDITIONAL = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
CONDITIONAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "inpaint": {"in_channels": 9, "num_class_embeds": 5},  # and class labels
    "sdxl": SDXL,
}
# Each family that is exported in the tests, with the number of its skip connections.
SKIPS = {"plain": 4, "inpaint": 4, "sdxl": 9, "unconditional": 4}


def save_family(name: str, path: Path) -> Path:
    """Save one of ``SKIPS`` with random weights."""
    if name != "unconditional":
        return save_unet(path, **CONDITIONAL[name])
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    with_lively_weights(UNet2DModel(**UNCONDITIONAL)).save_pretrained(path)
    return path


def random_inputs(
    folder: Path, *, batch: int, height: int, width: int, sequence: int = 7, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return random inputs that a diffusers pipeline could pass to this UNet, from its config."""
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "sample": normal(batch, config["in_channels"], height, width),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator).float(),
    }
    if config["_class_name"] == "UNet2DConditionModel":
        inputs["encoder_hidden_states"] = normal(batch, sequence, config["cross_attention_dim"])
    if config.get("addition_embed_type") == "text_time":
        each = config["addition_time_embed_dim"]
        inputs["text_embeds"] = normal(batch, config["projection_class_embeddings_input_dim"] - 6 * each)
        inputs["time_ids"] = torch.tensor([[64.0, 48.0, 3.0, 5.0, 64.0, 32.0]]).repeat(batch, 1)
    if classes := config.get("num_class_embeds"):
        inputs["class_labels"] = torch.arange(1, batch + 1) % classes
    return inputs


def eager(folder: Path, inputs: Tensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the UNet's output in diffusers."""
    import diffusers

    name = "UNet2DModel" if "encoder_hidden_states" not in inputs else "UNet2DConditionModel"
    unet = getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype).eval()
    arguments: dict[str, Any] = {
        key: value.to(dtype) if value.is_floating_point() and key != "timestep" else value
        for key, value in inputs.items()
    }
    if "text_embeds" in inputs:
        arguments["added_cond_kwargs"] = {key: arguments.pop(key) for key in ("text_embeds", "time_ids")}
    with torch.no_grad():
        answer = unet(**arguments).sample
    assert isinstance(answer, torch.Tensor)
    return answer


def run(engine: str, graph: Path, inputs: Tensors) -> dict[str, torch.Tensor]:
    """Return a graph's outputs by name. Inputs that the graph does not have are left out."""
    state = graph.stat()
    return _loaded(engine, graph, (state.st_mtime_ns, state.st_size))(inputs)


@lru_cache(maxsize=4)
def _loaded(engine: str, graph: Path, version: tuple[int, int]) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[engine](graph)


def _onnxruntime(graph: Path) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_outputs()]

    def answer(inputs: Tensors) -> dict[str, torch.Tensor]:
        feed = {argument.name: inputs[argument.name].numpy() for argument in session.get_inputs()}
        return {name: torch.from_numpy(array) for name, array in zip(names, session.run(names, feed), strict=True)}

    return answer


def _openvino(graph: Path) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    import onnx
    import openvino

    # OpenVINO gives a port further names of its own.
    contract = onnx.load(str(graph), load_external_data=False).graph
    model = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(inputs: Tensors) -> dict[str, torch.Tensor]:
        results = model({value.name: inputs[value.name].numpy() for value in contract.input})
        return {value.name: torch.from_numpy(results[value.name].copy()) for value in contract.output}

    return answer


def largest_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference; infinity if a value is NaN."""
    assert got.shape == expected.shape
    difference = (got.double() - expected.double()).abs()
    return float(difference.max()) if bool(torch.isfinite(difference).all()) else float("inf")
