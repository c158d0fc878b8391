"""Graphs with the inputs that ControlNets and T2I-Adapters fill: equal to eager PyTorch, and cut as any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.unets import largest_difference, random_inputs, run, save_family

from offcut.errors import ModelError, ShapeError
from offcut.exporter.cut import find_cuts, split
from offcut.exporter.families import family_of
from offcut.exporter.residuals import argument_of, flatten, nest
from offcut.exporter.specs import TensorSpec, solve
from offcut.exporter.trace.export import ExportedUNet, export

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "in_channels": 4,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "cross_attention_dim": 768,
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
}


def maps_of(config: dict[str, Any], adapter: str) -> dict[str, tuple[int | str, ...]]:
    specs = family_of(config).specs(config, "float16", (adapter,))
    return {spec.name: spec.shape for spec in specs if argument_of(spec.name)}


def test_stable_diffusions_controlnet_gives_thirteen_feature_maps() -> None:
    maps = maps_of(SD15, "controlnet")
    assert len(maps) == 13
    assert maps["down_block_residual_0"] == ("batch", 320, "height", "width")
    assert maps["down_block_residual_3"] == ("batch", 320, "height/2", "width/2")
    assert maps["down_block_residual_11"] == ("batch", 1280, "height/8", "width/8")
    assert maps["mid_block_residual"] == ("batch", 1280, "height/8", "width/8")


def test_a_t2i_adapter_gives_one_map_a_level_and_xls_one_for_the_mid_block() -> None:
    assert [shape[1:3] for shape in maps_of(SD15, "t2i-adapter").values()] == [
        (320, "height"),
        (640, "height/2"),
        (1280, "height/4"),
        (1280, "height/8"),
    ]
    xl = {
        **SD15,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    }
    assert [shape[1:3] for shape in maps_of(xl, "t2i-adapter").values()] == [
        (320, "height/2"),
        (640, "height/2"),
        (1280, "height/4"),
        (1280, "height/4"),
    ]


def test_arguments_become_inputs_and_back() -> None:
    arguments = {
        "down_block_additional_residuals": [1, 2, 3],
        "mid_block_additional_residual": 4,
        "down_intrablock_additional_residuals": None,
    }
    flat = flatten(arguments)
    assert flat == {
        "down_block_residual_0": 1,
        "down_block_residual_1": 2,
        "down_block_residual_2": 3,
        "mid_block_residual": 4,
    }
    assert nest({"sample": 0, **flat}) == {name: value for name, value in arguments.items() if value is not None}


def test_unknown_adapters_and_families_without_them_are_refused() -> None:
    with pytest.raises(ModelError, match="takes controlnet, t2i-adapter"):
        family_of(SD15).specs(SD15, "float32", ("lora",))
    with pytest.raises(ModelError, match="takes none"):
        family_of({"_class_name": "UNet2DModel"}).specs({"_class_name": "UNet2DModel"}, "float32", ("controlnet",))


def test_a_residual_of_another_size_than_the_latent_asks_for_is_refused() -> None:
    specs = {
        "sample": TensorSpec("sample", "float32", ("batch", 4, "height", "width")),
        "down_block_residual_3": TensorSpec("down_block_residual_3", "float32", ("batch", 8, "height/2", "width/2")),
    }
    fits = {"sample": (1, 4, 16, 8), "down_block_residual_3": (1, 8, 8, 4)}
    assert solve(specs, fits) == {"batch": 1, "height": 16, "width": 8}
    with pytest.raises(ShapeError, match="down_block_residual_3 has shape"):
        solve(specs, {**fits, "down_block_residual_3": (1, 8, 16, 8)})
    assert specs["down_block_residual_3"].fixed({"height": 16}).shape == ("batch", 8, 8, "width/2")


def residual_inputs(unet: ExportedUNet, dims: dict[str, int], seed: int = 3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(spec.resolve(dims), generator=random) / 2
        for name, spec in unet.inputs.items()
        if argument_of(name)
    }


def eager(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """diffusers' own output, with these residuals."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder).eval()
    plain = {name: tensor for name, tensor in inputs.items() if argument_of(name) is None}
    if "text_embeds" in plain:
        plain["added_cond_kwargs"] = {key: plain.pop(key) for key in ("text_embeds", "time_ids")}
    down = [tensor for name, tensor in inputs.items() if name.startswith("down_block_residual")]
    more: dict[str, Any] = {}
    if down:
        more = {
            "down_block_additional_residuals": tuple(down),
            "mid_block_additional_residual": inputs["mid_block_residual"],
        }
    within = [tensor for name, tensor in inputs.items() if name.startswith("down_intrablock_residual")]
    if within:
        more["down_intrablock_additional_residuals"] = [tensor.clone() for tensor in within]
    with torch.no_grad():
        return unet(**plain, **more).sample


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapters"),
    [("plain", ("controlnet",)), ("sdxl", ("controlnet", "t2i-adapter"))],
    ids=["stable diffusion: controlnet", "sdxl: controlnet and t2i-adapter"],
)
def test_the_graphs_agree_with_eager_pytorch_and_the_shallow_one_takes_only_what_it_reads(
    name: str, adapters: tuple[str, ...], tmp_path: Path
) -> None:
    folder = save_family(name, tmp_path / "unet")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    unet = export(folder, tmp_path / "onnx", adapters=adapters)
    size = 2 ** len(config["block_out_channels"])
    dims = {"batch": 2, "height": size, "width": 2 * size}
    inputs = random_inputs(folder, **dims)
    residuals = residual_inputs(unet, dims)
    given = {**inputs, **residuals}
    full = run("onnxruntime", unet.path, given)["noise_pred"]
    assert largest_difference(full, eager(folder, given)) < 1e-4
    silent = {**inputs, **{key: torch.zeros_like(value) for key, value in residuals.items()}}
    assert largest_difference(run("onnxruntime", unet.path, silent)["noise_pred"], eager(folder, inputs)) < 1e-4
    assert largest_difference(full, eager(folder, inputs)) > 1e-2  # they matter

    cut = find_cuts(unet)[0]
    pair = split(unet, cut, tmp_path / "split")
    made = run("onnxruntime", pair.full, given)
    shallow = run("onnxruntime", pair.shallow, {**given, **made})["noise_pred"]
    assert torch.equal(shallow, made["noise_pred"])
    import onnx

    read = {value.name for value in onnx.load(pair.shallow, load_external_data=False).graph.input}
    assert "down_block_residual_0" in read
    assert not {"down_block_residual_1", "mid_block_residual", "down_intrablock_residual_0"} & read
