"""Bundles of ``tiny_unet_dir`` and open engine pairs that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import offcut
import offcut.engines.builder.variants as variants_module
from offcut.engines.base import EnginePair
from offcut.exporter.trace.export import ExportedUNet

UNET_CUTS = ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "mlperf"]
COMPILED_CUTS = ["deepcache:0"]
"""Cuts of the bundle that inductor compiles for every shape. Each cut is compiled separately."""

BF16_CUTS = ["mlperf"]
BF16_SIZES = {"batch": 2, "height": 8, "width": 12, "sequence": 7}
"""Sizes of the bundle that inductor compiles in bf16. Compilation for one shape takes half the time."""

ONNX_ENGINES = ("onnxruntime", "openvino")
"""Engines that open the bundle's ONNX graphs."""

CPU_ENGINES = (*ONNX_ENGINES, pytest.param("inductor", marks=pytest.mark.slow))
"""Engines that run on every machine."""


@pytest.fixture(scope="session")
def fp32_export(unet_export: Callable[[str], tuple[Path, ExportedUNet]]) -> ExportedUNet:
    """The export of ``tiny_unet_dir`` in fp32."""
    return unet_export("plain")[1]


@pytest.fixture
def quick_export(fp32_export: ExportedUNet, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that the test's builds export to; each export is copied from the cache."""
    exports: list[Path] = []
    cached_export = variants_module.cached_export

    def export(source: Any, out: Path, **options: Any) -> ExportedUNet:
        exports.append(out)
        return cached_export(source, out, **options)

    monkeypatch.setattr(variants_module, "cached_export", export)
    return exports


@pytest.fixture(scope="session")
def every_cut(tiny_unet_dir: Path, once: Callable[..., Path]) -> Path:
    """``tiny_unet_dir`` with every cut, on both engines."""
    return once("every-cut.offcut", lambda path: offcut.build(tiny_unet_dir, path, cuts=UNET_CUTS, engine=ONNX_ENGINES))


@pytest.fixture(scope="session")
def compiled_bundle(tiny_unet_dir: Path, once: Callable[..., Path]) -> Path:
    """``tiny_unet_dir`` compiled by inductor in fp32 for every shape, with ``COMPILED_CUTS``, without ONNX graphs."""

    def build(path: Path) -> None:
        with _quick_host_code():
            offcut.build(tiny_unet_dir, path, cuts=COMPILED_CUTS, engine="inductor", deploy=True)

    return once("compiled.offcut", build)


@pytest.fixture(scope="session")
def compiled_bf16_bundle(tiny_unet_dir: Path, once: Callable[..., Path]) -> Path:
    """``tiny_unet_dir`` compiled by inductor in bf16 for ``BF16_SIZES`` only, with ``BF16_CUTS``."""

    def build(path: Path) -> None:
        with _quick_host_code():
            offcut.build(
                tiny_unet_dir,
                path,
                cuts=BF16_CUTS,
                engine="inductor",
                precision="bf16",
                dims=BF16_SIZES,
                deploy=True,
            )

    return once("compiled-bf16.offcut", build)


@contextmanager
def _quick_host_code() -> Iterator[None]:
    """Compile the C++ wrapper without optimization, which is quicker to compile and slower to run."""
    from torch._inductor import config

    with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


@pytest.fixture
def bundle_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function from an engine's name to the bundle with its build of ``tiny_unet_dir``."""
    return lambda name: request.getfixturevalue("every_cut" if name in ONNX_ENGINES else "compiled_bundle")


@pytest.fixture(scope="session")
def opened_pairs() -> Iterator[dict[tuple[str, Path], EnginePair]]:
    """Open pairs by engine and bundle. They stay open, because opening a pair compiles every graph."""
    pairs: dict[tuple[str, Path], EnginePair] = {}
    yield pairs
    for pair in pairs.values():
        pair.close()


@pytest.fixture
def open_pair(
    bundle_of: Callable[[str], Path], opened_pairs: dict[tuple[str, Path], EnginePair]
) -> Callable[..., EnginePair]:
    """Return a function that opens an engine's pair of ``tiny_unet_dir``; tests that only bind the pair share it."""

    def get(engine: str) -> EnginePair:
        key = engine, bundle_of(engine)
        if key not in opened_pairs:
            opened_pairs[key] = offcut.Bundle.open(key[1]).open_pair(engine)
        return opened_pairs[key]

    return get


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if an engine reads a graph."""
    import offcut.engines.onnxruntime.pair as onnxruntime_module
    import offcut.engines.openvino as openvino_module

    def refuse(*args: object) -> None:
        pytest.fail("a graph was deserialised")

    monkeypatch.setattr(onnxruntime_module, "open", refuse)
    monkeypatch.setattr(openvino_module, "open", refuse)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file of a directory, without the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
