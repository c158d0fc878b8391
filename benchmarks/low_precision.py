"""What low precision costs and saves: quality on the shapes model, and the ratio of a full and a shallow call's times.

python -m offcut.benchmarks.low_precision quality --prompts 48 -o quality.json
python -m offcut.benchmarks.low_precision ablation --samples 32 -o ablation.json
python -m offcut.benchmarks.low_precision latency sd15.offcut --size 256 -o latency.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..engines.base import BoundPair, EnginePair
    from ..engines.bundle import Bundle
    from .joint import Row

# (engine, precision of the graphs, inference precision)
Build = tuple[str, str, str | None]
BUILDS: tuple[Build, ...] = (
    ("openvino", "fp32", None),
    ("openvino", "fp32", "bf16"),
    ("openvino", "int8", None),
    ("onnxruntime", "fp32", None),
    ("onnxruntime", "int8", None),
)
INTERVALS = (None, 3, 5)


@dataclass(frozen=True)
class Quality:
    """Pictures of one build with one schedule, beside those that fp32 on the same engine draws without caching.

    Attributes:
        interval: None for uncached.
        right: share of the prompts that the judge found obeyed in full.
        psnr: mean, in dB, to the same seed's picture in fp32 with the same schedule; None for fp32 itself.
        psnr_uncached: the same to fp32 without caching.
        worst: the least of ``psnr``.
    """

    engine: str
    precision: str
    interval: int | None
    prompts: int
    right: float
    psnr: float | None
    worst: float | None
    psnr_uncached: float | None


@dataclass(frozen=True)
class Latency:
    """Seconds of a call, the median of interleaved rounds, and its share of the same engine's in fp32."""

    engine: str
    precision: str
    call: str
    seconds: float
    to_fp32: float


def name_of(precision: str, hint: str | None) -> str:
    return f"{precision} computed in {hint}" if hint else precision


def build_all(model: str | Path, out: Path, builds: Iterable[Build], progress: Callable[[str], None]) -> Bundle:
    """All builds in one bundle, int8 calibrated on the shapes model's own prompts."""
    from ..engines.build import build
    from ..engines.bundle import Bundle
    from ..runtime.calibration import Calibration

    for engine, precision, hint in builds:
        progress(f"{engine} {name_of(precision, hint)}")
        build(
            model,
            out,
            engine=engine,
            precision=precision,
            inference_precision=hint,
            calibration=Calibration(),
            progress=progress,
        )
    return Bundle.open(out)


def quality(
    bundle: Bundle, builds: Sequence[Build], *, prompts: int, steps: int, progress: Callable[[str], None]
) -> list[Quality]:
    """Draw random prompts of one object with every build and schedule, and judge them."""
    from ..runtime.pipeline import load
    from ..runtime.schedule import Uniform
    from .shapes.score import prompts as captions
    from .shapes.score import score

    texts = captions("one object", prompts)
    rows: list[Quality] = []
    drawn: dict[tuple[str, str, int | None], Sequence[Any]] = {}
    for engine, precision, hint in builds:
        pipe = load(bundle, engine, precision=precision, inference_precision=hint or precision)
        pipe.set_progress_bar_config(disable=True)
        for interval in INTERVALS:
            progress(f"{engine} {name_of(precision, hint)}, interval {interval}")
            pipe.unet.set_schedule(None if interval is None else Uniform(interval, warmup=2))
            images = [_draw(pipe, text, steps, seed) for seed, text in enumerate(texts)]
            drawn[engine, name_of(precision, hint), interval] = images
            verdict = score(_taking(images), texts)
            near = _psnrs(drawn.get((engine, "fp32", interval)), images)
            rows.append(
                Quality(
                    engine=engine,
                    precision=name_of(precision, hint),
                    interval=interval,
                    prompts=len(texts),
                    right=verdict.right,
                    psnr=_mean(near),
                    worst=min(near, default=None),
                    psnr_uncached=_mean(_psnrs(drawn.get((engine, "fp32", None)), images)),
                )
            )
        pipe.unet.close()
    return rows


def _psnrs(exact: Sequence[Any] | None, images: Sequence[Any]) -> list[float]:
    """Picture by picture; none where these are the exact ones."""
    from .generate import psnr

    if exact is None or exact is images:
        return []
    return [psnr(*pair) for pair in zip(exact, images, strict=True)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def latency(bundle: Bundle, *, size: int, rounds: int, progress: Callable[[str], None]) -> list[Latency]:
    """Time the full and the first cut's shallow call of every build, one after the other in each round."""
    import torch

    times: dict[tuple[str, str, str], list[float]] = {}
    opened: dict[tuple[str, str], tuple[EnginePair, BoundPair, str]] = {}
    generator = torch.Generator().manual_seed(0)
    for entry in bundle.manifest.engines.values():
        variant = bundle.manifest.variants[entry.variant]
        hint = entry.inference_precision
        progress(f"open {entry.engine} {name_of(variant.precision, hint)}")
        pair = bundle.open_pair(
            entry.engine, precision=variant.precision, inference_precision=hint or variant.precision
        )
        dims = {"batch": 2, "height": size // 8, "width": size // 8, "sequence": 77}
        bound = pair.prepare({name: spec.resolve(dims) for name, spec in pair.inputs.items()})
        for name in pair.inputs:
            buffer = bound.buffers[name]
            buffer.copy_(torch.randn(buffer.shape, generator=generator) if name != "timestep" else torch.tensor(500.0))
        opened[entry.engine, name_of(variant.precision, hint)] = (
            pair,
            bound,
            next(iter(pair.cuts)),
        )
    for turn in range(rounds + 1):
        progress(f"round {turn} of {rounds}")
        for (engine, precision), (_, bound, cut) in opened.items():
            for call, run in (("full", bound.full), (f"shallow {cut}", partial(bound.shallow, cut))):
                began = time.perf_counter()
                run()
                if turn:  # the first prepares kernels
                    times.setdefault((engine, precision, call), []).append(time.perf_counter() - began)
    for pair, bound, _ in opened.values():
        bound.close()
        pair.close()
    return _rows(times)


def _rows(times: Mapping[tuple[str, str, str], Sequence[float]]) -> list[Latency]:
    rows = []
    for (engine, precision, call), seconds in times.items():
        exact = times.get((engine, "fp32", call))
        ratio = statistics.median(a / b for a, b in zip(seconds, exact, strict=True)) if exact else float("nan")
        rows.append(Latency(engine, precision, call, statistics.median(seconds), ratio))
    return rows


def _draw(pipe: Any, prompt: str, steps: int, seed: int) -> Any:
    import torch

    return pipe(prompt, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed)).images[0]


def _taking(images: Sequence[Any]) -> Callable[[Sequence[str]], Any]:
    """A ``Draw`` that hands out pictures that are there, in order."""
    import numpy as np

    left = iter(images)
    return lambda texts: [np.asarray(next(left).convert("RGB")) for _ in texts]


def main() -> None:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    by_quality = kinds.add_parser("quality", help="on the shapes model, built afresh")
    by_quality.add_argument("--prompts", type=int, default=48)
    by_quality.add_argument("--steps", type=int, default=25)
    by_quality.add_argument("--bundle", type=Path, help="keep the builds here, or use those that are there")
    by_ablation = kinds.add_parser("ablation", help="caching and int8 together, on the shapes model")
    by_ablation.add_argument("--engine", default="onnxruntime")
    by_ablation.add_argument("--interval", type=int, default=5)
    by_ablation.add_argument("--steps", type=int, default=30)
    by_ablation.add_argument("--guidance", type=float, default=3.0)
    by_ablation.add_argument("--samples", type=int, default=32, help="half to fit, a quarter to select, one to test")
    by_ablation.add_argument("--probes", type=int, default=8)
    by_ablation.add_argument("--threads", type=int)
    by_ablation.add_argument("--bundle", type=Path, help="keep the builds here, or use those that are there")
    by_latency = kinds.add_parser("latency", help="of every build in a bundle")
    by_latency.add_argument("bundle", type=Path)
    by_latency.add_argument("--size", type=int, default=256, help="of the image in pixels")
    by_latency.add_argument("--rounds", type=int, default=7)
    for each in (by_quality, by_ablation, by_latency):
        each.add_argument("-o", "--output", type=Path, help="write the figures as JSON, too")
    arguments = parser.parse_args()
    try:
        _run(arguments)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def _run(arguments: argparse.Namespace) -> None:
    from ..engines.bundle import Bundle
    from ..engines.registry import machine
    from .shapes.model import model_path

    def progress(sentence: str) -> None:
        if not sentence.startswith(" "):
            print(f"... {sentence}", flush=True)

    rows: Sequence[Quality | Latency | Row]
    if arguments.kind == "latency":
        rows = latency(Bundle.open(arguments.bundle), size=arguments.size, rounds=arguments.rounds, progress=progress)
    elif arguments.kind == "ablation":
        with tempfile.TemporaryDirectory() as folder:
            rows = _ablation(arguments, arguments.bundle or Path(folder) / "shapes.offcut", progress)
    else:
        with tempfile.TemporaryDirectory() as folder:
            out = arguments.bundle or Path(folder) / "shapes.offcut"
            bundle = build_all(model_path(), out, BUILDS, progress)
            rows = quality(bundle, BUILDS, prompts=arguments.prompts, steps=arguments.steps, progress=progress)
    for row in rows:
        print("  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in asdict(row).values()))
    if arguments.output is not None:
        settings = {name: value for name, value in vars(arguments).items() if isinstance(value, int | str)}
        figures = {"machine": machine(), "settings": settings, "rows": [asdict(row) for row in rows]}
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _ablation(arguments: argparse.Namespace, out: Path, progress: Callable[[str], None]) -> Sequence[Row]:
    from .joint import Task, ablation
    from .shapes.model import model_path
    from .shapes.score import KINDS
    from .shapes.score import prompts as captions

    builds: Sequence[Build] = [(arguments.engine, precision, None) for precision in ("fp32", "int8")]
    bundle = build_all(model_path(), out, builds, progress)
    texts = [text for kind in KINDS[:2] for text in captions(kind, arguments.samples // 2)]
    task = Task(
        prompts=tuple(texts),
        interval=arguments.interval,
        steps=arguments.steps,
        guidance=arguments.guidance,
        samples=arguments.samples,
        probes=arguments.probes,
    )
    return ablation(bundle, arguments.engine, ("fp32", "int8"), task, progress, threads=arguments.threads)


if __name__ == "__main__":
    main()
