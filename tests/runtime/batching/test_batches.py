"""The image of a request does not depend on the requests that share its engine calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

import offcut
from offcut.errors import ShapeError
from offcut.runtime.batching import Policy, Ticket, Worker
from offcut.runtime.batching.calls import EngineCalls
from offcut.runtime.generation.forecast import Coefficients, Extrapolate, Forecast
from offcut.runtime.generation.schedule import Quad, Uniform

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' use of NumPy

LatentsAlone = Callable[..., torch.Tensor]
Send = Callable[..., Ticket]

SCHEDULERS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


@dataclass(frozen=True)
class Corrected(Forecast):
    """Coefficients that change from call to call, like those that tuning fits."""

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        return Coefficients(1 + 0.01 * call, 0.0 if before is None else 0.1 * (call - last), 0.001 * call)


@dataclass(frozen=True, repr=False)
class Alternating(Uniform):
    """Shallow calls at two cuts in turn; None stands for the cut of the request."""

    @property
    def cuts(self) -> tuple[str | None, ...]:
        return (None, "deepcache:0")

    def cut_of(self, call: int) -> str | None:
        return self.cuts[call % 2]


TOLERANCE = 1e-5
"""Largest difference of latents, relative to the largest latent: ONNX Runtime rounds a single row differently."""


XL_EMBEDS = {
    "prompt_embeds": torch.ones(1, 7, 16),
    "negative_prompt_embeds": torch.zeros(1, 7, 16),
    "pooled_prompt_embeds": torch.ones(1, 10),
    "negative_pooled_prompt_embeds": torch.zeros(1, 10),
}


def random_requests(pipe: Any, seed: int, count: int) -> list[dict[str, Any]]:
    """Return requests that differ in everything that may differ between the members of a call."""
    rng = random.Random(seed)
    return [
        {
            "arguments": {
                "prompt": [" ".join(rng.choices("abcdefgh", k=rng.randint(1, 6)))] * rng.choice([1, 1, 1, 2]),
                "negative_prompt": None,
                "num_inference_steps": rng.randint(2, 9),
                "guidance_scale": rng.choice([1.0, 3.0, 7.5]),
                "seed": rng.randrange(1000),
                **rng.choice([{}, {}, {"height": 32, "width": 96}]),
            },
            "schedule": rng.choice([None, Uniform(2), Uniform(3, warmup=2), Quad(2, center=1), Uniform(5)]),
            "cut": rng.choice(["deepcache:0", "deepcache:1"]),
            "forecast": rng.choice([None, Extrapolate(0.5), Extrapolate(1.0), Corrected()]),
            "scheduler": rng.choice(SCHEDULERS).from_config(pipe.scheduler.config, skip_prk_steps=True),
        }
        for _ in range(count)
    ]


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max())


def test_each_of_several_random_requests_gives_the_same_image_as_alone(
    shared_pipe: Any, latents_alone: LatentsAlone, send: Send
) -> None:
    for seed in range(3):
        alternating = [
            {"arguments": {"seed": number}, "schedule": Alternating(4), "cut": "deepcache:1", "forecast": forecast}
            for number, forecast in enumerate([None, Corrected()])
        ]
        requests = [*random_requests(shared_pipe, seed, 9), *alternating]
        expected = [latents_alone(request) for request in requests]
        with Worker(shared_pipe, max_in_flight=6, policy=Policy(bound=4), max_batch=8) as worker:
            tickets = [send(worker, request) for request in requests]
            images = [ticket.future.result().images for ticket in tickets]
            statistics = worker.statistics()
        worst = max(difference(*pair) for pair in zip(images, expected, strict=True))
        assert worst <= TOLERANCE
        assert statistics.mean_rows > 2.5  # a request alone has 1, 2 or 4
        assert max(rows for _, rows in statistics.ticks) <= 8
        assert {kind for kind, _ in statistics.ticks} == {"full", "shallow"}
        assert statistics.slots == statistics.cache_bytes == statistics.in_flight == statistics.queued == 0
        assert statistics.requests["done"].count == len(requests)


def test_equal_requests_give_the_same_images_as_alone_bit_for_bit(
    shared_pipe: Any, latents_alone: LatentsAlone, send: Send
) -> None:
    """With two rows or more, ONNX Runtime's rounding does not depend on the number of rows."""
    requests = [{"arguments": {"seed": seed}, "schedule": Uniform(3)} for seed in range(5)]
    expected = [latents_alone(request) for request in requests]
    with Worker(shared_pipe) as worker:
        tickets = [send(worker, request) for request in requests]
        for ticket, latents in zip(tickets, expected, strict=True):
            assert torch.equal(ticket.future.result().images, latents)
        statistics = worker.statistics()
    assert max(rows for _, rows in statistics.ticks) == 10
    assert statistics.gathers_skipped > 0


def test_a_forecast_keeps_the_features_of_two_full_calls(
    shared_pipe: Any, latents_alone: LatentsAlone, send: Send
) -> None:
    """The slot is twice as large, and the image is that of the request alone, bit for bit."""
    plain = {"arguments": {"seed": 1}, "schedule": Uniform(3)}
    with_forecast = {**plain, "forecast": Extrapolate(1.0)}
    expected = [latents_alone(plain), latents_alone(with_forecast)]
    assert not torch.equal(*expected)
    sizes = []
    with Worker(shared_pipe) as worker:
        requests = (plain, with_forecast)
        tickets = [
            send(worker, request, on_step=lambda _: sizes.append(worker.statistics().cache_bytes))
            for request in requests
        ]
        for ticket, latents in zip(tickets, expected, strict=True):
            assert torch.equal(ticket.future.result().images, latents)
    assert max(sizes) == 3 * 2 * 16 * 16 * 16 * 4


@pytest.mark.parametrize("forecast", [None, Corrected()], ids=str)
def test_requests_may_reuse_the_guidance_difference(
    forecast: Forecast | None, shared_pipe: Any, send: Send, latents_alone: LatentsAlone
) -> None:
    """Shallow calls with half of the batch are shared with those of other requests with the whole batch."""
    request = {"arguments": {"seed": 1}, "schedule": Uniform(3), "forecast": forecast}
    other = {"arguments": {"seed": 2}, "schedule": Uniform(3)}
    unguided = {"arguments": {"seed": 3, "guidance_scale": 1.0}, "schedule": Uniform(3)}
    shared_pipe.unet.set_schedule(Uniform(3), None, forecast, reuse_guidance=True)
    generator = torch.Generator().manual_seed(1)
    arguments = {"prompt": "a red square", "num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "latent"}
    expected = shared_pipe(**arguments, generator=generator).images
    shared_pipe.unet.set_schedule(None)
    whole = [latents_alone(each) for each in (request, other, unguided)]
    with Worker(shared_pipe) as worker:
        tickets = [
            send(worker, request, reuse_guidance=True),
            send(worker, other),
            send(worker, unguided, reuse_guidance=True),
        ]
        images = [ticket.future.result().images for ticket in tickets]
        assert ("shallow", 4) in worker.statistics().ticks  # 1 + 2 + 1 rows
    for actual, latents in zip(images, [expected, *whole[1:]], strict=True):
        assert difference(actual, latents) <= TOLERANCE
    assert difference(images[0], whole[0]) > 10 * TOLERANCE


@pytest.mark.parametrize("forecast", [None, Extrapolate(1.0), Corrected()], ids=str)
def test_calls_have_cuts_of_their_own(
    forecast: Forecast | None, shared_pipe: Any, latents_alone: LatentsAlone, send: Send
) -> None:
    """A slot has the features of all cuts of its request, each once, and calls at the same cut are shared."""
    requests = [
        {
            "arguments": {"seed": seed, "num_inference_steps": 9},
            "schedule": Alternating(4, warmup=2),
            "cut": cut,
            "forecast": forecast,
        }
        for seed, cut in enumerate(["mlperf", "deepcache:2", "mlperf"])
    ]
    expected = [latents_alone(request) for request in requests]
    buffers = shared_pipe.unet.bound.buffers
    names = [shared_pipe.unet.cut_features[cut] for cut in ("deepcache:0", "mlperf")]
    slot_bytes = sum(buffers[name].nbytes for name in {name for features in names for name in features})
    sizes = []
    with Worker(shared_pipe) as worker:
        tickets = [send(worker, request) for request in requests]
        for ticket, latents in zip(tickets, expected, strict=True):
            assert difference(ticket.future.result().images, latents) <= TOLERANCE
        assert max(rows for _, rows in worker.statistics().ticks) > 2
        assert worker.statistics().cache_bytes == 0
        send(worker, requests[0], on_step=lambda _: sizes.append(worker.statistics().cache_bytes)).future.result()
    assert max(sizes) == slot_bytes * (1 if forecast is None else 2)


def test_openvino_keeps_requests_apart(tiny_bundle: Path, latents_alone: LatentsAlone, send: Send) -> None:
    pipe: Any = offcut.load(tiny_bundle, "openvino", threads=1)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.advise = False
    requests = random_requests(pipe, 7, 5)
    expected = [latents_alone(request, pipe) for request in requests]
    with Worker(pipe) as worker:
        tickets = [send(worker, request) for request in requests]
        worst = max(
            difference(ticket.future.result().images, latents)
            for ticket, latents in zip(tickets, expected, strict=True)
        )
    assert worst <= 1e-4  # OpenVINO compiles other kernels for other batch sizes
    pipe.unet.close()


@pytest.mark.parametrize("sizes", [(8,), (4, 16)])
def test_padding_changes_nothing(
    sizes: tuple[int, ...], shared_pipe: Any, latents_alone: LatentsAlone, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    called_sizes, run = set(), EngineCalls.run

    def recording(self: EngineCalls, cut: str | None, calls: Any, bound: Any, size: int) -> list[torch.Tensor]:
        called_sizes.add(size)
        return run(self, cut, calls, bound, size)

    monkeypatch.setattr(EngineCalls, "run", recording)
    requests = [{"arguments": {"seed": seed}, "schedule": Uniform(2)} for seed in range(3)]
    expected = [latents_alone(request) for request in requests]
    with Worker(shared_pipe, batch_sizes=sizes) as worker:
        tickets = [send(worker, request) for request in requests]
        assert all(
            difference(ticket.future.result().images, latents) <= TOLERANCE
            for ticket, latents in zip(tickets, expected, strict=True)
        )
    assert called_sizes
    assert called_sizes <= set(sizes)


@pytest.mark.parametrize("supported_sizes", [{2}, {4}, {2, 4}, {1, 2, 3, 4, 5, 6}])
def test_engines_that_support_certain_batch_sizes_only(
    supported_sizes: set[int],
    shared_pipe: Any,
    latents_alone: LatentsAlone,
    send: Send,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls are split, or padded, to batch sizes that the engines support, as with static profiles."""
    requests = [{"arguments": {"seed": seed}, "schedule": Uniform(2)} for seed in range(4)]
    expected = [latents_alone(request) for request in requests]
    prepare = shared_pipe.unet._pair.prepare

    def prepare_supported(shapes: Any) -> Any:
        if shapes["sample"][0] not in supported_sizes:
            raise ShapeError("no profile of this engine covers this batch")
        return prepare(shapes)

    monkeypatch.setattr(shared_pipe.unet._pair, "prepare", prepare_supported)
    with Worker(shared_pipe) as worker:
        tickets = [send(worker, request) for request in requests]
        assert all(
            difference(ticket.future.result().images, latents) <= TOLERANCE
            for ticket, latents in zip(tickets, expected, strict=True)
        )
        assert max(rows for _, rows in worker.statistics().ticks) == max(supported_sizes)
        too_many = send(worker, {"arguments": {"num_images_per_prompt": 4}})
        with pytest.raises(ShapeError, match="no profile"):
            too_many.future.result()
        assert worker.healthy


@pytest.mark.slow
def test_an_export_of_one_batch_size_is_padded(tiny_unet_dir: Path, once: Any, shared_pipe: Any, send: Send) -> None:
    bundle = once(
        "fixed-batch.offcut",
        lambda path: offcut.build(tiny_unet_dir, path, engine="onnxruntime", dims={"batch": 6}),
    )
    unet = offcut.UNet.load(bundle, "onnxruntime", threads=1)
    components = {**shared_pipe.components, "unet": unet, "text_encoder": None, "tokenizer": None}
    pipe: Any = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    offcut.attach(pipe, unet)
    embeds = {
        "prompt": None,
        "prompt_embeds": noise(1, 7, 16),
        "negative_prompt_embeds": torch.zeros(1, 7, 16),
        "height": 64,
        "width": 64,
    }
    requests = [{"arguments": {**embeds, "seed": seed}, "schedule": Uniform(2)} for seed in range(3)]
    three = {key: torch.cat([value] * 3) if isinstance(value, torch.Tensor) else value for key, value in embeds.items()}
    unet.set_schedule(Uniform(2))
    expected = pipe(
        **three,
        num_inference_steps=6,
        guidance_scale=5.0,
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
    ).images
    unet.set_schedule(None)
    with Worker(pipe) as worker:
        tickets = [send(worker, request) for request in requests]
        for ticket, latents in zip(tickets, expected, strict=True):
            assert difference(ticket.future.result().images[0], latents) <= TOLERANCE
    unet.close()


def test_other_pipelines_of_the_same_modules_share_calls(shared_pipe: Any, send: Send) -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    img2img = {
        "arguments": {"image": picture, "strength": 0.5, "num_inference_steps": 8},
        "schedule": Uniform(2),
        "pipeline": StableDiffusionImg2ImgPipeline,
    }
    with Worker(shared_pipe) as worker:
        images_alone = send(worker, img2img).future.result().images
        tickets = [send(worker, img2img), send(worker, {"arguments": {}, "schedule": Uniform(2)})]
        together = [ticket.future.result().images for ticket in tickets]
        statistics = worker.statistics()
    assert difference(together[0], images_alone) <= TOLERANCE
    assert ("full", 4) in statistics.ticks


@pytest.mark.slow
def test_stable_diffusion_xl(unet_export: Any, parts: dict[str, Any], send: Send, tmp_path: Path) -> None:
    bundle = offcut.build(unet_export("sdxl")[0], tmp_path / "xl.offcut", engine="onnxruntime")
    unet = offcut.UNet.load(bundle, "onnxruntime", threads=1)
    unet.advise = False
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe: Any = StableDiffusionXLPipeline(
        vae=parts["vae"], unet=unet, scheduler=parts["scheduler"], **dict.fromkeys(names)
    )
    pipe.set_progress_bar_config(disable=True)
    offcut.attach(pipe, unet)
    requests = [
        {
            "arguments": {**XL_EMBEDS, "prompt": None, "height": 64, "width": 64, "seed": seed, "original_size": size},
            "schedule": Uniform(2),
        }
        for seed, size in enumerate([(64, 64), (128, 96), (640, 640)])
    ]
    with Worker(pipe, max_in_flight=1) as worker:
        images_alone = [send(worker, request).future.result().images for request in requests]
    with Worker(pipe) as worker:
        tickets = [send(worker, request) for request in requests]
        for ticket, latents in zip(tickets, images_alone, strict=True):
            assert difference(ticket.future.result().images, latents) <= TOLERANCE
        assert ("full", 6) in worker.statistics().ticks
    unet.close()
