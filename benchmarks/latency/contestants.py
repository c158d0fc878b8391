"""The catalogue: who can take part, how each is set up, and why one cannot. All of it is fixed before the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...engines.bundle.bundle import Bundle, devices_of
from ...engines.bundle.manifest import EngineEntry
from ...engines.registry import engine as engine_module
from ...errors import UserError
from ...runtime.generation.schedule import Uniform, parse
from .case import Case, Entrant
from .loop import vae_scale

PEERS = ("diffusers", "deepcache", "compile", "optimum", "engine")
"""diffusers eager; DeepCache's helper; ``torch.compile``; optimum's pipeline; the bundle's engines, full graph only."""

OPTIMUM_MISSING = (
    "optimum-onnx is not installed in this environment, whose transformers it does not allow: make older, then "
    "--peer-python optimum=.venv-older/bin/python"
)

_GIB = 2**30
# Resident memory at the peak for a byte of weights, beside activations and libraries; measured with SD 1.5.
_NEED = {"onnxruntime": 1.3, "openvino": 2.2, "inductor": 1.3, "pytorch": 1.2, "compiled": 1.4, "optimum": 1.4}
_BESIDE = int(1.5 * _GIB)
# Activations of a video at the peak, in feature maps of the outermost level: eager PyTorch took 40 to 70.
_MAPS = 60
_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


def interval_of(schedule: str) -> int:
    """The interval of a schedule that DeepCache's helper can follow.

    Raises:
        UserError: it follows none but this.
    """
    parsed = parse(schedule)
    if not isinstance(parsed, Uniform) or parsed != Uniform(parsed.interval):
        raise UserError(f"DeepCache's helper knows uniform intervals without warm-up only, not {schedule}")
    return parsed.interval


def branch_of(cut: str) -> int:
    """The helper's ``cache_branch_id`` of a cut.

    Raises:
        UserError: it has none.
    """
    convention, _, index = cut.partition(":")
    if convention != "deepcache":
        raise UserError(f"DeepCache's helper has no branch for the cut {cut}")
    return int(index)


def catalogue(
    bundle: Bundle,
    case: Case,
    *,
    parameters: int,
    engines: Sequence[str] = (),
    peers: Sequence[str] = PEERS,
    pythons: Mapping[str, str] | None = None,
    no_model: str = "",
) -> list[Entrant]:
    """Every contestant in the order of its turn, those of one house side by side.

    Args:
        parameters: of the UNet, for the memory that it needs.
        engines: those of the bundle that take part; all by default.
        peers: those of ``PEERS`` that take part.
        pythons: interpreters of other environments, by the peer that runs there.
        no_model: why the peers have no model to load, where ``case.model`` is None.

    Raises:
        UserError: an engine is not in the bundle.
    """
    for name in engines:
        if name not in bundle.engines:
            engine_module(name)
            raise UserError(f"{bundle.path} holds {', '.join(bundle.engines)}, not {name}: add it with offcut build")
    beside = _beside(case, bundle)
    ours = list(_offcut(bundle, case, engines or bundle.engines, "engine" in peers, beside))
    precisions = list(dict.fromkeys(["fp32", "bf16", *(entrant.precision for entrant in ours)]))
    theirs = [entrant for precision in precisions for entrant in _pytorch(case, peers, precision, parameters, beside)]
    if "optimum" in peers:
        theirs.append(_optimum(case, parameters, (pythons or {}).get("optimum"), beside))
    if case.model is None:
        theirs = [replace(entrant, not_run=entrant.not_run or no_model) for entrant in theirs]
    return _neighbours([*theirs, *ours])


def _offcut(bundle: Bundle, case: Case, engines: Iterable[str], uncached: bool, beside: int) -> Iterator[Entrant]:
    builds: dict[tuple[str, str], EngineEntry] = {}
    for entry in bundle.manifest.engines.values():
        if entry.engine in engines:  # of several builds alike the newest, as bundle.entry has it
            precision = entry.inference_precision or bundle.manifest.variants[entry.variant].precision
            builds[entry.engine, precision] = entry
    for (engine, precision), entry in builds.items():
        variant = bundle.manifest.variants[entry.variant]
        weights = () if variant.graphs is None or entry.compiled else (variant.graphs.weights,)
        both = [file for file in entry.files if not file.endswith(".log")] or [
            entry.full,
            *([entry.shallow[case.cut]] if case.cut in entry.shallow else []),
            *weights,
        ]
        full = [file for file in both if file not in entry.shallow.values()]
        stored = sum(bundle.manifest.files[file].size for file in both)
        settings = {
            "graphs": f"{variant.precision}, opset {variant.opset}",
            "computes in": precision,
            "threads": str(case.threads),
            **{name: str(value) for name, value in entry.settings.items()},
        }
        reason = None
        if case.cut not in entry.cuts:
            reason = f"{entry.key} was not built with the cut {case.cut}; it has {', '.join(entry.cuts)}"
        elif case.device.partition(":")[0] not in devices_of(entry):
            reason = f"{entry.key} cannot run on {case.device} here: {engine_module(engine).probe().reason}"
        common: dict[str, Any] = {
            "engine": engine,
            "precision": precision,
            "kind": "offcut",
            "house": f"{engine} {precision}",
            "build": entry.key,
            "need": _need(engine, stored) + beside,
            "not_run": reason,
        }
        alone = f"{engine} {precision} full only"
        yield Entrant(
            f"offcut {engine} {precision}",
            "offcut",
            cached=True,
            settings=settings,
            size=stored,
            twin=alone if uncached else None,
            **common,
        )
        if uncached:
            note = {"graph": "writes the cached features too, and nobody reads them"}
            size = sum(bundle.manifest.files[file].size for file in full)
            yield Entrant(alone, engine, cached=False, settings=settings | note, size=size, **common)


def _pytorch(case: Case, peers: Sequence[str], precision: str, parameters: int, beside: int) -> Iterator[Entrant]:
    weights = parameters * _SIZES[precision]
    # SD 1.5's UNet on a CPU with AVX-512 bf16, 256x256: channels_last took 1.20 of contiguous in fp32, 1.00 in bf16.
    # A video's UNet has weights of five dimensions, which PyTorch refuses to lay out as channels_last.
    channels_last = case.frames is None and (case.device != "cpu" or precision != "fp32")
    settings = {
        "weights": f"torch_dtype={precision}",
        "memory format": "channels_last" if channels_last else "contiguous",
        "attention": "scaled_dot_product_attention, diffusers' default",
        "autocast": "none",
        "threads": str(case.threads),
    }
    common: dict[str, Any] = {"engine": "pytorch", "precision": precision, "size": weights}
    helper = _helper_reason(case)
    eager: dict[str, Any] = {**common, "house": f"eager {precision}", "need": _need("pytorch", weights) + beside}
    if "diffusers" in peers:
        name = f"diffusers eager {precision}"
        yield Entrant(name, "diffusers", kind="eager", cached=False, settings=settings, **eager)
    if "deepcache" in peers:
        yield Entrant(
            f"DeepCache eager {precision}",
            "DeepCache",
            kind="deepcache",
            cached=True,
            settings=settings | {"helper": "DeepCacheSDHelper, enabled before and disabled after each loop"},
            twin=f"diffusers eager {precision}" if "diffusers" in peers else None,
            not_run=helper,
            **eager,
        )
    if "compile" not in peers or precision == "fp32":  # whoever compiles for speed has lowered the precision first
        return
    compiled: dict[str, Any] = {**common, "need": _need("compiled", weights) + beside}
    whole = "torch.compile(unet, fullgraph=True, dynamic=False), default mode; two whole loops more to warm up"
    name = f"torch.compile {precision}"
    yield Entrant(
        name,
        "torch.compile",
        kind="compiled",
        cached=False,
        house=f"compiled {precision}",
        settings=settings | {"compile": whole},
        **compiled,
    )
    if "deepcache" in peers:
        on = "then the helper, left on; two whole loops more to warm up"
        yield Entrant(
            f"DeepCache compile-blocks {precision}",
            "DeepCache",
            kind="deepcache-regional",
            cached=True,
            house=f"compiled blocks {precision}",
            settings=settings | {"compile": f"unet.compile_repeated_blocks(fullgraph=True, dynamic=False), {on}"},
            not_run=helper,
            **compiled,
        )
        yield Entrant(
            f"DeepCache compile {precision}",
            "DeepCache",
            kind="deepcache-compiled",
            cached=True,
            house=f"compiled, helped {precision}",
            settings=settings | {"compile": f"torch.compile(unet), {on}"},
            not_run=helper,
            **compiled,
        )


def _optimum(case: Case, parameters: int, python: str | None, beside: int) -> Entrant:
    from importlib.metadata import PackageNotFoundError, version

    reason = None
    if python is None:
        try:
            version("optimum-onnx")
        except PackageNotFoundError:
            reason = OPTIMUM_MISSING
    return Entrant(
        "optimum onnxruntime fp32",
        "optimum",
        "onnxruntime",
        "fp32",
        kind="optimum",
        cached=False,
        house="optimum",
        settings={
            "pipeline": "ORTPipelineForText2Image",
            "export": "optimum.exporters.onnx.main_export, its defaults",
            "session": "default options, intra_op_num_threads set",
            "threads": str(case.threads),
        },
        size=parameters * 4,
        need=_need("optimum", parameters * 4) + beside,
        python=python,
        not_run=reason,
    )


def _helper_reason(case: Case) -> str | None:
    """Why DeepCache's helper cannot do what the case asks; None if it can."""
    try:
        interval_of(case.schedule)
        branch_of(case.cut)
    except UserError as error:
        return str(error)
    return None


def _need(kind: str, weights: int) -> int:
    return int(_NEED.get(kind, 1.5) * weights)


def _beside(case: Case, bundle: Bundle) -> int:
    """What a contestant needs beside its weights, in bytes: libraries, and the activations of all frames at once."""
    pixels = case.height * case.width // vae_scale(bundle) ** 2
    batch = case.images * (2 if case.guidance > 1 else 1) * (case.frames or 0)
    return _BESIDE + _MAPS * 4 * batch * pixels * int(bundle.unet_config["block_out_channels"][0])


def _neighbours(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Those of one house side by side, each told whom it shares its process with."""
    houses: dict[str, list[Entrant]] = {}
    for entrant in entrants:
        houses.setdefault(entrant.house, []).append(entrant)
    together = []
    for members in houses.values():
        for entrant in members:
            others = [other.name for other in members if other is not entrant and other.not_run is None]
            note = f"shared with {', '.join(others)}: so are load time and peak memory" if others else "its own"
            together.append(replace(entrant, settings={**entrant.settings, "process": note}))
    return together
