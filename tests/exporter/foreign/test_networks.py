"""The networks around an ONNX UNet, under offcut's names, and the index of their pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from support.foreign import save_text_encoder_as_optimum
from support.unets import largest_difference, run

from offcut.errors import ModelError
from offcut.exporter.foreign.networks import (
    export_foreign_component,
    foreign_networks,
    missing_components,
    pipeline_index,
)
from offcut.exporter.load import locate

ENGINES = ["onnxruntime", "openvino"]


@pytest.fixture
def pipeline(foreign_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(foreign_dir, tmp_path / "pipeline"))


def edit_index(pipeline: Path, **changes: object) -> None:
    file = pipeline / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_text_encoder_hands_out_its_hidden_states(foreign_dir: Path, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    """Which Stable Diffusion's export does not, and which clip_skip needs."""
    from safetensors.torch import load_file
    from transformers import CLIPTextModel

    theirs = onnx.load(foreign_dir / "text_encoder" / "model.onnx").graph
    assert [value.name for value in theirs.output] == ["last_hidden_state", "pooler_output"]
    (made,) = export_foreign_component(locate(foreign_dir), "text_encoder", tmp_path)
    hidden = [f"hidden_states_{index}" for index in range(3)]
    assert list(made.outputs) == ["last_hidden_state", *hidden, "pooler_output"]
    assert str(made.inputs["input_ids"]) == "input_ids: int64[batch, sequence]"
    eager = CLIPTextModel.from_pretrained(tiny_pipeline_dir / "text_encoder").eval()
    ids = torch.randint(0, 26, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = eager(ids, output_hidden_states=True)
    for engine in ENGINES:
        got = run(engine, made.path, {"input_ids": ids})
        assert largest_difference(got["pooler_output"], expected.pooler_output) <= 1e-5
        for name, value in zip(hidden, expected.hidden_states, strict=True):
            assert largest_difference(got[name], value) <= 1e-5
    norm = getattr(eager, "text_model", eager).final_layer_norm
    kept = load_file(made.path.parent / "final_layer_norm.safetensors")
    assert torch.equal(kept["weight"], norm.weight)
    assert torch.equal(kept["bias"], norm.bias)


def test_hidden_states_are_found_where_norms_are_many_nodes(
    pipeline: Path, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    """As before opset 17, which has the LayerNormalization of PyTorch's exporter."""
    from transformers import CLIPTextModel

    eager = CLIPTextModel.from_pretrained(tiny_pipeline_dir / "text_encoder").eval()
    save_text_encoder_as_optimum(eager, pipeline / "text_encoder" / "model.onnx", opset=14)
    (made,) = export_foreign_component(locate(pipeline), "text_encoder", tmp_path / "out")
    ids = torch.randint(0, 26, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = eager(ids, output_hidden_states=True)
    got = run("onnxruntime", made.path, {"input_ids": ids})
    for index, value in enumerate(expected.hidden_states):
        assert largest_difference(got[f"hidden_states_{index}"], value) <= 1e-5


def test_ids_of_32_bits_are_taken_as_64(pipeline: Path, tmp_path: Path) -> None:
    """As optimum's exports of some years took them."""
    file = pipeline / "text_encoder" / "model.onnx"
    model = onnx.load(file)
    whole = run("onnxruntime", file, {"input_ids": torch.ones(1, 16, dtype=torch.int64)})
    name = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["wide" if each == name else each for each in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", [name], ["wide"], to=TensorProto.INT64))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    onnx.save(model, file)
    (made,) = export_foreign_component(locate(pipeline), "text_encoder", tmp_path / "out")
    assert made.inputs["input_ids"].dtype == "int64"
    got = run("onnxruntime", made.path, {"input_ids": torch.ones(1, 16, dtype=torch.int64)})
    assert torch.equal(got["pooler_output"], whole["pooler_output"])


def test_an_autoencoder_is_two_graphs(foreign_dir: Path, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    decoder, encoder = export_foreign_component(locate(foreign_dir), "vae", tmp_path)
    assert str(decoder.outputs["image"]) == "image: float32[batch, 3, 4*height, 4*width]"
    assert str(encoder.outputs["latent_parameters"]) == "latent_parameters: float32[batch, 8, height/4, width/4]"
    assert (decoder.multiple, encoder.multiple) == (1, 4)
    eager = AutoencoderKL.from_pretrained(tiny_pipeline_dir / "vae").eval()
    generator = torch.Generator().manual_seed(0)
    latent, image = torch.randn(1, 4, 6, 10, generator=generator), torch.randn(3, 3, 16, 32, generator=generator)
    with torch.no_grad():
        expected = eager.decode(latent).sample, eager.encode(image).latent_dist.parameters
    for engine in ENGINES:
        got = run(engine, decoder.path, {"latent_sample": latent})["image"]
        assert largest_difference(got, expected[0]) <= 1e-4
        got = run(engine, encoder.path, {"image": image})["latent_parameters"]
        assert largest_difference(got, expected[1]) <= 1e-4


def test_the_index_names_what_is_there(pipeline: Path) -> None:
    """optimum exports no safety checker, and writes its own classes into what it saves again."""
    edit_index(
        pipeline,
        _class_name="ORTStableDiffusionPipeline",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        requires_safety_checker=True,
        vae_decoder=["optimum.onnxruntime.modeling_diffusion", "ORTVaeDecoder"],
    )
    for name, kind in {"unet": "ORTUnet", "vae_decoder": "ORTVaeDecoder", "text_encoder": "ORTTextEncoder"}.items():
        file = pipeline / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": kind}))
    source = locate(pipeline)
    assert foreign_networks(source) == ["text_encoder", "vae"]
    assert missing_components(source) == ["safety_checker"]
    index = pipeline_index(source)
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert "vae_decoder" not in index


def _no_encoder(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "vae_encoder")


def _no_text_encoder(pipeline: Path) -> None:
    (pipeline / "text_encoder" / "model.onnx").unlink()


def _of_another_class(pipeline: Path) -> None:
    file = pipeline / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["T5EncoderModel"]}))


def _of_no_pipeline(pipeline: Path) -> None:
    edit_index(pipeline, _class_name="OnnxStrangePipeline")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_no_encoder, r"has no vae_encoder/model\.onnx, half of its autoencoder: export it again"),
        (_no_text_encoder, r"has no text_encoder/model\.onnx: export it again"),
        (_of_another_class, "has a text_encoder that offcut cannot take from ONNX: it takes CLIPTextModel, "),
        (
            _of_no_pipeline,
            "has the pipeline class OnnxStrangePipeline, which diffusers does not have: give a directory",
        ),
    ],
)
def test_what_cannot_be_taken_is_one_sentence(
    damage: Callable[[Path], None], sentence: str, pipeline: Path, tmp_path: Path
) -> None:
    damage(pipeline)
    source = locate(pipeline)

    def take() -> None:
        for name in foreign_networks(source):
            export_foreign_component(source, name, tmp_path / "out")
        pipeline_index(source)

    with pytest.raises(ModelError, match=sentence):
        take()
