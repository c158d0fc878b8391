"""Resolution of a request into a plan: a build refuses invalid requests here, before any work begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import BundleError, CutError, EngineError, ModelError
from ...exporter.components import exportable
from ...exporter.cut import CONVENTIONS, is_cut_name
from ...exporter.families import downsampling
from ...exporter.foreign.find import ForeignGraph, open_foreign
from ...exporter.foreign.networks import foreign_networks
from ...exporter.foreign.unet import check_precision, fixed_dims
from ...exporter.load import PRECISIONS, ModelSource, locate, read_index
from ...exporter.lora import find, read
from ...exporter.quantize.qdq import Scheme
from ...exporter.weight_files import chosen_variant, weight_files
from ..base import Progress, Setting, Settings
from ..bundle.bundle import Bundle, devices_of, digest_file
from ..bundle.manifest import MANIFEST_FILE, EngineEntry
from ..bundle.pipeline_files import pipeline_files
from ..bundle.store import LOCK_FILE, is_leftover
from ..precision import LOW_PRECISIONS, bounds, scheme_of
from ..profiles import Profile, trained_side
from ..registry import choose, compiler, engine
from .request import BuildRequest, Calibrator, Sizes

# Components of a pipeline that add to the UNet's skip connections, and the adapters whose inputs they need.
_ADAPTER_OF = {"controlnet": "controlnet", "adapter": "t2i-adapter"}
_COMPILABLE = ("text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True)
class BuildPlan:
    """A checked build with every default resolved.

    Attributes:
        source: the model.
        weights_digest: SHA-256 of its weights; see ``weights_digest``.
        precision: precision of the exported graphs.
        fixed: dimensions that the export fixes, with their sizes.
        settings: values of all ``SETTINGS``, by engine.
        device: device to verify engines on, where they run on it.
        deploy: whether to leave the ONNX graphs and their weights out of the bundle.
        compile_all: whether to export the networks around the UNet too.
        adapters: adapters whose inputs the graphs have.
        scheme, calibrator: rounding of the graphs, and the calibration for it; None if they are not rounded.
        cache: whether exports are read from and written to the user's cache directory.
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
        """Precision of the graphs' inputs and outputs, and of layers that are not rounded."""
        return self.scheme.base if self.scheme else self.precision

    @property
    def variant(self) -> str:
        """Name of the variant in the bundle, e.g. ``"fp32-opset23"``."""
        fixed = "".join(f"-{name[0]}{size}" for name, size in sorted(self.fixed.items()))
        adapters = "".join(f"-{name}" for name in sorted(self.adapters))
        return f"{self.scheme.label if self.scheme else self.precision}-opset{self.opset}{fixed}{adapters}"

    def recorded_settings(self, name: str) -> dict[str, Setting]:
        """Return the settings of an engine that decide what is built; the manifest records them."""
        module = compiler(name)
        helpers = module.HELPERS if module else frozenset()
        return {setting: value for setting, value in self.settings[name].items() if setting not in helpers}

    def device_for(self, entry: EngineEntry) -> str | None:
        """Return the device to verify an engine on: the plan's, or another that runs it; None if there is none."""
        devices = devices_of(entry)
        if self.device.partition(":")[0] in devices:
            return self.device
        return devices[0] if devices else None


def resolve(request: BuildRequest, progress: Progress) -> BuildPlan:
    """Check a request and resolve its defaults; ``offcut.build`` lists the errors."""
    engines = _engines(request, progress)
    if not request.cuts:
        raise CutError(f"no cut was named: write {CONVENTIONS}")
    for cut in request.cuts:
        if not is_cut_name(cut):
            raise CutError(f"{cut!r} is not a valid cut name: write {CONVENTIONS}")
    if request.profiles and not any(compiler(name) for name in engines):
        raise EngineError(f"{engines[0]} takes every size, so it needs no profile: leave the sizes out")
    scheme = _scheme(engines, request)
    source = locate(
        request.model,
        revision=request.revision,
        variant=request.variant,
        subfolder=request.subfolder,
        loras=list(request.loras),
        ip_adapters=list(request.ip_adapters),
        attention=request.attention,
    )
    if source.variant is None and not source.onnx and (variant := chosen_variant(source.folder, None)):
        progress(f"{source.name} has its UNet as {variant} only: take these weights, as --variant {variant} does")
    networks = compilable(source)
    foreign = _check_foreign(request, source, engines, scheme, networks) if source.onnx else None
    for lora in request.loras:
        layers = read(lora.path, source.config).text_layer_count
        if layers and not source.is_pipeline:
            progress(f"{lora.path.name} has {layers} layers of a text encoder, which are left out: a UNet has none")
    _check_video(source, request.precision if scheme else None)
    if request.compile_all and not networks:
        raise ModelError(
            f"{request.model} has no networks around its UNet that offcut can compile: leave --compile-all out"
        )
    if source.is_pipeline:
        pipeline_files(source, networks if request.compile_all or source.onnx else ())  # before any long work
    adapters = _adapters_of(source) if request.adapters is None else request.adapters
    adapters = tuple(dict.fromkeys(adapters))
    if scheme and adapters:
        raise EngineError(
            f"{request.precision} is calibrated without adapters: build {', '.join(adapters)} in fp32, fp16 or bf16"
        )
    if scheme and request.ip_adapters:
        raise EngineError(f"{request.precision} is calibrated without images: build IP-Adapters in fp32, fp16 or bf16")
    fixed = (fixed_dims(foreign, source) if foreign else {}) | dict(request.dims)
    inference_precision = request.inference_precision
    return BuildPlan(
        source=source,
        weights_digest=weights_digest(source),
        cuts=tuple(dict.fromkeys(request.cuts)),
        engines=tuple(dict.fromkeys(engines)),
        precision=request.precision,
        opset=foreign.opset if foreign else request.opset or engine(engines[0]).default_opset,
        fixed=fixed,
        inference_precision=None if inference_precision == request.precision else inference_precision,
        profiles=_profiles(source, scheme.base if scheme else request.precision, adapters, fixed, request.profiles),
        settings=_settings(engines, request.settings),
        device=request.device,
        deploy=request.deploy,
        compile_all=request.compile_all or bool(foreign and networks),
        adapters=adapters,
        scheme=scheme,
        calibrator=request.calibration if scheme else None,
        cache=request.cache,
    )


def compilable(source: ModelSource) -> list[str]:
    """Return the components of a pipeline that can be exported; for foreign ONNX those that are ONNX graphs."""
    if source.onnx:
        return foreign_networks(source)
    return [name for name in _COMPILABLE if source.is_pipeline and exportable(source.component(name))]


def weights_digest(source: ModelSource) -> str:
    """Return a digest of the UNet's weights as the user gave them, and of the LoRAs and IP-Adapters in them."""
    files = open_foreign(source.folder).files if source.onnx else weight_files(source.folder, source.variant)
    digests = [digest_file(file) for file in files]
    digests += [f"{digest_file(find(lora.path))}*{lora.scale}" for lora in source.loras]
    digests += [digest_file(adapter.path) for adapter in source.ip_adapters]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def check_target(out: Path, plan: BuildPlan) -> None:
    """Refuse a directory that holds something other than a bundle of the plan's model.

    Raises:
        BundleError: the path is a file, another model's bundle, or a directory with other files.
    """
    if out.is_file():
        raise BundleError(f"{out} is a file; give a directory for the bundle")
    if not (out / MANIFEST_FILE).exists():
        # A lock without a manifest is left by a build that was killed while it moved its files in.
        unfinished = (out / LOCK_FILE).exists()
        others = [path.name for path in out.iterdir() if not is_leftover(path.name)] if out.is_dir() else []
        if others and not unfinished:
            raise BundleError(f"{out} is not a bundle and holds {min(others)}: give a new or an empty directory")
        return
    bundle = Bundle.open(out)
    source, config = bundle.manifest.source, bundle.unet_config
    plan_config = json.loads(json.dumps(plan.source.config, default=str))
    shared_keys = (key for key in config.keys() & plan_config.keys() if key[0] != "_")
    if source.weights_digest != plan.weights_digest or any(config[key] != plan_config[key] for key in shared_keys):
        fused = " or the same with other LoRAs or IP-Adapters" if source.model == plan.source.name else ""
        raise BundleError(f"{out} holds another model ({source.model}){fused}; give another directory")
    if source.attention != plan.source.attention:
        raise BundleError(
            f"{out} holds this UNet with {source.attention or 'its own'} attention, not "
            f"{plan.source.attention or 'its own'}; give another directory"
        )


def _engines(request: BuildRequest, progress: Progress) -> list[str]:
    names = []
    for name in request.engines:
        if name == "auto":
            choice = choose(request.device)
            progress(f"engine {choice.name}: {choice.reason}")
            name = choice.name
        probe = engine(name).probe()
        if not probe.usable and not probe.builds:
            raise EngineError(f"the engine {name} cannot be used here: {probe.reason}")
        if request.deploy and compiler(name) is None:
            raise EngineError(f"{name} opens the ONNX graphs, which --deploy leaves out: build it without")
        bounds(name, request.precision, request.inference_precision, request.device)
        names.append(name)
    if not names:
        raise EngineError("no engine was named: write auto, or see offcut doctor")
    return names


def _scheme(engines: Sequence[str], request: BuildRequest) -> Scheme | None:
    """Return the rounding of the graphs, which all engines of a build share; None if they are not rounded."""
    precision = request.precision
    schemes = list(dict.fromkeys(scheme_of(name, precision) for name in engines))
    if len(schemes) > 1:
        raise EngineError(
            f"{' and '.join(engines)} take {precision} graphs of different kinds: build them one after the other"
        )
    if precision in LOW_PRECISIONS and request.calibration is None:
        raise EngineError(f"{precision} needs calibration: pass calibration=offcut.Calibration()")
    return schemes[0]


def _check_foreign(
    request: BuildRequest, source: ModelSource, engines: Sequence[str], scheme: Scheme | None, networks: Sequence[str]
) -> ForeignGraph:
    """Open a foreign ONNX graph, after refusing options that need PyTorch's weights.

    Args:
        networks: components around the UNet that are ONNX too.

    Raises:
        ModelError: the graph is damaged, or the request needs PyTorch's weights, another precision or another opset.
        EngineError: no engine of the build opens the networks around the UNet.
    """
    impossible = {
        "a LoRA in its weights: give it to offcut run --lora, or to pipe.load_lora_weights": request.loras,
        "an IP-Adapter": request.ip_adapters,
        f"the inputs of {' and '.join(request.adapters or ())}": request.adapters,
        f"{request.attention} attention": request.attention,
        f"{request.precision}, which is calibrated in PyTorch": scheme,
        "graphs for inductor, which PyTorch makes": "inductor" in engines,
    }
    if refused := [feature for feature, requested in impossible.items() if requested]:
        feature, _, remedy = refused[0].partition(": ")
        raise ModelError(
            f"{source.name} holds its UNet as ONNX, without weights for PyTorch, and cannot be given {feature}: "
            + (remedy or "build from the model that it was exported from")
        )
    original = open_foreign(source.folder)
    check_precision(original, request.precision)
    if request.opset not in (None, original.opset):
        raise ModelError(f"{original.path} has opset {original.opset}, not {request.opset}: leave --opset out")
    if networks and all(compiler(name) for name in engines):
        raise EngineError(
            f"{' and '.join(engines)} compiles the UNet only, and {source.name} holds {', '.join(networks)} as ONNX "
            "too: name onnxruntime or openvino as well"
        )
    return original


def _check_video(source: ModelSource, low_precision: str | None) -> None:
    """Refuse calibration on videos, and an AnimateDiff pipeline whose motion adapter is not in its UNet yet."""
    if (source.family.is_video or source.attention) and low_precision:
        raise EngineError(f"{low_precision} is calibrated on images: build a UNet for videos in fp32, fp16 or bf16")
    if not source.is_pipeline or source.family.is_video:
        return
    if read_index(source.root).get("motion_adapter", [None])[0] is not None:
        raise ModelError(
            f"{source.name} keeps its motion adapter apart from its UNet, and diffusers joins them when it loads them: "
            "load it with diffusers, save it with save_pretrained, and build from that"
        )


def _adapters_of(source: ModelSource) -> tuple[str, ...]:
    """Return the adapters that the model's own pipeline has."""
    if not source.is_pipeline:
        return ()
    index = read_index(source.root)
    return tuple(adapter for name, adapter in _ADAPTER_OF.items() if index.get(name, [None])[0] is not None)


def _profiles(
    source: ModelSource,
    precision: str,
    adapters: Sequence[str],
    fixed: Mapping[str, int],
    profiles: tuple[Profile, ...] | Sizes,
) -> tuple[Profile, ...]:
    if not isinstance(profiles, Sizes):
        return profiles
    specs = source.family.specs(source.config, PRECISIONS[precision], adapters)
    inputs = {spec.name: spec.fixed(fixed) for spec in specs}
    native = trained_side(source.config.get("sample_size"))
    frames = source.family.trained_frames(source.config)
    return profiles.profiles(inputs, multiple=downsampling(source.config), native=native, frames=frames)


def _settings(engines: Sequence[str], settings: Mapping[str, Settings]) -> dict[str, Settings]:
    """Return all settings of each engine, with its defaults for those that were not given."""
    if unused := sorted(set(settings) - set(engines)):
        raise EngineError(f"settings were given for {', '.join(unused)}, which is not built: name it with engine=")
    complete: dict[str, Settings] = {}
    for name in engines:
        module = compiler(name)
        defaults = module.SETTINGS if module else {}
        if unknown := sorted(set(settings.get(name, {})) - set(defaults)):
            known = ", ".join(defaults) or "none: it opens the ONNX graphs as they are"
            raise EngineError(f"{name} has no setting {', '.join(unknown)}; it has {known}")
        complete[name] = {**defaults, **settings.get(name, {})}
    return complete
