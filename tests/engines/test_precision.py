"""The table of precisions by engine: each row is built and checked against its bounds, or refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.unets import eager, random_inputs

import offcut
import offcut.engines.builder.variants as variants_module
from offcut.engines.builder.verify import ParityCheck, verify_bundle
from offcut.engines.precision import BOUNDS, LOW_PRECISIONS, Bounds, bounds, scheme_of
from offcut.engines.registry import ENGINES, compiler, engine
from offcut.errors import EngineError
from offcut.exporter.load import PRECISIONS

from .conftest import ONNX_ENGINES

Row = tuple[str, str, str | None]
BUILT = [row for row, value in BOUNDS.items() if isinstance(value, Bounds) and compiler(row[0]) is None]
REFUSED = [row for row, value in BOUNDS.items() if isinstance(value, str)]


def label(row: Row) -> str:
    return " ".join(part for part in row if part)


def needs(row: Row) -> set[str]:
    return {row[2]} - {None} if row[2] else set()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def table(tiny_unet_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every row that can be built here, one export for each precision."""
    path = tmp_path_factory.mktemp("precision") / "table.offcut"
    for name, precision, hint in BUILT:
        if needs((name, precision, hint)) <= engine(name).probe().features:
            offcut.build(
                tiny_unet_dir,
                path,
                cuts=["deepcache:0", "deepcache:3", "mlperf"],
                engine=name,
                precision=precision,
                inference_precision=hint,
                calibration=offcut.Calibration(samples=2, steps=6),
            )
    return path


@pytest.fixture(scope="module")
def results(table: Path) -> dict[str, list[ParityCheck]]:
    """Checks of every row."""
    return verify_bundle(offcut.Bundle.open(table))


@pytest.fixture
def row_entry(table: Path, request: pytest.FixtureRequest) -> tuple[offcut.Bundle, str]:
    row: Row = request.param
    if missing := needs(row) - engine(row[0]).probe().features:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    bundle = offcut.Bundle.open(table)
    keys = [
        key
        for key, entry in bundle.manifest.engines.items()
        if (entry.engine, bundle.manifest.variants[entry.variant].precision, entry.inference_precision) == row
    ]
    assert len(keys) == 1
    return bundle, keys[0]


@pytest.mark.slow
@pytest.mark.parametrize("row_entry", BUILT, indirect=True, ids=label)
def test_a_row_that_is_offered_is_built_and_within_its_bounds(
    row_entry: tuple[offcut.Bundle, str], results: dict[str, list[ParityCheck]]
) -> None:
    checks = results[row_entry[1]]
    assert len(checks) == 1 + 2 * 3 + 4
    for check in checks:
        assert check.passed, f"{check.name}: {check.error:.3g} of {check.bound:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("row_entry", BUILT, indirect=True, ids=label)
def test_a_row_is_near_the_full_precision_model_at_other_inputs(
    row_entry: tuple[offcut.Bundle, str], tiny_unet_dir: Path
) -> None:
    """Inputs and shape differ from those of the build, and PyTorch computes in fp32, not in the graph's precision."""
    bundle, key = row_entry
    entry = bundle.manifest.engines[key]
    pair = bundle.open_pair(
        entry.engine,
        precision=bundle.manifest.variants[entry.variant].precision,
        inference_precision=entry.inference_precision or bundle.manifest.variants[entry.variant].precision,
    )
    inputs = random_inputs(tiny_unet_dir, batch=3, height=16, width=8, sequence=11, seed=5)
    bound = pair.prepare({name: tuple(value.shape) for name, value in inputs.items()})
    for name, value in inputs.items():
        bound.buffers[name].copy_(value)
    bound.full()
    expected = eager(tiny_unet_dir, inputs)
    error = float((bound.buffers["noise_pred"].float() - expected).abs().max() / expected.abs().max())
    pair.close()
    limits = BOUNDS[entry.engine, bundle.manifest.variants[entry.variant].precision, entry.inference_precision]
    assert isinstance(limits, Bounds)
    assert error <= limits.parity
    is_low_precision = (
        bundle.manifest.variants[entry.variant].precision != "fp32" or entry.inference_precision is not None
    )
    assert (error > 1e-5) is is_low_precision, "computed in the requested precision"


@pytest.mark.slow
def test_the_manifest_records_each_engines_precision(table: Path) -> None:
    bundle = offcut.Bundle.open(table)
    for key, entry in bundle.manifest.engines.items():
        variant = bundle.manifest.variants[entry.variant]
        base = variant.quantization.base if variant.quantization else variant.precision
        scheme = scheme_of(entry.engine, variant.precision)
        assert variant.name == f"{scheme.label if scheme else variant.precision}-opset23"
        assert variant.noise_pred.dtype == PRECISIONS[base]
        assert entry.requires == ((entry.inference_precision,) if entry.inference_precision else ())
        report = json.loads((table / "engines" / key / "build.json").read_text(encoding="utf-8"))
        assert report["inference_precision"] == entry.inference_precision


@pytest.mark.slow
def test_the_newest_build_is_the_default(table: Path) -> None:
    bundle = offcut.Bundle.open(table)
    assert bundle.entry("openvino").variant == "int8-opset23"
    for precision in PRECISIONS:
        assert bundle.entry("openvino", precision=precision).variant == f"{precision}-opset23"
    hinted = bundle.entry("openvino", precision="fp32", inference_precision="bf16")
    exact = bundle.entry("openvino", inference_precision="fp32")
    assert (hinted.inference_precision, exact.inference_precision) == ("bf16", None)
    assert exact.variant == hinted.variant == "fp32-opset23"
    with pytest.raises(EngineError, match="holds no such build of onnxruntime"):
        bundle.entry("onnxruntime", precision="bf16")


@pytest.mark.parametrize("row", REFUSED, ids=label)
def test_a_row_that_cannot_work_is_refused_before_anything_is_exported(
    row: Row, tiny_unet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants_module, "cached_export", lambda *args, **options: pytest.fail("a model was exported"))
    name, precision, hint = row
    reason = BOUNDS[row]
    assert isinstance(reason, str)
    with pytest.raises(EngineError) as caught:
        offcut.build(tiny_unet_dir, tmp_path / "b", engine=name, precision=precision, inference_precision=hint)
    assert reason in str(caught.value)
    assert "; it runs fp32, " in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_every_engine_and_precision_has_a_row() -> None:
    for name in ENGINES:
        for precision in (*PRECISIONS, *LOW_PRECISIONS):
            assert (name, precision, None) in BOUNDS


@pytest.mark.smoke
def test_full_precision_is_exact_across_the_cut_everywhere() -> None:
    for name in ONNX_ENGINES:
        assert bounds(name, "fp32") == Bounds(parity=1e-4, relative=False, across=0.0)
        assert bounds(name, "fp32", "fp32") == bounds(name, "fp32")


def test_a_combination_outside_the_table_is_refused_with_the_offered_ones() -> None:
    with pytest.raises(
        EngineError, match=r"openvino cannot run fp32 computed in int8: .*; it runs fp32, fp32 computed"
    ):
        bounds("openvino", "fp32", "int8")
    with pytest.raises(EngineError, match="onnxruntime cannot run int4"):
        bounds("onnxruntime", "int4")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_hint_of_the_graphs_own_precision_is_ignored(precision: str) -> None:
    assert bounds("openvino", precision, precision) == bounds("openvino", precision)
