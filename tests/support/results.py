"""Results as ``offcut bench`` leaves them, with invented figures, for the report's and the comparison's tests."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offcut.benchmarks.record import Environment, Result
from offcut.benchmarks.schema.latency import Contestant, Latency
from offcut.benchmarks.schema.quality import Quality, QualityRow
from offcut.benchmarks.stats import Estimate
from offcut.runtime.generation.schedule import Uniform

CLOCK = "perf_counter; from the first scheduler call to the last latent: scheduler, guidance and UNet calls"


def machine(**changed: Any) -> Environment:
    given: dict[str, Any] = {
        "cpu": "AMD EPYC 9B14 (avx2, avx512f)",
        "cores": 2,
        "memory_gib": 24.0,
        "system": "Linux 6.1.0 x86_64",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "diffusers": "0.42.1", "onnxruntime": "1.31.0", "openvino": "2026.4.0"},
        "load": 0.1,
    }
    return Environment(**given | changed)


def contestant(
    name: str,
    full_seconds: float,
    shallow_seconds: float | None = None,
    *,
    rounds: int = 5,
    noise: float = 0.01,
    seed: int = 0,
    **own: Any,
) -> Contestant:
    """20 steps; with a shallow time every 5th call is full after two full ones."""
    chance = random.Random(f"{name} {seed}")

    def around(value: float, count: int) -> list[float]:
        return [value * (1 + chance.gauss(0, noise)) for _ in range(count)]

    full, shallow, calls = full_seconds, shallow_seconds, ((20, 0) if shallow_seconds is None else (5, 15))
    family, engine = name.split()[:2]
    given: dict[str, Any] = {
        "name": name,
        "family": family,
        "engine": engine if family == "offcut" else "pytorch",
        "precision": "bf16" if "bf16" in name else "fp32",
        "caching": None if shallow is None else "every 5th call full, 2 to warm up, deepcache:0",
        "settings": {"threads": "2", "opset": "23"},
        "loops": around(1.01 * (calls[0] * full + calls[1] * (shallow or 0)), rounds),
        "full": around(full, rounds * calls[0]),
        "full_alone": around(full * 0.99, 10),
        "full_calls": calls[0],
        "shallow_calls": calls[1],
        "load_seconds": 3.25,
        "host_peak_bytes": 5_123_456_789,
        "size_bytes": 3_438_000_000,
    }
    if shallow is not None:
        given |= {"shallow": around(shallow, rounds * calls[1]), "shallow_alone": around(shallow, 10)}
    return Contestant(**given | own)


def latency(**changed: Any) -> Latency:
    given: dict[str, Any] = {
        "model": "Stable Diffusion 1.5's architecture, random weights",
        "steps": 20,
        "height": 512,
        "width": 512,
        "images_per_call": 1,
        "guidance": 7.5,
        "scheduler": "DDIMScheduler",
        "rounds": 5,
        "threads": 2,
        "clock": CLOCK,
        "contestants": [
            contestant("offcut onnxruntime fp32", 3.9),
            contestant("offcut onnxruntime fp32, interval 5, warmup 2, deepcache:0", 3.9, 0.39),
            contestant("offcut openvino fp32", 3.5),
            contestant("offcut openvino fp32, interval 5, warmup 2, deepcache:0", 3.5, 0.31),
            contestant("offcut openvino bf16", 1.0),
            contestant("offcut openvino bf16, interval 5, warmup 2, deepcache:0", 1.0, 0.11),
            contestant("diffusers eager fp32", 4.6),
            contestant("diffusers eager bf16", 1.7),
            contestant("torch.compile fp32", 3.6, noise=0.03),
            contestant("DeepCache eager fp32", 4.6, 0.52, full=[], shallow=[], full_alone=[], shallow_alone=[]),
            Contestant(
                name="optimum onnxruntime fp32",
                family="optimum",
                engine="onnxruntime",
                precision="fp32",
                not_run="optimum-onnx is not installed: pip install 'offcut[optimum]'",
            ),
        ],
    }
    return Latency(**given | changed)


def around(mean: float, half: float) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def quality(**changed: Any) -> Quality:
    ratio, here = 0.1, 0.22
    rows: list[QualityRow] = []
    for sampler, loss in (("ddim", 0.0), ("dpm++ 2m", 1.5), ("euler ancestral", 6.0)):
        names = [f"{place}.png" for place in range(3)]
        rows.append(
            QualityRow(
                name=f"{sampler} 50", kind="uncached", sampler=sampler, steps=50, full_calls=50, shallow_calls=0,
                images=64, cost=50, cost_here=50, accuracy=around(0.71, 0.06), frechet=4.1, timeline="#" * 50,
                samples=[f"{sampler.replace(' ', '-')}-0-{name}" for name in names],
            )
        )  # fmt: skip
        for interval, psnr, share in ((2, 46.9, 0.71), (3, 41.5, 0.70), (5, 35.1, 0.69), (10, 27.2, 0.58)):
            schedule = Uniform(interval, warmup=2)
            full = set(schedule.full_calls(50))
            rows.append(
                QualityRow(
                    name=f"{sampler} 50, {schedule}, deepcache:0",
                    kind="cached",
                    sampler=sampler,
                    steps=50,
                    schedule=str(schedule),
                    cut="deepcache:0",
                    interval=interval,
                    warmup=2,
                    full_calls=len(full),
                    shallow_calls=50 - len(full),
                    images=64,
                    cost=len(full) + ratio * (50 - len(full)),
                    cost_here=len(full) + here * (50 - len(full)),
                    psnr=around(psnr - loss, 0.9),
                    psnr_worst=psnr - loss - 8,
                    ssim=around(1 - 0.004 * interval, 0.002),
                    distance=around(0.004 * interval, 0.001),
                    accuracy=around(share, 0.06),
                    accuracy_change=around(share - 0.71, 0.02),
                    frechet=4.1 + interval / 20,
                    timeline="".join("#" if call in full else "." for call in range(50)),
                    samples=[f"{sampler.replace(' ', '-')}-{interval}-{name}" for name in names]
                    if interval != 10
                    else [],
                )
            )
        for steps, psnr in ((28, 39.9), (21, 36.0), (15, 31.1), (9, 25.6)):
            rows.append(
                QualityRow(
                    name=f"{sampler} {steps}",
                    kind="fewer steps",
                    sampler=sampler,
                    steps=steps,
                    full_calls=steps,
                    shallow_calls=0,
                    images=64,
                    cost=steps,
                    cost_here=steps,
                    psnr=around(psnr - loss / 2, 1.1),
                    psnr_worst=psnr - 9,
                    ssim=around(0.97, 0.01),
                    distance=around(0.03, 0.004),
                    accuracy=around(0.68, 0.06),
                    accuracy_change=around(-0.03, 0.03),
                    frechet=4.4,
                    timeline="#" * steps,
                )
            )
    given: dict[str, Any] = {
        "model": "shapes, 64x64",
        "engine": "onnxruntime fp32",
        "guidance": 4.0,
        "images": 64,
        "shallow_over_full": ratio,
        "shallow_over_full_here": here,
        "rows": rows,
        "sample_prompts": ["a red circle", "a blue square above a green triangle", "two yellow stars"],
    }
    return Quality(**given | changed)


def result(*, environment: Environment | None = None, **sections: Any) -> Result:
    return Result(
        title="Stable Diffusion 1.5 on two cores",
        command="offcut bench latency sd15-dir -o out",
        started=datetime(2026, 11, 2, 9, 30, tzinfo=UTC),
        seconds=1234.5,
        environment=environment or machine(),
        **sections or {"latency": latency()},
    )


def draw_samples(measured: Quality, folder: Path) -> None:
    """The PNG files that the rows name."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    for row in measured.rows:
        for place, name in enumerate(row.samples):
            image = Image.new("RGB", (64, 64), (235, 232, 224))
            shift = 0 if row.interval is None else row.interval
            box = (10 + 4 * place, 12, 42 + 4 * place + shift, 44)
            ImageDraw.Draw(image).ellipse(box, fill=((200, 40, 40), (40, 80, 200), (220, 180, 30))[place])
            image.save(folder / name)
