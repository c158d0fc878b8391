"""LoRAs on an open UNet, compared with diffusers with PEFT and with a bundle that was built with the LoRAs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from support.loras import random_adapter, save_adapter, save_lora

import offcut
from offcut.errors import ModelError, UserError
from offcut.exporter.lora import read
from offcut.runtime.generation.schedule import Uniform
from offcut.runtime.loras import LoraSet
from offcut.runtime.tuning.steps import TunedSteps

STEPS = 6


@pytest.fixture(scope="module")
def files(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("loras")
    return {
        "a": save_lora("kohya", tiny_pipeline_dir, out / "a", seed=1),
        "b": save_lora("diffusers", tiny_pipeline_dir, out / "b", seed=2, rank=4, alpha=2.0),
    }


@pytest.fixture
def unet(one_cut_bundle: Path, engine: str) -> Iterator[offcut.UNet]:
    opened = offcut.UNet.load(one_cut_bundle, engine, threads=1)
    opened.set_schedule(Uniform(3))
    yield opened
    opened.close()


def outputs(unet: offcut.UNet) -> list[torch.Tensor]:
    """Return the outputs of a full and a shallow call."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    with unet.generation(calls=2):
        return [unet(torch.randn(2, 4, 16, 16, generator=generator), t, text).sample for t in (900, 850)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def image(pipe: Any, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    output = pipe("a red square", num_inference_steps=STEPS, generator=generator, output_type="latent", **arguments)
    assert isinstance(output.images, torch.Tensor)
    return output.images


def test_a_lora_that_was_replaced_and_restored_leaves_no_trace(unet: offcut.UNet, files: dict[str, Path]) -> None:
    plain = outputs(unet)
    name = unet.load_lora(files["a"], 0.5)
    with_a = outputs(unet)
    unet.unload_lora(name)
    assert equal(outputs(unet), plain)
    unet.load_lora(files["b"], name="b")
    with_b = outputs(unet)
    unet.unload_lora()
    unet.load_lora(files["a"], 0.5)
    assert equal(outputs(unet), with_a)
    differ = [not torch.equal(one, other) for one, other in ((plain[1], with_a[1]), (with_a[0], with_b[0]))]
    assert all(differ)


def test_a_schedule_that_was_tuned_without_the_lora_is_reported(
    unet: offcut.UNet, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    unet.set_schedule(TunedSteps((0,), 2))
    with caplog.at_level(logging.WARNING, logger="offcut"):
        outputs(unet)
        assert "tuned without" not in caplog.text
        unet.load_lora(files["a"], name="style")
        outputs(unet)
        outputs(unet)
    assert caplog.text.count("this schedule was tuned without the LoRA style:") == 1


def test_layers_of_a_text_encoder_are_left_out_with_a_warning(
    unet: offcut.UNet, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    unet.load_lora(files["b"], name="b")
    assert not caplog.records
    unet.load_lora(files["a"], name="a")
    assert "the LoRA a has 4 layers of a text encoder too" in caplog.text
    assert "offcut build --lora fuses both" in caplog.text


def test_the_pipeline_equals_eager_diffusers(
    unet: offcut.UNet, files: dict[str, Path], tiny_pipeline_dir: Path, engine: str
) -> None:
    """Two LoRAs, one with a text encoder; the UNet's layers by offcut, the text encoder's by diffusers."""
    eager = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe = offcut.attach(StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir), unet)
    unet.set_schedule(None)
    plain = image(eager)
    for each in (eager, pipe):
        for name, file in files.items():
            each.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        each.set_adapters(["a", "b"], [0.5, 0.75])
    assert unet.loras == {"a": 0.5, "b": 0.75}
    torch.testing.assert_close(image(pipe), image(eager), rtol=0, atol=2e-4)
    assert pipe.get_list_adapters() == eager.get_list_adapters()
    for each in (eager, pipe):
        each.set_adapters("b")
    torch.testing.assert_close(image(pipe), image(eager), rtol=0, atol=2e-4)
    for each in (eager, pipe):
        each.unload_lora_weights()
    assert unet.loras == {}
    torch.testing.assert_close(image(eager), plain, rtol=0, atol=0)
    torch.testing.assert_close(image(pipe), plain, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_a_lora_fused_when_the_bundle_is_built_is_the_same_bit_for_bit(
    tiny_pipeline_dir: Path, files: dict[str, Path], one_cut_bundle: Path, tmp_path: Path
) -> None:
    loras: dict[str | Path, float] = {files["a"]: 0.5, files["b"]: 0.25}
    offcut.build(tiny_pipeline_dir / "unet", tmp_path / "fused.offcut", engine="onnxruntime", loras=loras)
    fused = offcut.UNet.load(tmp_path / "fused.offcut", threads=1)
    swapped = offcut.UNet.load(one_cut_bundle, "onnxruntime", threads=1)
    for path, scale in loras.items():
        swapped.load_lora(path, scale)
    for each in (fused, swapped):
        each.set_schedule(Uniform(3), cut="deepcache:0")
    assert equal(outputs(fused), outputs(swapped))
    recorded = offcut.Bundle.open(tmp_path / "fused.offcut").manifest.source.loras
    assert [(each.name, each.scale) for each in recorded] == [
        ("kohya.safetensors", 0.5),
        ("pytorch_lora_weights.safetensors", 0.25),
    ]


def test_a_lora_that_cannot_be_loaded_leaves_the_weights_unchanged(
    unet: offcut.UNet, files: dict[str, Path], tmp_path: Path
) -> None:
    unet.load_lora(files["a"])
    before = outputs(unet)
    (tmp_path / "none.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="not a readable safetensors"):
        unet.load_lora(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no LoRA 'b': it has kohya"):
        unet.unload_lora("b")
    with unet.generation(calls=2), pytest.raises(UserError, match="cannot change during a generation"):
        unet.unload_lora()
    assert unet.loras == {"kohya": 1.0}
    assert equal(outputs(unet), before)


class LoraSetMachine(RuleBasedStateMachine):
    """``LoraSet`` and PEFT's layers in an eager UNet, given the same operations in random order."""

    LORAS: ClassVar[dict[str, Path]] = {}
    FOLDER: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_pretrained(self.FOLDER)
        self.loras = LoraSet()

    names = st.sampled_from(["a", "b", "c"])
    scales = st.sampled_from([0.0, 0.5, 1.0, -2.0])

    @initialize(names=st.permutations(["a", "b", "c"]))
    def load_all(self, names: list[str]) -> None:
        for name in names:
            self.load(name)

    @rule(name=names)
    def load(self, name: str) -> None:
        if name in self.loras.loras or not self.loras.enabled:
            return
        file = self.LORAS[name]
        self.unet.load_lora_adapter(file.parent, weight_name=file.name, prefix="unet", adapter_name=name)
        self.loras = self.loras.loaded(read(file, self.unet.config), name, 1.0, [name])

    @precondition(lambda self: self.loras.loras)
    @rule(chosen=st.dictionaries(names, scales, min_size=1, max_size=3))
    def set_adapters(self, chosen: dict[str, float]) -> None:
        self.unet.set_adapters(list(chosen), list(chosen.values()))
        self.loras = self.loras.activated(chosen)

    @precondition(lambda self: self.loras.loras)
    @rule(name=names)
    def set_adapter(self, name: str) -> None:
        if name in self.loras.loras:
            self.unet.set_adapter(name)
            self.loras = self.loras.activated({name: self.loras.scales[name]})

    @precondition(lambda self: len(self.loras.loras) > 1)
    @rule(name=names)
    def delete(self, name: str) -> None:
        self.unet.delete_adapters(name)
        self.loras = self.loras.deleted([name])

    @rule()
    def unload(self) -> None:
        self.unet.unload_lora()
        self.loras = LoraSet()

    @precondition(lambda self: self.loras.loras)
    @rule(enabled=st.sampled_from([True, True, False]))
    def switch(self, enabled: bool) -> None:
        (self.unet.enable_lora if enabled else self.unet.disable_lora)()
        self.loras = replace(self.loras, enabled=enabled)

    @invariant()
    def products_are_equal(self) -> None:
        terms = self.loras.terms()
        expected = {
            f"{name}.weight": sum(module.get_delta_weight(adapter) for adapter in active)
            for name, module in self.unet.named_modules()
            if isinstance(module, BaseTunerLayer) and not module.disable_adapters
            if (active := [adapter for adapter in module.active_adapters if module.scaling.get(adapter)])
        }
        assert set(terms) == set(expected)
        for name, delta in expected.items():
            product = sum(low_rank.product(delta.shape) * scale for low_rank, scale in terms[name])
            torch.testing.assert_close(product, delta.detach(), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_the_state_of_loras_is_that_of_peft(tiny_unet_dir: Path, tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        unet = UNet2DConditionModel.from_pretrained(tiny_unet_dir)
        config = random_adapter(unet, Random(seed), layers=8)  # of 12 layers, so that some have several LoRAs
        LoraSetMachine.LORAS[name] = save_adapter("diffusers", unet, config, tmp_path / name)
    LoraSetMachine.FOLDER = tiny_unet_dir
    run_state_machine_as_test(
        LoraSetMachine, settings=settings(max_examples=40, stateful_step_count=12, deadline=None, derandomize=True)
    )
