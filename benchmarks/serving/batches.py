"""Durations of engine calls by the number of requests that share them, and the largest gain that sharing allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..schema.serving import BatchRow, ServingLoad
from ..shapes.model import PROMPTS
from .load_plan import ServerSetting

AT_LOAD = 0.7
"""Rate of the simulated open loop, as a share of the capacity."""


def measure_batches(setting: ServerSetting, measured: ServingLoad, stage: Callable[[str], None]) -> None:
    """Measure the worker without HTTP, simulate its limits, and store both in ``measured``.

    ``allowed_latency`` is simulated as if only engine calls took time, at the load ``AT_LOAD``.
    """
    from ...engines.bundle.bundle import Bundle
    from ...runtime.batching.policy import Policy
    from ...runtime.generation.schedule import Uniform
    from ...runtime.pipeline import load
    from ..planning.capacity import WARMUP, RequestLoad, capacity
    from ..planning.measure import measure
    from ..planning.simulate import RequestKind, WorkerSetting

    bundle = Bundle.open(setting.bundle)
    engine = bundle.choose_engine(setting.engine, setting.device).name
    schedule = Uniform(setting.interval, warmup=setting.warmup)
    pipe: Any = load(bundle, engine, device=setting.device, threads=setting.threads)
    try:
        costs = measure(
            pipe,
            {
                "prompt": PROMPTS[0],
                "num_inference_steps": setting.steps,
                "guidance_scale": setting.guidance,
                **({} if setting.size is None else {"height": setting.size, "width": setting.size}),
            },
            schedule,
            model=setting.bundle.name,
            device=setting.device,
            together=[count for count in (1, 2, 4, 8, 16) if count <= setting.in_flight],
            stage=stage,
        )
    finally:
        pipe.unet.close()
    kind = RequestKind(tuple(schedule.is_full(call, setting.steps) for call in range(setting.steps)))
    shared = WorkerSetting(Policy(), max_in_flight=setting.in_flight, max_queue=10**6, max_batch=setting.rows)
    shared_rate, single_rate = (
        capacity(costs, RequestLoad([kind], requests=400), replace(shared, max_in_flight=in_flight))
        for in_flight in (setting.in_flight, 1)
    )
    no_time = {"between": dict.fromkeys(costs.between, 0.0), "encode": 0.0, "decode": 0.0}
    calls_only, load_of = type(costs)(**costs.model_dump() | no_time), RequestLoad([kind], requests=4000)
    ways = (shared, replace(shared, whole_requests=True))
    rate = AT_LOAD * min(capacity(calls_only, load_of, way) for way in ways)
    p50, p50_whole = (load_of.on(calls_only, way, rate).percentile(50, WARMUP) for way in ways)
    measured.batches = [
        BatchRow(
            requests=rows // costs.rows,
            rows=rows,
            full=costs.full[rows],
            shallow=costs.shallow[rows],
            between=costs.between[rows],
        )
        for rows in sorted(costs.full)
    ]
    measured.allowed, measured.allowed_latency = shared_rate / single_rate, p50_whole / p50
