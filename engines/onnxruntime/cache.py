"""The directory where ONNX Runtime's providers keep the engines that they compile: machine code.

It grows as the bundle is used, so the manifest cannot list its files. In their place a seal vouches for them: their
digests, signed with a secret of this user. What has no such seal, as in a bundle that was copied from elsewhere, is
removed before a provider reads it, and compiled again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from ...errors import EngineError

CACHE_FOLDER = "cache"
"""In a bundle; a directory for each engine of the manifest, by its key."""

_SEAL = "sealed.json"
_LOCK = ".lock"


class EngineCache:
    """A directory of compiled engines.

    Args:
        folder: made if it is not there.
        bundle: that it lies in; its files count only with a seal then. None for a directory that the user named, which
            only they can write to.

    Raises:
        EngineError: it cannot be written, or a link leads elsewhere.
    """

    def __init__(self, folder: Path, bundle: Path | None) -> None:
        self.folder = folder
        self._sealed = bundle is not None
        # What has no seal is removed, so it had better be the cache.
        if bundle is not None and folder.resolve() != bundle.resolve() / folder.relative_to(bundle):
            raise EngineError(f"{folder} is a link to elsewhere: remove it, or name a directory with runtime_cache")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _LOCK).touch()
            self._secret = _secret() if self._sealed else b""
        except OSError as error:
            raise EngineError(
                f"compiled engines cannot be kept in {folder} ({error.strerror}): "
                "name a directory for them with runtime_cache"
            ) from error

    @contextmanager
    def trusted(self) -> Iterator[Path]:
        """The directory with nothing in it that is not trusted, for a provider to read and write.

        What it leaves there is sealed. Other processes wait meanwhile, and find the engines ready.
        """
        with FileLock(self.folder / _LOCK):
            if self._sealed:
                self._clean()
            yield self.folder
            self._seal()

    def seal(self) -> None:
        """Vouch for what a provider has left there since: it also compiles when it is run."""
        with FileLock(self.folder / _LOCK):
            self._seal()

    def _clean(self) -> None:
        vouched = self._vouched()
        for path in self._files():
            if path.is_symlink() or vouched.get(self._name(path)) != _digest(path):
                path.unlink()

    def _seal(self) -> None:
        if not self._sealed:
            return
        digests = {self._name(path): _digest(path) for path in self._files()}
        seal = {"files": digests, "signature": self._signature(digests)}
        fresh = self.folder / f"{_SEAL}.new"
        fresh.write_text(json.dumps(seal, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, self.folder / _SEAL)

    def _vouched(self) -> dict[str, str]:
        """Each file's digest, as sealed; none if the seal is missing, damaged or another's."""
        try:
            seal = json.loads((self.folder / _SEAL).read_text(encoding="utf-8"))
            files, signature = dict(seal["files"]), str(seal["signature"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return files if hmac.compare_digest(signature, self._signature(files)) else {}

    def _signature(self, digests: dict[str, str]) -> str:
        # A seal holds for one directory only: another engine's would be taken for this one's.
        text = json.dumps([self.folder.parent.name, self.folder.name, sorted(digests.items())])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def _files(self) -> list[Path]:
        ours = {self.folder / name for name in (_SEAL, f"{_SEAL}.new", _LOCK)}
        found = (path for path in self.folder.rglob("*") if path.is_symlink() or path.is_file())
        return sorted(path for path in found if path not in ours)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _secret() -> bytes:
    """This user's, made at first use; it leaves the machine with no bundle."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offcut"
    home.mkdir(parents=True, exist_ok=True)
    path = home / "engine-cache.key"
    with FileLock(home / ".lock"):
        if not path.exists():
            path.touch(mode=0o600)
            path.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()
