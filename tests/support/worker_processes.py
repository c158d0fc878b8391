"""The worker of `offcut bench latency`, called in this process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from safetensors.torch import load_file

from offcut.benchmarks.latency.case import Case, Entrant
from offcut.benchmarks.latency.worker import LatencyWorker


def latents_in_fp32(case: Case, entrants: Iterable[Entrant]) -> dict[str, torch.Tensor]:
    """Return the final latents of each fp32 contestant by its family, from four steps with every second call full."""
    latents = {}
    for entrant in entrants:
        if entrant.precision == "fp32":
            worker = LatencyWorker()
            worker.open(case=case.as_json(), entrant=entrant.as_json(), calls=2, warm_up=1)
            answer = worker.loop(name=entrant.name, calls=2)
            assert len(answer["full"]) == (2 if entrant.cached else 4)
            latents[entrant.family] = load_file(answer["latents"])["latents"]
    return latents
