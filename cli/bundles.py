"""Commands on bundles: build, inspect, verify, prune; and doctor, which lists the engines that work here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..engines.builder.request import BuildRequest, Sizes
from .options import Adapters, BundleArgument, Fix, IPAdapters, Json, Loras, Origin, unpack
from .shell import (
    err,
    out,
    parse_dims,
    parse_settings,
    print_bold,
    print_contract,
    print_json,
    quiet_libraries,
    stages,
    steps_bar,
)

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle
    from ..runtime.calibration import Calibration


def _in(panel: str) -> dict[str, Any]:
    return {"rich_help_panel": panel}


_TIME = "Where the time goes"

_REQUEST = {
    "model": typer.Argument(help="Hub id, directory of a diffusers pipeline, or directory of a bare UNet."),
    "cuts": typer.Option("--cut", help="deepcache:K, paper:K or mlperf; repeatable."),
    "engines": typer.Option("--engine", help="auto, or a name that offcut doctor lists; repeatable."),
    "precision": typer.Option(help="fp32, fp16, bf16, int8, or fp8 (TensorRT). All but fp32 can cost image quality."),
    "inference_precision": typer.Option(help="OpenVINO: compute fp32 graphs in bf16. Can cost image quality."),
    "device": typer.Option(help="Device: cpu, or cuda as PyTorch spells it."),
    "opset": typer.Option(help="ONNX opset; by default the one that suits the engine best."),
    "deploy": typer.Option("--deploy", help="Leave the ONNX graphs out; every engine must be a compiled one."),
    "compile_all": typer.Option(
        "--compile-all", help="Build the text encoders and the autoencoder too, without PyTorch weights."
    ),
    "attention": typer.Option(
        help="cross-frame, for Text2Video-Zero: each frame attends to the first. "
        "By default the attention of the model's own pipeline."
    ),
    "revision": typer.Option(help="Branch, tag or commit on the hub."),
    "variant": typer.Option(help="Variant of the weight files, e.g. fp16."),
    "subfolder": typer.Option(help="Subfolder of the UNet inside the model; 'unet' in a pipeline."),
}
_SIZES = {
    "static": typer.Option(metavar="WxH", help="Image size in pixels; repeatable."),
    "dynamic": typer.Option(metavar="MIN..MAX", help="Range of an image's sides in pixels, 256..1024."),
    "max_batch": typer.Option(help="Images per call."),
    "min_shapes": typer.Option(metavar="NAME:AxB,...", help="Smallest input shapes in trtexec's spelling."),
    "opt_shapes": typer.Option(metavar="NAME:AxB,...", help="Input shapes to tune for."),
    "max_shapes": typer.Option(metavar="NAME:AxB,...", help="Largest input shapes."),
}


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration for low precision; None stands for the default of ``offcut.Calibration``."""

    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Calibration prompts, one per line; by default the model's own, or built-in ones."
        ),
    ] = None
    calibration_samples: Annotated[int | None, typer.Option(help="Number of calibration images.")] = None
    calibration_steps: Annotated[int | None, typer.Option(help="Scheduler steps of each calibration image.")] = None
    calibration_interval: Annotated[int | None, typer.Option(help="Full UNet every N calls while calibrating.")] = None
    calibration_size: Annotated[int | None, typer.Option(help="Side of the calibration images in pixels.")] = None
    keep: Annotated[
        tuple[str, ...],
        typer.Option(metavar="PATTERN", help="Layers not to round, e.g. 'mid_block*'; repeatable."),
    ] = ()
    sensitive: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            help="Do not round layers whose signal-to-noise ratio is this far below the median layer's; default 8.",
        ),
    ] = None


@unpack
def build(
    request: Annotated[BuildRequest, _REQUEST],
    sizes: Annotated[Sizes, _SIZES, "Shape profiles"],
    low_precision: Annotated[CalibrationOptions, "Low precision (int8, fp8)"],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle directory; an existing bundle is added to.")],
    fix: Fix = None,
    triton: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write the graphs as Triton models, for onnxruntime or tensorrt."),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="TensorRT-RTX: GPU to build for, e.g. 89 or 120; repeatable.", **_in("Compiled engines")),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="See offcut doctor --settings.", **_in("Compiled engines")),
    ] = None,
    adapter: Adapters = None,
    lora: Loras = None,
    ip_adapter: IPAdapters = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Export again, even if the user's cache directory has the same export.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle: export, cut, compile, and verify each engine against PyTorch or the foreign ONNX."""
    from ..engines.builder.build import build_bundle
    from ..exporter.ip_adapter import IPAdapter
    from ..exporter.lora import ScaledLora

    settings = parse_settings(setting or [], list(request.engines))
    if compute_capability:
        settings.setdefault("tensorrt-rtx", {})["compute_capabilities"] = tuple(compute_capability)
    request = replace(
        request,
        dims=parse_dims(fix),
        profiles=sizes,
        settings=settings,
        loras=tuple(map(ScaledLora.parse, lora or ())),
        ip_adapters=tuple(map(IPAdapter.parse, ip_adapter or ())),
        adapters=tuple(adapter) if adapter else None,
        calibration=_calibration(request.precision, low_precision),
        cache=not no_cache,
    )
    with stages() as stage:
        bundle = build_bundle(request, output, stage)
        if triton is not None:
            stage("write the models for Triton")
            _write_triton(bundle, triton, output, request.device)
    _print_bundle(bundle, as_json)


def _calibration(precision: str, options: CalibrationOptions) -> Calibration | None:
    """Return the calibration of a low precision; None for the other precisions, which take no calibration options."""
    from ..engines.precision import LOW_PRECISIONS
    from ..runtime.calibration import Calibration
    from ..runtime.prompts import read_prompts

    fields: dict[str, Any] = {
        "prompts": read_prompts(options.calibrate) if options.calibrate else None,
        "samples": options.calibration_samples,
        "steps": options.calibration_steps,
        "interval": options.calibration_interval,
        "size": options.calibration_size,
        "keep": options.keep or None,
        "sensitive": options.sensitive,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if precision not in LOW_PRECISIONS:
        if fields:
            raise typer.BadParameter(f"{precision} is not calibrated: leave the calibration out, or write int8")
        return None
    if fields.get("prompts"):
        fields.setdefault("samples", len(fields["prompts"]))
    return Calibration(**fields)


def _write_triton(bundle: Bundle, folder: Path, output: Path, device: str) -> None:
    from ..engines.builder.triton import BACKENDS, write_repository
    from ..errors import UserError

    built = {entry.engine for entry in bundle.manifest.engines.values()}
    engine = next((name for name in reversed(BACKENDS) if name in built), "")
    if not engine:
        raise UserError(f"Triton runs none of this bundle's engines: add --engine {' or '.join(BACKENDS)}")
    name = output.resolve().name.removesuffix(".offcut")
    write_repository(bundle, folder, name=name, engine=engine, device=device)


def inspect(
    bundle: BundleArgument,
    timed: Annotated[
        bool,
        typer.Option("--time", help="Generate an image, and show the time of each component.", **_in(_TIME)),
    ] = False,
    engine: Annotated[str, typer.Option(help="Engine: auto, or one of the bundle's.", **_in(_TIME))] = "auto",
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.", **_in(_TIME))] = "cpu",
    prompt: Annotated[str, typer.Option(help="Prompt of the image.", **_in(_TIME))] = "a lighthouse in a storm",
    steps: Annotated[int, typer.Option(help="Number of scheduler steps.", min=1, **_in(_TIME))] = 20,
    interval: Annotated[int, typer.Option(help="Full UNet every N calls; 1 is uncached.", min=1, **_in(_TIME))] = 5,
    height: Annotated[int | None, typer.Option(help="Height of the image in pixels.", **_in(_TIME))] = None,
    width: Annotated[int | None, typer.Option(help="Width of the image in pixels.", **_in(_TIME))] = None,
    as_json: Json = False,
) -> None:
    """Show a bundle's model, engines, cuts, inputs, outputs and digest; with --time the time of each component."""
    from ..engines.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    if not timed:
        _print_bundle(opened, as_json)
        return
    from dataclasses import asdict

    from ..runtime.generation.schedule import Uniform
    from ..runtime.images.request import ImageRequest
    from ..runtime.images.timing import time_components
    from ..runtime.pipeline import load

    quiet_libraries()
    with stages() as stage:
        stage("load the bundle")
        pipe = load(opened, engine, device=device)
    request = ImageRequest(prompt, steps=steps, height=height, width=width)
    with steps_bar(steps) as step:
        parts = time_components(pipe, request, Uniform(interval) if interval > 1 else None, on_step=step)
    if as_json:
        print_json({"path": str(opened.path), "digest": opened.digest, "parts": [asdict(part) for part in parts]})
        return
    table = Table("part", "runs in", box=SIMPLE)
    for heading in ("calls", "seconds", "share"):
        table.add_column(heading, justify="right")
    for part in parts:
        table.add_row(part.name, part.runs_in, str(part.calls), f"{part.seconds:.3f}", f"{part.share:.1%}")
    out.print(table)


@unpack
def verify(
    bundle: BundleArgument,
    origin: Annotated[Origin, "Origin of the bundle"],
    device: Annotated[str | None, typer.Option(help="Device: cpu or cuda; by default each engine's own.")] = None,
    as_json: Json = False,
) -> None:
    """Check all digests, and compare each engine with its model and across its cuts; exit 1 if a check fails."""
    from ..engines.builder.verify import verify_bundle

    with stages() as stage:
        results = verify_bundle(origin.open(bundle), stage, device)
    passed = all(check.passed for checks in results.values() for check in checks)
    if as_json:
        rows = [
            {"engine": key, "check": check.name, "error": check.error, "bound": check.bound, "passed": check.passed}
            for key, checks in results.items()
            for check in checks
        ]
        print_json({"passed": passed, "checks": rows})
    else:
        for key, checks in results.items():
            table = Table("check", "difference", "bound", "", title=key, box=SIMPLE, title_justify="left")
            for check in checks:
                sign = ">" if check.at_least else "<="
                mark = Text("ok", "green") if check.passed else Text("FAILED", "bold red")
                table.add_row(check.name, f"{check.error:.2e}", f"{sign} {check.bound:g}", mark)
            out.print(table)
    if not passed:
        raise typer.Exit(1)


def prune(
    bundle: BundleArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove builds that the manifest does not name, e.g. leftovers of a killed build. Your own files stay."""
    from ..engines.bundle.store import prune as run_prune

    pruned = run_prune(bundle, dry_run)
    if as_json:
        print_json({"files": pruned.files, "bytes": pruned.bytes, "left": pruned.left})
        return
    for name in pruned.files:
        out.print(name, highlight=False)
    if pruned.left:
        err.print(f"{len(pruned.left)} other files were left, e.g. {pruned.left[0]}", highlight=False)
    out.print(f"{'would free' if dry_run else 'freed'} {pruned.bytes / 2**20:.1f} MiB in {len(pruned.files)} files")


def doctor(
    settings: Annotated[bool, typer.Option("--settings", help="Also list each engine's settings for --set.")] = False,
    as_json: Json = False,
) -> None:
    """Show which engines work on this machine, and why others do not."""
    from ..engines.registry import compiler, machine, probe_all

    with stages() as stage:
        stage("look at the engines")
        facts, probes = machine(), probe_all()
    settings_by_engine = {name: dict(module.SETTINGS) if (module := compiler(name)) else {} for name in probes}
    if as_json:
        engines = {
            name: {
                "usable": probe.usable,
                "builds": probe.usable or probe.builds,
                "version": probe.version,
                "devices": probe.devices,
                "targets": dict(probe.targets),
                "reason": probe.reason,
                "settings": settings_by_engine[name],
            }
            for name, probe in probes.items()
        }
        print_json({**facts, "engines": engines})
        return
    for name, fact in facts.items():
        out.print(f"{name}: {fact}", highlight=False)
    table = Table("engine", "usable", "version", "devices", "found", box=SIMPLE)
    for name, probe in probes.items():
        mark = Text("yes", "green") if probe.usable else Text("builds", "yellow") if probe.builds else Text("no", "red")
        table.add_row(name, mark, probe.version or "", ", ".join(probe.devices), escape(probe.reason))
    out.print(table)
    if settings:
        for name, values in settings_by_engine.items():
            for setting, value in values.items():
                default = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value).lower()
                out.print(f"--set {name}.{setting}={default}", highlight=False)


def _print_schedule(bundle: Bundle, name: str) -> None:
    from ..runtime.tuning.artifact import Tuned

    document = Tuned.load(bundle, name).document
    key, result = document.key, document.measured[0]
    low, high = key.guidance
    scales = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    cuts = " and ".join(document.used_cuts) or document.cut
    print_bold(
        f"schedule {name}",
        f": {key.scheduler}, {key.steps} steps, guidance {scales}, {cuts}: "
        f"{result.full_calls} full calls, UNet {result.speed_up:.2f}x, {result.psnr:.1f} dB",
    )


def _print_bundle(bundle: Bundle, as_json: bool) -> None:
    manifest = bundle.manifest
    if as_json:
        print_json({"path": str(bundle.path), "digest": bundle.digest, **manifest.model_dump(mode="json")})
        return
    total = sum(entry.size for entry in manifest.files.values())
    print_bold(
        bundle.path,
        f": {manifest.source.model}, {manifest.pipeline or 'UNet only'}, {total / 2**20:.0f} MiB",
    )
    if manifest.source.onnx:
        out.print("  from foreign ONNX", highlight=False)
    for lora in manifest.source.loras:
        out.print(f"  with the LoRA {lora.name} at {lora.scale:g}", highlight=False)
    table = Table(box=SIMPLE)
    table.add_column("engine", no_wrap=True)
    for heading in ("version", "graphs", "computes in", "cuts"):
        table.add_column(heading)
    for entry in manifest.engines.values():
        precision = manifest.variants[entry.variant].precision
        table.add_row(
            entry.key, entry.version, entry.variant, entry.inference_precision or precision, " ".join(entry.cuts)
        )
    out.print(table)
    for variant in manifest.variants.values():
        cached = {tensor.name: tensor for cut in variant.cuts for tensor in cut.cached}
        print_bold(variant.name)
        if rounded := variant.quantization:
            out.print(
                f"  {rounded.rounded} layers rounded, {len(rounded.kept)} kept in {rounded.base}", highlight=False
            )
        print_contract(
            {
                "inputs": {tensor.name: tensor.spec() for tensor in variant.inputs},
                "outputs": {t.name: t.spec() for t in (variant.noise_pred, *cached.values())},
            }
        )
    for name in manifest.schedules:
        _print_schedule(bundle, name)
    out.print(f"digest {bundle.digest}", highlight=False)
