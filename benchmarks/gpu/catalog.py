"""The checks of a run, with the reasons why some of them cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from ...engines.registry import engine as engine_module
from ...errors import EngineError
from . import correctness, lifetime, performance, streams
from .check import CheckOutcome, GpuCheck
from .workbench import GpuOptions, Workbench, usable_precision

_Run = Callable[..., CheckOutcome]

# Checks for each engine and precision.
_BY_PRECISION: tuple[tuple[str, str, _Run], ...] = (
    ("parity", "every graph agrees with eager PyTorch and across the cut", correctness.parity),
    ("trajectory", "ten cached steps agree with eager PyTorch that follows the same schedule", correctness.trajectory),
)
# Checks for each engine, in the first precision that the engine supports. The last field is what the check needs.
_BY_ENGINE: tuple[tuple[str, str, _Run, str | None], ...] = (
    ("correctness/interleaved", "calls of two shapes in turns stay independent", correctness.interleaved, None),
    ("streams/no-sync", "UNet.forward never waits for the device", streams.no_sync, "cuda"),
    ("streams/side-stream", "a caller's own stream is ordered with the engine's", streams.side_stream, "cuda"),
    ("streams/cuda-graphs", "replayed calls equal launched ones, no buffer moves", streams.cuda_graphs, "graphs"),
    ("streams/moved-buffers", "graphs of freed buffers are not replayed for new ones", streams.moved_buffers, "graphs"),
    ("memory/allocations", "in steady state only noise_pred is allocated", lifetime.allocations, "cuda"),
    ("memory/close", "closing frees the memory", lifetime.close, "cuda"),
    ("threads/two", "two threads with a UNet each stay independent", lifetime.threads, None),
)
# Checks for each architecture, number of images and engine.
_PERFORMANCE: tuple[tuple[str, str, _Run, str | None], ...] = (
    ("loop", "the loop takes little more time than its engine calls", performance.loop, None),
    ("deepcache", "faster than DeepCache's helper on eager PyTorch", performance.against_helper, "DeepCache"),
    ("compiled", "as fast as two modules of torch.compile", performance.against_compiled, "triton"),
    ("memory", "caching adds little more memory than the shallow weights and features", performance.memory, "cuda"),
    ("roofline", "FLOP/s stay below the machine's ceiling", performance.roofline, None),
)


def catalog(options: GpuOptions) -> list[GpuCheck]:
    """Return the checks that these options select, in the order in which they run."""
    checks = []

    def add(id: str, title: str, run: Callable[[Workbench], CheckOutcome], engine: str, obstacle: str | None) -> None:
        checks.append(GpuCheck(id, title, run, engine, obstacle))

    for engine in options.engines:
        for precision in options.precisions:
            obstacle = _obstacle(options, engine, (precision,))
            for name, title, run in _BY_PRECISION:
                bound = partial(run, engine=engine, precision=precision)
                add(
                    f"correctness/{name}/{engine}/{precision}",
                    f"{engine}, {precision}: {title}",
                    bound,
                    engine,
                    obstacle,
                )
        obstacle = _obstacle(options, engine, options.precisions)
        for name, title, run, need in _BY_ENGINE:
            missing = obstacle or _missing(need, options, engine)
            add(f"{name}/{engine}", f"{engine}: {title}", partial(_first_precision, run, engine), engine, missing)
    if not options.performance:
        return checks
    for architecture in options.architectures:
        for images in options.batches:
            for engine in options.engines:
                contest = performance.Contest(architecture, engine, options.precisions[0], images)
                obstacle = _obstacle(options, engine, options.precisions[:1])
                for name, title, run, need in _PERFORMANCE:
                    add(
                        f"performance/{name}/{architecture}/b{images}/{engine}",
                        f"{engine}, {architecture}, {images} images: {title}",
                        partial(run, contest=contest),
                        engine,
                        obstacle or _missing(need, options, engine),
                    )
    return checks


def no_device(device: str) -> str | None:
    """Return why no check can run on this device here; None where checks can run."""
    import torch

    if not device.startswith("cuda") or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"no GPU can be used: PyTorch {torch.__version__} was built without CUDA"
    return (
        f"no GPU can be used: PyTorch {torch.__version__} for CUDA {torch.version.cuda} finds no NVIDIA GPU or driver"
    )


def _obstacle(options: GpuOptions, engine: str, precisions: tuple[str, ...]) -> str | None:
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


def _missing(need: str | None, options: GpuOptions, engine: str) -> str | None:
    """Return why a requirement of a check is not met; None where it is met."""
    cuda = options.device.startswith("cuda")
    if need in ("cuda", "graphs"):
        if not cuda:
            return f"this check needs CUDA, and this run is on {options.device}"
        return f"{engine} records no CUDA graphs" if need == "graphs" and engine not in streams.RECORDING else None
    if need is None or (need == "triton" and not cuda):  # torch.compile writes C++ for a CPU
        return None
    return None if find_spec(need) is not None else f"the package {need} is not installed: pip install {need}"


def _first_precision(run: _Run, engine: str, bench: Workbench) -> CheckOutcome:
    return run(bench, engine, usable_precision(engine, bench.options.precisions))
