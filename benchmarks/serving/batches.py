"""What engine calls take by how many requests share them, and what sharing can therefore gain at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ..shapes.model import PROMPTS
from .record import BatchRow

if TYPE_CHECKING:
    from ..planning.costs import Costs
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
        from ...engines.bundle import Bundle
        from ...runtime.pipeline import load
        from ...runtime.schedule import Uniform
        from ..planning.measure import measure

        opened = Bundle.open(serving.bundle)
        engine = opened.choose_engine(serving.engine, serving.device).name
        pipe: Any = load(opened, engine, device=serving.device, threads=serving.threads)
        arguments = {
            "prompt": PROMPTS[0],
            "num_inference_steps": serving.steps,
            "guidance_scale": serving.guidance,
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
        from ...runtime.batching.policy import Deadline
        from ...runtime.schedule import Uniform
        from ..planning.answer import Load, capacity
        from ..planning.simulate import Kind, Setting

        schedule = Uniform(serving.interval, warmup=serving.warmup)
        kind = Kind(tuple(schedule.is_full(call, serving.steps) for call in range(serving.steps)))
        load = Load([kind], requests=400)

        def most(in_flight: int) -> float:
            return capacity(self.costs, load, Setting(Deadline(), max_in_flight=in_flight, max_batch=serving.rows))

        return most(serving.in_flight) / most(1)
