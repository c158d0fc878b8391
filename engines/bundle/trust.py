"""Record of the bundles that this user trusts to run code.

A compiled engine is code: its library runs it when it opens the engine. A bundle is trusted if ``offcut build`` made it
here, or if the user once gave its digest or accepted it. The record holds digests, so that it applies to every copy of
a bundle, and to no copy that somebody has changed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import platformdirs

_VARIABLE = "OFFCUT_DATA"
_FILE = "trusted-bundles.txt"

log = logging.getLogger("offcut.trust")


def record_file() -> Path:
    """Return the file of the record; ``OFFCUT_DATA`` names another directory than the user's own."""
    folder = os.environ.get(_VARIABLE)
    return (Path(folder) if folder else platformdirs.user_data_path("offcut")) / _FILE


def is_trusted(digest: str) -> bool:
    """Return whether the record can be read and holds a bundle's digest (``Bundle.built_digest``)."""
    try:
        return digest in record_file().read_text(encoding="utf-8").splitlines()
    except OSError:
        return False


def trust(digest: str) -> None:
    """Add a bundle's digest to the record. If the record cannot be written, a warning says so."""
    if is_trusted(digest):
        return
    file = record_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as record:
            record.write(f"{digest}\n")
    except OSError as error:
        log.warning(
            "cannot note in %s that this bundle was built here (%s): its compiled engines open with --trust only",
            file,
            error.strerror or error,
        )
