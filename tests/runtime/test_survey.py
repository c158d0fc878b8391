"""Pipelines of diffusers on compiled, cached UNets: equal to eager PyTorch with plain reuse, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.models import new_unet
from support.reuse import EagerReuse
from support.survey import RECIPES, REFUSED, new_pipeline, pipelines_with_a_unet, run

import offcut
from offcut.errors import UserError
from offcut.runtime.generation.schedule import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' use of NumPy

MANUAL = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
QUICK = ("StableDiffusionInstructPix2PixPipeline", "ScoreSdeVePipeline")
SAME = 90.0


@pytest.fixture(scope="module")
def small_parts(small_pipeline_dir: Path) -> dict[str, Any]:
    pipe = StableDiffusionPipeline.from_pretrained(small_pipeline_dir)
    return {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer")}


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return pipelines_with_a_unet()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Any, offcut.UNet]]]:
    """Function that returns a recipe's eager UNet and its engines; recipes with equal configs share them."""
    made: dict[str, tuple[Any, offcut.UNet]] = {}

    def get(name: str) -> tuple[Any, offcut.UNet]:
        key = str(sorted(RECIPES[name].unet.items(), key=str))
        if key not in made:
            folder = tmp_path_factory.mktemp("survey")
            eager = new_unet(RECIPES[name].unet)
            eager.save_pretrained(folder / "model")
            offcut.build(folder / "model", folder / "b", engine="onnxruntime")
            unet = offcut.UNet.load(folder / "b", threads=1)
            unet.advise = False
            made[key] = eager, unet
        return made[key]

    yield get
    for _, unet in made.values():
        unet.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_a_pipeline_equals_eager_pytorch_or_is_refused(
    name: str,
    kinds: dict[str, Any],
    engines: Callable[[str], tuple[Any, offcut.UNet]],
    small_parts: dict[str, Any],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    recipe, kind = RECIPES[name], kinds[name]
    eager_unet, unet = engines(name)
    unet.set_schedule(None)
    pipe = new_pipeline(kind, recipe, small_parts, unet)
    if name in REFUSED:
        with pytest.raises(UserError) as caught:
            run(offcut.attach(pipe, unet), recipe)
        assert REFUSED[name] in str(caught.value)
        return
    uncached = run(new_pipeline(kind, recipe, small_parts, eager_unet), recipe)
    assert torch.isfinite(uncached).all()
    assert decibels(run(offcut.attach(pipe, unet), recipe), uncached) > SAME
    unet.set_schedule(Uniform(3))
    # Components with a state of their own, such as a scheduler of a super-resolution, are new for each call.
    cached = run(offcut.attach(new_pipeline(kind, recipe, small_parts, unet), unet), recipe)
    record = unet.last_run
    assert record is not None
    if recipe.one_call_a_step:
        assert record.timeline == "".join("#" if call % 3 == 0 else "." for call in range(len(record.full)))
        assert record.calls == len(record.full)
    calls = list(zip(record.trajectories, record.full, strict=True))
    with EagerReuse(eager_unet, lambda call: calls[call]):
        expected = run(new_pipeline(kind, recipe, small_parts, eager_unet), recipe)
    assert decibels(cached, expected) > SAME


def test_the_manual_lists_what_the_survey_covers(kinds: dict[str, Any]) -> None:
    text = MANUAL.read_text(encoding="utf-8")
    rows = {
        line.split("`")[1]: "refused" if "| refused" in line else "works"
        for line in text.splitlines()
        if line.startswith("| `") and "Pipeline" in line.split("`")[1]
    }
    assert rows == {name: "refused" if name in REFUSED else "works" for name in RECIPES}
    assert set(RECIPES) <= set(kinds)
