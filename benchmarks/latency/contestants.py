"""The contestants of a latency run: their settings, and why some cannot run. Both are fixed before the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...engines.bundle.bundle import Bundle, devices_of
from ...engines.bundle.manifest import EngineEntry
from ...engines.registry import engine as engine_module
from ...errors import UserError
from ...runtime.generation.schedule import Uniform, parse
from ..record import installed_versions
from .case import Case, Entrant
from .loop import vae_scale

PEERS = ("diffusers", "deepcache", "compile", "optimum", "engine")
"""Peers: eager diffusers, DeepCache's helper, ``torch.compile``, optimum, and the bundle's engines without caching."""

OPTIMUM_MISSING = (
    "optimum-onnx is not installed here and does not support this version of transformers: run make older, then give "
    "--peer-python optimum=.venv-older/bin/python"
)

# Peak resident memory for each byte of weights: the largest ratio measured with SD 1.5, by OpenVINO. Other engines took
# 1.2 to 1.4.
_NEED_PER_BYTE = 2.2
_NEED_OF_LIBRARIES = 3 * 2**29
# Peak activations of a video, in feature maps of the outermost level: eager PyTorch took 40 to 70.
_MAPS = 60
_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


def interval_of(schedule: str) -> int:
    """Return the interval of a schedule that DeepCache's helper can follow.

    Raises:
        UserError: the schedule is not a uniform interval without warm-up.
    """
    parsed = parse(schedule)
    if not isinstance(parsed, Uniform) or parsed != Uniform(parsed.interval):
        raise UserError(f"DeepCache's helper supports only uniform intervals without warm-up, not {schedule}")
    return parsed.interval


def branch_of(cut: str) -> int:
    """Return the helper's ``cache_branch_id`` for a cut.

    Raises:
        UserError: the helper has no branch for this cut.
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
    """Return the contestants in the order of their turns; those of one process are neighbours.

    Args:
        parameters: number of the UNet's parameters, for the memory that the peers need.
        engines: names of the bundle's engines; all by default.
        peers: names in ``PEERS``.
        pythons: Python interpreters of other environments, by the peer that runs there.
        no_model: why the peers have no model, where ``case.model`` is None.

    Raises:
        UserError: an engine is not in the bundle.
    """
    for name in engines:
        if name not in bundle.engines:
            engine_module(name)
            raise UserError(f"{bundle.path} holds {', '.join(bundle.engines)}, not {name}: add it with offcut build")
    ours = list(_offcut(bundle, case, engines or bundle.engines, "engine" in peers))
    precisions = list(dict.fromkeys(["fp32", "bf16", *(entrant.precision for entrant in ours)]))
    theirs = [entrant for precision in precisions for entrant in _pytorch(case, peers, precision, parameters)]
    if "optimum" in peers:
        theirs.append(_optimum(case, parameters, (pythons or {}).get("optimum")))
    if case.model is None:
        theirs = [replace(entrant, not_run=entrant.not_run or no_model) for entrant in theirs]
    activations = _activations(case, bundle)
    entrants = [*theirs, *ours]
    sizes = {entrant.process: max(e.size for e in entrants if e.process == entrant.process) for entrant in entrants}
    needs = {name: int(_NEED_PER_BYTE * size) + _NEED_OF_LIBRARIES + activations for name, size in sizes.items()}
    return _group_by_process([replace(entrant, need=needs[entrant.process]) for entrant in entrants])


def _offcut(bundle: Bundle, case: Case, engines: Iterable[str], uncached: bool) -> Iterator[Entrant]:
    builds: dict[tuple[str, str], EngineEntry] = {}
    for entry in bundle.manifest.engines.values():
        if entry.engine in engines:  # a later build replaces an earlier one with the same engine and precision
            precision = entry.inference_precision or bundle.manifest.variants[entry.variant].precision
            builds[entry.engine, precision] = entry
    for (engine, precision), entry in builds.items():
        variant = bundle.manifest.variants[entry.variant]
        weights = () if variant.graphs is None or entry.compiled else (variant.graphs.weights,)
        files = [file for file in entry.files if not file.endswith(".log")] or [
            entry.full,
            *([entry.shallow[case.cut]] if case.cut in entry.shallow else []),
            *weights,
        ]
        full_files = [file for file in files if file not in entry.shallow.values()]
        size, full_size = (sum(bundle.manifest.files[file].size for file in names) for names in (files, full_files))
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
            "process": f"{engine} {precision}",
            "build": entry.key,
            "not_run": reason,
        }
        name, twin = f"offcut {engine} {precision}", f"{engine} {precision} full only"
        cached_twin = twin if uncached else None
        yield Entrant(name, "offcut", cached=True, settings=settings, size=size, twin=cached_twin, **common)
        if uncached:
            settings = settings | {"graph": "also writes the cached features, which are not read"}
            yield Entrant(twin, engine, cached=False, settings=settings, size=full_size, **common)


def _pytorch(case: Case, peers: Sequence[str], precision: str, parameters: int) -> Iterator[Entrant]:
    # SD 1.5's UNet at 256x256 on a CPU with AVX-512 bf16: channels_last took 1.20 times as long as contiguous in fp32,
    # and 1.00 times in bf16. PyTorch has no channels_last for the five-dimensional weights of a video's UNet.
    channels_last = case.frames is None and (case.device != "cpu" or precision != "fp32")
    settings = {
        "weights": f"torch_dtype={precision}",
        "memory format": "channels_last" if channels_last else "contiguous",
        "attention": "scaled_dot_product_attention, diffusers' default",
        "autocast": "none",
        "threads": str(case.threads),
    }
    common: dict[str, Any] = {"engine": "pytorch", "precision": precision, "size": parameters * _SIZES[precision]}
    eager: dict[str, Any] = {**common, "process": f"eager {precision}"}
    helper: dict[str, Any] = {**common, "cached": True, "not_run": _helper_reason(case)}
    if "diffusers" in peers:
        name = f"diffusers eager {precision}"
        yield Entrant(name, "diffusers", kind="eager", cached=False, settings=settings, **eager)
    if "deepcache" in peers:
        yield Entrant(
            f"DeepCache eager {precision}",
            "DeepCache",
            kind="deepcache",
            settings=settings | {"helper": "DeepCacheSDHelper, enabled before and disabled after each loop"},
            twin=f"diffusers eager {precision}" if "diffusers" in peers else None,
            **helper | eager,
        )
    if "compile" not in peers or precision == "fp32":  # users choose a lower precision before they compile
        return
    more = "two more whole loops to warm up"
    yield Entrant(
        f"torch.compile {precision}",
        "torch.compile",
        kind="compiled",
        cached=False,
        process=f"compiled {precision}",
        settings=settings | {"compile": f"torch.compile(unet, fullgraph=True, dynamic=False), default mode; {more}"},
        **common,
    )
    if "deepcache" in peers:
        for name, kind, process, code in (
            (
                "compile-blocks",
                "deepcache-regional",
                "compiled blocks",
                "unet.compile_repeated_blocks(fullgraph=True, dynamic=False)",
            ),
            ("compile", "deepcache-compiled", "compiled, helped", "torch.compile(unet)"),
        ):
            yield Entrant(
                f"DeepCache {name} {precision}",
                "DeepCache",
                kind=kind,
                process=f"{process} {precision}",
                settings=settings | {"compile": f"{code}, then the helper, never disabled; {more}"},
                **helper,
            )


def _optimum(case: Case, parameters: int, python: str | None) -> Entrant:
    return Entrant(
        "optimum onnxruntime fp32",
        "optimum",
        "onnxruntime",
        "fp32",
        kind="optimum",
        cached=False,
        process="optimum",
        settings={
            "pipeline": "ORTPipelineForText2Image",
            "export": "optimum.exporters.onnx.main_export, its defaults",
            "session": "default options, intra_op_num_threads set",
            "threads": str(case.threads),
        },
        size=parameters * 4,
        python=python,
        not_run=OPTIMUM_MISSING if python is None and not installed_versions(("optimum-onnx",)) else None,
    )


def _helper_reason(case: Case) -> str | None:
    """Return why DeepCache's helper cannot follow the case's schedule or cut; None if it can."""
    try:
        interval_of(case.schedule)
        branch_of(case.cut)
    except UserError as error:
        return str(error)
    return None


def _activations(case: Case, bundle: Bundle) -> int:
    """Return the bytes of the activations of all frames of a video; 0 for images."""
    pixels = case.height * case.width // vae_scale(bundle) ** 2
    batch = case.images * (2 if case.guidance > 1 else 1) * (case.frames or 0)
    return _MAPS * 4 * batch * pixels * int(bundle.unet_config["block_out_channels"][0])


def _group_by_process(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Return the contestants grouped by process; the settings of each name the others in its process."""
    processes: dict[str, list[Entrant]] = {}
    for entrant in entrants:
        processes.setdefault(entrant.process, []).append(entrant)
    grouped = []
    for members in processes.values():
        for entrant in members:
            others = [other.name for other in members if other is not entrant and other.not_run is None]
            note = f"shared with {', '.join(others)}, like load time and peak memory" if others else "its own"
            grouped.append(replace(entrant, settings={**entrant.settings, "process": note}))
    return grouped
