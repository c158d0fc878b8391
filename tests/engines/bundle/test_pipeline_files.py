from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from offcut.engines.bundle.pipeline_files import copy_pipeline_files, pipeline_class
from offcut.errors import ModelError
from offcut.exporter.load import load_unet, locate


@pytest.fixture
def pipeline(tiny_pipeline_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "pipeline"))


def test_every_component_but_the_unet_is_copied(pipeline: Path, tmp_path: Path) -> None:
    names = copy_pipeline_files(locate(pipeline), tmp_path / "out")
    assert {name for name in names if name.endswith(".safetensors")} == {
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert {"model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"} <= {
        *names
    }
    copies = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copies == set(names)


def test_the_models_prompts_are_copied(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    assert "prompts.txt" in copy_pipeline_files(locate(pipeline), tmp_path / "out")
    assert (tmp_path / "out" / "prompts.txt").read_text(encoding="utf-8") == "a cat\n"


def test_a_bare_unet_has_no_pipeline_files(tiny_unet_dir: Path, tmp_path: Path) -> None:
    source = locate(tiny_unet_dir)
    assert copy_pipeline_files(source, tmp_path / "out") == []
    assert pipeline_class(source) is None


def test_the_variants_weights_are_copied_if_they_exist(pipeline: Path, tmp_path: Path) -> None:
    vae = pipeline / "vae"
    shutil.copyfile(vae / "diffusion_pytorch_model.safetensors", vae / "diffusion_pytorch_model.fp16.safetensors")
    names = copy_pipeline_files(locate(pipeline, variant="fp16"), tmp_path / "out")
    assert [name for name in names if name.endswith(".safetensors")] == [
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    plain = copy_pipeline_files(locate(pipeline), tmp_path / "plain")
    assert names == plain
    assert (tmp_path / "out" / names[-1]).exists()


def save_as(pipeline: Path, variant: str | None, shard_size: str = "10GB", remove: bool = True) -> None:
    """Save the weights of the pipeline's models again, as files of a variant and in shards."""
    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    for name in ("unet", "vae", "text_encoder"):
        if remove:
            (file,) = (pipeline / name).glob("*.safetensors")
            file.unlink()
        getattr(pipe, name).save_pretrained(pipeline / name, variant=variant, max_shard_size=shard_size)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", ["10GB", "20KB"], ids=["whole", "shards"])
def test_copies_are_loaded_without_a_variant(
    pipeline: Path, tmp_path: Path, variant: str | None, shard_size: str
) -> None:
    expected = StableDiffusionPipeline.from_pretrained(pipeline).text_encoder.state_dict()
    save_as(pipeline, variant, shard_size)
    sharded = list((pipeline / "text_encoder").glob("*-00001-of-*.safetensors"))
    assert bool(sharded) == (shard_size == "20KB")
    names = copy_pipeline_files(locate(pipeline, variant=variant), tmp_path / "out")
    assert not any("fp16" in name for name in names)
    unet = load_unet(locate(pipeline, variant=variant))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", unet=unet)
    for name, weight in pipe.text_encoder.state_dict().items():
        assert torch.equal(weight, expected[name])


def test_a_missing_shard_is_refused(pipeline: Path, tmp_path: Path) -> None:
    save_as(pipeline, None, "20KB")
    next((pipeline / "vae").glob("*-00001-of-*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"vae lacks the shard diffusion_pytorch_model-00001-of"):
        copy_pipeline_files(locate(pipeline), tmp_path / "out")


def test_a_model_without_weights_is_refused(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="nothing to load in vae"):
        copy_pipeline_files(locate(pipeline), tmp_path / "out")
    assert "vae/config.json" in copy_pipeline_files(locate(pipeline), tmp_path / "graphs", without_weights=("vae",))


def test_pickled_weights_are_not_copied(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    names = copy_pipeline_files(locate(pipeline), tmp_path / "out")
    assert not any(name.endswith(".bin") for name in names)
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="nothing to load in vae; offcut takes safetensors only"):
        copy_pipeline_files(locate(pipeline), tmp_path / "again")


def test_a_missing_component_is_refused_and_a_disabled_one_is_not(pipeline: Path, tmp_path: Path) -> None:
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    assert index["safety_checker"] == [None, None]
    shutil.rmtree(pipeline / "scheduler")
    with pytest.raises(ModelError, match="nothing to load in scheduler"):
        copy_pipeline_files(locate(pipeline), tmp_path / "out")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", "", "."])
def test_a_component_outside_the_pipeline_is_refused(name: str, pipeline: Path, tmp_path: Path) -> None:
    """The model's author writes the index, which must not lead to files outside the bundle."""
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}", encoding="utf-8")
    (pipeline / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "X"]}), encoding="utf-8")
    with pytest.raises(ModelError, match="is not a valid folder name"):
        copy_pipeline_files(locate(pipeline), tmp_path / "out" / "bundle")


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_an_index_without_a_pipeline_class_is_refused(text: str, pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "model_index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"model_index\.json"):
        pipeline_class(locate(pipeline))
    with pytest.raises(ModelError, match=r"model_index\.json"):
        copy_pipeline_files(locate(pipeline), tmp_path / "out")
