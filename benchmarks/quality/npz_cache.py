"""Arrays that a long run stores next to its result, so that an interrupted run continues."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ...errors import UserError


def read(path: Path, *names: str) -> tuple[Any, ...] | None:
    """Return the arrays of these names, those without dimensions as Python values; None if the file is missing.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and its images are generated again") from error
    return tuple(array if array.ndim else array.item() for array in arrays)


def write(path: Path, **arrays: Any) -> None:
    """Write arrays to a temporary file and rename it, so that the file is always complete.

    Raises:
        UserError: it cannot be written.
    """
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):  # where the folder itself is what cannot be
            beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; give another directory with -o") from error
