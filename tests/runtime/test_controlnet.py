"""ControlNets on compiled, cached engines: compared with eager diffusers, and with outputs reused on shallow calls."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

import offcut
from offcut.errors import EngineError, UserError

pytestmark = pytest.mark.slow
PROMPT = "a cat"
SCHEDULE = offcut.Uniform(3)
STEPS = 7


def new_controlnet(unet: Any, seed: int) -> ControlNetModel:
    """Return a ControlNet whose outputs are not zero, like those of a trained one."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16))
    with torch.no_grad():
        for part in (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(scope="module")
def control() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def nets(parts: dict[str, Any]) -> list[ControlNetModel]:
    return [new_controlnet(parts["unet"], seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def bundle(parts: dict[str, Any], nets: list[ControlNetModel], once: Any) -> Path:
    """Bundle built from a pipeline with a ControlNet, which gives it the ControlNet's inputs without an option."""

    def build(path: Path) -> None:
        model = path.with_name(f"{path.name}-model")
        StableDiffusionControlNetPipeline(
            **parts | {"controlnet": nets[0]}, requires_safety_checker=False
        ).save_pretrained(model)
        offcut.build(model, path, cuts=["deepcache:0", "deepcache:2"], engine=["onnxruntime", "openvino"])

    return Path(once("tiny-controlnet", build))


@pytest.fixture
def with_controlnet(parts: dict[str, Any], nets: list[ControlNetModel]) -> Callable[..., Any]:
    """Return a function that returns an eager pipeline with one or several new copies of the ControlNets."""

    def make(count: int = 1) -> Any:
        copies = []
        for net in nets[:count]:
            copied = ControlNetModel.from_config(net.config)
            copied.load_state_dict(net.state_dict())
            copies.append(copied.eval())
        scheduler = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        pipe = StableDiffusionControlNetPipeline(
            **parts | {"scheduler": scheduler, "controlnet": copies if count > 1 else copies[0]},
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def unet(bundle: Path, engine: str) -> Iterator[offcut.UNet]:
    opened = offcut.UNet.load(bundle, engine, threads=1)
    yield opened
    opened.close()


@pytest.mark.parametrize("count", [1, 2], ids=["one ControlNet", "two"])
def test_cached_engines_with_controlnets_equal_deepcache_in_eager_pytorch(
    count: int,
    with_controlnet: Callable[..., Any],
    unet: offcut.UNet,
    control: torch.Tensor,
    generate: Callable[..., torch.Tensor],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
    cached_by_call: Callable[..., Any],
) -> None:
    image = control if count == 1 else [control, control.flip(-1)]
    eager = with_controlnet(count)
    with cached_by_call(eager.unet, 2, SCHEDULE.full_calls(STEPS)):
        expected = generate(eager, steps=STEPS, prompt=PROMPT, image=image)
    pipe = offcut.attach(with_controlnet(count), unet)
    unet.set_schedule(SCHEDULE, cut="deepcache:2")
    match = decibels(generate(pipe, steps=STEPS, prompt=PROMPT, image=image), expected)
    assert match > 100
    assert unet.last_run is not None
    assert unet.last_run.timeline == "#..#..#"
    other = generate(pipe, steps=STEPS, prompt=PROMPT, image=[control.flip(-2)] * 2 if count > 1 else control.flip(-2))
    assert decibels(other, expected) < match - 20  # the control image has an effect


def test_a_bundle_for_controlnets_also_runs_without_a_controlnet(
    parts: dict[str, Any],
    bundle: Path,
    engine: str,
    control: torch.Tensor,
    eager: StableDiffusionPipeline,
    generate: Callable[..., torch.Tensor],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    pipe = offcut.load(bundle, engine, threads=1)
    assert isinstance(pipe.controlnet, ControlNetModel)
    pipe.set_progress_bar_config(disable=True)
    generate(pipe, steps=2, prompt=PROMPT, image=control)  # leaves residuals in the buffers
    plain = offcut.attach(StableDiffusionPipeline(**parts, requires_safety_checker=False), pipe.unet)
    plain.set_progress_bar_config(disable=True)
    assert decibels(generate(plain, steps=4), generate(eager, steps=4)) > 70
    pipe.unet.close()


@pytest.mark.parametrize("count", [1, 2], ids=["one ControlNet", "two"])
def test_reused_controlnets_run_on_full_calls_only(
    count: int,
    with_controlnet: Callable[..., Any],
    unet: offcut.UNet,
    control: torch.Tensor,
    generate: Callable[..., torch.Tensor],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
    cached_by_call: Callable[..., Any],
) -> None:
    image = control if count == 1 else [control, control.flip(-1)]
    eager = with_controlnet(count)
    full = SCHEDULE.full_calls(STEPS)
    outputs: list[Any] = []
    calls = 0
    run = eager.controlnet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls in full:
            outputs[:] = run(*args, **kwargs)
        calls += 1
        return list(outputs[0]), outputs[1].clone()

    eager.controlnet.forward = forward
    with cached_by_call(eager.unet, 0, full):
        expected = generate(eager, steps=STEPS, prompt=PROMPT, image=image)

    pipe = offcut.attach(with_controlnet(count), unet, reuse_controlnet=True)
    nets = list(getattr(pipe.controlnet, "nets", [pipe.controlnet]))
    assert all(isinstance(net, ControlNetModel) for net in nets)
    runs: list[int] = []
    for net in nets:
        net.conv_in.register_forward_hook(lambda *_: runs.append(1))
    unet.set_schedule(SCHEDULE)
    assert decibels(generate(pipe, steps=STEPS, prompt=PROMPT, image=image), expected) > 70
    assert len(runs) == count * len(full)
    generate(pipe, steps=STEPS, prompt=PROMPT, image=image)
    assert len(runs) == 2 * count * len(full)  # no output is reused in the next generation


def test_a_loop_with_two_latents_runs_the_controlnet_for_each(
    with_controlnet: Callable[..., Any], unet: offcut.UNet, control: torch.Tensor
) -> None:
    """Outputs of a ControlNet are reused with one latent only: those of one latent never reach the other."""
    latents = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    text = torch.zeros(1, 7, unet.config["cross_attention_dim"])
    unet.set_schedule(SCHEDULE)

    def run(reuse: bool) -> list[torch.Tensor]:
        pipe = offcut.attach(with_controlnet(), unet, reuse_controlnet=reuse)
        pipe.scheduler.set_timesteps(4)
        outputs = []
        with torch.no_grad(), unet.generation(4):
            for timestep in pipe.scheduler.timesteps:
                for latent in latents:
                    down, middle = pipe.controlnet(latent, timestep, text, control, return_dict=False)
                    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                    outputs.append(unet(latent, timestep, text, **residuals).sample)
        return outputs

    for expected, actual in zip(run(False), run(True), strict=True):
        assert torch.equal(expected, actual)


def test_a_controlnet_runs_again_when_its_scale_changes(
    with_controlnet: Callable[..., Any],
    unet: offcut.UNet,
    control: torch.Tensor,
    generate: Callable[..., torch.Tensor],
) -> None:
    pipe = offcut.attach(with_controlnet(), unet, reuse_controlnet=True)
    runs: list[int] = []
    pipe.controlnet.conv_in.register_forward_hook(lambda *_: runs.append(1))
    unet.set_schedule(offcut.Uniform(10))
    generate(pipe, steps=10, prompt=PROMPT, image=control, control_guidance_end=0.5)
    assert len(runs) == 2  # at the full call, and where its scale falls to 0


def test_unsupported_controlnet_settings_are_refused(
    bundle: Path, tiny_pipeline_dir: Path, eager: Any, tmp_path: Path
) -> None:
    opened = offcut.UNet.load(bundle, "onnxruntime", threads=1)
    with pytest.raises(UserError, match="no ControlNet whose feature maps"):
        offcut.attach(eager, opened, reuse_controlnet=True)
    assert not isinstance(eager.unet, offcut.UNet)
    opened.close()
    with pytest.raises(EngineError, match="calibrated without adapters"):
        offcut.build(
            tiny_pipeline_dir,
            tmp_path / "b",
            engine="onnxruntime",
            precision="int8",
            adapters=["controlnet"],
            calibration=offcut.Calibration(),
        )
