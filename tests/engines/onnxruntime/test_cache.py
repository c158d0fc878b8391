"""The engines that ONNX Runtime's TensorRT providers compile are cached outside bundles, by the graphs' digests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import offcut
from offcut.engines.base import Graphs
from offcut.engines.onnxruntime.providers import PROVIDERS, cache_folder, locked_cache
from offcut.engines.profiles import Profile
from offcut.errors import EngineError

Copy = Callable[[Path], Path]


@pytest.fixture
def graphs(unet_bundle: Path) -> Graphs:
    bundle = offcut.Bundle.open(unet_bundle)
    return bundle.graphs(bundle.entry("onnxruntime"))


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFCUT_CACHE", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache"


def folder_of(graphs: Graphs, provider: str | None = "tensorrt", runtime_cache: Path | None = None) -> Path | None:
    return cache_folder(PROVIDERS[provider] if provider else None, "1.31", graphs, runtime_cache)


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_engines_are_cached_in_the_users_directory(graphs: Graphs, user_cache: Path, provider: str) -> None:
    folder = folder_of(graphs, provider)
    assert folder is not None
    assert folder.is_relative_to(user_cache / "engines")
    assert folder.name.startswith(PROVIDERS[provider].name)


def test_no_engine_is_cached_in_or_read_from_a_bundle(graphs: Graphs, unet_bundle: Path, copied: Copy) -> None:
    folder = folder_of(graphs)
    assert folder is not None
    assert not folder.resolve().is_relative_to(unet_bundle.resolve())


def test_providers_that_compile_nothing_have_no_cache(graphs: Graphs) -> None:
    assert folder_of(graphs, "cuda") is None
    assert folder_of(graphs, None) is None


def test_a_bundle_that_was_moved_finds_its_engines(graphs: Graphs, unet_bundle: Path, copied: Copy) -> None:
    moved = offcut.Bundle.open(copied(unet_bundle))
    assert folder_of(moved.graphs(moved.entry("onnxruntime"))) == folder_of(graphs)


def test_graphs_or_weights_with_other_digests_have_another_directory(
    graphs: Graphs, unet_bundle: Path, copied: Copy
) -> None:
    """A manifest can claim any engine key, but digests are checked when files are read."""
    bundle = offcut.Bundle.open(copied(unet_bundle))
    entry = bundle.entry("onnxruntime")
    variant = bundle.manifest.variants[entry.variant]
    assert variant.graphs is not None
    folders = {folder_of(graphs)}
    files = dict(bundle.manifest.files)
    for name in (entry.full, *entry.shallow.values(), variant.graphs.weights):
        altered = files[name].model_copy(update={"sha256": "0" * 64})
        manifest = bundle.manifest.model_copy(update={"files": {**files, name: altered}})
        folders.add(folder_of(offcut.Bundle(bundle.path, manifest, "").graphs(entry)))
    assert len(folders) == 3 + len(entry.shallow)


def test_other_profiles_or_another_precision_have_another_directory(graphs: Graphs) -> None:
    sizes = Profile.of({"batch": (1, 2, 4), "height": (8, 8, 16), "width": (8, 8, 16), "sequence": (7, 7, 7)})
    variants = [graphs, replace(graphs, profiles=(sizes,)), replace(graphs, precision="fp16")]
    assert len({folder_of(each) for each in variants}) == 3


def test_runtime_cache_names_another_directory(graphs: Graphs, tmp_path: Path, user_cache: Path) -> None:
    folder, default = folder_of(graphs, runtime_cache=tmp_path / "mine"), folder_of(graphs)
    assert folder is not None
    assert default is not None
    assert folder.relative_to(tmp_path / "mine") == default.relative_to(user_cache / "engines")


def test_graphs_outside_a_bundle_are_not_cached(graphs: Graphs) -> None:
    with pytest.raises(EngineError, match="no digest to cache compiled engines by"):
        folder_of(replace(graphs, digest=None))


def test_engines_that_were_compiled_are_found_again(tmp_path: Path) -> None:
    engine = tmp_path / "digest" / "provider" / "graph.engine"
    with locked_cache(engine.parent):
        engine.write_text("code")
    with locked_cache(engine.parent):
        assert engine.read_text() == "code"


def test_a_second_user_of_the_cache_waits_for_the_first(tmp_path: Path) -> None:
    folder, order = tmp_path / "digest" / "provider", []

    def second() -> None:
        with locked_cache(folder):
            order.append("second")

    with locked_cache(folder):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_only_the_user_can_write_to_the_cache(tmp_path: Path) -> None:
    with locked_cache(tmp_path / "digest" / "provider"):
        assert (tmp_path / "digest" / "provider").stat().st_mode & 0o077 == 0


def test_an_unwritable_cache_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "digest").write_text("a file that prevents the directory, as permissions do not stop root")
    with (
        pytest.raises(EngineError, match=r"cannot be cached in .*: name a directory for them with runtime_cache"),
        locked_cache(tmp_path / "digest" / "provider"),
    ):
        raise AssertionError("unreachable")
