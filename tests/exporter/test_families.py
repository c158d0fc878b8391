from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.unets import SKIPS, eager, random_inputs, save_family

from offcut.errors import ModelError
from offcut.exporter.families import FAMILIES, example_dims, example_inputs, family_of
from offcut.exporter.load import locate


def config_of(unet_class: str = "UNet2DConditionModel", **settings: Any) -> dict[str, Any]:
    """A config as offcut sees it: diffusers' defaults, these settings, the class's name."""
    import inspect

    import diffusers

    parameters = inspect.signature(getattr(diffusers, unet_class).__init__).parameters.items()
    defaults = {name: p.default for name, p in parameters if p.default is not inspect.Parameter.empty}
    return {**defaults, "_class_name": unet_class, **settings}


def inputs_of(config: dict[str, Any], dtype: str = "float32") -> dict[str, tuple[str, tuple[int | str, ...]]]:
    return {spec.name: (spec.dtype, spec.shape) for spec in family_of(config).inputs(config, dtype)}


@pytest.mark.smoke
def test_stable_diffusion_takes_a_latent_a_timestep_each_and_text() -> None:
    assert inputs_of(config_of(cross_attention_dim=768), "float16") == {
        "sample": ("float16", ("batch", 4, "height", "width")),
        "timestep": ("float32", ("batch",)),
        "encoder_hidden_states": ("float16", ("batch", "sequence", 768)),
    }


def test_inpainting_takes_nine_channels() -> None:
    assert inputs_of(config_of(in_channels=9))["sample"][1] == ("batch", 9, "height", "width")


@pytest.mark.parametrize(
    ("projection", "time_ids"), [(2816, 6), (2560, 5)], ids=["sdxl base: sizes and crop", "sdxl refiner: and a score"]
)
def test_sdxl_takes_a_pooled_embedding_and_time_ids(projection: int, time_ids: int) -> None:
    config = config_of(
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=projection,
    )
    inputs = inputs_of(config)
    assert inputs["text_embeds"] == ("float32", ("batch", 1280))
    assert inputs["time_ids"] == ("float32", ("batch", time_ids))


def test_class_labels_are_numbers_and_projected_ones_are_vectors() -> None:
    assert inputs_of(config_of(num_class_embeds=10))["class_labels"] == ("int64", ("batch",))
    projected = config_of(class_embed_type="projection", projection_class_embeddings_input_dim=32)
    assert inputs_of(projected)["class_labels"] == ("float32", ("batch", 32))
    assert inputs_of(config_of("UNet2DModel", num_class_embeds=10))["class_labels"] == ("int64", ("batch",))


def test_an_unconditional_unet_takes_no_text() -> None:
    assert list(inputs_of(config_of("UNet2DModel"))) == ["sample", "timestep"]


def test_a_guidance_embedding_is_an_input() -> None:
    assert inputs_of(config_of(time_cond_proj_dim=24))["timestep_cond"] == ("float32", ("batch", 24))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"cross_attention_dim": [32, 64]}, "cross_attention_dim differs from block to block"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"class_embed_type": "identity"}, "class_embed_type='identity'"),
        ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj'"),
        ({"unet_class": "UNet2DModel", "class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"unet_class": "UNet2DModel", "class_embed_type": "identity"}, "class_embed_type='identity'"),
    ],
)
def test_unsupported_settings_are_refused_by_name(settings: dict[str, Any], what: str) -> None:
    config = config_of(**settings)
    with pytest.raises(ModelError, match=what):
        family_of(config).inputs(config, "float32")


def test_a_transformer_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"FluxTransformer2DModel .* no skip connections to cut"):
        family_of({"_class_name": "FluxTransformer2DModel"})


def test_family_names_are_unique_and_their_classes_exist() -> None:
    import diffusers

    assert len({family.name for family in FAMILIES.values()}) == len(FAMILIES)
    assert all(hasattr(diffusers, unet_class) for unet_class in FAMILIES)


@pytest.mark.parametrize("name", SKIPS)
def test_the_inputs_are_those_of_the_unets_forward(name: str, tmp_path: Path) -> None:
    """The names and shapes are those of a pipeline, and the family's arguments give the same output."""
    folder = save_family(name, tmp_path / name)
    source = locate(folder)
    specs = source.family.inputs(source.config, "float32")
    inputs = random_inputs(folder, batch=2, height=8, width=12)
    dims = {"batch": 2, "height": 8, "width": 12, "sequence": 7}
    assert {spec.name: spec.resolve(dims) for spec in specs} == {k: tuple(v.shape) for k, v in inputs.items()}

    import diffusers

    unet = getattr(diffusers, source.family.unet_class).from_pretrained(folder).eval()
    with torch.no_grad():
        output = unet(**source.family.arguments(inputs), return_dict=False)[0]
    assert torch.equal(output, eager(folder, inputs))


@pytest.mark.parametrize("name", SKIPS)
def test_examples_are_reproducible_and_no_two_dimensions_are_alike(name: str, tmp_path: Path) -> None:
    source = locate(save_family(name, tmp_path / name))
    specs = source.family.inputs(source.config, "float32")
    dims = example_dims(source.config)
    assert len({*dims.values()}) == len(dims)
    first, second = example_inputs(specs, dims), example_inputs(specs, dims)
    assert list(first) == [spec.name for spec in specs]
    for spec in specs:
        assert tuple(first[spec.name].shape) == spec.resolve(dims)
        assert first[spec.name].dtype == spec.torch_dtype()
        assert torch.equal(first[spec.name], second[spec.name])


def test_an_older_config_is_read_with_the_defaults_of_diffusers(tmp_path: Path) -> None:
    folder = save_family("plain", tmp_path / "model")
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    newer = ["addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim", "encoder_hid_dim_type"]
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in newer}), encoding="utf-8")
    source = locate(folder)
    assert [spec.name for spec in source.family.inputs(source.config, "float32")] == [
        "sample",
        "timestep",
        "encoder_hidden_states",
    ]
