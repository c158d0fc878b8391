"""Concurrent builds, killed builds, and pruning afterwards, in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import offcut
from offcut.engines.bundle.manifest import MANIFEST_FILE
from offcut.engines.bundle.store import prune
from offcut.errors import BundleError

from ..conftest import contents

Copy = Callable[[Path], Path]

# A process that reads lines [MODEL, TARGET, ["CUT,ENGINE,POINT", ...]] and forks a child that builds for each triple.
# Forking spares each child the imports. The process writes the children's exit codes.
# A child kills itself at its point: "verify" during the verification of an engine, "moved" after moving the files and
# before replacing the manifest. At "meet" it waits until every child is about to commit.
CHILDREN = """
import json, os, signal, sys, time
from pathlib import Path
import diffusers, onnx_ir, onnxruntime, openvino
import offcut
import offcut.engines.builder.build
import offcut.engines.bundle.store as store


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def child(model, target, count, number, cut, engine, point):
    if point == "moved":
        store._replace = die

    def progress(sentence):
        if point == "verify" and sentence.startswith("verify"):
            die()
        if point == "meet" and sentence == "commit":
            Path(f"{target}.met{number}").touch()
            deadline = time.monotonic() + 100
            while len(list(target.parent.glob(f"{target.name}.met*"))) < count:
                assert time.monotonic() < deadline, "the other build did not reach its commit"
                time.sleep(0.01)

    offcut.build(model, target, cuts=[cut], engine=engine, progress=progress)


for line in sys.stdin:
    *paths, triples = json.loads(line)
    pids = []
    for number, triple in enumerate(triples):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(*map(Path, paths), len(triples), number, *triple.split(","))
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""

InProcesses = Callable[..., list[int]]


@pytest.fixture(scope="module")
def in_processes() -> Iterator[InProcesses]:
    """Return a function that builds in processes and returns their exit codes: 0, or minus the signal."""
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILDREN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    requests, replies = parent.stdin, parent.stdout
    assert requests is not None
    assert replies is not None

    def build(model: Path, target: Path, *children: str) -> list[int]:
        requests.write(json.dumps([str(model), str(target), children]) + "\n")
        requests.flush()
        codes: list[int] = json.loads(replies.readline())
        assert 1 not in codes, "standard error gives the reason"
        return codes

    yield build
    requests.close()
    assert parent.wait(60) == 0
    replies.close()


# ---- concurrent builds


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [("deepcache:0", "deepcache:0"), ("deepcache:1", "mlperf")], ids=["same", "other"])
def test_two_builds_at_once_leave_one_valid_bundle_with_both(
    cuts: tuple[str, str], tiny_unet_dir: Path, unet_bundle: Path, tmp_path: Path, in_processes: InProcesses
) -> None:
    """Both are ready to commit before either does. If their cuts differ, the second adds its cut."""
    target = tmp_path / "b"
    codes = in_processes(tiny_unet_dir, target, f"{cuts[0]},onnxruntime,meet", f"{cuts[1]},openvino,meet")
    assert codes == [0, 0]
    bundle = offcut.Bundle.open(target)
    bundle.verify_files()
    assert set(bundle.engines) == {"onnxruntime", "openvino"}
    assert set(bundle.cuts) == set(cuts)
    for engine, cut in zip(("onnxruntime", "openvino"), cuts, strict=True):
        pair = bundle.open_pair(engine)
        assert cut in pair.cuts
        pair.close()
    assert not list(target.glob(".build-*"))
    assert len(list(target.rglob("*.data"))) == 1


def test_an_overtaken_build_adds_to_the_bundle(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    """In one process: the other build runs when this one is about to commit."""
    target = tmp_path / "b"
    sentences: list[str] = []

    def progress(sentence: str) -> None:
        sentences.append(sentence)
        if sentences.count("commit") == 1 and sentence == "commit":
            offcut.build(tiny_unet_dir, target, cuts=["deepcache:1"], engine="openvino")

    bundle = offcut.build(tiny_unet_dir, target, cuts=["mlperf"], engine="onnxruntime", progress=progress)
    bundle.verify_files()
    assert set(bundle.entry("onnxruntime").cuts) == {"deepcache:1", "mlperf"}
    assert bundle.entry("openvino").cuts == ("deepcache:1",)
    assert "another build made this export meanwhile: add to it" in sentences
    assert len(quick_export) == 2
    prune(target)
    bundle.verify_files()


def test_a_build_is_refused_if_another_model_was_committed_first(
    tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_unet_dir, tmp_path / "other"))
    file = other / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "conv_in.bias": load_file(file)["conv_in.bias"] + 1e-6}, file)

    def progress(sentence: str) -> None:
        if sentence == "commit":
            offcut.build(other, tmp_path / "b", engine="onnxruntime")

    with pytest.raises(BundleError, match="another model"):
        offcut.build(tiny_unet_dir, tmp_path / "b", engine="onnxruntime", progress=progress)
    bundle = offcut.Bundle.open(tmp_path / "b")
    bundle.verify_files()
    assert bundle.manifest.source.model == str(other)


# ---- killed builds


@pytest.mark.slow
@pytest.mark.parametrize("point", ["verify", "moved"])
def test_a_killed_build_of_a_new_bundle_can_be_built_again(
    point: str,
    tiny_unet_dir: Path,
    unet_bundle: Path,
    tmp_path: Path,
    quick_export: list[Path],
    in_processes: InProcesses,
) -> None:
    target = tmp_path / "b"
    assert in_processes(tiny_unet_dir, target, f"deepcache:0,onnxruntime,{point}") == [-9]
    assert contents(target)
    with pytest.raises(BundleError, match="is not an offcut bundle"):
        offcut.Bundle.open(target)

    offcut.build(tiny_unet_dir, target, cuts=["deepcache:1"], engine="onnxruntime").verify_files()
    prune(target)
    bundle = offcut.Bundle.open(target)
    bundle.verify_files()
    assert {*contents(target)} == {*bundle.manifest.files, "offcut.json"}


@pytest.mark.slow
@pytest.mark.parametrize("point", ["verify", "moved"])
def test_a_killed_build_leaves_the_bundle_valid_and_prune_removes_its_leftovers(
    point: str, tiny_unet_dir: Path, unet_bundle: Path, copied: Copy, in_processes: InProcesses
) -> None:
    bundle = copied(unet_bundle)
    before = contents(bundle)
    assert in_processes(tiny_unet_dir, bundle, f"deepcache:1,onnxruntime,{point}") == [-9]

    after = contents(bundle)
    assert {name: after[name] for name in before} == before
    leftovers = sorted(set(after) - set(before))
    assert leftovers
    opened = offcut.Bundle.open(bundle)
    opened.verify_files()
    opened.open_pair("onnxruntime").close()

    preview = prune(bundle, dry_run=True)
    assert contents(bundle) == after
    assert sorted(preview.files) == leftovers
    # A weights file that is linked into the staging directory is counted there, as ``du`` would count it.
    assert preview.bytes == sum(len(after[name]) for name in leftovers)
    assert prune(bundle) == preview
    assert contents(bundle) == before
    assert not list(bundle.glob(".build-*"))


# ---- prune


def test_prune_of_a_clean_bundle_removes_nothing(unet_bundle: Path, copied: Copy) -> None:
    bundle = copied(unet_bundle)
    before = contents(bundle)
    removed = prune(bundle)
    assert (removed.files, removed.bytes) == ((), 0)
    assert contents(bundle) == before


def test_prune_removes_builds_outside_the_manifest_and_leaves_the_users_files(unet_bundle: Path, copied: Copy) -> None:
    bundle = copied(unet_bundle)
    own = ["README.md", "thesis/chapter-1.txt", ".git/config", "tokenizer/notes.txt", "unet.txt"]
    outputs = ["engines/old/deep/engine.plan", "unet/fp16-opset9/full.onnx", ".build-0123456789ab/full.onnx"]
    for name in (*own, *outputs):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"12345")
    (bundle / "engines" / "link").symlink_to("/etc/passwd")
    removed = prune(bundle)
    assert set(removed.files) == {*outputs, "engines/link"}
    assert set(removed.left) == set(own)
    assert not (bundle / "engines" / "old").exists()
    assert all((bundle / name).read_bytes() == b"12345" for name in own)
    assert Path("/etc/passwd").exists()
    offcut.Bundle.open(bundle).verify_files()


def test_prune_does_not_follow_links_to_folders(unet_bundle: Path, copied: Copy, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "letters.txt").write_text("dear", encoding="utf-8")
    bundle = copied(unet_bundle)
    (bundle / "engines" / "link").symlink_to(outside)
    prune(bundle)
    assert (outside / "letters.txt").read_text(encoding="utf-8") == "dear"
    assert not (bundle / "engines" / "link").is_symlink()


@pytest.mark.parametrize("exists", [True, False])
def test_prune_refuses_a_directory_that_is_not_a_bundle(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "photos"
    if exists:
        target.mkdir()
        (target / "cat.png").write_bytes(b"cat")
    with pytest.raises(BundleError, match="is not an offcut bundle"):
        prune(target)
    assert [path.name for path in target.glob("*")] == (["cat.png"] if exists else [])
    assert target.exists() is exists


def test_a_read_only_bundle_can_be_opened_but_not_built_into(
    unet_bundle: Path, copied: Copy, tiny_unet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not bind root, so the refusal of the file system is simulated."""
    bundle = copied(unet_bundle)
    real_mkdir = Path.mkdir

    def mkdir(self: Path, *args: Any, **options: Any) -> None:
        if self.name.startswith(".build-"):
            raise PermissionError(13, "Permission denied")
        real_mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    offcut.Bundle.open(bundle).open_pair("onnxruntime").close()
    with pytest.raises(BundleError, match=r"cannot write .*: Permission denied"):
        offcut.build(tiny_unet_dir, bundle, engine="onnxruntime")


def test_files_are_readable_by_others(unet_bundle: Path) -> None:
    """A bundle may be copied, mounted, and served by another user than the one who built it."""
    for path in unet_bundle.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert path.stat().st_mode & 0o044 == 0o044, path.name


def test_names_of_staging_directory_and_lock_begin_with_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build ignores names with a dot, so the files of an unfinished build do not make it refuse the directory."""
    from offcut.engines.bundle import store

    assert store._STAGING.startswith(".")
    assert store.LOCK_FILE.startswith(".")
    assert MANIFEST_FILE == "offcut.json"


def test_pruning_removes_compiled_engines_that_earlier_versions_kept_in_the_bundle(
    unet_bundle: Path, copied: Copy
) -> None:
    bundle = copied(unet_bundle)
    key = offcut.Bundle.open(bundle).entry("onnxruntime").key
    names = {f"cache/{key}/tensorrt/a.engine", "cache/gone-1/tensorrt/a.engine", "cache/a.engine"}
    for name in names:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"code")
    assert set(prune(bundle).files) == names
    assert not (bundle / "cache").exists()
    offcut.Bundle.open(bundle).verify_files()
