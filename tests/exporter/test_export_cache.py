"""The cache of exports: hits, misses by each part of the key, damage, its bound, and several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import save_unet

import offcut
from offcut.engines.builder.resolve import weights_digest
from offcut.errors import UserError
from offcut.exporter import export_cache
from offcut.exporter.export_cache import FILES, ExportCache, cache_key, cached_export
from offcut.exporter.load import ModelSource, locate
from offcut.exporter.trace.export import ExportedUNet

OPTIONS: dict[str, Any] = {"precision": "fp32", "opset": 23, "dims": {}, "adapters": ()}

Cached = Callable[..., tuple[ExportedUNet, list[str]]]


@pytest.fixture
def source(tiny_unet_dir: Path) -> ModelSource:
    return locate(tiny_unet_dir)


@pytest.fixture
def cache(tmp_path: Path) -> ExportCache:
    return ExportCache(tmp_path / "cache")


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch, unet_export: Callable[[str], tuple[Path, ExportedUNet]]) -> None:
    """``export`` copies the export of ``tiny_unet_dir``, for tests of the cache alone."""
    _, made = unet_export("plain")

    def export(source: ModelSource, out: Path, *, progress: Callable[[str], None], **_: Any) -> ExportedUNet:
        progress("trace")
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).write_bytes((made.path.parent / name).read_bytes())
        return replace(made, path=out / made.path.name, weights=out / made.weights.name)

    monkeypatch.setattr(export_cache, "export", export)


@pytest.fixture
def cached(source: ModelSource, cache: ExportCache, tmp_path: Path) -> Cached:
    """Export through the cache: the export and the stages that were announced."""
    count = iter(range(100))

    def get(weights: str = "w", cache: ExportCache | None = cache) -> tuple[ExportedUNet, list[str]]:
        stages: list[str] = []
        out = tmp_path / f"out-{next(count)}"
        made = cached_export(source, out, weights_digest=weights, **OPTIONS, cache=cache, progress=stages.append)
        return made, stages

    return get


def entries(cache: ExportCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if path.name != "locks"]


def test_a_hit_has_the_same_files_and_description(
    cached: Cached, quick_export: None, unet_export: Callable[[str], tuple[Path, ExportedUNet]]
) -> None:
    """As the real export that was put into the cache."""
    _, made = unet_export("plain")
    cached()
    found, stages = cached()
    assert len(stages) == 1
    assert stages[0].startswith("reuse the export in ")
    for name in FILES:
        assert (made.path.parent / name).read_bytes() == (found.path.parent / name).read_bytes()
    assert found.path == found.path.parent / "unet.onnx"
    moved = {name: getattr(found, name) for name in ("path", "weights", "reference")}
    assert replace(made, **moved) == found


def test_the_cache_keeps_copies(cached: Cached, cache: ExportCache, quick_export: None) -> None:
    """A file that is damaged in a bundle leaves the cache as it was."""
    first, _ = cached()
    sound = first.weights.read_bytes()
    first.weights.write_bytes(b"damaged")
    second, stages = cached()
    assert second.weights.read_bytes() == sound
    assert len(stages) == 1


def test_bundles_are_the_same_with_and_without_the_cache(
    tiny_unet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., str]
) -> None:
    """``--no-cache`` neither reads nor writes the cache."""
    options: dict[str, Any] = {"cuts": ["deepcache:0", "mlperf"], "engine": "onnxruntime"}
    offcut.build(tiny_unet_dir, tmp_path / "fill", **options)
    stages: list[str] = []
    reused = offcut.build(tiny_unet_dir, tmp_path / "reused", **options, progress=stages.append)
    assert "trace" not in stages
    monkeypatch.setenv("OFFCUT_CACHE", str(tmp_path / "cache"))
    cuts = ("--cut", "deepcache:0", "--cut", "mlperf")
    command("build", tiny_unet_dir, "-o", tmp_path / "fresh", "--engine", "onnxruntime", *cuts, "--no-cache")
    assert not (tmp_path / "cache").exists()
    fresh = offcut.Bundle.open(tmp_path / "fresh")
    assert fresh.manifest.files == reused.manifest.files
    assert fresh.digest == reused.digest


CHANGES: dict[str, Callable[[ModelSource], tuple[ModelSource, dict[str, Any]]]] = {
    "weights": lambda source: (source, {"weights_digest": "other"}),
    "precision": lambda source: (source, {"precision": "fp16"}),
    "opset": lambda source: (source, {"opset": 20}),
    "fixed dimension": lambda source: (source, {"dims": {"batch": 2}}),
    "size of a fixed dimension": lambda source: (source, {"dims": {"batch": 4}}),
    "adapters": lambda source: (source, {"adapters": ("controlnet",)}),
    "attention": lambda source: (replace(source, attention="cross-frame"), {}),
    "config": lambda source: (replace(source, config={**source.config, "norm_eps": 1e-3}), {}),
    "class": lambda source: (replace(source, config={**source.config, "_class_name": "UNetMotionModel"}), {}),
    "IP-Adapter": lambda source: (replace(source, config={**source.config, "ip_adapters": [{"scale": 1.0}]}), {}),
}


def test_each_part_of_the_key_decides(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(source: ModelSource, weights_digest: str = "w", **options: Any) -> str:
        return cache_key(source, weights_digest, **{**OPTIONS, **options})

    keys = {"none": key(source)}
    assert key(source) == keys["none"]
    for name, change in CHANGES.items():
        changed, options = change(source)
        keys[name] = key(changed, **options)
    for library in export_cache.versions():
        with monkeypatch.context() as patch:
            patch.setattr(export_cache, "versions", lambda library=library: {library: "0"})
            keys[library] = key(source)
    monkeypatch.setattr(export_cache, "exporter_digest", lambda: "other")
    keys["exporter"] = key(source)
    assert len(set(keys.values())) == len(keys), keys


def test_the_key_knows_the_libraries_and_no_path(source: ModelSource) -> None:
    assert set(export_cache.versions()) == {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript"}
    moved = replace(source, name="elsewhere", root=Path("elsewhere"), config={**source.config, "_name_or_path": "x"})
    assert cache_key(source, "w", **OPTIONS) == cache_key(moved, "w", **OPTIONS)


def test_the_exporters_digest_changes_with_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "export.py").write_text("a = 1\n")
    monkeypatch.setattr(export_cache, "__file__", str(tmp_path / "export_cache.py"))
    before = export_cache.exporter_digest()
    (tmp_path / "trace" / "export.py").write_text("a = 2\n")
    assert export_cache.exporter_digest() != before


def test_other_weights_are_another_entry(tmp_path: Path, tiny_unet_dir: Path) -> None:
    """``weights_digest`` is what builds put into the key."""
    other = locate(save_unet(tmp_path / "other", norm_num_groups=2))
    own = locate(tiny_unet_dir)
    weights = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    before = weights_digest(other)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert len({before, weights_digest(other), weights_digest(own) + "own"}) == 3


@pytest.mark.parametrize("damaged", [*FILES, "entry.json"])
@pytest.mark.parametrize("how", ["altered", "removed"])
def test_a_damaged_entry_is_discarded(
    damaged: str, how: str, cached: Cached, cache: ExportCache, quick_export: None
) -> None:
    first, _ = cached()
    (entry,) = entries(cache)
    file = entry / damaged
    if how == "altered":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    second, stages = cached()
    assert stages[1:] == ["the export in the cache is damaged: export again", "trace"]
    for name in FILES:
        assert (first.path.parent / name).read_bytes() == (second.path.parent / name).read_bytes()
    _, stages = cached()
    assert "trace" not in stages, "the new export is kept"


def test_the_entries_used_longest_ago_go_first(cached: Cached, cache: ExportCache, quick_export: None) -> None:
    cached("a")
    size = sum(file.stat().st_size for file in entries(cache)[0].iterdir())
    bounded = ExportCache(cache.folder, int(2.5 * size))
    cached("b", bounded)
    for age, path in enumerate(sorted(entries(cache), key=lambda path: path.stat().st_mtime, reverse=True)):
        os.utime(path / "entry.json", (1e9 - age, 1e9 - age))
    _, stages = cached("a", bounded)
    assert "trace" not in stages
    cached("c", bounded)
    assert len(entries(cache)) == 2
    assert "trace" not in cached("a", bounded)[1]
    assert "trace" not in cached("c", bounded)[1]
    assert "trace" in cached("b", bounded)[1]


def test_an_export_larger_than_the_cache_is_not_kept(cached: Cached, cache: ExportCache, quick_export: None) -> None:
    exported, _ = cached(cache=ExportCache(cache.folder, 1000))
    assert exported.path.is_file()
    assert entries(cache) == []


def test_what_a_killed_build_left_is_removed(cached: Cached, cache: ExportCache, quick_export: None) -> None:
    left = cache.folder / f"{'0' * 64}.partial"
    left.mkdir(parents=True)
    (left / "weights.data").write_bytes(b"half")
    cached()
    assert not left.exists()
    assert len(entries(cache)) == 1


def test_an_entry_in_use_is_not_removed(cached: Cached, cache: ExportCache, quick_export: None) -> None:
    cached("a")
    (entry,) = entries(cache)
    with cache.locked(entry.name, lambda stage: None):
        ExportCache(cache.folder, 0).shrink()
        assert entry.is_dir()
    ExportCache(cache.folder, 0).shrink()
    assert not entry.exists()


def test_a_cache_that_cannot_be_written_does_not_stop_the_export(
    cached: Cached, tmp_path: Path, quick_export: None
) -> None:
    (tmp_path / "file").touch()
    exported, stages = cached(cache=ExportCache(tmp_path / "file" / "cache"))
    assert exported.path.is_file()
    assert stages[0].startswith("export without the cache: ")


def test_a_full_disk_fails_no_build(cached: Cached, quick_export: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(source: Path, target: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_cache, "_copy", copy)
    exported, stages = cached()
    assert exported.path.is_file()
    assert "is not kept in" in stages[-1]


def test_the_environment_names_the_directory_and_the_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFCUT_CACHE", str(tmp_path))
    monkeypatch.setenv("OFFCUT_CACHE_SIZE", "1.5")
    assert ExportCache.of_user() == ExportCache(tmp_path / "exports", 1_500_000_000)
    monkeypatch.delenv("OFFCUT_CACHE_SIZE")
    assert ExportCache.of_user().size == 20_000_000_000
    monkeypatch.delenv("OFFCUT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ExportCache.of_user().folder.parts[-2:] == ("offcut", "exports")
    for wrong in ("much", "-1", "inf"):
        monkeypatch.setenv("OFFCUT_CACHE_SIZE", wrong)
        with pytest.raises(UserError, match=r"OFFCUT_CACHE_SIZE is '.*', which is not a size"):
            ExportCache.of_user()


_BUILD = """
import sys
import offcut
stages = []
offcut.build(sys.argv[1], sys.argv[2], engine="onnxruntime", progress=stages.append)
print("trace" in stages)
"""


@pytest.mark.slow
def test_two_processes_at_once_export_once(tiny_unet_dir: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OFFCUT_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _BUILD, str(tiny_unet_dir), str(tmp_path / name)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    traced = [process.communicate(timeout=600)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(traced) == ["False", "True"]
    assert offcut.Bundle.open(tmp_path / "a").digest == offcut.Bundle.open(tmp_path / "b").digest
    (entry,) = entries(ExportCache(tmp_path / "cache" / "exports"))
    assert set(json.loads((entry / "entry.json").read_text())["files"]) == set(FILES)
