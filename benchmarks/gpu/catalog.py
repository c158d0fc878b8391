"""The list of checks for a run, and why some of them cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from ...engines.registry import engine as engine_module
from ...errors import EngineError
from .check import Check, Outcome
from .workbench import Options, Workbench, usable_precision

Run = Callable[[Workbench, str, str], Outcome]


def catalog(options: Options) -> list[Check]:
    """Every check that these options name, in the order in which they run."""
    from . import correctness, lifetime, streams

    checks = []
    for engine in options.engines:
        for precision in options.precisions:
            for name, title, run in (
                ("parity", "every graph agrees with eager PyTorch and across the cut", correctness.parity),
                ("trajectory", "ten cached steps agree with eager PyTorch cached alike", correctness.trajectory),
            ):
                checks.append(
                    Check(
                        f"correctness/{name}/{engine}/{precision}",
                        f"{engine}, {precision}: {title}",
                        partial(_run, run, engine, precision),
                        engine,
                        _obstacle(options, engine, (precision,)),
                    )
                )
        for name, title, run, device in (
            (
                "correctness/interleaved",
                "two shapes take turns and do not disturb each other",
                correctness.interleaved,
                None,
            ),
            ("streams/no-sync", "UNet.forward never waits for the device", streams.no_sync, "cuda"),
            ("streams/side-stream", "a caller's own stream is in order with the engine's", streams.side_stream, "cuda"),
            ("streams/cuda-graphs", "replayed calls equal launched ones, buffers stay", streams.cuda_graphs, "cuda"),
            (
                "streams/moved-buffers",
                "what was recorded for buffers that are gone is not replayed for others",
                streams.moved_buffers,
                "cuda",
            ),
            ("memory/allocations", "steady state allocates noise_pred and nothing else", lifetime.allocations, "cuda"),
            ("memory/close", "closing gives the memory back", lifetime.close, "cuda"),
            ("threads/two", "two threads with a UNet each do not meet", lifetime.threads, None),
        ):
            obstacle = _obstacle(options, engine, options.precisions)
            if obstacle is None and device == "cuda" and not options.device.startswith("cuda"):
                obstacle = f"it is about CUDA, and this run is on {options.device}"
            if (
                obstacle is None
                and name in ("streams/cuda-graphs", "streams/moved-buffers")
                and engine not in streams.RECORDING
            ):
                obstacle = f"{engine} records no CUDA graphs"
            checks.append(
                Check(
                    f"{name}/{engine}", f"{engine}: {title}", partial(_first_precision, run, engine), engine, obstacle
                )
            )
    if options.performance:
        checks += _performance(options)
    return checks


def _performance(options: Options) -> list[Check]:
    from . import performance, roofline

    checks = []
    for architecture in options.architectures:
        for images in options.batches:
            for engine in options.engines:
                contest = performance.Contest(architecture, engine, options.precisions[0], images)
                for name, title, run, needs in (
                    ("loop", "the loop costs little beyond its engine calls", performance.loop, None),
                    (
                        "deepcache",
                        "ahead of DeepCache's helper on eager PyTorch",
                        performance.against_helper,
                        "DeepCache",
                    ),
                    ("compiled", "level with two modules of torch.compile", performance.against_compiled, "triton"),
                    ("memory", "memory beyond the uncached engine", performance.memory, "cuda"),
                    ("roofline", "FLOP/s and bytes/s beside the machine's ceilings", roofline.roofline, None),
                ):
                    checks.append(
                        Check(
                            f"performance/{name}/{architecture}/b{images}/{engine}",
                            f"{engine}, {architecture}, {images} images: {title}",
                            partial(_contest, run, contest),
                            engine,
                            _obstacle(options, engine, options.precisions[:1]) or _needed(needs, options),
                        )
                    )
    return checks


def no_device(device: str) -> str | None:
    """Why nothing can run on this device here; None where it can."""
    import torch

    if not device.startswith("cuda") or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"no GPU can be used: PyTorch {torch.__version__} was built without CUDA"
    return (
        f"no GPU can be used: PyTorch {torch.__version__} for CUDA {torch.version.cuda} finds no NVIDIA GPU or driver"
    )


def _obstacle(options: Options, engine: str, precisions: tuple[str, ...]) -> str | None:
    if reason := no_device(options.device):
        return reason
    probe = engine_module(engine).probe()
    if options.device.partition(":")[0] not in probe.devices:
        return f"{engine} cannot run on {options.device} here: {probe.reason}"
    try:
        usable_precision(engine, precisions)
    except EngineError as error:
        return str(error)
    return None


def _needed(needs: str | None, options: Options) -> str | None:
    if needs == "cuda":
        return None if options.device.startswith("cuda") else f"it is about CUDA, and this run is on {options.device}"
    if needs == "triton" and not options.device.startswith("cuda"):
        return None  # torch.compile writes C++ there
    if needs is None or find_spec(needs) is not None:
        return None
    return f"the package {needs} is not installed: pip install {needs}"


def _run(run: Run, engine: str, precision: str, bench: Workbench) -> Outcome:
    return run(bench, engine, precision)


def _first_precision(run: Run, engine: str, bench: Workbench) -> Outcome:
    return run(bench, engine, usable_precision(engine, bench.options.precisions))


def _contest(run: Callable[..., Outcome], contest: object, bench: Workbench) -> Outcome:
    return run(bench, contest)
