"""Commits to a bundle: files are staged and moved in, then the manifest is replaced in one step.

Files in a bundle never change. If a build stops half-way, the bundle stays as it was. Two builds at once both commit,
one after the other.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ...errors import BundleError
from .bundle import Bundle, digest_file
from .manifest import MANIFEST_FILE, FileEntry, Manifest

_STAGING = ".build-"
_BUILD_FOLDERS = ("cache", "components", "engines", "schedules", "unet")
"""Folders that only builds and ``tune`` write to; earlier versions wrote ``cache``."""
LOCK_FILE = ".lock"


@contextmanager
def staging(bundle: Path) -> Iterator[Path]:
    """Yield a directory inside the bundle to build in; it is always removed at the end.

    Raises:
        BundleError: the disk is full, or the directory cannot be written.
    """
    try:
        bundle.mkdir(parents=True, exist_ok=True)
        folder = bundle / f"{_STAGING}{uuid.uuid4().hex[:12]}"
        folder.mkdir()
    except OSError as error:
        raise BundleError(f"cannot write {bundle}: {error.strerror or error}") from error
    try:
        yield folder
    except OSError as error:
        # NumPy, which writes the weights, reports a full disk without an error number.
        short_write = error.errno is None and "requested and" in str(error)
        if short_write or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BundleError(
                f"the disk of {bundle} is full; what was in the bundle is unchanged: free some space and build again"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            bundle.rmdir()  # removes the empty directory of a failed build


def commit(bundle: Path, staged: Path, update: Callable[[Manifest | None, dict[str, FileEntry]], Manifest]) -> Manifest:
    """Move the staged files into the bundle and replace its manifest.

    Args:
        bundle: the bundle's directory.
        staged: a directory laid out as the bundle is.
        update: returns the new manifest, given the current one (None for a new bundle) and the entries of the staged
            files. Called under the bundle's lock.

    Raises:
        BundleError: the bundle has another file with the name of a staged one.
    """
    entries = {}
    for file in sorted(path for path in staged.rglob("*") if path.is_file()):
        entries[file.relative_to(staged).as_posix()] = FileEntry(size=file.stat().st_size, sha256=digest_file(file))
    with FileLock(bundle / LOCK_FILE):
        current = Bundle.open(bundle).manifest if (bundle / MANIFEST_FILE).exists() else None
        manifest = update(current, entries)
        existing = set(current.files) if current else set()
        moved: list[Path] = []
        try:
            for name, entry in entries.items():
                if name in existing:
                    _check_same(bundle / name, name, entry)
                    continue
                # A file that the manifest does not name is a leftover of a build that was killed while it moved files.
                (bundle / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged / name, bundle / name)
                moved.append(bundle / name)
            _replace(bundle / MANIFEST_FILE, manifest.to_json())
        except BaseException:
            _remove(moved, bundle)
            raise
    return manifest


@dataclass(frozen=True)
class PrunedFiles:
    """The removed files: their names, and their total size in bytes; and the names of other files that were left."""

    files: tuple[str, ...]
    bytes: int
    left: tuple[str, ...]


def prune(bundle: Path, dry_run: bool = False) -> PrunedFiles:
    """Remove builds that the manifest does not name: graphs of earlier builds, and leftovers of a killed build.

    Only files in places where builds write are removed. Other files are the user's own and stay.

    Do not prune while a build is running into the same bundle: its unfinished files would be removed too.

    Raises:
        BundleError: the directory is not a bundle; nothing was removed.
    """
    Bundle.open(bundle)  # before the lock, which creates a file
    with FileLock(bundle / LOCK_FILE):
        opened = Bundle.open(bundle)
        named = {*opened.manifest.files, MANIFEST_FILE, LOCK_FILE}
        files = sorted(path for path in opened.path.rglob("*") if path.is_file() or path.is_symlink())
        unnamed = [name for path in files if (name := path.relative_to(bundle).as_posix()) not in named]
        removed = [name for name in unnamed if _is_build_output(name)]
        pruned = PrunedFiles(
            tuple(removed),
            sum((bundle / name).lstat().st_size for name in removed),
            tuple(name for name in unnamed if name not in removed),
        )
        if not dry_run:
            for name in removed:
                (bundle / name).unlink()
            for folder in sorted((path for path in bundle.rglob("*") if path.is_dir()), reverse=True):
                if _is_build_output(f"{folder.relative_to(bundle).as_posix()}/") and not any(folder.iterdir()):
                    folder.rmdir()
    return pruned


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of a bundle is a lock, a staging directory or an unfinished manifest."""
    return name == LOCK_FILE or name.startswith((_STAGING, f".{MANIFEST_FILE}-"))


def _is_build_output(name: str) -> bool:
    """Return whether a file of a bundle is in a place that only builds write to."""
    first, *others = name.split("/")
    return is_leftover(first) or bool(others and first in _BUILD_FOLDERS)


def _check_same(target: Path, name: str, entry: FileEntry) -> None:
    if not target.is_file() or target.stat().st_size != entry.size or digest_file(target) != entry.sha256:
        raise BundleError(f"{target.parent} holds another file {name}; build into another directory")


def _remove(files: list[Path], bundle: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)
        for folder in file.parents:
            if folder == bundle or any(folder.iterdir()):
                break
            folder.rmdir()


def _replace(file: Path, text: str) -> None:
    """Replace a file, so that a reader sees the old text or the new text, never a part."""
    temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
