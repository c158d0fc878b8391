"""What is drawn where images are made to tune, calibrate or measure with."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..exporter.load import PROMPTS_FILE

PROMPTS = (
    "a photograph of a mountain lake in the morning",
    "a portrait of an old fisherman, oil painting",
    "a red circle on a white background",
    "a busy street at night in the rain, neon lights",
    "a bowl of fruit on a wooden table",
    "a small blue house beside a green tree",
    "an astronaut on the surface of the moon",
    "a close-up of a cat's face",
)
"""What is drawn where neither the user nor the model says."""


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: give a text file with one a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"{file} holds no prompt: write one a line")
    return prompts


def prompts_for(root: Path, file: Path | None) -> tuple[str, ...]:
    """The prompts of a user's file; without one the model's own, or such as any text-to-image model draws.

    Args:
        root: of a bundle or pipeline, which may hold ``PROMPTS_FILE``.

    Raises:
        UserError: a file cannot be read, or holds none.
    """
    own = root / PROMPTS_FILE
    return read_prompts(file or own) if file is not None or own.is_file() else PROMPTS
