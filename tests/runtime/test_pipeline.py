"""``load`` and ``attach``, combined with schedulers, callbacks, offloading, saving and threads."""

from __future__ import annotations

import inspect
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)

import offcut
from offcut.errors import BundleError, EngineError, UserError
from offcut.runtime.generation.schedule import Quad, Uniform

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' use of NumPy

Generate = Callable[..., torch.Tensor]


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    """Both engines, in the default tier, because these tests generate whole images as users do."""
    return str(request.param)


def test_load_returns_the_whole_pipeline(
    tiny_bundle: Path, eager: Any, engine: str, generate: Generate, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pipe = offcut.load(tiny_bundle, engine, threads=1)
    assert "Expected types" not in caplog.text
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert isinstance(pipe, StableDiffusionPipeline)
    assert pipe.unet.engine == engine
    assert pipe.vae.dtype == pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    assert torch.allclose(generate(pipe), generate(eager), atol=1e-3)
    assert pipe.unet.last_run.calls == 10
    pipe.unet.close()


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
def test_a_bundle_of_half_precision_files_is_loaded(
    named: bool, small_pipeline_dir: Path, tmp_path: Path, generate: Generate, decibels: Callable[..., float]
) -> None:
    """diffusers saves ``*.fp16.safetensors``; a bundle's own copies have no variant in their names."""
    StableDiffusionPipeline.from_pretrained(small_pipeline_dir).to(torch.float16).save_pretrained(
        tmp_path / "model", variant="fp16"
    )
    messages: list[str] = []
    variant = "fp16" if named else None
    offcut.build(tmp_path / "model", tmp_path / "b", engine="onnxruntime", variant=variant, progress=messages.append)
    assert any("has its UNet as fp16 only" in message for message in messages) != named
    pipe = offcut.load(tmp_path / "b", threads=1)
    eager = StableDiffusionPipeline.from_pretrained(tmp_path / "model", variant="fp16", torch_dtype=torch.float32)
    for each in (pipe, eager):
        each.set_progress_bar_config(disable=True)
    assert decibels(generate(pipe), generate(eager)) > 100
    pipe.unet.close()


def test_load_passes_arguments_on(tiny_bundle: Path) -> None:
    scheduler = HeunDiscreteScheduler(steps_offset=1)
    pipe = offcut.load(offcut.Bundle.open(tiny_bundle), "onnxruntime", threads=1, scheduler=scheduler)
    assert pipe.scheduler is scheduler
    pipe.unet.close()


def test_a_bare_unets_bundle_has_no_pipeline(unet_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"bare UNet.*offcut\.UNet\.load, or offcut\.attach"):
        offcut.load(unet_bundle)
    unet = offcut.UNet.load(unet_bundle, "onnxruntime", threads=1)
    noise_pred = unet(torch.randn(1, 4, 8, 8), 10, encoder_hidden_states=torch.randn(1, 7, 16)).sample
    assert noise_pred.shape == (1, 4, 8, 8)
    unet.close()


def test_a_bundle_of_another_kind_of_unet_is_refused(eager: Any, unet_bundle: Path, tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"another kind of UNet.*cross_attention_dim 16 instead of 32"):
        offcut.attach(eager, unet_bundle, "onnxruntime")
    assert type(eager) is StableDiffusionPipeline
    with pytest.raises(UserError, match="has no unet"):
        offcut.attach(eager.vae, tiny_bundle)


def test_from_pretrained_accepts_an_offcut_unet(
    tiny_pipeline_dir: Path, opened: Any, engine: str, generate: Generate
) -> None:
    unet = opened(engine)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, unet=unet)
    pipe.set_progress_bar_config(disable=True)
    unet.set_schedule(Uniform(4))
    generate(pipe)
    assert unet.last_run.timeline == "#...#...#."
    assert unet.last_run.calls is None
    pipe.unet = unet
    unet.set_schedule(None)


def test_an_attached_pipeline_keeps_its_class_name_and_signature(pipe: Any) -> None:
    kind = type(pipe)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert kind is not StableDiffusionPipeline
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(kind, name) == getattr(StableDiffusionPipeline, name)
    assert inspect.signature(pipe.__call__).parameters == {
        name: parameter
        for name, parameter in inspect.signature(StableDiffusionPipeline.__call__).parameters.items()
        if name != "self"
    }
    assert type(offcut.attach(pipe, pipe.unet)) is kind
    assert set(pipe.components) == {*StableDiffusionPipeline._get_signature_keys(StableDiffusionPipeline)[0]}


def test_the_eager_unet_can_be_restored(pipe: Any, parts: dict[str, Any], eager: Any, generate: Generate) -> None:
    ours = pipe.unet
    pipe.unet = parts["unet"]
    assert torch.equal(generate(pipe), generate(eager))
    pipe.unet = ours


def test_schedulers_can_be_changed(pipe: Any, generate: Generate) -> None:
    pipe.unet.set_schedule(Quad(3, center=4))
    for scheduler, steps, calls in ((DPMSolverMultistepScheduler, 10, 10), (HeunDiscreteScheduler, 5, 9)):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        generate(pipe, steps=steps)
        assert pipe.unet.last_run.calls == calls
        assert pipe.unet.last_run.full_calls == Quad(3, center=4).full_calls(calls)


def test_callbacks_interrupts_and_progress_bars(
    pipe: Any, generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.unet.set_schedule(Uniform(3))
    steps: list[int] = []

    def watch(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        assert pipeline is pipe
        assert pipeline.num_timesteps == 10
        return {"latents": values["latents"] * 1}

    plain = generate(pipe)
    assert torch.equal(generate(pipe, callback_on_step_end=watch), plain)
    assert steps == list(range(10))
    pipe.set_progress_bar_config(disable=False, desc="denoising")
    generate(pipe)
    assert "denoising" in capsys.readouterr().err
    assert pipe.interrupt is False


def test_guidance_that_ends_early_changes_the_batch_size(pipe: Any, generate: Generate) -> None:
    def drop_guidance(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            pipeline._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"][-1:]
        return values

    pipe.unet.set_schedule(Uniform(4))
    generate(pipe, callback_on_step_end=drop_guidance, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert pipe.unet.last_run.timeline == "#...##..#."


def test_moving_and_offloading(pipe: Any, generate: Generate) -> None:
    plain = generate(pipe)
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.float32) is pipe
    assert pipe.device == torch.device("cpu")
    with pytest.raises(EngineError, match=r"cannot be cast to torch\.float16"):
        pipe.unet.to(torch.float16)
    pipe.enable_model_cpu_offload(device="cpu")
    try:
        assert torch.equal(generate(pipe), plain)
        assert torch.equal(generate(pipe), plain)
    finally:
        pipe.remove_all_hooks()
    pipe.enable_attention_slicing()
    pipe.vae.enable_tiling()
    assert torch.equal(generate(pipe), plain)


def test_unsupported_switches_of_the_pipeline_are_errors(pipe: Any) -> None:
    with pytest.raises(UserError, match="FreeU"):
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(UserError, match="attention processors"):
        pipe.fuse_qkv_projections()


def test_saving_and_loading_again(
    pipe: Any, generate: Generate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = generate(pipe)
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path)
    assert "holds the UNet's config only" in caplog.text
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    with pytest.raises(BundleError, match=r"from_pretrained\(\.\.\., unet=offcut\.UNet\.load\(bundle\)\)"):
        DiffusionPipeline.from_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, unet=pipe.unet)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again), plain)


def test_pipelines_that_share_components(pipe: Any, generate: Generate) -> None:
    image = torch.rand(1, 3, 64, 64)
    for img2img in (
        AutoPipelineForImage2Image.from_pipe(pipe),
        StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet),  # from_pipe keeps only modules of known types
        StableDiffusionImg2ImgPipeline(**pipe.components),
    ):
        assert type(img2img) is StableDiffusionImg2ImgPipeline
        assert img2img.unet is pipe.unet
        img2img.set_progress_bar_config(disable=True)
        pipe.unet.set_schedule(Quad(2, center=2))
        with pytest.raises(UserError, match=r"offcut\.attach"):
            generate(img2img, image=image, strength=0.8)
        offcut.attach(img2img, pipe.unet)
        generate(img2img, image=image, strength=0.8)
        assert pipe.unet.last_run.calls == 8
        assert pipe.unet.last_run.full_calls == Quad(2, center=2).full_calls(8)
        pipe.unet.set_schedule(None)


def test_two_pipelines_in_two_threads_use_one_bundle(tiny_bundle: Path, engine: str, generate: Generate) -> None:
    bundle = offcut.Bundle.open(tiny_bundle)
    pipes = [offcut.load(bundle, engine, threads=1) for _ in range(2)]
    for pipe, schedule in zip(pipes, (Uniform(3), Uniform(2)), strict=True):
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.set_schedule(schedule)
    alone = [generate(pipe, seed=seed) for seed, pipe in enumerate(pipes)]
    together: list[list[torch.Tensor]] = [[], []]

    def work(seed: int) -> None:
        together[seed] += [generate(pipes[seed], seed=seed) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        assert len(together[seed]) == 2
        assert all(torch.equal(latents, alone[seed]) for latents in together[seed])
    for pipe in pipes:
        pipe.unet.close()


def test_one_pipeline_in_two_threads_is_refused(pipe: Any, generate: Generate) -> None:
    raised: list[BaseException] = []

    def call_again(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        def work() -> None:
            try:
                generate(pipe)
            except UserError as error:
                raised.append(error)

        if step == 2:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return values

    plain = generate(pipe)
    assert torch.equal(generate(pipe, callback_on_step_end=call_again), plain)
    assert "already in a generation" in str(raised[0])


@pytest.mark.slow
def test_an_unconditional_pipeline_without_num_timesteps(tmp_path: Path, unet_export: Any) -> None:
    folder, _ = unet_export("unconditional")
    eager = DDIMPipeline(unet=UNet2DModel.from_pretrained(folder), scheduler=DDIMScheduler())
    eager.save_pretrained(tmp_path / "ddim")
    offcut.build(tmp_path / "ddim", tmp_path / "ddim.offcut", engine="onnxruntime")
    pipe = offcut.load(tmp_path / "ddim.offcut", "onnxruntime", threads=1)
    pipe.unet.set_schedule(Quad(2, center=3))
    for each in (pipe, eager):
        each.set_progress_bar_config(disable=True)

    def run(which: Any) -> torch.Tensor:
        images = which(generator=torch.Generator().manual_seed(0), num_inference_steps=8, output_type="np").images
        return torch.from_numpy(images)

    cached = run(pipe)
    assert pipe.unet.last_run.full_calls == Quad(2, center=3).full_calls(8)
    pipe.unet.set_schedule(None)
    assert torch.allclose(run(pipe), run(eager), atol=1e-4)
    assert not torch.allclose(run(pipe), cached, atol=1e-4)
    pipe.unet.close()
