"""Survey of diffusers' pipelines with a UNet: all classes, how one is made small and called, and the manual's table.

``python -m support.survey``, run in ``tests/``, writes the table of ``docs/reference/models.md`` anew.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from .components import stable_diffusion
from .recipes import NOT_MADE, RECIPES, Recipe

STEPS = 7
MANUAL = Path(__file__).parents[2] / "docs" / "reference" / "models.md"


def pipelines_with_a_unet() -> dict[str, Any]:
    """Return every pipeline class of the installed diffusers that takes a UNet of offcut's families, by name."""
    from offcut.exporter.families import FAMILIES

    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        if "onnx" in module.name or "flax" in module.name:
            continue
        try:
            contents = vars(importlib.import_module(module.name))
        except (ImportError, RuntimeError, AttributeError):
            continue  # needs a package that is not installed
        for name, kind in contents.items():
            if not inspect.isclass(kind) or not issubclass(kind, diffusers.DiffusionPipeline):
                continue
            unet = inspect.signature(kind.__init__).parameters.get("unet")
            if kind.__module__ == module.name and unet and any(family in str(unet.annotation) for family in FAMILIES):
                found[name] = kind
    return found


def new_pipeline(kind: Any, recipe: Recipe, unet: Any) -> Any:
    """Return a pipeline with this UNet; components of Stable Diffusion are its own unless the recipe names others."""
    parameters = inspect.signature(kind.__init__).parameters
    components: dict[str, Any] = {"unet": unet, "scheduler": recipe.scheduler()}
    components |= {name: make() for name, make in recipe.components.items() if name in parameters}
    for name, parameter in parameters.items():
        if name == "requires_safety_checker":
            components[name] = False
        elif name in stable_diffusion() and name not in components:
            components[name] = stable_diffusion()[name]
        elif name not in components and name != "self" and parameter.default is inspect.Parameter.empty:
            components[name] = None
    pipe = kind(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, recipe: Recipe) -> torch.Tensor:
    """Call a pipeline, and return its images or latents."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments = {
        "num_inference_steps": STEPS,
        "output_type": recipe.output,
        "generator": torch.Generator().manual_seed(0),
        **recipe.call,
    }
    output = pipe(**{name: value for name, value in arguments.items() if name in parameters})
    result = next(getattr(output, name) for name in ("prediction", "frames", "rgb", "images") if hasattr(output, name))
    if isinstance(result, list) and isinstance(result[0], Image.Image):
        result = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in result])
    return torch.as_tensor(result)


def table(kinds: Mapping[str, Any]) -> list[str]:
    """Return the rows of the manual's table, one for each class."""
    rows = []
    for name in sorted(kinds):
        if name in NOT_MADE:
            rows.append(f"| `{name}` | not made: {NOT_MADE[name]} |")
            continue
        recipe = RECIPES[name]
        words = ["refused" if recipe.refused else "works", *([recipe.note] if recipe.note else [])]
        rows.append(f"| `{name}` | {': '.join(words)} |")
    return rows


def with_table(text: str, rows: list[str]) -> str:
    """Return the manual's page with these rows in place of those of its table of pipelines."""
    before, heading, rest = text.partition("| pipeline | |\n|---|---|\n")
    assert heading, "the page has no table of pipelines"
    _, blank, after = rest.partition("\n\n")
    return before + heading + "\n".join(rows) + blank + after


if __name__ == "__main__":
    MANUAL.write_text(with_table(MANUAL.read_text(encoding="utf-8"), table(pipelines_with_a_unet())), encoding="utf-8")
