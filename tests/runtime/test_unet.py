"""``UNet`` without a pipeline, on a pair of engines that computes simple arithmetic."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from offcut.engines.base import BoundPair
from offcut.errors import CutError, EngineError, OffcutError, ScheduleError, ShapeError, UserError
from offcut.exporter.specs import TensorSpec, solve
from offcut.runtime.generation.schedule import Quad, Steps, Uniform
from offcut.runtime.pipeline import attach
from offcut.runtime.tuning.steps import TunedSteps
from offcut.runtime.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' use of NumPy

CONFIG = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "cross_attention_dim": 8}
SAMPLE = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
TIMESTEP = TensorSpec("timestep", "float32", ("batch",))
TEXT = TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence", 8))
SDXL = (TensorSpec("text_embeds", "float32", ("batch", 6)), TensorSpec("time_ids", "float32", ("batch", 6)))


class ArithmeticPair:
    """Engine pair: the full graph outputs ``noise_pred = sample + mean(text) + timestep`` and ``hidden = timestep``.

    A shallow graph subtracts ``hidden`` from the same ``noise_pred``.
    """

    name = "arithmetic"
    device = torch.device("cpu")

    def __init__(self, *inputs: TensorSpec, cuts: tuple[str, ...] = ("deepcache:0", "deepcache:1")) -> None:
        self.inputs = {spec.name: spec for spec in inputs or (SAMPLE, TIMESTEP, TEXT)}
        self.cuts: Mapping[str, tuple[str, ...]] = dict.fromkeys(cuts, ("hidden",))
        noise_pred = TensorSpec("noise_pred", self.inputs["sample"].dtype, self.inputs["sample"].shape)
        self.outputs = {"noise_pred": noise_pred, "hidden": TensorSpec("hidden", "float32", ("batch",))}
        self.log: list[str] = []
        self.prepared: list[ArithmeticBound] = []
        self.closed = False
        self.fails = False

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> BoundPair:
        self.prepared.append(ArithmeticBound(self, shapes))
        return self.prepared[-1]

    def close(self) -> None:
        self.closed = True


class ArithmeticBound:
    def __init__(self, pair: ArithmeticPair, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.pair = pair
        self.dims = solve(pair.inputs, shapes)
        specs = [*pair.inputs.values(), *pair.outputs.values()]
        self.buffers = {spec.name: torch.zeros(spec.resolve(self.dims), dtype=spec.torch_dtype()) for spec in specs}
        self.closed = False

    def full(self) -> None:
        self._run("full")
        self.buffers["hidden"].copy_(self._timestep())

    def shallow(self, cut: str) -> None:
        self._run(cut)
        self.buffers["noise_pred"] -= self.buffers["hidden"].reshape(-1, 1, 1, 1)

    def close(self) -> None:
        self.closed = True

    def _run(self, graph: str) -> None:
        self.pair.log.append(graph)
        if self.pair.fails:
            raise RuntimeError("the engine broke")
        text = self.buffers["encoder_hidden_states"].mean() if "encoder_hidden_states" in self.buffers else 0
        noise_pred = self.buffers["sample"] + text + self._timestep().reshape(-1, 1, 1, 1)
        self.buffers["noise_pred"].copy_(noise_pred)

    def _timestep(self) -> torch.Tensor:
        return self.buffers["timestep"].float()


@pytest.fixture
def pair() -> ArithmeticPair:
    return ArithmeticPair()


@pytest.fixture
def unet(pair: ArithmeticPair) -> UNet:
    return UNet(pair, CONFIG)


def inputs(batch: int = 2, size: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "sample": torch.full((batch, 4, size, size), 1.0),
        "timestep": 10,
        "encoder_hidden_states": torch.full((batch, 5, 8), 0.5),
        **more,
    }


# Inputs and outputs


@pytest.mark.parametrize(
    "timestep",
    [10, 10.0, torch.tensor(10), torch.tensor(10.0), torch.tensor([10]), torch.tensor([10, 10])],
    ids=["int", "float", "int64[]", "float32[]", "[1]", "[batch]"],
)
@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize("shape", [("batch",), (1,), ("steps",), ()], ids=str)
def test_every_form_of_timestep_reaches_every_form_of_input(timestep: Any, dtype: str, shape: tuple[Any, ...]) -> None:
    unet = UNet(ArithmeticPair(SAMPLE, TensorSpec("timestep", dtype, shape), TEXT), CONFIG)
    arguments = inputs(timestep=timestep)
    if isinstance(timestep, torch.Tensor) and timestep.shape == (2,) and shape != ("batch",):
        with pytest.raises(ShapeError, match="pass one for all images"):
            unet(**arguments)
    else:
        assert torch.equal(unet(**arguments).sample, torch.full((2, 4, 8, 8), 11.5))


def test_each_image_may_have_its_own_timestep(unet: UNet) -> None:
    noise_pred = unet(**inputs(timestep=torch.tensor([10.0, 20.5]))).sample
    assert noise_pred[:, 0, 0, 0].tolist() == [11.5, 22.0]


def test_a_fractional_timestep_is_not_rounded_for_an_integer_input() -> None:
    unet = UNet(ArithmeticPair(SAMPLE, TensorSpec("timestep", "int64", ("batch",)), TEXT), CONFIG)
    with pytest.raises(UserError, match=r"fractional timesteps \(10\.500\).*choose a scheduler without"):
        unet(**inputs(timestep=torch.tensor(10.5)))


def test_the_output_has_diffusers_class_and_new_memory(unet: UNet, pair: ArithmeticPair) -> None:
    output = unet(**inputs())
    assert isinstance(output, UNet2DConditionOutput)
    first = output.sample
    (second,) = unet(**inputs(timestep=5), return_dict=False)
    assert torch.equal(first, torch.full((2, 4, 8, 8), 11.5))
    assert torch.equal(second, torch.full((2, 4, 8, 8), 6.5))
    buffer = pair.prepared[0].buffers["noise_pred"]
    assert buffer.data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_the_output_has_the_samples_dtype(unet: UNet) -> None:
    half = {name: value.half() for name, value in inputs().items() if isinstance(value, torch.Tensor)}
    assert unet(**half, timestep=10).sample.dtype == torch.float16
    assert unet.dtype == torch.float32


def test_an_unconditional_unet_takes_class_labels_where_diffusers_does() -> None:
    labels = TensorSpec("class_labels", "int64", ("batch",))
    unet = UNet(ArithmeticPair(SAMPLE, TIMESTEP, labels), {**CONFIG, "_class_name": "UNet2DModel"})
    for output in (
        unet(torch.zeros(2, 4, 8, 8), 1, torch.tensor([3, 4])),
        unet(torch.zeros(2, 4, 8, 8), 1, class_labels=torch.tensor([3, 4])),
    ):
        assert isinstance(output, UNet2DOutput)
    with pytest.raises(UserError, match="also needs class_labels"):
        unet(torch.zeros(2, 4, 8, 8), 1)


def test_sdxls_conditioning_reaches_the_engine() -> None:
    config = {**CONFIG, "addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 42}
    pair = ArithmeticPair(SAMPLE, TIMESTEP, TEXT, *SDXL)
    unet = UNet(pair, config)
    added = {"text_embeds": torch.full((2, 6), 2.0), "time_ids": torch.full((2, 6), 3.0)}
    unet(**inputs(), added_cond_kwargs=added)
    for name, value in added.items():
        assert torch.equal(pair.prepared[0].buffers[name], value)
    assert unet.add_embedding.linear_1.in_features == 42
    with pytest.raises(UserError, match="also needs text_embeds, time_ids"):
        unet(**inputs())


def test_an_sdxl_pipeline_accepts_an_offcut_unet() -> None:
    config = {
        **CONFIG,
        "sample_size": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 6 * 6 + 6,
    }
    unet = UNet(ArithmeticPair(SAMPLE, TIMESTEP, TEXT, *SDXL), config)
    scheduler = EulerDiscreteScheduler()
    pipe = attach(StableDiffusionXLPipeline(None, None, None, None, None, unet, scheduler), unet)
    pipe.set_progress_bar_config(disable=True)
    unet.set_schedule(Quad(2, center=2))
    latents = pipe(
        prompt_embeds=torch.ones(1, 5, 8),
        negative_prompt_embeds=torch.zeros(1, 5, 8),
        pooled_prompt_embeds=torch.ones(1, 6),
        negative_pooled_prompt_embeds=torch.zeros(1, 6),
        num_inference_steps=10,
        denoising_end=0.8,
        output_type="latent",
    ).images
    assert latents.shape == (1, 4, 8, 8)
    assert unet.last_run is not None
    assert unet.last_run.full_calls == Quad(2, center=2).full_calls(8)


def test_buffers_written_in_inference_mode_serve_outside_it(unet: UNet) -> None:
    with torch.inference_mode():
        unet(**inputs())
    unet(**inputs())


def test_a_call_that_needs_gradients_is_refused(unet: UNet) -> None:
    arguments = inputs()
    arguments["sample"].requires_grad_()
    with pytest.raises(UserError, match="compute no gradients"):
        unet(**arguments)
    with torch.no_grad():
        assert not unet(**arguments).sample.requires_grad
    text = inputs(encoder_hidden_states=torch.zeros(2, 5, 8, requires_grad=True))
    assert not unet(**text).sample.requires_grad


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask.*leave it out"),
        ({"encoder_attention_mask": torch.ones(2, 5)}, "encoder_attention_mask"),
        ({"down_block_additional_residuals": (torch.ones(1),)}, "--adapter controlnet"),
        ({"mid_block_additional_residual": torch.ones(1)}, "--adapter controlnet"),
        ({"down_intrablock_additional_residuals": (torch.ones(1),)}, "--adapter t2i-adapter"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "give the scale to pipe.set_adapters"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "gligen"),
        ({"added_cond_kwargs": {"image_embeds": [torch.ones(1)]}}, "build the bundle with --ip-adapter"),
        ({"added_cond_kwargs": {"text_embeds": torch.ones(2, 6)}}, "no input text_embeds"),
        ({"class_labels": torch.ones(2)}, "no input class_labels"),
        ({"timestep_cond": torch.ones(2, 8)}, "no input timestep_cond"),
        ({"encoder_hidden_states": None}, "also needs encoder_hidden_states"),
        ({"encoder_hidden_states": [1.0]}, "encoder_hidden_states is a list"),
        ({"sample": torch.ones(2, 4, 8, 8, device="meta")}, r"sample is on meta.*pipe\.to\('cpu'\)"),
        ({"encoder_hidden_states": torch.ones(1, 5, 8)}, "batch = 2"),
    ],
)
def test_arguments_without_an_engine_input_are_refused(unet: UNet, argument: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unet(**inputs(**argument))


def test_arguments_without_effect_are_accepted(unet: UNet) -> None:
    unet(**inputs(), cross_attention_kwargs={"scale": 1.0}, added_cond_kwargs={}, attention_mask=None)
    unet(**inputs(), cross_attention_kwargs={})


# Buffers


def test_buffers_are_bound_once_for_each_shape_and_the_least_recently_used_are_closed(
    unet: UNet, pair: ArithmeticPair
) -> None:
    for size in (8, 8, 16, 8):
        unet(**inputs(size=size))
    assert len(pair.prepared) == 2
    unet(**inputs(size=24))
    assert [bound.closed for bound in pair.prepared] == [False, True, False]
    unet(**inputs(size=16))
    assert [bound.closed for bound in pair.prepared] == [True, True, False, False]


def test_closing(unet: UNet, pair: ArithmeticPair) -> None:
    unet(**inputs())
    unet.close()
    unet.close()
    assert pair.closed
    assert pair.prepared[0].closed
    with pytest.raises(EngineError, match=r"closed: open it again with offcut\.UNet\.load"):
        unet(**inputs())


# Schedules and generations


def calls(unet: UNet, timesteps: Any, **more: Any) -> None:
    for timestep in timesteps:
        unet(**inputs(timestep=timestep, **more))


def test_announced_calls_follow_the_schedule_whatever_the_timesteps(unet: UNet, pair: ArithmeticPair) -> None:
    unet.set_schedule(Uniform(3), cut="deepcache:1")
    text = inputs()["encoder_hidden_states"]
    for timesteps in ([9, 8, 7, 6], [9, 8, 8, 7], [1, 2, 3, 4]):
        pair.log.clear()
        with unet.generation(calls=4):
            calls(unet, timesteps, encoder_hidden_states=text)
        assert pair.log == ["full", "deepcache:1", "deepcache:1", "full"]
        assert unet.last_run is not None
        assert unet.last_run.timeline == "#..#"
        assert (unet.last_run.calls, unet.last_run.schedule, unet.last_run.cut) == (4, Uniform(3), "deepcache:1")


def test_calls_at_one_constant_timestep_need_a_key(unet: UNet, pair: ArithmeticPair) -> None:
    """Without a key they could belong to several latents, so that every call is full."""
    unet.set_schedule(Uniform(3), cut="deepcache:1")
    with unet.generation(calls=4):
        calls(unet, [9, 9, 9, 9])
    assert pair.log == ["full"] * 4
    pair.log.clear()
    with unet.generation(calls=4), unet.trajectory("only"):
        calls(unet, [9, 9, 9, 9])
    assert pair.log == ["full", "deepcache:1", "deepcache:1", "full"]
    with pytest.raises(UserError, match="key is None"), unet.trajectory(None):
        pass


def test_a_schedule_may_give_calls_cuts_of_their_own(unet: UNet, pair: ArithmeticPair) -> None:
    unet.set_schedule(TunedSteps((0, 3), 5, (None, "deepcache:1", None, None, "deepcache:0")), cut="deepcache:0")
    assert unet.cut == "deepcache:0"
    with unet.generation(calls=5):
        calls(unet, [5, 4, 3, 2, 1])
    assert pair.log == ["full", "deepcache:1", "deepcache:0", "full", "deepcache:0"]
    assert unet.last_run is not None
    assert unet.last_run.cuts == (None, "deepcache:1", "deepcache:0", None, "deepcache:0")
    assert unet.last_run.timeline == "#..#."


def test_the_number_of_calls_is_optional_for_schedules_that_do_not_need_it(unet: UNet) -> None:
    unet.set_schedule(Uniform(2))
    with unet.generation():
        calls(unet, [3, 2, 1])
    assert unet.last_run is not None
    assert unet.last_run.timeline == "#.#"
    unet.set_schedule(Quad(2))
    with pytest.raises(ScheduleError, match=r"unet\.generation\(calls=n\)"), unet.generation():
        pass
    with pytest.raises(ScheduleError, match=r"offcut\.attach"):
        unet(**inputs())


def test_unannounced_calls_begin_a_new_generation_when_the_timestep_rises(unet: UNet, pair: ArithmeticPair) -> None:
    unet.set_schedule(Uniform(9))
    calls(unet, [9, 8, 8, 7, 9, 8], encoder_hidden_states=inputs()["encoder_hidden_states"])
    assert pair.log == ["full", "deepcache:0", "deepcache:0", "deepcache:0", "full", "deepcache:0"]
    assert unet.last_run is not None
    assert unet.last_run.timeline == "#."


@pytest.mark.parametrize("announced", [True, False])
def test_the_call_after_any_interruption_is_full(unet: UNet, pair: ArithmeticPair, announced: bool) -> None:
    unet.set_schedule(Uniform(100))

    def interrupted(interrupt: Any) -> list[str]:
        unet.reset()
        if not announced:
            calls(unet, [9, 8])
            interrupt()
            pair.log.clear()
            calls(unet, [7, 6])
            return pair.log
        with unet.generation(calls=100):
            calls(unet, [9, 8])
            interrupt()
            pair.log.clear()
            calls(unet, [7, 6])
        return pair.log

    def fail() -> None:
        pair.fails = True
        with pytest.raises(RuntimeError, match="broke"):
            unet(**inputs())
        pair.fails = False

    full_again = ["full", "deepcache:0"]
    assert interrupted(lambda: None) == ["deepcache:0", "deepcache:0"]
    assert interrupted(unet.reset) == full_again
    assert interrupted(unet._reset_stateful_cache) == full_again
    assert interrupted(fail) == full_again
    assert interrupted(lambda: unet(**inputs(size=16))) == full_again
    assert interrupted(lambda: unet(**inputs(batch=1))) == full_again


def test_an_input_error_does_not_change_the_generation(unet: UNet, pair: ArithmeticPair) -> None:
    unet.set_schedule(Uniform(100))
    with unet.generation(calls=4):
        calls(unet, [9])
        with pytest.raises(UserError):
            unet(**inputs(), attention_mask=torch.ones(1))
        calls(unet, [8])
    assert pair.log == ["full", "deepcache:0"]


def test_an_exception_ends_the_generation(unet: UNet) -> None:
    unet.set_schedule(Uniform(2))

    def interrupted() -> None:
        with unet.generation(calls=4):
            calls(unet, [9, 8])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with unet.generation(calls=2):
        calls(unet, [7, 6])
    assert unet.last_run is not None
    assert unet.last_run.timeline == "#."


def test_generations_do_not_nest(unet: UNet) -> None:
    with unet.generation(calls=2):
        with pytest.raises(UserError, match="already in a generation"), unet.generation(calls=2):
            pass
        calls(unet, [2])
        with pytest.raises(ScheduleError, match="during a generation"):
            unet.set_schedule(None)


def test_set_schedule_checks_and_resolves_cuts(unet: UNet) -> None:
    assert unet.cuts == ("deepcache:0", "deepcache:1")
    assert (unet.schedule, unet.cut) == (None, None)
    unet.set_schedule(Steps([3]))
    assert (unet.schedule, unet.cut) == (Steps([3]), "deepcache:0")
    unet.set_schedule(Steps([3]), cut="paper:0")
    assert unet.cut == "deepcache:1"
    with pytest.raises(CutError, match=r"'paper:7'; it has deepcache:0, deepcache:1"):
        unet.set_schedule(Steps([3]), cut="paper:7")
    unet.set_schedule(None)
    assert (unet.schedule, unet.cut) == (None, None)
    without = UNet(ArithmeticPair(cuts=()), CONFIG)
    without.set_schedule(None)
    with pytest.raises(CutError, match="built without a cut"):
        without.set_schedule(Uniform(2))


def test_last_run_has_seconds_when_asked(unet: UNet) -> None:
    assert unet.last_run is None
    calls(unet, [2, 1])
    assert unet.last_run is not None
    assert unet.last_run.seconds == ()
    unet.reset()
    unet.record_times = True
    calls(unet, [2, 1])
    assert len(unet.last_run.seconds) == 2
    assert all(seconds > 0 for seconds in unet.last_run.seconds)


def in_thread(work: Any) -> Any:
    """Run a function in a thread; return its result, or the error that it raised."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except OffcutError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def test_another_thread_is_refused_in_a_generation_and_begins_a_new_one_outside(
    unet: UNet, pair: ArithmeticPair
) -> None:
    unet.set_schedule(Uniform(100))
    with unet.generation(calls=9):
        calls(unet, [9])
        assert "another thread" in str(in_thread(lambda: unet(**inputs(timestep=8))))
        calls(unet, [8])
    assert pair.log == ["full", "deepcache:0"]
    pair.log.clear()
    calls(unet, [9])
    in_thread(lambda: calls(unet, [9, 8]))
    calls(unet, [8])
    assert pair.log == ["full", "full", "deepcache:0", "full"]


def test_two_threads_at_once_are_refused(unet: UNet, pair: ArithmeticPair, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Any] = []

    def full(bound: ArithmeticBound) -> None:
        if not errors:
            errors.append(None)
            errors[0] = in_thread(lambda: unet(**inputs()))

    monkeypatch.setattr(ArithmeticBound, "full", full)
    unet(**inputs())
    assert "two threads use this UNet at once" in str(errors[0])
    unet(**inputs())


# Interface of a model in diffusers and PyTorch


def test_moves_and_casts_to_other_devices_and_dtypes_are_refused(unet: UNet) -> None:
    assert unet.to("cpu") is unet.to(torch.device("cpu", 0)) is unet.to(torch.float32) is unet.to(None, None) is unet
    assert unet.to(device="cpu", dtype=torch.float32) is unet.cpu() is unet.float() is unet
    for move in (lambda: unet.to("cuda"), lambda: unet.to("meta"), unet.cuda, lambda: unet.cuda(1)):
        with pytest.raises(EngineError, match=r"run on cpu and cannot move.*offcut\.UNet\.load\(bundle, device="):
            move()
    for cast in (unet.half, unet.bfloat16, unet.double, lambda: unet.to(torch.float16)):
        with pytest.raises(EngineError, match=r"take torch\.float32 and cannot be cast"):
            cast()


def test_the_config_has_what_newer_pipelines_read(unet: UNet) -> None:
    assert unet.config.in_channels == 4
    assert unet.config.time_cond_proj_dim is None
    assert unet.config._class_name == "UNet2DConditionModel"
    eager = UNet2DConditionModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), mid_block_type=None, up_block_types=("UpBlock2D",)
    )
    assert set(eager.config) - {"_use_default_values"} <= set(unet.config)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("enable_freeu", (0.9, 0.2, 1.2, 1.4)),
        ("fuse_qkv_projections", ()),
        ("set_attn_processor", (object(),)),
        ("add_adapter", (object(),)),
        ("fuse_lora", ()),
        ("_load_ip_adapter_weights", ([{}],)),
        ("enable_layerwise_casting", ()),
        ("enable_group_offload", (torch.device("cpu"),)),
        ("enable_gradient_checkpointing", ()),
    ],
)
def test_methods_that_need_the_layers_are_refused(unet: UNet, method: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(UserError, match="layers are compiled into engines"):
        getattr(unet, method)(*arguments)


def test_the_empty_attention_processors_can_be_set_again(unet: UNet) -> None:
    unet.set_attn_processor(unet.attn_processors)
    unet.unload_lora()


def test_a_unet_cannot_be_copied(unet: UNet) -> None:
    with pytest.raises(UserError, match="open another UNet"):
        copy.deepcopy(unet)


def test_the_repr_names_engine_device_and_schedule(unet: UNet) -> None:
    unet.set_schedule(Uniform(5, warmup=2))
    assert repr(unet) == "UNet(arithmetic on cpu, torch.float32, Uniform(5, warmup=2), cut='deepcache:0')"
    assert unet.num_parameters() == sum(parameter.numel() for parameter in unet.parameters()) == 0
    assert next(unet.parameters()).device == unet.device


def test_sequential_offloading_finds_nothing_to_offload(unet: UNet) -> None:
    plain = unet(**inputs()).sample
    cpu_offload(unet, torch.device("cpu", 0))
    assert torch.equal(unet(**inputs()).sample, plain)
    assert unet.device == torch.device("cpu")


def test_torch_compile_does_not_trace_the_unet(unet: UNet, pair: ArithmeticPair) -> None:
    unet.set_schedule(Uniform(2))
    compiled = torch.compile(unet, backend="eager")
    calls(compiled, [9, 8, 7])
    assert pair.log == ["full", "deepcache:0", "full"]
