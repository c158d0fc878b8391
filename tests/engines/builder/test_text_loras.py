"""LoRAs with layers for text encoders, fused when a bundle is built, against diffusers with PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.loras import save_lora, save_lora_for_both, text_encoder_by_diffusers

import offcut
import offcut.engines.builder.text_loras as text_loras_module
from offcut.engines.builder.text_loras import fused_text_encoders
from offcut.errors import ModelError
from offcut.exporter.load import ModelSource, locate
from offcut.exporter.lora import ScaledLora

Loras = Sequence[tuple[Path, float]]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def files(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("loras")
    return {
        "kohya": save_lora("kohya", tiny_pipeline_dir, out / "kohya", seed=1),
        "peft": save_lora_for_both(tiny_pipeline_dir, out / "peft", seed=2),
        "unet": save_lora("diffusers", tiny_pipeline_dir, out / "unet", seed=3),
    }


@pytest.fixture
def fuse(tmp_path: Path) -> Callable[..., ModelSource]:
    def run(pipeline: Path, loras: Loras, variant: str | None = None) -> ModelSource:
        source = locate(pipeline, loras=[ScaledLora(path, scale) for path, scale in loras], variant=variant)
        return fused_text_encoders(source, tmp_path / "fused", lambda sentence: None)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights by their names in transformers 5."""
    return {name.removeprefix("text_model."): value for name, value in load_file(folder / WEIGHTS).items()}


@pytest.mark.parametrize("scales", [{"kohya": 0.5}, {"peft": 0.75}, {"kohya": -0.5, "unet": 1.0, "peft": 0.25}])
def test_fused_text_encoders_equal_those_of_diffusers_and_peft(
    scales: dict[str, float], files: dict[str, Path], tiny_pipeline_dir: Path, fuse: Callable[..., ModelSource]
) -> None:
    loras = [(files[name], scale) for name, scale in scales.items()]
    source = fuse(tiny_pipeline_dir, loras)
    folder = source.component("text_encoder")
    assert folder != tiny_pipeline_dir / "text_encoder"
    assert source.component("vae") == tiny_pipeline_dir / "vae"
    assert (folder / "config.json").read_bytes() == (tiny_pipeline_dir / "text_encoder" / "config.json").read_bytes()
    fused, before = weights(folder), weights(tiny_pipeline_dir / "text_encoder")
    expected = text_encoder_by_diffusers(tiny_pipeline_dir, loras).state_dict()
    changed = set()
    for name, value in fused.items():
        torch.testing.assert_close(
            value, expected.get(name, expected.get(f"text_model.{name}")), rtol=0, atol=2e-6, msg=name
        )
        if not torch.equal(value, before[name]):
            changed.add(name)
    kohyas = {f"encoder.layers.0.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "out")}
    pefts = {
        f"encoder.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1")
    }
    assert changed == (kohyas if "kohya" in scales else set()) | (pefts if "peft" in scales else set())


def test_each_layer_has_its_own_rank_and_alpha(
    files: dict[str, Path], tiny_pipeline_dir: Path, tmp_path: Path, fuse: Callable[..., ModelSource]
) -> None:
    """diffusers does not find such layers in transformers 5. Weights in half precision keep their dtype."""
    pipeline = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "pipeline"))
    tensors = load_file(pipeline / "text_encoder" / WEIGHTS)
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(half, pipeline / "text_encoder" / "model.fp16.safetensors", {"format": "pt"})
    lora = load_file(files["kohya"])
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    down, up = torch.randn(7, 32), torch.randn(32, 7)
    lora |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.75)}
    save_file(lora, tmp_path / "uneven.safetensors")
    source = fuse(pipeline, [(tmp_path / "uneven.safetensors", 0.5)], variant="fp16")
    fused = load_file(source.component("text_encoder") / "model.fp16.safetensors")
    assert set(fused) == set(half)
    assert {value.dtype for value in fused.values() if value.is_floating_point()} == {torch.float16}
    products = {"q": up @ down * 0.5 * 1.75 / 7}
    for part in ("k", "v", "out"):
        stem = f"lora_te_text_model_encoder_layers_0_self_attn_{part}_proj"
        products[part] = lora[f"{stem}.lora_up.weight"] @ lora[f"{stem}.lora_down.weight"] * 0.5 * 6 / 3
    for name, value in fused.items():
        part = name.rpartition("_proj.weight")[0].rpartition(".")[2]
        expected = half[name]
        if "layers.0.self_attn" in name and part in products:
            expected = (expected.float() + products[part]).half()
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
def test_a_bundle_holds_the_fused_text_encoder(files: dict[str, Path], tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    """The bundle holds PyTorch weights, or with ``compile_all`` a graph. ``test_loras`` tests the UNet's layers."""
    scales: dict[str | Path, float] = {files["kohya"]: 0.01, files["peft"]: 0.25}
    eager = text_encoder_by_diffusers(tiny_pipeline_dir, [(Path(path), scale) for path, scale in scales.items()])
    ids = torch.randint(0, 26, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = eager(ids)[0]
    messages: list[str] = []
    for compile_all in (False, True):
        path = tmp_path / f"all-{compile_all}.offcut"
        bundle = offcut.build(
            tiny_pipeline_dir,
            path,
            engine="onnxruntime",
            loras=scales,
            compile_all=compile_all,
            progress=messages.append,
        )
        assert not [name for name in bundle.manifest.files if "with-loras" in name]
        pipe = offcut.load(path, threads=1)
        with torch.no_grad():
            torch.testing.assert_close(pipe.text_encoder(ids)[0], expected, rtol=0, atol=1e-5)
        pipe.unet.close()
    assert messages.count("fuse kohya, peft into text_encoder") == 2


def test_layers_of_a_text_encoder_are_reported_as_left_out_for_a_bare_unet(
    files: dict[str, Path], tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    messages: list[str] = []

    class Stop(Exception):
        """Raised where the export would begin."""

    def progress(sentence: str) -> None:
        messages.append(sentence)
        if sentence == "load" or sentence.startswith("reuse"):
            raise Stop

    with pytest.raises(Stop):
        offcut.build(
            tiny_pipeline_dir / "unet",
            tmp_path / "bare.offcut",
            engine="onnxruntime",
            loras={files["kohya"]: 1.0},
            progress=progress,
        )
    assert "kohya.safetensors has 4 layers of a text encoder, which are left out: a UNet has none" in messages


def test_a_lora_for_another_text_encoder_is_refused(
    files: dict[str, Path], tiny_pipeline_dir: Path, tmp_path: Path, fuse: Callable[..., ModelSource]
) -> None:
    lora = load_file(files["kohya"])
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    wide = lora | {f"{stem}.lora_down.weight": torch.zeros(3, 768)}
    deep = {name.replace("layers_0", "layers_11"): value for name, value in lora.items() if name.startswith("lora_te")}
    second = {name.replace("lora_te_", "lora_te2_"): value for name, value in lora.items()}
    for name, tensors, complaint in (
        ("wide", wide, r"its encoder\.layers\.0\.self_attn\.q_proj is 32 x 768, but this text encoder has \[32, 32\]"),
        ("deep", lora | deep, r"this text encoder has no encoder\.layers\.11"),
        ("second", second, "this pipeline has no text_encoder_2"),
    ):
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(ModelError, match=f"the LoRA {name} is for another model: .*{complaint}"):
            fuse(tiny_pipeline_dir, [(tmp_path / f"{name}.safetensors", 1.0)])
    assert not (tmp_path / "fused").exists()


def test_a_text_encoder_lora_is_refused_without_peft(
    files: dict[str, Path],
    tiny_pipeline_dir: Path,
    fuse: Callable[..., ModelSource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_loras_module, "find_spec", lambda name: None)
    assert fuse(tiny_pipeline_dir, [(files["unet"], 1.0)]).components == {}
    with pytest.raises(ModelError, match="which diffusers fuses with peft: pip install peft"):
        fuse(tiny_pipeline_dir, [(files["kohya"], 1.0)])
