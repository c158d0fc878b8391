"""What engine calls take by how many requests share them, and what sharing can therefore gain at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from ..schema.serving import BatchRow
from ..shapes.model import PROMPTS
from .goals import AT_LOAD

if TYPE_CHECKING:
    from ..planning.answer import Load
    from ..planning.costs import Costs
    from ..planning.simulate import Setting
    from .process import Serving


@dataclass(frozen=True)
class Batches:
    """Measured with the worker alone, without HTTP.

    Attributes:
        costs: as ``offcut bench plan`` has them.
    """

    costs: Costs

    @classmethod
    def measure(cls, serving: Serving, stage: Callable[[str], None] = lambda text: None) -> Self:
        from ...engines.bundle.bundle import Bundle
        from ...runtime.generation.schedule import Uniform
        from ...runtime.pipeline import load
        from ..planning.measure import measure

        opened = Bundle.open(serving.bundle)
        engine = opened.choose_engine(serving.engine, serving.device).name
        pipe: Any = load(opened, engine, device=serving.device, threads=serving.threads)
        arguments = {
            "prompt": PROMPTS[0],
            "num_inference_steps": serving.steps,
            "guidance_scale": serving.guidance,
            **({} if serving.size is None else {"height": serving.size, "width": serving.size}),
        }
        schedule = Uniform(serving.interval, warmup=serving.warmup)
        together = [count for count in (1, 2, 4, 8, 16) if count <= serving.in_flight]
        try:
            return cls(
                measure(
                    pipe,
                    arguments,
                    schedule,
                    model=serving.bundle.name,
                    device=serving.device,
                    together=together,
                    stage=stage,
                )
            )
        finally:
            pipe.unet.close()

    @property
    def rows(self) -> list[BatchRow]:
        costs = self.costs
        return [
            BatchRow(
                requests=rows // costs.rows,
                rows=rows,
                full=costs.full[rows],
                shallow=costs.shallow[rows],
                between=costs.between[rows],
            )
            for rows in sorted(costs.full)
        ]

    def allowed(self, serving: Serving) -> float:
        """Throughput with as many requests as may be in flight over that with one, as these times simulate it."""
        from ..planning.answer import capacity

        setting = _setting(serving)
        most, one = (
            capacity(self.costs, _load(serving, 400), replace(setting, max_in_flight=in_flight))
            for in_flight in (serving.in_flight, 1)
        )
        return most / one

    def allowed_latency(self, serving: Serving) -> float:
        """p50 of batches of whole requests over that of shared steps at ``AT_LOAD``, if only engine calls took time."""
        from ..planning.answer import WARMUP, capacity

        free = {"between": dict.fromkeys(self.costs.between, 0.0), "encode": 0.0, "decode": 0.0}
        bare, load = type(self.costs)(**self.costs.model_dump() | free), _load(serving, 4000)
        shared = _setting(serving)
        whole = replace(shared, whole_requests=True)
        rate = AT_LOAD * min(capacity(bare, load, each) for each in (shared, whole))
        steps, others = (load.on(bare, each, rate).percentile(50, WARMUP) for each in (shared, whole))
        return others / steps


def _setting(serving: Serving) -> Setting:
    from ...runtime.batching.policy import Policy
    from ..planning.simulate import Setting

    return Setting(Policy(), max_in_flight=serving.in_flight, max_queue=10**6, max_batch=serving.rows)


def _load(serving: Serving, requests: int) -> Load:
    from ...runtime.generation.schedule import Uniform
    from ..planning.answer import Load
    from ..planning.simulate import Kind

    schedule = Uniform(serving.interval, warmup=serving.warmup)
    return Load(
        [Kind(tuple(schedule.is_full(call, serving.steps) for call in range(serving.steps)))], requests=requests
    )
