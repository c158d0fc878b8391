from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from offcut.engines.bundle.pipeline_files import copy_pipeline_files, pipeline_class, weight_files
from offcut.errors import ModelError
from offcut.exporter.load import locate


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
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    plain = copy_pipeline_files(locate(pipeline), tmp_path / "plain")
    assert "vae/diffusion_pytorch_model.fp16.safetensors" not in plain


def test_shards_of_a_variant_belong_to_it(tmp_path: Path) -> None:
    names = ["m.safetensors", "m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in weight_files(tmp_path, "fp16")] == names[1:]
    assert [file.name for file in weight_files(tmp_path, None)] == names[:1]
    assert [file.name for file in weight_files(tmp_path, "bf16")] == names[:1]


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
