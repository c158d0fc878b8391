"""Views: directories that hold verified files of a bundle and nothing else, for libraries that read whole directories.

diffusers and transformers look for files by name, so a file that somebody adds to a component's directory could take
the place of a listed one (``tokenizer.json``, an index of shards, ``adapter_config.json``). A view does not have it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path

from ...errors import BundleError
from .bundle import Bundle
from .reading import inside

_COPIED_BYTES = 2**24
"""Files up to this size are copied into a view; larger ones are links to the opened file."""

_OPEN_FILES = Path("/proc/self/fd")


@contextmanager
def view(bundle: Bundle, names: Iterable[str]) -> Iterator[Path]:
    """Yield a private directory with these files of a bundle, which is removed at the end.

    A file is opened once. Its digest is computed from the opened file, and readers of the view get its content from
    there. So a file that is exchanged in the bundle after the check has no effect.

    Raises:
        BundleError: a file is missing, altered, or a link that leaves the bundle.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offcut-")))
        for name in names:
            file = stack.enter_context(_open(bundle, name))
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _verify(bundle, name, file)
            if bundle.manifest.files[name].size > _COPIED_BYTES and _OPEN_FILES.is_dir():
                target.symlink_to(_OPEN_FILES / str(file.fileno()))
                continue
            with target.open("wb") as copy:
                shutil.copyfileobj(file, copy)
            with target.open("rb") as copy:
                _verify(bundle, name, copy)
        yield folder


def _open(bundle: Bundle, name: str) -> BufferedReader:
    if name not in bundle.manifest.files:
        raise BundleError(f"{bundle.path}: {name} is not in the manifest; build the bundle again")
    file = inside(bundle.path, name)
    if not file.is_file():
        raise BundleError(f"{bundle.path}: {name} is missing; copy or build the bundle again")
    return file.open("rb")


def _verify(bundle: Bundle, name: str, file: BufferedReader) -> None:
    """Compare an opened file with the manifest, and go back to its start."""
    if hashlib.file_digest(file, "sha256").hexdigest() != bundle.manifest.files[name].sha256:
        raise BundleError(f"{bundle.path}: {name} was altered (its SHA-256 differs); copy or build the bundle again")
    file.seek(0)
