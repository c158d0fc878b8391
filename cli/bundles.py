"""Commands on bundles: build, inspect, verify, prune; and doctor, which says what can be built here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from .options import (
    Adapters,
    Attention,
    BundleArgument,
    Cuts,
    Device,
    Fix,
    IPAdapters,
    Json,
    Loras,
    Model,
    Opset,
    Revision,
    Subfolder,
    Variant,
)
from .shell import bar, dims_of, loras_of, out, print_contract, print_json, quiet_libraries, settings_of, stages

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle


def _in(panel: str) -> dict[str, Any]:
    return {"rich_help_panel": panel}


_SHAPES = "Shapes of compiled engines (TensorRT)"
_COMPILE = "Compiled engines"
_LOW = "Low precision (int8, fp8)"
_TIME = "Where the time goes"


def build(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle's directory; added to if it is one.")],
    cut: Cuts = None,
    engine: Annotated[list[str] | None, typer.Option(help="auto, or a name; again for several.")] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8 or fp8 (TensorRT). All but fp32 can cost image quality.")
    ] = "fp32",
    inference_precision: Annotated[
        str | None, typer.Option(help="OpenVINO: compute fp32 graphs in bf16. Can cost image quality.")
    ] = None,
    device: Device = "cpu",
    opset: Opset = None,
    fix: Fix = None,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Leave the ONNX graphs out; every engine must be a compiled one.")
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the graphs as models of Triton too, for onnxruntime or tensorrt."),
    ] = None,
    compile_all: Annotated[
        bool, typer.Option("--compile-all", help="Text encoders and autoencoder too; a bundle without PyTorch weights.")
    ] = False,
    static: Annotated[
        list[str] | None, typer.Option(metavar="WxH", help="Image size in pixels; again for several.", **_in(_SHAPES))
    ] = None,
    dynamic: Annotated[
        str | None, typer.Option(metavar="MIN..MAX", help="Sides of an image in pixels, 256..1024.", **_in(_SHAPES))
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Images a call.", **_in(_SHAPES))] = None,
    min_shapes: Annotated[
        str | None, typer.Option(metavar="NAME:AxB,...", help="As trtexec takes them.", **_in(_SHAPES))
    ] = None,
    opt_shapes: Annotated[str | None, typer.Option(metavar="NAME:AxB,...", **_in(_SHAPES))] = None,
    max_shapes: Annotated[str | None, typer.Option(metavar="NAME:AxB,...", **_in(_SHAPES))] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="TensorRT-RTX: GPUs to build for, as 89 or 120.", **_in(_COMPILE))
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="See offcut doctor --settings.", **_in(_COMPILE)),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts to calibrate on, one a line; by default the model's, or some.", **_in(_LOW)
        ),
    ] = None,
    calibration_samples: Annotated[int | None, typer.Option(help="Images to denoise.", **_in(_LOW))] = None,
    calibration_steps: Annotated[int | None, typer.Option(help="Of each image.", **_in(_LOW))] = None,
    calibration_interval: Annotated[
        int | None, typer.Option(help="Of the cached schedule that is calibrated on.", **_in(_LOW))
    ] = None,
    calibration_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.", **_in(_LOW))] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers not to round, as 'mid_block*'; again for more.", **_in(_LOW)),
    ] = None,
    sensitive: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Nor layers so much noisier than the median one; 8 by default.", **_in(_LOW)),
    ] = None,
    adapter: Adapters = None,
    lora: Loras = None,
    ip_adapter: IPAdapters = None,
    attention: Attention = None,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Export again, even if the user's cache directory has the same export.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle: export, cut, compile, verify each engine against PyTorch, or against the ONNX that is given."""
    from ..engines.builder.build import build as run_build
    from ..engines.builder.request import Sizes
    from ..engines.precision import LOW_PRECISIONS
    from ..runtime.calibration import Calibration
    from ..runtime.prompts import read_prompts

    wanted: dict[str, Any] = {
        "prompts": read_prompts(calibrate) if calibrate else None,
        "samples": calibration_samples,
        "steps": calibration_steps,
        "interval": calibration_interval,
        "size": calibration_size,
        "keep": tuple(keep) if keep else None,
        "sensitive": sensitive,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    if given and precision not in LOW_PRECISIONS:
        raise typer.BadParameter(f"{precision} is not calibrated: leave the calibration out, or write int8")
    if given.get("prompts"):
        given.setdefault("samples", len(given["prompts"]))

    names = engine or ["auto"]
    settings = settings_of(setting or [], names)
    if compute_capability:
        settings.setdefault("tensorrt-rtx", {})["compute_capabilities"] = tuple(compute_capability)
    with stages() as stage:
        bundle = run_build(
            model,
            output,
            cuts=cut or ["deepcache:0"],
            engine=names,
            precision=precision,
            inference_precision=inference_precision,
            opset=opset,
            dims=dims_of(fix),
            profiles=Sizes(tuple(static or ()), dynamic, max_batch, min_shapes, opt_shapes, max_shapes),
            settings=settings,
            deploy=deploy,
            compile_all=compile_all,
            device=device,
            adapters=adapter,
            loras=loras_of(lora),
            ip_adapters=ip_adapter or (),
            attention=attention,
            revision=revision,
            variant=variant,
            subfolder=subfolder,
            calibration=Calibration(**given) if precision in LOW_PRECISIONS else None,
            cache=not no_cache,
            progress=stage,
        )
        if triton is not None:
            stage("write the models for Triton")
            _write_triton(bundle, triton, output, device)
    _print_bundle(bundle, as_json)


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
        typer.Option("--time", help="Draw an image, and show which part of the pipeline takes how long.", **_in(_TIME)),
    ] = False,
    engine: Annotated[str, typer.Option(help="auto, or one of the bundle's.", **_in(_TIME))] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.", **_in(_TIME))] = "cpu",
    prompt: Annotated[str, typer.Option(help="What to draw.", **_in(_TIME))] = "a lighthouse in a storm",
    steps: Annotated[int, typer.Option(help="Of the scheduler.", min=1, **_in(_TIME))] = 20,
    interval: Annotated[int, typer.Option(help="Full UNet every N calls; 1 is uncached.", min=1, **_in(_TIME))] = 5,
    height: Annotated[int | None, typer.Option(help="Of the image, in pixels.", **_in(_TIME))] = None,
    width: Annotated[int | None, typer.Option(help="Of the image, in pixels.", **_in(_TIME))] = None,
    as_json: Json = False,
) -> None:
    """Show what a bundle holds: model, engines, cuts, inputs and outputs, digest; with --time, where the time goes."""
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
    with bar(steps) as step:
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


def verify(
    bundle: BundleArgument,
    expect_digest: Annotated[str | None, typer.Option(help="Fail unless the bundle has this digest.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; each engine's own by default.")] = None,
    as_json: Json = False,
) -> None:
    """Check every file's digest, and every engine against its model and across its cuts; exit 1 if one fails."""
    from ..engines.builder.verify import verify_bundle
    from ..engines.bundle.bundle import Bundle

    with stages() as stage:
        results = verify_bundle(Bundle.open(bundle, expect_digest), stage, device)
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
                mark = "[green]ok[/]" if check.passed else "[bold red]FAILED[/]"
                table.add_row(check.name, f"{check.error:.2e}", f"{sign} {check.bound:g}", mark)
            out.print(table)
    if not passed:
        raise typer.Exit(1)


def prune(
    bundle: BundleArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what the manifest no longer names, and what a killed build left behind."""
    from ..engines.bundle.store import prune as run_prune

    pruned = run_prune(bundle, dry_run)
    if as_json:
        print_json({"files": pruned.files, "bytes": pruned.bytes})
        return
    for name in pruned.files:
        out.print(name)
    out.print(f"{'would free' if dry_run else 'freed'} {pruned.bytes / 2**20:.1f} MiB in {len(pruned.files)} files")


def doctor(
    settings: Annotated[bool, typer.Option("--settings", help="Also list what --set takes, for each engine.")] = False,
    as_json: Json = False,
) -> None:
    """Say which engines can be used on this machine, and why not."""
    from ..engines.registry import compiler, machine, probe_all

    with stages() as stage:
        stage("look at the engines")
        facts, probes = machine(), probe_all()
    known = {name: dict(found.SETTINGS) if (found := compiler(name)) else {} for name in probes}
    if as_json:
        engines = {
            name: {
                "usable": probe.usable,
                "builds": probe.usable or probe.builds,
                "version": probe.version,
                "devices": probe.devices,
                "targets": dict(probe.targets),
                "reason": probe.reason,
                "settings": known[name],
            }
            for name, probe in probes.items()
        }
        print_json({**facts, "engines": engines})
        return
    for name, fact in facts.items():
        out.print(f"{name}: {fact}", highlight=False)
    table = Table("engine", "usable", "version", "devices", "found", box=SIMPLE)
    for name, probe in probes.items():
        mark = "[green]yes[/]" if probe.usable else "[yellow]builds[/]" if probe.builds else "[red]no[/]"
        table.add_row(name, mark, probe.version or "", ", ".join(probe.devices), escape(probe.reason))
    out.print(table)
    if settings:
        for name, values in known.items():
            for setting, value in values.items():
                default = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value).lower()
                out.print(f"--set {name}.{setting}={default}", highlight=False)


def _print_schedule(bundle: Bundle, name: str) -> None:
    from ..runtime.tuning.artifact import Tuned

    document = Tuned.load(bundle, name).document
    key, ours = document.key, document.measured[0]
    low, high = key.guidance
    scales = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    cuts = " and ".join(document.used) or document.cut
    out.print(
        f"[bold]schedule {name}[/]: {key.scheduler}, {key.steps} steps, guidance {scales}, {cuts}: "
        f"{ours.full_calls} full calls, UNet {ours.speed_up:.2f}x, {ours.psnr:.1f} dB",
        highlight=False,
    )


def _print_bundle(bundle: Bundle, as_json: bool) -> None:
    manifest = bundle.manifest
    if as_json:
        print_json({"path": str(bundle.path), "digest": bundle.digest, **manifest.model_dump(mode="json")})
        return
    total = sum(entry.size for entry in manifest.files.values())
    out.print(
        f"[bold]{bundle.path}[/]: {manifest.source.model}, {manifest.pipeline or 'UNet only'}, {total / 2**20:.0f} MiB"
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
        out.print(f"[bold]{variant.name}[/]")
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
