"""Writing a bundle: files are made aside, then moved in, and one replacement of the manifest makes them count.

Files never change once they are in place. Whatever stops a build half-way, the bundle stays as it was; two builds at
once both get in, one after the other.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ..errors import BundleError
from .bundle import Bundle, digest_file
from .manifest import MANIFEST_FILE, FileEntry, Manifest

_STAGING = ".build-"
_LOCK = ".lock"


@contextmanager
def staging(bundle: Path) -> Iterator[Path]:
    """A directory inside the bundle to build in; it is removed at the end, whatever happens.

    Raises:
        BundleError: the disk is full or the directory cannot be written.
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BundleError(
                f"the disk of {bundle} is full; what was in the bundle is unchanged: free some space and build again"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(path.name != _LOCK for path in bundle.iterdir()):
            shutil.rmtree(bundle, ignore_errors=True)  # a build that failed leaves no empty bundle


def commit(bundle: Path, staged: Path, update: Callable[[Manifest | None, dict[str, FileEntry]], Manifest]) -> Manifest:
    """Move the staged files into the bundle and replace its manifest.

    Args:
        bundle: the bundle's directory.
        staged: a directory laid out as the bundle is.
        update: from the manifest that is there now (None for a new bundle) and the entries of the staged files to
            the new manifest. Called under the bundle's lock.

    Raises:
        BundleError: a staged file has the name of another one that is there already.
    """
    entries = {}
    for file in sorted(path for path in staged.rglob("*") if path.is_file()):
        entries[file.relative_to(staged).as_posix()] = FileEntry(size=file.stat().st_size, sha256=digest_file(file))
    with FileLock(bundle / _LOCK):
        current = Bundle.open(bundle).manifest if (bundle / MANIFEST_FILE).exists() else None
        manifest = update(current, entries)
        for name, entry in entries.items():
            _move_in(staged / name, bundle / name, name, entry)
        _replace(bundle / MANIFEST_FILE, manifest.to_json())
    return manifest


@dataclass(frozen=True)
class Pruned:
    """What was removed: files by name, and their bytes in all."""

    files: tuple[str, ...]
    bytes: int


def prune(bundle: Path, dry_run: bool = False) -> Pruned:
    """Remove what no manifest names: older graphs, and what a killed build left behind.

    Do not prune while a build is running into the same bundle: its unfinished files would go too.
    """
    with FileLock(bundle / _LOCK):
        opened = Bundle.open(bundle)
        named = {*opened.manifest.files, MANIFEST_FILE, _LOCK}
        files = sorted(path for path in opened.path.rglob("*") if path.is_file() or path.is_symlink())
        loose = [path for path in files if path.relative_to(bundle).as_posix() not in named]
        removed = Pruned(
            tuple(path.relative_to(bundle).as_posix() for path in loose), sum(path.lstat().st_size for path in loose)
        )
        if not dry_run:
            for path in loose:
                path.unlink()
            for folder in sorted((path for path in bundle.rglob("*") if path.is_dir()), reverse=True):
                if not any(folder.iterdir()):
                    folder.rmdir()
    return removed


def _move_in(source: Path, target: Path, name: str, entry: FileEntry) -> None:
    if target.exists():
        if target.stat().st_size != entry.size or digest_file(target) != entry.sha256:
            raise BundleError(
                f"{target.parent} holds another {name}; run offcut prune, or build into another directory"
            )
        source.unlink()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _replace(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    fresh = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    with fresh.open("w", encoding="utf-8", newline="\n") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(fresh, file)
