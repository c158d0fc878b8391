"""Contestants with torch.compile and its eager backend: their latents, and which of their calls are shallow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offcut.benchmarks.latency.case import Case, Entrant, LatencyRequest
from offcut.benchmarks.latency.resolve import resolve
from offcut.benchmarks.latency.rounds import relative_difference
from offcut.benchmarks.latency.worker import LatencyWorker
from offcut.engines.bundle.bundle import Bundle

EAGER, HELPER = "diffusers eager bf16", "DeepCache eager bf16"
COMPILED, BLOCKS, WHOLE = "torch.compile bf16", "DeepCache compile-blocks bf16", "DeepCache compile bf16"


@pytest.fixture(scope="module")
def answers(
    tiny_bundle: Path, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    """Return one measured loop of each contestant, with its final latents."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("compiled")
    request = LatencyRequest(
        tiny_pipeline_dir, steps=6, schedule="uniform:3", threads=1, peers=("diffusers", "deepcache", "compile")
    )
    case, entrants = resolve(Bundle.open(tiny_bundle), request, folder)
    loops = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        LatencyWorker().inputs(case=case.as_json())
        for entrant in entrants:
            if entrant.precision == "bf16" and entrant.kind != "offcut":
                loops[entrant.name] = _loop(case, entrant)
                loops[entrant.name]["latents"] = load_file(loops[entrant.name]["latents"])["latents"]
    yield loops
    torch._dynamo.reset()


def _loop(case: Case, entrant: Entrant) -> dict[str, Any]:
    torch._dynamo.reset()  # in a run each has its own process
    torch._dynamo.utils.counters.clear()
    worker = LatencyWorker()
    opened = worker.open(case=case.as_json(), entrant=entrant.as_json(), calls=2, warm_up=1)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    answer = worker.loop(name=entrant.name, calls=2)
    answer["compiled"] = compiled
    answer["compiled late"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
    answer["alone"] = worker.alone(name=entrant.name, repeats=2)
    assert opened["warm_up"] > 0
    return answer


@pytest.mark.slow
def test_compiled_contestants_are_compiled_before_they_are_measured(
    answers: dict[str, dict[str, Any]],
) -> None:
    assert set(answers) == {EAGER, HELPER, COMPILED, BLOCKS, WHOLE}
    for name, answer in answers.items():
        assert (answer["compiled"] > 0) is (name not in (EAGER, HELPER)), name
        assert answer["compiled late"] == 0, name


@pytest.mark.slow
def test_compiled_contestants_compute_what_eager_ones_compute(answers: dict[str, dict[str, Any]]) -> None:
    uncached, cached = answers[EAGER]["latents"], answers[HELPER]["latents"]
    cache_difference = relative_difference(cached, uncached)
    assert cache_difference > 1e-2
    assert relative_difference(answers[COMPILED]["latents"], uncached) < cache_difference / 10
    for name in (BLOCKS, WHOLE):
        assert relative_difference(answers[name]["latents"], cached) < cache_difference / 10, name
        assert relative_difference(answers[name]["latents"], uncached) > cache_difference / 2, name


@pytest.mark.slow
def test_full_and_shallow_calls_are_distinguished(answers: dict[str, dict[str, Any]]) -> None:
    for name, answer in answers.items():
        cached = name in (HELPER, BLOCKS, WHOLE)
        assert (len(answer["full"]), len(answer["shallow"])) == ((2, 4) if cached else (6, 0))
        assert set(answer["alone"]) == ({"full", "shallow"} if cached else {"full"})
        assert sum(answer["full"]) + sum(answer["shallow"]) < answer["loop"]
