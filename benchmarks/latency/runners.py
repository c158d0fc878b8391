"""Open contestants: an engine or a peer in a diffusers pipeline, ready to run the denoising loop."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...engines.base import EngineOptions
from ...engines.bundle.bundle import Bundle, open_entry
from ...exporter.load import load_unet, locate
from ...exporter.trace.export import SAMPLE
from ...runtime.generation.features import CachedFeatures, CallPart, FeatureBuffers
from ...runtime.generation.forecast import Coefficients, Forecast
from ...runtime.generation.schedule import parse
from ...runtime.pipeline import attach
from ...runtime.text_to_image import scheduler_named
from ...runtime.unet import UNet
from ..turns import Clock, LoopRunner, Marks, mark_calls
from .case import Case, Entrant
from .contestants import branch_of, interval_of
from .loop import build_pipeline, denoise, read_inputs


@dataclass
class SharedParts:
    """Objects that the contestants of a process share; each is created once."""

    case: Case
    _parts: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the object with this name; the first call creates it with ``make``."""
        if name not in self._parts:
            began = time.perf_counter()
            part = make()
            self._parts[name] = part, time.perf_counter() - began
        return self._parts[name][0]

    @property
    def bundle(self) -> Bundle:
        bundle = self.get("bundle", partial(Bundle.open, self.case.bundle))
        assert isinstance(bundle, Bundle)
        return bundle

    @property
    def seconds(self) -> float:
        """Seconds that the creation of all objects has taken so far."""
        return sum(seconds for _, seconds in self._parts.values())


class PipelineRunner(LoopRunner):
    """A diffusers pipeline whose UNet's calls are marked.

    Attributes:
        pipe: the pipeline.
        dtype: dtype of the latents.
    """

    def __init__(self, pipe: Any, marks: Marks, dtype: torch.dtype, case: Case) -> None:
        self.pipe, self.marks, self.dtype = pipe, marks, dtype
        self._case = case
        self._inputs = read_inputs(case, dtype)

    def loop(self, calls: int | None = None) -> torch.Tensor:
        """Run the loop inside a turn, and return the latents; ``calls`` limits the number of steps."""
        return torch.as_tensor(denoise(self.pipe, self._case, self._inputs, calls=calls))

    @abstractmethod
    def call_alone(self, full: bool) -> Callable[[], object] | None:
        """Return a function that repeats the UNet's last full or shallow call inside a turn, or None without one."""

    def forecast(self) -> Callable[[], object] | None:
        """Return a function that does what a forecast adds to a full and a shallow call; None without forecasts."""
        return None


class OffcutRunner(PipelineRunner):
    """An engine of the bundle, with caching or with only full calls."""

    def __init__(
        self, pipe: Any, marks: Marks, unet: UNet, features: tuple[str, ...], case: Case, cached: bool
    ) -> None:
        super().__init__(pipe, marks, unet.dtype, case)
        self._unet, self._features = unet, features
        self._schedule = parse(case.schedule) if cached else None
        self._cut = case.cut if cached else None

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._unet.set_schedule(self._schedule, cut=self._cut)
        yield

    def call_alone(self, full: bool) -> Callable[[], object] | None:
        bound = self._unet.bound
        if bound is None or (not full and self._cut is None):
            return None
        return bound.full if full else partial(bound.shallow, self._cut or "")

    def forecast(self) -> Callable[[], object] | None:
        bound = self._unet.bound
        if bound is None or self._cut is None:
            return None
        features = CachedFeatures(_ChannelForecast({name: bound.buffers[name] for name in self._features}))
        features.allocate(bound, self._features)
        buffers, rows = FeatureBuffers(in_place=True), bound.buffers[SAMPLE].shape[0]

        def record_and_predict() -> None:
            buffers.record_full(bound, [CallPart(features, 0, rows)], rows, self._features)
            buffers.fill(bound, [CallPart(features, 1, rows)], rows, self._features)

        return record_and_predict


class _ChannelForecast(Forecast):
    """A linear extrapolation with damping 0.5 and coefficients for feature channel, as ``offcut tune`` fits them."""

    def __init__(self, features: Mapping[str, torch.Tensor]) -> None:
        self._coefficients = {
            name: Coefficients(*(feature.new_full(feature.shape[1:2], value) for value in (1.0, 0.5, 0.0)))
            for name, feature in features.items()
        }

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients:
        return self._coefficients[feature]


class PeerRunner(PipelineRunner):
    """A peer's UNet, whose calls are marked as the pipeline makes them.

    Args:
        is_full: returns whether a call of the loop, counted from 0, is full.

    Attributes:
        enabled: returns a context in which the peer's caching is enabled; None if nothing has to be enabled.
    """

    def __init__(
        self,
        pipe: Any,
        marks: Marks,
        dtype: torch.dtype,
        case: Case,
        is_full: Callable[[int], bool] = lambda call: True,
    ) -> None:
        super().__init__(pipe, marks, dtype, case)
        self._is_full = is_full
        self.enabled: Callable[[], Any] | None = None
        self._call = 0
        self._latest: dict[bool, Callable[[], Any]] = {}
        self._interceptor = _intercept_calls(pipe.unet)

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._call = 0
        self._interceptor.listener = self._mark
        try:
            if self.enabled is None:
                yield
            else:
                with self.enabled():
                    yield
        finally:
            self._interceptor.listener = None

    def call_alone(self, full: bool) -> Callable[[], object] | None:
        return self._latest.get(full)

    def _mark(self, call: Callable[[], Any]) -> Any:
        full = self._is_full(self._call)
        self._call += 1
        self._latest[full] = call
        output: list[Any] = []
        self.marks.around(lambda: output.append(call()), self.marks.full if full else self.marks.shallow)
        return output[0]


@dataclass
class _CallInterceptor:
    """Holder of the function that makes a UNet's calls; None lets the UNet make them itself."""

    listener: Callable[[Callable[[], Any]], Any] | None = None


def _intercept_calls(unet: Any) -> _CallInterceptor:
    """Replace a UNet's class by a subclass whose ``__call__`` an interceptor can handle; return the interceptor."""
    kind = type(unet)
    if hasattr(kind, "offcut_interceptor"):
        interceptor = kind.offcut_interceptor
        assert isinstance(interceptor, _CallInterceptor)
        return interceptor
    interceptor = _CallInterceptor()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = partial(kind.__call__, self, *args, **kwargs)
        return original() if interceptor.listener is None else interceptor.listener(original)

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    subclass = type(kind.__name__, (kind,), {**names, "__call__": call, "offcut_interceptor": interceptor})
    object.__setattr__(
        unet, "__class__", subclass
    )  # torch.compile's wrapper would set the attribute of the wrapped module
    return interceptor


def open_offcut(entrant: Entrant, shared: SharedParts) -> PipelineRunner:
    """Open an engine of the bundle; the cached and the uncached contestant share the open pair."""
    case, bundle = shared.case, shared.bundle
    assert entrant.build is not None

    def open_unet() -> tuple[UNet, Marks, tuple[str, ...]]:
        entry = bundle.manifest.engines[entrant.build or ""]
        # Shallow graphs of other cuts would waste memory. The full graph writes the features of all cuts.
        entry = entry.model_copy(update={"shallow": {case.cut: entry.shallow[case.cut]}})
        options = EngineOptions(case.device, case.threads, inference_precision=entry.inference_precision)
        pair, marks = open_entry(bundle, entry, options), Marks(Clock(case.device))
        mark_calls(pair, marks)
        return UNet(pair, bundle.unet_config), marks, pair.cuts[case.cut]

    unet, marks, features = shared.get("engine", open_unet)
    pipe = build_pipeline(case, bundle, unet)
    return OffcutRunner(attach(pipe.to(unet.device), unet), marks, unet, features, case, entrant.cached)


def open_eager(entrant: Entrant, shared: SharedParts) -> PipelineRunner:
    """Open eager diffusers with the entrant's settings."""
    return _peer(shared, _eager_unet(entrant, shared))


def open_deepcache(entrant: Entrant, shared: SharedParts) -> PipelineRunner:
    """Open DeepCache's own helper around the same eager UNet, which is restored after each turn."""
    runner = _peer(shared, _eager_unet(entrant, shared), is_full=_helper_is_full(shared))
    helper = _helper(shared, runner)

    @contextmanager
    def enabled() -> Iterator[None]:
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    runner.enabled = enabled
    return runner


def open_compiled(entrant: Entrant, shared: SharedParts) -> PipelineRunner:
    """Open the UNet compiled as a whole by ``torch.compile``, for the shape of the run."""
    return _peer(shared, torch.compile(_torch_unet(entrant, shared), fullgraph=True, dynamic=False))


def open_deepcache_compiled(entrant: Entrant, shared: SharedParts) -> PipelineRunner:
    """Open DeepCache's helper around a compiled UNet; PyTorch recompiles the UNet for each path in the helper."""
    # dynamic=False would compile the UNet for each step, because the helper's code reads the step number.
    runner = _peer(shared, torch.compile(_torch_unet(entrant, shared)), is_full=_helper_is_full(shared))
    _helper(shared, runner).enable()  # never disabled: a change of the helper's hooks discards the compiled code
    return runner


def open_deepcache_regional(entrant: Entrant, shared: SharedParts) -> PipelineRunner:
    """Open DeepCache's helper around a UNet with compiled repeated blocks, which lie below the helper's hooks."""
    unet = _torch_unet(entrant, shared)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    runner = _peer(shared, unet, is_full=_helper_is_full(shared))
    _helper(shared, runner).enable()
    return runner


def open_optimum(entrant: Entrant, shared: SharedParts) -> PipelineRunner:
    """Open optimum's ONNX Runtime pipeline; optimum exports the pipeline first if the directory is empty."""
    import onnxruntime
    from optimum.onnxruntime import ORTPipelineForText2Image

    case = shared.case
    folder = Path(case.optimum)
    if not (folder / "model_index.json").is_file():
        export_with_optimum(case.model or "", folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 3
    provider = "CUDAExecutionProvider" if case.device.startswith("cuda") else "CPUExecutionProvider"
    pipe = shared.get(
        "optimum",
        lambda: ORTPipelineForText2Image.from_pretrained(folder, provider=provider, session_options=options),
    )
    pipe.scheduler = scheduler_named(pipe.scheduler, case.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return PeerRunner(pipe, Marks(Clock(case.device)), torch.float32, case)


def export_with_optimum(model: str, folder: Path) -> None:
    """Export optimum's ONNX pipeline; the directory appears once the export is complete."""
    from optimum.exporters.onnx import main_export

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    main_export(model, unfinished, task="text-to-image", do_validation=False, local_files_only=True)
    unfinished.rename(folder)


KINDS: dict[str, Callable[[Entrant, SharedParts], PipelineRunner]] = {
    "offcut": open_offcut,
    "eager": open_eager,
    "deepcache": open_deepcache,
    "compiled": open_compiled,
    "deepcache-compiled": open_deepcache_compiled,
    "deepcache-regional": open_deepcache_regional,
    "optimum": open_optimum,
}


def _torch_unet(entrant: Entrant, shared: SharedParts) -> Any:
    """Return diffusers' UNet with the weights that the bundle was built from, in the entrant's precision."""
    case = shared.case
    assert case.model is not None
    unet: Any = load_unet(locate(case.model, variant=shared.bundle.manifest.source.variant), entrant.precision)
    layout = torch.channels_last if entrant.settings.get("memory format") == "channels_last" else None
    return unet.to(case.device) if layout is None else unet.to(case.device, memory_format=layout)


def _eager_unet(entrant: Entrant, shared: SharedParts) -> Any:
    return shared.get("unet", partial(_torch_unet, entrant, shared))


def _peer(shared: SharedParts, unet: Any, **options: Any) -> PeerRunner:
    case = shared.case
    pipe = build_pipeline(case, shared.bundle, unet).to(case.device)
    return PeerRunner(pipe, Marks(Clock(case.device)), unet.dtype, case, **options)


def _helper(shared: SharedParts, runner: PeerRunner) -> Any:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=runner.pipe)
    helper.set_params(cache_interval=interval_of(shared.case.schedule), cache_branch_id=branch_of(shared.case.cut))
    return helper


def _helper_is_full(shared: SharedParts) -> Callable[[int], bool]:
    interval = interval_of(shared.case.schedule)
    return lambda call: call % interval == 0
