"""How each kind of contestant is opened and made ready for its turn, inside the process of its house."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
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
from ...runtime.generation.forecast import Coefficients, Forecast, History
from ...runtime.generation.schedule import parse
from ...runtime.pipeline import attach
from ...runtime.text_to_image import scheduler_named
from ...runtime.unet import UNet
from .case import Case, Entrant
from .clock import Clock, Marks, TimedPair
from .contestants import branch_of, interval_of
from .loop import build_pipeline


@dataclass
class Shared:
    """What the contestants of a house have in common: each thing is made once, and its seconds are remembered."""

    case: Case
    made: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.made:
            began = time.perf_counter()
            made = make()
            self.made[name] = made, time.perf_counter() - began
        return self.made[name][0]

    @property
    def bundle(self) -> Bundle:
        bundle = self.get("bundle", partial(Bundle.open, self.case.bundle))
        assert isinstance(bundle, Bundle)
        return bundle

    @property
    def seconds(self) -> float:
        """To make all that was made so far."""
        return sum(seconds for _, seconds in self.made.values())


class Runner(ABC):
    """A contestant that is open: a pipeline, its UNet's calls marked.

    Attributes:
        pipe: the diffusers pipeline.
        marks: of the calls made in a turn, while they are on.
        dtype: of the latents.
    """

    def __init__(self, pipe: Any, marks: Marks, dtype: torch.dtype) -> None:
        self.pipe, self.marks, self.dtype = pipe, marks, dtype

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The house's model is in this contestant's state inside, and nobody's outside."""
        yield

    @abstractmethod
    def call_alone(self, full: bool) -> Callable[[], object] | None:
        """The UNet's latest full or shallow call, to be repeated; None if there was none. Call it inside a turn."""

    def forecast(self) -> Callable[[], object] | None:
        """What a forecast adds to a full and a shallow call, to be repeated after them; None where it cannot."""
        return None


class OffcutRunner(Runner):
    """A bundle's engine, cached or with every call full."""

    def __init__(self, pipe: Any, pair: TimedPair, unet: UNet, case: Case, cached: bool) -> None:
        super().__init__(pipe, pair.marks, unet.dtype)
        self._unet, self._features = unet, pair.cuts[case.cut]
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
        history = History(_PerChannel({name: bound.buffers[name] for name in self._features}), self._features)

        def keep_and_predict() -> None:
            history.keep(bound, 0)
            history.predict(bound, 1)

        return keep_and_predict


class _PerChannel(Forecast):
    """Half of an extrapolation, with a number for each channel of each feature: what ``offcut tune`` fits, in shape."""

    def __init__(self, features: Mapping[str, torch.Tensor]) -> None:
        self._coefficients = {
            name: Coefficients(*(each.new_full(each.shape[1:2], value) for value in (1.0, 0.5, 0.0)))
            for name, each in features.items()
        }

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients:
        return self._coefficients[feature]


class PeerRunner(Runner):
    """A UNet of somebody else's, whose calls are marked as they come from the pipeline.

    Args:
        is_full: says of a loop's call, counted from 0, whether it recomputes everything.
    """

    def __init__(
        self,
        pipe: Any,
        marks: Marks,
        dtype: torch.dtype,
        is_full: Callable[[int], bool] = lambda call: True,
    ) -> None:
        super().__init__(pipe, marks, dtype)
        self._is_full = is_full
        self.entered: Callable[[], Any] | None = None
        """Puts the model into this contestant's state, and back."""
        self._call = 0
        self._latest: dict[bool, Callable[[], Any]] = {}
        self._ear = _ear(pipe.unet)

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._call = 0
        self._ear.listener = self._listen
        try:
            if self.entered is None:
                yield
            else:
                with self.entered():
                    yield
        finally:
            self._ear.listener = None

    def call_alone(self, full: bool) -> Callable[[], object] | None:
        return self._latest.get(full)

    def _listen(self, call: Callable[[], Any]) -> Any:
        full = self._is_full(self._call)
        self._call += 1
        self._latest[full] = call
        answer: list[Any] = []
        self.marks.around(lambda: answer.append(call()), self.marks.full if full else self.marks.shallow)
        return answer[0]


@dataclass
class _Ear:
    """Who hears of a UNet's calls."""

    listener: Callable[[Callable[[], Any]], Any] | None = None


def _ear(unet: Any) -> _Ear:
    """Let someone make a UNet's calls in its place; Python looks a call up in the object's class."""
    kind = type(unet)
    if hasattr(kind, "offcut_ear"):
        ear = kind.offcut_ear
        assert isinstance(ear, _Ear)
        return ear
    ear = _Ear()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = partial(kind.__call__, self, *args, **kwargs)
        return made() if ear.listener is None else ear.listener(made)

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    listening = type(kind.__name__, (kind,), {**names, "__call__": call, "offcut_ear": ear})
    object.__setattr__(unet, "__class__", listening)  # torch.compile's wrapper passes attributes on to what it wraps
    return ear


def open_offcut(entrant: Entrant, shared: Shared) -> Runner:
    """One of the bundle's engines; cached and uncached share the open pair."""
    case, bundle = shared.case, shared.bundle
    assert entrant.build is not None

    def open_unet() -> tuple[UNet, TimedPair]:
        entry = bundle.manifest.engines[entrant.build or ""]
        # The other cuts' shallow graphs would only take memory; the full graph writes their features all the same.
        entry = entry.model_copy(update={"shallow": {case.cut: entry.shallow[case.cut]}})
        options = EngineOptions(case.device, case.threads, inference_precision=entry.inference_precision)
        pair = TimedPair(open_entry(bundle, entry, options), Marks(Clock(case.device)))
        return UNet(pair, bundle.unet_config), pair

    unet, pair = shared.get("engine", open_unet)
    pipe = build_pipeline(case, bundle, unet, unet.dtype)
    return OffcutRunner(attach(pipe.to(unet.device), unet), pair, unet, case, entrant.cached)


def open_eager(entrant: Entrant, shared: Shared) -> Runner:
    """diffusers as it comes, with the settings that the catalogue wrote down."""
    return _peer(shared, _eager_unet(entrant, shared))


def open_deepcache(entrant: Entrant, shared: Shared) -> Runner:
    """DeepCache's own helper around the same eager UNet, which it leaves as it was after each turn."""
    runner = _peer(shared, _eager_unet(entrant, shared), is_full=_helper_is_full(shared))
    helper = _helper(shared, runner)

    @contextmanager
    def enabled() -> Iterator[None]:
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    runner.entered = enabled
    return runner


def open_compiled(entrant: Entrant, shared: Shared) -> Runner:
    """``torch.compile`` of the whole UNet, for the one shape that comes."""
    unet = torch.compile(_torch_unet(entrant, shared), fullgraph=True, dynamic=False)
    return _peer(shared, unet)


def open_deepcache_compiled(entrant: Entrant, shared: Shared) -> Runner:
    """DeepCache's helper around a UNet compiled whole; PyTorch compiles it again for each way through the helper."""
    # dynamic=False would compile it once for each step, whose number the helper's code reads.
    runner = _peer(shared, torch.compile(_torch_unet(entrant, shared)), is_full=_helper_is_full(shared))
    _helper(shared, runner).enable()  # and left on: what is compiled is lost when its hooks change
    return runner


def open_deepcache_regional(entrant: Entrant, shared: Shared) -> Runner:
    """DeepCache's helper around a UNet whose repeated blocks are compiled one by one, below what the helper wraps."""
    unet = _torch_unet(entrant, shared)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    runner = _peer(shared, unet, is_full=_helper_is_full(shared))
    _helper(shared, runner).enable()
    return runner


def open_optimum(entrant: Entrant, shared: Shared) -> Runner:
    """optimum's ONNX Runtime pipeline, exported by optimum itself if it is not yet."""
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
    return PeerRunner(pipe, Marks(Clock(case.device)), torch.float32)


def export_with_optimum(model: str, folder: Path) -> None:
    """Write optimum's ONNX pipeline; the folder is there only once it is whole."""
    from optimum.exporters.onnx import main_export

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    main_export(model, unfinished, task="text-to-image", do_validation=False, local_files_only=True)
    unfinished.rename(folder)


KINDS: dict[str, Callable[[Entrant, Shared], Runner]] = {
    "offcut": open_offcut,
    "eager": open_eager,
    "deepcache": open_deepcache,
    "compiled": open_compiled,
    "deepcache-compiled": open_deepcache_compiled,
    "deepcache-regional": open_deepcache_regional,
    "optimum": open_optimum,
}


def _torch_unet(entrant: Entrant, shared: Shared) -> Any:
    """diffusers' UNet with the weights that the bundle was built from, in the entrant's precision."""
    case = shared.case
    assert case.model is not None
    unet: Any = load_unet(locate(case.model, variant=shared.bundle.manifest.source.variant), entrant.precision)
    layout = torch.channels_last if entrant.settings.get("memory format") == "channels_last" else None
    return unet.to(case.device) if layout is None else unet.to(case.device, memory_format=layout)


def _eager_unet(entrant: Entrant, shared: Shared) -> Any:
    return shared.get("unet", partial(_torch_unet, entrant, shared))


def _peer(shared: Shared, unet: Any, **how: Any) -> PeerRunner:
    case = shared.case
    pipe = build_pipeline(case, shared.bundle, unet, unet.dtype).to(case.device)
    return PeerRunner(pipe, Marks(Clock(case.device)), unet.dtype, **how)


def _helper(shared: Shared, runner: PeerRunner) -> Any:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=runner.pipe)
    helper.set_params(cache_interval=interval_of(shared.case.schedule), cache_branch_id=branch_of(shared.case.cut))
    return helper


def _helper_is_full(shared: Shared) -> Callable[[int], bool]:
    interval = interval_of(shared.case.schedule)
    return lambda call: call % interval == 0
