"""Directories of the packaged model and its ControlNet, and prompts for the model."""

from __future__ import annotations

from pathlib import Path

from ...errors import ModelError

PROMPTS: tuple[str, ...] = (
    "a large red circle on a white background",
    "a large blue square on a grey background",
    "a large yellow star on a black background",
    "a large green triangle on a pink background",
    "a large white cross on a teal background",
    "a small purple diamond on a white background",
    "a red circle above a blue square on a grey background",
    "a yellow star left of a white circle on a black background",
)
"""Demonstration prompts: six with one object, then two with a relation."""

DIRECTORY = Path(__file__).parent / "model"
CONTROL = Path(__file__).parent / "control"
RUN = Path(__file__).parent / "run"


def model_path() -> Path:
    """Return the directory of the trained model, a diffusers `StableDiffusionPipeline`.

    Raises:
        ModelError: the installation has no such directory.
    """
    if not (DIRECTORY / "model_index.json").exists():
        raise ModelError(f"the shapes model is missing from {DIRECTORY}: reinstall offcut")
    return DIRECTORY


def control_path() -> Path:
    """Return the directory of the model's ControlNet for silhouettes, a diffusers `ControlNetModel`.

    Raises:
        ModelError: the installation has no such directory.
    """
    if not (CONTROL / "config.json").exists():
        raise ModelError(f"the shapes model's ControlNet is missing from {CONTROL}: reinstall offcut")
    return CONTROL
