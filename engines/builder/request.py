"""What a build was asked for, checked before any work begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import BundleError, CutError, EngineError, ModelError
from ...exporter.cut import CONVENTIONS, is_cut_name
from ...exporter.families import downsampling
from ...exporter.foreign.find import open_original
from ...exporter.foreign.unet import fixed_by
from ...exporter.ip_adapter import IPAdapter
from ...exporter.load import PRECISIONS, ModelSource, locate, read_index
from ...exporter.lora import Scaled, find, read
from ...exporter.quantize.qdq import Scheme
from ..base import Setting, Settings
from ..bundle.bundle import Bundle, devices_of, digest_file
from ..bundle.manifest import MANIFEST_FILE, EngineEntry
from ..bundle.networks import compilable
from ..bundle.pipeline_files import weight_files
from ..bundle.store import LOCK_FILE
from ..precision import bounds
from ..profiles import Profile, trained_side
from ..registry import choose, compiler, engine
from .foreign import check_onnx
from .quantize import Calibrator
from .schemes import LOW_PRECISIONS, scheme_of
from .sizes import Sizes

Progress = Callable[[str], None]

# A pipeline's parts that add to the UNet's skip connections, and the adapters whose inputs they need.
_PARTS = {"controlnet": "controlnet", "adapter": "t2i-adapter"}


@dataclass(frozen=True)
class Plan:
    """What the user asked for, resolved.

    Attributes:
        settings: of each engine, all of its ``SETTINGS``.
        device: that engines are verified on, where they run on it.
        deploy: leave the ONNX graphs and their weights out of the bundle.
        compile_all: export the networks around the UNet too.
        adapters: whose inputs the graphs have.
        scheme, calibrator: how the graphs are rounded, and on what; None where they are not.
        cache: whether an export may come from the user's cache directory and is kept there.
    """

    source: ModelSource
    weights_digest: str
    cuts: tuple[str, ...]
    engines: tuple[str, ...]
    precision: str
    opset: int
    fixed: Mapping[str, int]
    inference_precision: str | None
    profiles: tuple[Profile, ...]
    settings: Mapping[str, Settings]
    device: str
    deploy: bool
    compile_all: bool
    adapters: tuple[str, ...]
    scheme: Scheme | None
    calibrator: Calibrator | None
    cache: bool

    @property
    def base(self) -> str:
        """Precision of what goes in and out of the graphs: theirs, or what surrounds the rounded layers."""
        return self.scheme.base if self.scheme else self.precision

    @property
    def variant(self) -> str:
        fixed = "".join(f"-{name[0]}{size}" for name, size in sorted(self.fixed.items()))
        adapters = "".join(f"-{name}" for name in sorted(self.adapters))
        return f"{self.scheme.label if self.scheme else self.precision}-opset{self.opset}{fixed}{adapters}"

    def recorded(self, name: str) -> dict[str, Setting]:
        """The settings of an engine that decide what is built."""
        compiles = compiler(name)
        helpers = compiles.HELPERS if compiles else frozenset()
        return {setting: value for setting, value in self.settings[name].items() if setting not in helpers}

    def device_for(self, entry: EngineEntry) -> str | None:
        """What to verify an engine on: the device asked for, or another that it runs on; None if none is here."""
        fitting = devices_of(entry)
        if self.device.partition(":")[0] in fitting:
            return self.device
        return fitting[0] if fitting else None


def make_plan(
    model: str | Path,
    *,
    cuts: Sequence[str],
    engines: str | Sequence[str],
    precision: str,
    inference_precision: str | None,
    opset: int | None,
    dims: Mapping[str, int] | None,
    profiles: Sequence[Profile] | Sizes,
    settings: Mapping[str, Settings] | None,
    deploy: bool,
    compile_all: bool,
    device: str,
    revision: str | None,
    variant: str | None,
    subfolder: str | None,
    adapters: Sequence[str] | None,
    loras: Mapping[str | Path, float],
    ip_adapters: Sequence[IPAdapter],
    attention: str | None,
    calibrator: Calibrator | None,
    cache: bool,
    progress: Progress,
) -> Plan:
    """Resolve and check what ``build`` was asked for; its arguments, and what it raises."""
    names = []
    for name in [engines] if isinstance(engines, str) else engines:
        if name == "auto":
            choice = choose(device)
            progress(f"engine {choice.name}: {choice.reason}")
            name = choice.name
        names.append(name)
        _check_engine(name, precision, inference_precision, device, deploy)
    if not names:
        raise EngineError("no engine was named: write auto, or see offcut doctor")
    if not cuts:
        raise CutError(f"no cut was named: write {CONVENTIONS}")
    cuts = [cuts] if isinstance(cuts, str) else cuts
    for cut in cuts:
        if not is_cut_name(cut):
            raise CutError(f"{cut!r} is no name of a cut: write {CONVENTIONS}")
    if profiles and not any(compiler(name) for name in names):
        raise EngineError(f"{names[0]} takes every size, so it needs no profile: leave the sizes out")
    scheme = _scheme(names, precision, calibrator)
    wanted = [Scaled(Path(path), float(scale)) for path, scale in loras.items()]
    source = locate(
        model,
        revision=revision,
        variant=variant,
        subfolder=subfolder,
        loras=wanted,
        ip_adapters=ip_adapters,
        attention=attention,
    )
    graph = None
    if source.onnx:
        graph = check_onnx(source, names, scheme, opset, precision, adapters=adapters, attention=attention)
        compile_all = compile_all or bool(compilable(source))
    for each in wanted:
        if (left := read(each.path, source.config).text_encoder) and not source.is_pipeline:
            progress(f"{each.path.name} has {left} layers of a text encoder, which are left out: a UNet has none")
    _check_video(source, precision if scheme else None)
    if compile_all and not compilable(source):
        raise ModelError(f"{model} has no networks around its UNet that offcut can compile: leave --compile-all out")
    taken = tuple(dict.fromkeys(_adapters_of(source) if adapters is None else adapters))
    if taken and scheme:
        raise EngineError(f"{precision} is calibrated without adapters: build {', '.join(taken)} in fp32, fp16 or bf16")
    if ip_adapters and scheme:
        raise EngineError(f"{precision} is calibrated without images: build IP-Adapters in fp32, fp16 or bf16")
    fixed = (fixed_by(graph, source) if graph else {}) | dict(dims or {})
    return Plan(
        source=source,
        weights_digest=weights_digest(source),
        cuts=tuple(dict.fromkeys(cuts)),
        engines=tuple(dict.fromkeys(names)),
        precision=precision,
        opset=graph.opset if graph else opset or engine(names[0]).default_opset,
        fixed=fixed,
        inference_precision=None if inference_precision == precision else inference_precision,
        profiles=_profiles(source, scheme.base if scheme else precision, taken, fixed, profiles),
        settings=_settings(names, settings or {}),
        device=device,
        deploy=deploy,
        compile_all=compile_all,
        adapters=taken,
        scheme=scheme,
        calibrator=calibrator if scheme else None,
        cache=cache,
    )


def _check_video(source: ModelSource, low_precision: str | None) -> None:
    """Refuse what cannot be done with videos: calibration, and an AnimateDiff pipeline whose UNet has no motion yet."""
    if (source.family.is_video or source.attention) and low_precision:
        raise EngineError(f"{low_precision} is calibrated on images: build a UNet for videos in fp32, fp16 or bf16")
    if not source.is_pipeline or source.family.is_video:
        return
    if read_index(source.root).get("motion_adapter", [None])[0] is not None:
        raise ModelError(
            f"{source.name} keeps its motion adapter apart from its UNet, and diffusers joins them when it loads them: "
            "load it with diffusers, save it with save_pretrained, and build from that"
        )


def _scheme(names: Sequence[str], precision: str, calibrator: Calibrator | None) -> Scheme | None:
    """How the graphs are rounded; the engines of one build share them."""
    schemes = list(dict.fromkeys(scheme_of(name, precision) for name in names))
    if len(schemes) > 1:
        raise EngineError(
            f"{' and '.join(names)} take {precision} graphs of different kinds: build them one after the other"
        )
    if precision in LOW_PRECISIONS and calibrator is None:
        raise EngineError(f"{precision} needs to know what to calibrate on: pass calibration=offcut.Calibration()")
    return schemes[0]


def weights_digest(source: ModelSource) -> str:
    """A digest of the UNet's weights as the user gave them, and of the LoRAs and IP-Adapters that go into them."""
    files = open_original(source.folder).files if source.onnx else weight_files(source.folder, source.variant)
    parts = [digest_file(file) for file in files]
    parts += [f"{digest_file(find(each.path))}*{each.scale}" for each in source.loras]
    parts += [digest_file(adapter.path) for adapter in source.ip_adapters]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _check_engine(name: str, precision: str, inference_precision: str | None, device: str, deploy: bool) -> None:
    probe = engine(name).probe()
    if not probe.usable and not probe.builds:
        raise EngineError(f"the engine {name} cannot be used here: {probe.reason}")
    if deploy and compiler(name) is None:
        raise EngineError(f"{name} opens the ONNX graphs, which --deploy would leave out: build it without")
    bounds(name, precision, inference_precision, device)


def _profiles(
    source: ModelSource,
    precision: str,
    adapters: Sequence[str],
    fixed: Mapping[str, int],
    wanted: Sequence[Profile] | Sizes,
) -> tuple[Profile, ...]:
    if not isinstance(wanted, Sizes):
        return tuple(wanted)
    specs = source.family.specs(source.config, PRECISIONS[precision], adapters)
    inputs = {spec.name: spec.fixed(fixed) for spec in specs}
    native = trained_side(source.config.get("sample_size"))
    frames = source.family.trained_frames(source.config)
    return wanted.profiles(inputs, multiple=downsampling(source.config), native=native, frames=frames)


def _adapters_of(source: ModelSource) -> list[str]:
    """The adapters that the model's own pipeline has."""
    if not source.is_pipeline:
        return []
    parts = read_index(source.root)
    return [adapter for part, adapter in _PARTS.items() if parts.get(part, [None])[0] is not None]


def _settings(names: Sequence[str], given: Mapping[str, Settings]) -> dict[str, Settings]:
    """Each engine's settings, its defaults for those that were not given."""
    if idle := sorted(set(given) - set(names)):
        raise EngineError(f"settings were given for {', '.join(idle)}, which is not built: name it with engine=")
    complete: dict[str, Settings] = {}
    for name in names:
        compiles = compiler(name)
        known = compiles.SETTINGS if compiles else {}
        if unknown := sorted(set(given.get(name, {})) - set(known)):
            there = ", ".join(known) or "none: it opens the ONNX graphs as they are"
            raise EngineError(f"{name} has no setting {', '.join(unknown)}; it has {there}")
        complete[name] = {**known, **given.get(name, {})}
    return complete


def check_target(out: Path, plan: Plan) -> None:
    """Refuse a directory that holds something else.

    Raises:
        BundleError: it is a file, another model's bundle, or not empty.
    """
    if out.is_file():
        raise BundleError(f"{out} is a file; give a directory for the bundle")
    if not (out / MANIFEST_FILE).exists():
        # With a lock in it, it is what a build left that was killed while it moved its files in.
        unfinished = (out / LOCK_FILE).exists()
        if out.is_dir() and not unfinished and any(not path.name.startswith(".") for path in out.iterdir()):
            raise BundleError(f"{out} is not empty and no bundle; give another directory")
        return
    bundle = Bundle.open(out)
    held, config = bundle.manifest.source, bundle.unet_config
    ours = json.loads(json.dumps(plan.source.config, default=str))
    other = [key for key in config.keys() & ours.keys() if key[0] != "_" and config[key] != ours[key]]
    if other or held.weights_digest != plan.weights_digest:
        fused = " or the same with other LoRAs or IP-Adapters" if held.model == plan.source.name else ""
        raise BundleError(f"{out} holds another model ({held.model}){fused}; give another directory")
    if held.attention != plan.source.attention:
        raise BundleError(
            f"{out} holds this UNet with {held.attention or 'its own'} attention, not "
            f"{plan.source.attention or 'its own'}; give another directory"
        )
