"""Prompts for images that are generated to tune, calibrate or measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..exporter.load import PROMPTS_FILE

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle

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
"""Prompts that are used where neither the user nor the model has any."""


def read_prompts(file: Path) -> tuple[str, ...]:
    """Read prompts from a text file, one per line; empty lines are left out.

    Raises:
        UserError: the file cannot be read, or holds no prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: give a text file with one per line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"{file} holds no prompt: write one per line")
    return prompts


def prompts_for(root: Path, file: Path | None) -> tuple[str, ...]:
    """Return the prompts of a user's file; without a file the model's own prompts, or else ``PROMPTS``.

    Args:
        root: directory of a pipeline, which may hold ``PROMPTS_FILE``.

    Raises:
        UserError: a file cannot be read, or holds no prompt.
    """
    own = root / PROMPTS_FILE
    return read_prompts(file or own) if file is not None or own.is_file() else PROMPTS


def bundle_prompts(bundle: Bundle) -> tuple[str, ...]:
    """Return the prompts of a bundle's model if the bundle lists any, or else ``PROMPTS``.

    Raises:
        BundleError: the file of prompts is damaged.
        UserError: as ``read_prompts``.
    """
    if PROMPTS_FILE not in bundle.manifest.files:
        return PROMPTS
    bundle.verify_files([PROMPTS_FILE])
    return read_prompts(bundle.path / PROMPTS_FILE)
