"""Compiled engines that are kept in a bundle: ours are trusted, anybody else's are removed before they are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import offcut.engines.onnxruntime.cache as cache_module
from offcut.engines.onnxruntime.cache import EngineCache
from offcut.errors import EngineError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "b.offcut").mkdir()
    return tmp_path / "b.offcut"


def folder_of(bundle: Path, key: str = "onnxruntime-1", name: str = "tensorrt-1") -> Path:
    return bundle / "cache" / key / name


def compile_into(folder: Path, bundle: Path | None, text: str = "code") -> None:
    with EngineCache(folder, bundle).trusted() as place:
        (place / "full").mkdir(exist_ok=True)
        (place / "full" / "graph.engine").write_text(text)


def trusted(folder: Path, bundle: Path | None) -> set[str]:
    """What a provider would find."""
    with EngineCache(folder, bundle).trusted() as place:
        found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    return {name for name in found if name.startswith("full")}


def test_what_was_compiled_here_is_found_again(bundle: Path) -> None:
    compile_into(folder_of(bundle), bundle)
    assert trusted(folder_of(bundle), bundle) == {"full/graph.engine"}


def test_what_a_run_compiled_later_is_found_once_it_is_sealed(bundle: Path) -> None:
    cache = EngineCache(folder_of(bundle), bundle)
    compile_into(folder_of(bundle), bundle)
    (cache.folder / "full" / "later.engine").write_text("code")
    cache.seal()
    assert trusted(folder_of(bundle), bundle) == {"full/graph.engine", "full/later.engine"}


def alter(folder: Path) -> None:
    (folder / "full" / "graph.engine").write_text("evil")


def add(folder: Path) -> None:
    (folder / "full" / "graph.engine").rename(folder / "full" / "another.engine")


def link(folder: Path) -> None:
    (folder / "full" / "graph.engine").rename(folder.parent / "moved")
    (folder / "full" / "graph.engine").symlink_to(folder.parent / "moved")


def forge(folder: Path) -> None:
    """The digests of what is there, without the secret."""
    alter(folder)
    seal = json.loads((folder / "sealed.json").read_text())
    seal["files"]["full/graph.engine"] = cache_module._digest(folder / "full" / "graph.engine")
    (folder / "sealed.json").write_text(json.dumps(seal))


def unseal(folder: Path) -> None:
    (folder / "sealed.json").unlink()


def garble(folder: Path) -> None:
    (folder / "sealed.json").write_text('{"files": 3}')


def leave_home(folder: Path) -> None:
    """As on another machine, or for another user."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])


@pytest.mark.parametrize("change", [alter, add, link, forge, unseal, garble, leave_home], ids=lambda f: f.__name__)
def test_what_has_no_seal_of_ours_is_removed_before_it_is_read(change: Callable[[Path], None], bundle: Path) -> None:
    compile_into(folder_of(bundle), bundle)
    change(folder_of(bundle))
    assert trusted(folder_of(bundle), bundle) == set()
    compile_into(folder_of(bundle), bundle)
    assert trusted(folder_of(bundle), bundle) == {"full/graph.engine"}


def test_a_seal_holds_for_one_engine_only(bundle: Path) -> None:
    compile_into(folder_of(bundle, "onnxruntime-1"), bundle)
    shutil.copytree(bundle / "cache" / "onnxruntime-1", bundle / "cache" / "onnxruntime-2")
    assert trusted(folder_of(bundle, "onnxruntime-2"), bundle) == set()


def test_a_bundle_keeps_its_engines_when_it_is_moved(bundle: Path) -> None:
    compile_into(folder_of(bundle), bundle)
    moved = bundle.rename(bundle.with_name("c.offcut"))
    assert trusted(folder_of(moved), moved) == {"full/graph.engine"}


def test_a_directory_that_the_user_named_is_theirs(tmp_path: Path) -> None:
    (tmp_path / "mine" / "full").mkdir(parents=True)
    (tmp_path / "mine" / "full" / "any.engine").write_text("code")
    assert trusted(tmp_path / "mine", None) == {"full/any.engine"}
    assert not (tmp_path / "mine" / "sealed.json").exists()


@pytest.mark.parametrize("level", ["cache", "onnxruntime-1", "tensorrt-1"])
def test_a_link_in_the_place_of_the_cache_is_refused_and_nothing_behind_it_is_touched(
    level: str, bundle: Path, tmp_path: Path
) -> None:
    for inside in (tmp_path / "precious", bundle / "unet"):
        (inside / "onnxruntime-1" / "tensorrt-1").mkdir(parents=True)
        (inside / "tensorrt-1").mkdir()
        kept = [inside / "x", inside / "tensorrt-1" / "x", inside / "onnxruntime-1" / "tensorrt-1" / "x"]
        for file in kept:
            file.write_text("precious")
        place = folder_of(bundle)
        link = next(path for path in (place, *place.parents) if path.name == level)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(inside)
        with pytest.raises(EngineError, match="is a link to elsewhere: remove it, or name a directory"):
            EngineCache(place, bundle)
        assert all(file.read_text() == "precious" for file in kept)
        link.unlink()


def test_a_bundle_that_cannot_be_written_says_what_to_do(bundle: Path) -> None:
    (bundle / "cache").write_text("in the way, as a read-only file system is for root")
    with pytest.raises(EngineError, match=r"cannot be kept in .*: name a directory for them with runtime_cache"):
        EngineCache(folder_of(bundle), bundle)
    assert (bundle / "cache").is_file()


def test_the_secret_is_this_users_alone(bundle: Path) -> None:
    compile_into(folder_of(bundle), bundle)
    (key,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.key")
    assert key.stat().st_mode & 0o077 == 0
    assert len(key.read_bytes()) == 32
