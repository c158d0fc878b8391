"""Compiled engines are code: they are opened in bundles that were built here or that the user accepted."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import offcut
from offcut.engines.bundle.trust import is_trusted, record_file, trust
from offcut.errors import BundleError

Copy = Callable[[Path], Path]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine, on which nothing was built."""
    monkeypatch.setenv("OFFCUT_DATA", str(tmp_path / "data"))


@pytest.fixture
def compiled(unet_bundle: Path, copied: Copy) -> Path:
    """A bundle whose engine claims to be compiled; its file is no code, so opening it fails after the trust check."""
    bundle = copied(unet_bundle)
    manifest = json.loads((bundle / "offcut.json").read_text())
    key, entry = next((key, entry) for key, entry in manifest["engines"].items() if entry["engine"] == "onnxruntime")
    names = [f"engines/{key}/full.bin", f"engines/{key}/shallow.bin"]
    source = Path(entry["full"])
    for name in names:
        shutil.copyfile(bundle / source, bundle / name)
        manifest["files"][name] = manifest["files"][source.as_posix()]
    entry |= {"engine": "inductor", "full": names[0], "files": names, "shallow": {entry["cuts"][0]: names[1]}}
    entry |= {"cuts": entry["cuts"][:1], "version": offcut_version("torch")}
    (bundle / "offcut.json").write_text(json.dumps(manifest))
    return bundle


def offcut_version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def refused_for_trust(bundle: offcut.Bundle) -> bool:
    with pytest.raises(Exception) as caught:
        bundle.pair(bundle.entry("inductor"))
    return "has compiled engines, which are code, and was not built here" in str(caught.value)


def test_a_compiled_bundle_from_elsewhere_is_refused_until_it_is_accepted(compiled: Path, elsewhere: None) -> None:
    assert refused_for_trust(offcut.Bundle.open(compiled))
    assert not record_file().exists()
    accepted = offcut.Bundle.open(compiled, trust=True)
    assert not refused_for_trust(accepted)
    assert not refused_for_trust(offcut.Bundle.open(compiled))  # from now on


def test_the_digest_of_a_bundle_is_enough(compiled: Path, elsewhere: None) -> None:
    digest = offcut.Bundle.open(compiled).digest
    with pytest.raises(BundleError, match="it is another bundle"):
        offcut.Bundle.open(compiled, expect_digest="0" * 64)
    assert refused_for_trust(offcut.Bundle.open(compiled))
    assert not refused_for_trust(offcut.Bundle.open(compiled, expect_digest=digest))


def test_trust_ends_where_a_bundle_is_changed(compiled: Path, elsewhere: None, copied: Copy, tmp_path: Path) -> None:
    offcut.Bundle.open(compiled, trust=True)
    changed = Path(shutil.copytree(compiled, tmp_path / "copy"))
    assert not refused_for_trust(offcut.Bundle.open(changed))
    manifest = json.loads((changed / "offcut.json").read_text())
    name = next(name for name in manifest["files"] if name.endswith("full.bin"))
    manifest["files"][name]["sha256"] = "0" * 64
    (changed / "offcut.json").write_text(json.dumps(manifest))
    assert refused_for_trust(offcut.Bundle.open(changed))


def test_graphs_need_no_trust(unet_bundle: Path, elsewhere: None) -> None:
    offcut.Bundle.open(unet_bundle).open_pair("onnxruntime").close()
    offcut.Bundle.open(unet_bundle, trust=True)
    assert not record_file().exists()


def test_a_record_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFCUT_DATA", str(tmp_path / "file" / "data"))
    with caplog.at_level(logging.WARNING, "offcut.trust"):
        trust("1" * 64)
    assert "open with --trust only" in caplog.text


def test_what_was_built_here_is_trusted(tiny_unet_dir: Path, tmp_path: Path, elsewhere: None) -> None:
    bundle = offcut.build(tiny_unet_dir, tmp_path / "b", engine="onnxruntime")
    assert is_trusted(bundle.built_digest)


def test_an_untrusted_bundle_stays_so_after_a_build_is_added(
    compiled: Path, tiny_unet_dir: Path, elsewhere: None
) -> None:
    bundle = offcut.build(tiny_unet_dir, compiled, engine="openvino")
    assert not is_trusted(bundle.built_digest)
