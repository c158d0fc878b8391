from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import save_unet

from offcut.errors import ModelError
from offcut.exporter.load import ModelSource, load_unet, locate

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def unet(tiny_unet_dir: Path, tmp_path: Path) -> Path:
    """A bare UNet's directory that a test may damage."""
    return Path(shutil.copytree(tiny_unet_dir, tmp_path / "model"))


@pytest.fixture
def pipeline(tiny_pipeline_dir: Path, tmp_path: Path) -> Path:
    """A pipeline's directory that a test may damage."""
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "pipeline"))


def refusal(action: Callable[[], object]) -> str:
    """Return the message of the ModelError that a call must raise: one sentence on one line."""
    with pytest.raises(ModelError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.smoke
def test_a_pipeline_is_found_with_its_unet(tiny_pipeline_dir: Path) -> None:
    source = locate(tiny_pipeline_dir)
    assert source.is_pipeline
    assert (source.root, source.folder) == (tiny_pipeline_dir, tiny_pipeline_dir / "unet")
    assert source.family.name == "unet2d-condition"
    assert source.revision is None


def test_a_bare_unet_is_not_a_pipeline(tiny_unet_dir: Path) -> None:
    source = locate(str(tiny_unet_dir))
    assert not source.is_pipeline
    assert source.folder == tiny_unet_dir


@pytest.mark.parametrize("name", ["unet", "models/second"])
def test_a_subfolder_names_the_unet(name: str, tiny_unet_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_unet_dir, tmp_path / name)
    source = locate(tmp_path, subfolder=name)
    assert source.folder == tmp_path / name
    assert not source.is_pipeline
    assert load_unet(source).config["in_channels"] == 4


def test_the_home_directory_may_be_written_with_a_tilde(tiny_unet_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_unet_dir.parent))
    assert locate(f"~/{tiny_unet_dir.name}").folder == tiny_unet_dir


@pytest.mark.smoke
def test_the_unet_is_loaded_for_inference(tiny_unet_dir: Path) -> None:
    unet = load_unet(locate(tiny_unet_dir))
    assert not unet.training
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_weights_are_rounded_to_the_precision(precision: str, dtype: torch.dtype, tiny_unet_dir: Path) -> None:
    full = dict(load_unet(locate(tiny_unet_dir)).named_parameters())
    rounded = dict(load_unet(locate(tiny_unet_dir), precision).named_parameters())
    assert all(torch.equal(rounded[name], full[name].to(dtype)) for name in full)


def test_a_variant_has_weights_of_its_own(unet: Path) -> None:
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel.from_pretrained(unet)
    with torch.no_grad():
        other.conv_in.bias.fill_(0.5)
    other.save_pretrained(unet, variant="fp16")

    bias = load_unet(locate(unet, variant="fp16")).conv_in.bias
    assert torch.equal(bias, torch.full_like(bias, 0.5))
    plain = load_unet(locate(unet)).conv_in.bias
    assert not torch.equal(plain, bias)


def test_the_only_variant_is_taken_without_being_named(unet: Path) -> None:
    file = unet / "diffusion_pytorch_model.safetensors"
    expected = load_unet(locate(unet)).state_dict()
    file.rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    weights = load_unet(locate(unet)).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_variant_that_is_not_there_is_refused(unet: Path) -> None:
    message = refusal(lambda: load_unet(locate(unet, variant="fp16")))
    assert "fp16" in message


def test_sharded_weights_are_loaded(tiny_unet_dir: Path, tmp_path: Path) -> None:
    whole = load_unet(locate(tiny_unet_dir))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = dict(load_unet(locate(tmp_path / "shards")).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in whole.named_parameters())


def test_a_file_is_refused(unet: Path) -> None:
    assert "is a file; give the diffusers directory" in refusal(lambda: locate(unet / WEIGHTS))


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    assert "unet/config.json; give a diffusers pipeline or UNet directory" in refusal(lambda: locate(tmp_path))


def test_a_pipeline_without_its_unet_is_refused(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "unet")
    assert "unet/config.json" in refusal(lambda: locate(pipeline))


@pytest.mark.parametrize("text", ["", "{", "\0", '{"_class_name": "UNet2DConditionModel"', "[]", "3", '"UNet2DModel"'])
def test_a_config_that_is_not_a_json_object_is_refused(text: str, unet: Path) -> None:
    (unet / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in refusal(lambda: locate(unet))


def test_a_config_that_is_not_text_is_refused(unet: Path) -> None:
    (unet / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json" in refusal(lambda: locate(unet))


def test_a_transformer_is_refused(unet: Path) -> None:
    (unet / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}), encoding="utf-8")
    message = refusal(lambda: locate(unet))
    assert "FluxTransformer2DModel is not a UNet" in message
    assert "UNet2DConditionModel, UNet2DModel" in message


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_a_pipeline_of_a_transformer_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}', encoding="utf-8")
    refusal(lambda: locate(tmp_path))
    if name == "unet":
        assert "no skip connections to cut" in refusal(lambda: locate(tmp_path))


def test_a_transformer_pipeline_is_refused_with_the_reason_and_the_supported_unets(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}', encoding="utf-8")
    message = refusal(lambda: locate(tmp_path))
    assert "a transformer (SD3Transformer2DModel), which has no skip connections to cut" in message
    assert "UNet2DConditionModel, UNet2DModel" in message
    for nothing in ('{"_class_name": "X", "transformer": [null, null]}', '{"_class_name": "X"}', "[]", "{"):
        (tmp_path / "model_index.json").write_text(nothing, encoding="utf-8")
        assert "has no unet/config.json" in refusal(lambda: locate(tmp_path)).replace("\\", "/")


def test_pickled_weights_are_never_read(unet: Path) -> None:
    """The file would create ``stamp`` when it is unpickled."""
    import pickle

    stamp = unet / "stamp"

    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (stamp,)

    (unet / WEIGHTS).unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    message = refusal(lambda: load_unet(locate(unet)))
    assert "no safetensors weights" in message
    assert "convert them" in message
    assert not stamp.exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 10_000, -1])
def test_truncated_weights_are_refused(keep: int, unet: Path) -> None:
    whole = (unet / WEIGHTS).read_bytes()
    (unet / WEIGHTS).write_bytes(whole[:keep])
    message = refusal(lambda: load_unet(locate(unet)))
    assert "cannot be loaded" in message
    assert message.endswith("download or save it again")


def test_weights_that_lack_a_parameter_are_refused(unet: Path) -> None:
    """diffusers fills missing parameters with random numbers."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(unet / WEIGHTS)
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, unet / WEIGHTS)
    assert "mid_block.resnets.0.conv1.weight" in refusal(lambda: load_unet(locate(unet)))


def test_weights_of_another_shape_are_refused(unet: Path, tmp_path: Path) -> None:
    other = save_unet(tmp_path / "other", in_channels=9)
    shutil.copyfile(other / WEIGHTS, unet / WEIGHTS)
    message = refusal(lambda: load_unet(locate(unet)))
    assert "conv_in.weight" in message
    assert "ignore_mismatched_sizes" not in message


HUB = """
import json, sys
from offcut.errors import ModelError
from offcut.exporter.load import load_unet, locate

results = {}
for name in sys.argv[1:]:
    try:
        source = locate(name)
        load_unet(source)
        results[name] = [str(source.root), source.revision, source.is_pipeline]
    except ModelError as error:
        results[name] = str(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def offline(
    tiny_pipeline_dir: Path, tiny_unet_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """A hub cache with two models, and what ``locate`` makes of hub ids where there is no network."""
    cache = tmp_path_factory.mktemp("hub")
    for name, model in {"someone--tiny-sd": tiny_pipeline_dir, "someone--tiny-unet": tiny_unet_dir}.items():
        folder = cache / f"models--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
        shutil.copytree(model, folder / "snapshots" / COMMIT)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    names = ["someone/tiny-sd", "someone/tiny-unet", "someone/not-there", "no such/hub id", "./not/here"]
    done = subprocess.run(
        [sys.executable, "-c", HUB, *names], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    results = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(results, dict)
    return cache, results


def test_a_hub_id_is_found_in_the_cache_without_a_network(offline: tuple[Path, dict[str, object]]) -> None:
    cache, results = offline
    for name, is_pipeline in {"tiny-sd": True, "tiny-unet": False}.items():
        root = cache / f"models--someone--{name}" / "snapshots" / COMMIT
        assert results[f"someone/{name}"] == [str(root), COMMIT, is_pipeline]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("someone/not-there", "is not a local directory and could not be downloaded"),
        ("no such/hub id", "is neither a directory here nor a valid hub id"),
        ("./not/here", "is neither a directory here nor a valid hub id"),
    ],
)
def test_an_unknown_hub_id_is_refused(name: str, sentence: str, offline: tuple[Path, dict[str, object]]) -> None:
    message = offline[1][name]
    assert isinstance(message, str)
    assert message.startswith(f"{name} {sentence}")
    assert "\n" not in message


def test_the_folder_of_a_source(tmp_path: Path) -> None:
    source = ModelSource("model", tmp_path, "unet", None, None, {"_class_name": "UNet2DModel"})
    assert source.folder == tmp_path / "unet"
    assert not source.is_pipeline
