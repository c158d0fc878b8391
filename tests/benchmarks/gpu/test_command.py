"""The command ``gpu_check``: without a GPU it runs no check; with ``--device cpu`` its checks run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from offcut.benchmarks.gpu.catalog import catalog
from offcut.benchmarks.gpu.workbench import ENGINES, GpuOptions
from offcut.benchmarks.gpu_check import app

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@without_gpu
@pytest.mark.parametrize("flags", [[], ["--performance", "--architectures", "sd15,sdxl", "--batches", "1,8"]])
def test_without_a_gpu_no_check_runs(flags: list[str], tmp_path: Path) -> None:
    done = call("--output", str(tmp_path), *flags)
    assert done.exit_code == 0, done.output
    assert "No check was run" in done.stdout
    raw = json.loads((tmp_path / "result.json").read_text())
    assert {check["status"] for check in raw["checks"]} == {"not run"}
    assert all("no GPU can be used" in check["reason"] for check in raw["checks"])
    assert {engine for engine in ENGINES if any(engine in check["id"] for check in raw["checks"])} == set(ENGINES)
    assert {"device", "gpu", "driver", "cuda", "torch", "engine inductor"} <= set(raw["machine"])
    assert raw["command"].startswith("python -m offcut.benchmarks.gpu_check")
    report = (tmp_path / "report.md").read_text()
    assert all(check["id"] in report for check in raw["checks"])
    assert not (tmp_path / "tracebacks.txt").exists()


@without_gpu
def test_the_exit_code_can_require_a_gpu(tmp_path: Path) -> None:
    done = call("--output", str(tmp_path), "--require-gpu", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["counts"]["not run"] == len(catalog(GpuOptions()))


def test_the_list_names_every_check_once() -> None:
    done = call("--list", "--performance", "--batches", "1,8")
    assert done.exit_code == 0
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    expected = [check.id for check in catalog(GpuOptions(performance=True, batches=(1, 8)))]
    assert listed == expected
    assert len(set(listed)) == len(listed)
    groups = {identifier.split("/")[0] for identifier in listed}
    assert groups == {"correctness", "streams", "memory", "threads", "performance"}


def test_precisions_that_an_engine_refuses_are_not_run_with_the_reason() -> None:
    checks = catalog(GpuOptions(device="cpu", engines=("onnxruntime",), precisions=("bf16", "fp32")))
    obstacles = {check.id: check.obstacle for check in checks}
    assert "does not load bf16" in str(obstacles["correctness/parity/onnxruntime/bf16"])
    assert obstacles["correctness/parity/onnxruntime/fp32"] is None
    assert obstacles["correctness/interleaved/onnxruntime"] is None  # in fp32
    assert "needs CUDA" in str(obstacles["streams/no-sync/onnxruntime"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "onnx"], "one of"),
        (["--precisions", "int8"], "one of"),
        (["--batches", "0"], "not a number of images"),
    ],
)
def test_a_wrong_option_is_reported(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    assert "no check matches" in str(call("--only", "nothing").exception)


@pytest.mark.slow
def test_on_the_cpu_the_checks_run_in_their_own_process(tmp_path: Path) -> None:
    done = call(
        *("--device", "cpu", "--engines", "onnxruntime", "--precisions", "fp32"),
        *("--only", "threads/*", "--output", str(tmp_path), "--json"),
    )
    assert done.exit_code == 0, done.output
    raw = json.loads(done.stdout)
    assert [check["status"] for check in raw["checks"]] == ["passed"]
    assert raw["checks"][0]["figures"]["bit for bit"] is True
    assert "All checks that ran passed" in raw["verdict"]
