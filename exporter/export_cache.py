"""A cache of exports on this machine, so that a second build of the same UNet does not trace it again.

Each entry is a directory named by a digest of everything that decides the export: the weights, the UNet's config, the
options of ``export``, the versions of the libraries, and the source code of ``offcut.exporter``. An entry holds the
files that ``export`` writes, and ``entry.json`` with their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UserError
from .cache_dir import cache_dir
from .load import ModelSource
from .trace.convert import WEIGHTS_FILE
from .trace.export import GRAPH_FILE, PARAMETERS_FILE, ExportedUNet, Progress, export, read_export
from .trace.reference import REFERENCE_FILE

FILES = (GRAPH_FILE, WEIGHTS_FILE, PARAMETERS_FILE, REFERENCE_FILE)
SIZE_VARIABLE = "OFFCUT_CACHE_SIZE"
DEFAULT_SIZE = 20 * 10**9
"""Bytes; one export of Stable Diffusion XL in fp32 takes 10 GB, one of Stable Diffusion 1.5 takes 3.4 GB."""

_ENTRY_FILE = "entry.json"
_PARTIAL = ".partial"
_LOCKS = "locks"
_BLOCK = 1 << 22  # bytes read at a time


def cached_export(
    source: ModelSource,
    out: Path,
    *,
    weights_digest: str,
    precision: str,
    opset: int,
    dims: Mapping[str, int],
    adapters: Sequence[str] = (),
    cache: ExportCache | None,
    progress: Progress = lambda step: None,
) -> ExportedUNet:
    """Export a UNet into a directory, or copy the same export from the cache.

    Args:
        weights_digest: digest of the UNet's weights and of the LoRAs and IP-Adapters that are fused into them.
        cache: the cache, or None to export without one.
        progress: called with the name of each stage as it begins.

    Raises:
        ModelError: as in ``export``.
    """
    options: dict[str, Any] = {"precision": precision, "opset": opset, "dims": dims, "adapters": adapters}
    if cache is None:
        return export(source, out, **options, progress=progress)
    key = cache_key(source, weights_digest, **options)
    with cache.locked(key, progress) as available:
        if available and cache.copy_to(key, out, progress):
            return read_export(out, source, **options)
        exported = export(source, out, **options, progress=progress)
        if available:
            cache.add(key, out, progress)
    if available:
        cache.shrink()
    return exported


def cache_key(
    source: ModelSource,
    weights_digest: str,
    *,
    precision: str,
    opset: int,
    dims: Mapping[str, int],
    adapters: Sequence[str] = (),
) -> str:
    """Return a digest of everything that decides what ``export`` writes, in hexadecimal.

    Names that start with an underscore are left out of the config, except the UNet's class: diffusers keeps paths and
    its own version under them.
    """
    config = {name: value for name, value in source.config.items() if name[0] != "_" or name == "_class_name"}
    parts = {
        "weights": weights_digest,
        "config": config,
        "attention": source.attention,
        "precision": precision,
        "opset": opset,
        "dims": dict(dims),
        "adapters": list(adapters),
        "versions": versions(),
        "exporter": exporter_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that trace a UNet and write the graph."""
    names = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript")
    return {name: metadata.version(name) for name in names}


def exporter_digest() -> str:
    """Return a SHA-256 of the source files of ``offcut.exporter``, in hexadecimal."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ExportCache:
    """A directory of exports that several processes may use at once.

    Attributes:
        folder: the directory, created when an export is added.
        size: maximum size in bytes. Above it, the least recently used entries are removed.
    """

    folder: Path
    size: int = DEFAULT_SIZE

    @classmethod
    def of_user(cls) -> ExportCache:
        """Return the cache in the user's cache directory, or the one that the environment names.

        ``OFFCUT_CACHE`` names the directory; ``OFFCUT_CACHE_SIZE`` is its maximum size in GB.

        Raises:
            UserError: ``OFFCUT_CACHE_SIZE`` is not a size.
        """
        text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_SIZE / 1e9)
        try:
            size = int(float(text) * 1e9)
        except (ValueError, OverflowError):
            size = -1
        if size < 0:
            raise UserError(f"{SIZE_VARIABLE} is {text!r}, which is not a size: write a number of GB, such as 20")
        return cls(cache_dir() / "exports", size)

    @contextmanager
    def locked(self, key: str, progress: Progress) -> Iterator[bool]:
        """Lock an entry against other processes. The result is False if the directory cannot be written."""
        lock = self._lock(key)
        try:
            (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                progress("wait for another build that makes this export")
                lock.acquire()
        except OSError as error:
            progress(f"export without the cache: {self.folder} cannot be written ({error.strerror})")
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def copy_to(self, key: str, out: Path, progress: Progress) -> bool:
        """Copy an entry's files into a directory and check their digests. Return False if no intact entry exists.

        A damaged entry is removed. The caller holds the entry's lock.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return False
        progress(f"reuse the export in {self.folder}")
        try:
            digests = json.loads((entry / _ENTRY_FILE).read_text(encoding="utf-8"))["files"]
            out.mkdir(parents=True, exist_ok=True)
            intact = all(_copy(entry / name, out / name) == digests[name] for name in FILES)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            intact = False
        if intact:
            os.utime(entry / _ENTRY_FILE)
            return True
        progress("the export in the cache is damaged: export again")
        shutil.rmtree(entry)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        return False

    def add(self, key: str, export_dir: Path, progress: Progress) -> None:
        """Copy an export's files into the cache. The caller holds the entry's lock.

        An export that is larger than the whole cache is not kept. On a full disk none is kept, and the build goes on.
        """
        if sum((export_dir / name).stat().st_size for name in FILES) > self.size:
            return
        partial = self.folder / f"{key}{_PARTIAL}"
        try:
            shutil.rmtree(partial, ignore_errors=True)  # left by a build that was killed
            partial.mkdir()
            digests = {name: _copy(export_dir / name, partial / name) for name in FILES}
            (partial / _ENTRY_FILE).write_text(json.dumps({"files": digests}, indent=1), encoding="utf-8")
            partial.rename(self.folder / key)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            progress(f"the export is not kept in {self.folder} ({error.strerror})")

    def shrink(self) -> None:
        """Remove all partial entries, and the least recently used entries until the others fit ``size``.

        An entry that another process uses at this moment stays.
        """
        total, oldest_first = 0, sorted(self._entries())
        for *_, size in oldest_first:
            total += size
        for _, path, size in oldest_first:
            partial = path.name.endswith(_PARTIAL)
            if total <= self.size and not partial:
                continue
            with suppress(Timeout), self._lock(path.name.removesuffix(_PARTIAL)).acquire(timeout=0):
                shutil.rmtree(path, ignore_errors=True)
                total -= size

    def _entries(self) -> Iterator[tuple[float, Path, int]]:
        """Yield the time of the last use, the path and the size in bytes of each entry."""
        for path in self.folder.iterdir():
            if path.name == _LOCKS:
                continue
            with suppress(FileNotFoundError):  # another process removed it
                sizes = [file.stat().st_size for file in path.iterdir()]
                entry_file = path / _ENTRY_FILE
                yield (entry_file if entry_file.exists() else path).stat().st_mtime, path, sum(sizes)

    def _lock(self, key: str) -> FileLock:
        # Lock files are never removed: if another process had just opened the file, two processes would get the lock.
        return FileLock(self.folder / _LOCKS / key[:2])


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return the SHA-256 of the bytes that were written, in hexadecimal."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK):
            digest.update(block)
            writer.write(block)
    return digest.hexdigest()
