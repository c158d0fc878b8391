"""Views: directories that hold verified files of a bundle and nothing else, for libraries that read whole directories.

diffusers and transformers look for files by name, so a file that somebody adds to a component's directory could take
the place of a listed one (``tokenizer.json``, an index of shards, ``adapter_config.json``). A view does not have it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...errors import BundleError
from .bundle import Bundle, digest_file

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
            file = stack.enter_context(bundle.open_verified(name))
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if bundle.manifest.files[name].size > _COPIED_BYTES and _OPEN_FILES.is_dir():
                target.symlink_to(_OPEN_FILES / str(file.fileno()))
                continue
            with target.open("wb") as copy:
                shutil.copyfileobj(file, copy)
            if digest_file(target) != bundle.manifest.files[name].sha256:
                raise BundleError(f"{bundle.path}: {name} was changed while it was opened; open the bundle again")
        yield folder
