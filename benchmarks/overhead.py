"""``wall / ideal``: what the denoising loop costs beyond the engine's own calls.

``ideal = n_full * t_full + n_shallow * t_shallow``, the two times being medians of the engine's calls, measured both
alone and inside the loop; ``wall`` is the loop: scheduler, guidance and UNet calls, from the first call's beginning
to the last step's end.

    python -m offcut.benchmarks.architectures sd15 sd15-random
    offcut build sd15-random -o sd15.offcut --engine onnxruntime --engine openvino
    python -m offcut.benchmarks.overhead sd15.offcut --engine openvino --size 256
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Overhead:
    """One run of the loop.

    Attributes:
        engine, interval, steps, size: of the run; ``size`` is the image's side in pixels.
        full_calls, shallow_calls: of the UNet.
        full_seconds, shallow_seconds: medians of the engine's calls inside the loop.
        full_alone, shallow_alone: medians of the same calls back to back, outside the loop.
        wall: seconds of the loop.
        ratio: wall / ideal with the times inside the loop.
        ratio_alone: wall / ideal with the times alone.
    """

    engine: str
    interval: int
    steps: int
    size: int
    full_calls: int
    shallow_calls: int
    full_seconds: float
    shallow_seconds: float
    full_alone: float
    shallow_alone: float
    wall: float
    ratio: float
    ratio_alone: float


def measure(pipe: Any, *, steps: int, interval: int, size: int, guidance: float = 7.5) -> Overhead:
    """Run the denoising loop once, after a warm-up, with the text encoder and VAE outside."""
    import torch

    from ..runtime.schedule import Uniform

    embeds = pipe.encode_prompt("a circle", torch.device("cpu"), 1, guidance > 1)
    ends: list[float] = []

    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return tensors

    def loop(count: int) -> None:
        ends.clear()
        pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            num_inference_steps=count,
            guidance_scale=guidance,
            height=size,
            width=size,
            output_type="latent",
            callback_on_step_end=step_ended,
        )

    pipe.set_progress_bar_config(disable=True)
    pipe.unet.record_times = True
    pipe.unet.set_schedule(Uniform(interval))
    loop(interval + 1)
    alone = {full: _alone(pipe.unet, full) for full in (True, False)}
    loop(steps)
    run = pipe.unet.last_run
    # The first step's beginning is not announced to anybody: it is its end less its call, so its own overhead is
    # left out.
    wall = ends[-1] - ends[0] + run.seconds[0]
    times = {kind: [s for s, full in zip(run.seconds, run.full, strict=True) if full is kind] for kind in (True, False)}
    inside = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    counts = {kind: len(seconds) for kind, seconds in times.items()}
    return Overhead(
        engine=pipe.unet.engine,
        interval=interval,
        steps=steps,
        size=size,
        full_calls=counts[True],
        shallow_calls=counts[False],
        full_seconds=inside[True],
        shallow_seconds=inside[False],
        full_alone=alone[True],
        shallow_alone=alone[False],
        wall=wall,
        ratio=wall / sum(counts[kind] * inside[kind] for kind in counts),
        ratio_alone=wall / sum(counts[kind] * alone[kind] for kind in counts),
    )


def _alone(unet: Any, full: bool, repeats: int = 5) -> float:
    """Median seconds of the engine's call on the buffers of the last shapes, back to back."""
    bound = unet.bound
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        if full:
            bound.full()
        else:
            bound.shallow(unet.cut)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="of the image, in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()

    from ..runtime.pipeline import load

    pipe = load(arguments.bundle, engine=arguments.engine)
    runs = [
        measure(pipe, steps=arguments.steps, interval=arguments.interval, size=arguments.size)
        for _ in range(arguments.repeats)
    ]
    for run in runs:
        print(
            f"{run.engine} {run.size}px: full {run.full_seconds:.3f} s (alone {run.full_alone:.3f}), "
            f"shallow {run.shallow_seconds:.3f} s (alone {run.shallow_alone:.3f}), wall {run.wall:.3f} s, "
            f"wall / ideal {run.ratio:.4f} (alone {run.ratio_alone:.4f})"
        )
    print(f"median wall / ideal {statistics.median(run.ratio for run in runs):.4f}; 1 is the limit")
    if arguments.output is not None:
        from ..engines.registry import machine

        figures = {"machine": machine(), "runs": [asdict(run) for run in runs]}
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
