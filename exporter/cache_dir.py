"""The user's cache directory: exports and compiled engines that offcut can make again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return the directory of offcut's caches; it may not exist yet.

    The environment variable ``OFFCUT_CACHE`` names another directory. Caches hold machine code, so only the user should
    be able to write to this directory.
    """
    override = os.environ.get("OFFCUT_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("offcut")
