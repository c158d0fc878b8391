"""``offcut bench swap`` on a small UNet: LoRAs are loaded and unloaded, and a rebuild is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.results import machine, result

import offcut
from offcut.benchmarks import record
from offcut.benchmarks.report.page import write_report
from offcut.benchmarks.swap import Swap, SwapRequest, measure
from offcut.errors import ModelError, UserError


@pytest.fixture(scope="module")
def measured(unet_bundle: Path) -> Swap:
    return measure(offcut.Bundle.open(unet_bundle), SwapRequest(rounds=2, rank=4, threads=1, size=128))


def test_each_engine_loads_the_lora_and_restores_its_weights(measured: Swap) -> None:
    assert [row.engine for row in measured.rows] == ["onnxruntime", "openvino"]
    assert measured.sizes == {"batch": 2, "height": 16, "width": 16, "sequence": 77}
    assert measured.layers == 32
    assert measured.lora == "random, rank 4, every attention layer"
    for row in measured.rows:
        assert row.restored
        for seconds in (row.loaded, row.rescaled, row.unloaded, row.first_calls, row.later_calls):
            assert len(seconds) == 2
            assert min(seconds) > 0
        assert row.rebuilt is row.rebuilt_opened is None


def test_the_page_shows_every_row(measured: Swap, tmp_path: Path) -> None:
    page = write_report([result(swap=measured)], tmp_path).read_text(encoding="utf-8")
    for text in ("LoRAs", "random, rank 4", "32 layers", "onnxruntime", "openvino", "bit for bit"):
        assert text in page
    assert ">yes<" in page
    assert "The machine was not idle: load average 4" in write_report(
        [result(swap=measured, environment=machine(load=4.0))], tmp_path
    ).read_text(encoding="utf-8")
    broken = measured.model_copy(update={"rows": [measured.rows[0].model_copy(update={"restored": False})]})
    assert ">NO<" in write_report([result(swap=broken)], tmp_path).read_text(encoding="utf-8")


def test_missing_engines_and_files_are_reported(unet_bundle: Path, tmp_path: Path) -> None:
    bundle = offcut.Bundle.open(unet_bundle)
    with pytest.raises(ModelError, match="is not there: give the safetensors file"):
        measure(bundle, SwapRequest(lora=tmp_path / "none.safetensors", engines=("onnxruntime",)))
    with pytest.raises(UserError, match="not inductor: add it with"):
        measure(bundle, SwapRequest(engines=("inductor",)))


@pytest.mark.slow
def test_the_command_times_a_rebuild_too(
    unet_bundle: Path, tiny_unet_dir: Path, tmp_path: Path, command: Callable[..., str]
) -> None:
    options = ("--engine", "onnxruntime", "--iterations", "1", "--threads", "1", "-o", tmp_path / "out")
    output = command("bench", "swap", unet_bundle, "--model", tiny_unet_dir, "--json", *options)
    stored = record.read(tmp_path / "out")
    assert json.loads(output) == stored.model_dump(mode="json")
    assert stored.swap is not None
    (row,) = stored.swap.rows
    assert row.restored
    assert (row.rebuilt or 0) > row.swap
    assert (tmp_path / "out" / "report.html").is_file()
