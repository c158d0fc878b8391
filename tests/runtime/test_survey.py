"""Pipelines of diffusers on compiled, cached UNets: equal to eager PyTorch with plain reuse, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import new_unet
from support.recipes import NOT_MADE, RECIPES, Recipe
from support.reuse import EagerReuse
from support.survey import MANUAL, new_pipeline, pipelines_with_a_unet, run, table, with_table

import offcut
from offcut.errors import UserError
from offcut.runtime.generation.schedule import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' use of NumPy

QUICK = ("StableDiffusionInstructPix2PixPipeline", "ScoreSdeVePipeline", "IFPipeline")
SAME = 90.0


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return pipelines_with_a_unet()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Recipe], tuple[Any, offcut.UNet]]]:
    """Function that returns a recipe's eager UNet and its engines; recipes with equal builds share them."""
    built: dict[str, tuple[Any, offcut.UNet]] = {}

    def get(recipe: Recipe) -> tuple[Any, offcut.UNet]:
        key = repr(sorted(recipe.unet.items())) + repr(recipe.build)
        if key not in built:
            folder = tmp_path_factory.mktemp("survey")
            eager = new_unet(recipe.unet)
            eager.save_pretrained(folder / "model")
            offcut.build(folder / "model", folder / "b", engine="onnxruntime", **recipe.build)
            unet = offcut.UNet.load(folder / "b", threads=1)
            unet.advise = False
            built[key] = eager, unet
        return built[key]

    yield get
    for _, unet in built.values():
        unet.close()


def refusal(kind: Any, recipe: Recipe, engines: Callable[[Recipe], tuple[Any, offcut.UNet]]) -> str:
    """Return the message with which the build, ``attach`` or the call is refused; empty if none is."""
    try:
        _, unet = engines(recipe)
        run(offcut.attach(new_pipeline(kind, recipe, unet), unet), recipe)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_a_pipeline_equals_eager_pytorch_or_is_refused(
    name: str,
    kinds: dict[str, Any],
    engines: Callable[[Recipe], tuple[Any, offcut.UNet]],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    recipe, kind = RECIPES[name], kinds[name]
    if recipe.refused:
        assert recipe.refused in refusal(kind, recipe, engines)
        return
    eager_unet, unet = engines(recipe)
    unet.set_schedule(None)
    uncached = run(new_pipeline(kind, recipe, eager_unet), recipe)
    assert torch.isfinite(uncached).all()
    assert decibels(run(offcut.attach(new_pipeline(kind, recipe, unet), unet), recipe), uncached) > SAME
    unet.set_schedule(Uniform(3))
    # Components with a state of their own, such as a scheduler of a super-resolution, are new for each call.
    cached = run(offcut.attach(new_pipeline(kind, recipe, unet), unet), recipe)
    record = unet.last_run
    assert record is not None
    if recipe.one_call_a_step:
        assert record.timeline == "".join("#" if call % 3 == 0 else "." for call in range(len(record.full)))
        assert record.calls == len(record.full)
    calls = list(zip(record.trajectories, record.full, strict=True))
    with EagerReuse(eager_unet, lambda call: calls[call]):
        expected = run(new_pipeline(kind, recipe, eager_unet), recipe)
    assert decibels(cached, expected) > SAME


def test_every_pipeline_class_is_covered(kinds: dict[str, Any]) -> None:
    assert set(RECIPES) | set(NOT_MADE) == set(kinds)
    assert not set(RECIPES) & set(NOT_MADE)


def test_the_manual_has_the_table_of_the_survey(kinds: dict[str, Any]) -> None:
    text = MANUAL.read_text(encoding="utf-8")
    assert with_table(text, table(kinds)) == text
