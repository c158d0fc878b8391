"""The command line as a user meets it: help, JSON, exit codes, one-sentence errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from offcut.cli import _COMMANDS

COMMANDS = [function.__name__ for function in _COMMANDS]


def offcut(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offcut", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def failed(result: subprocess.CompletedProcess[str]) -> str:
    """The one-sentence error of a command that must fail without a traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.smoke
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = offcut(command, "--help")
    assert result.returncode == 0
    assert f"offcut {command}" in result.stdout.replace("python -m ", "")
    assert "Example:" in result.stdout


def test_it_says_its_version() -> None:
    from importlib.metadata import version

    result = offcut("--version")
    assert (result.returncode, result.stdout) == (0, f"offcut {version('offcut')}\n")


def test_help_loads_nothing_heavy() -> None:
    """``--help`` answers at once because nothing that takes seconds is imported."""
    code = (
        "import sys, offcut.cli; print([m for m in ('torch', 'diffusers', 'onnx_ir', 'openvino') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.smoke
def test_doctor_says_what_works() -> None:
    report = json.loads(offcut("doctor", "--json").stdout)
    assert report["engines"]["onnxruntime"]["usable"] is True
    assert "cpu" in report["engines"]["openvino"]["devices"]


def test_inspect_gives_the_manifest(unet_bundle: Path) -> None:
    report = json.loads(offcut("inspect", unet_bundle, "--json").stdout)
    assert report["pipeline"] is None
    assert {entry["engine"] for entry in report["engines"].values()} == {"onnxruntime", "openvino"}
    assert report["digest"] in offcut("inspect", unet_bundle).stdout


def test_verify_passes_and_fails(unet_bundle: Path, copied) -> None:  # type: ignore[no-untyped-def]
    report = json.loads(offcut("verify", unet_bundle, "--json").stdout)
    assert report["passed"] is True
    assert {row["engine"].split("-")[0] for row in report["checks"]} == {"onnxruntime", "openvino"}

    assert "another bundle" in failed(offcut("verify", unet_bundle, "--expect-digest", "00"))

    damaged = copied(unet_bundle)
    weights = next(damaged.rglob("weights.data"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "altered" in failed(offcut("verify", damaged))


def test_cuts_counts_every_cut(unet_bundle: Path) -> None:
    rows = json.loads(offcut("cuts", unet_bundle, "--json", "--height", "16", "--width", "16").stdout)
    names = [row["cut"]["name"] for row in rows]
    assert names == ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "mlperf"]
    flops = [row["flops"] for row in rows[:-1]]
    assert flops == sorted(flops)
    assert 0 < flops[0] < flops[-1] < 1
    assert rows[0]["cache_bytes"] == 2 * 16 * 16 * 16 * 4  # [2, 16, 16, 16] in fp32


def test_split_prints_the_contract(unet_bundle: Path, tmp_path: Path) -> None:
    graph = next(unet_bundle.rglob("full.onnx"))
    report = json.loads(offcut("split", graph, "--cut", "paper:0", "-o", tmp_path / "out", "--json").stdout)
    assert report["cut"] == "deepcache:1"
    assert [spec["name"] for spec in report["full"]["outputs"]] == ["noise_pred", "deep_feature_1"]
    assert "deep_feature_1" in [spec["name"] for spec in report["shallow"]["inputs"]]
    assert Path(report["shallow"]["path"]).is_file()
    assert "no cut 'deepcache:9'" in failed(offcut("split", graph, "--cut", "deepcache:9", "-o", tmp_path / "other"))


def test_prune_removes_only_what_is_not_named(unet_bundle: Path, copied) -> None:  # type: ignore[no-untyped-def]
    bundle = copied(unet_bundle)
    (bundle / "left-over").write_text("x")
    assert json.loads(offcut("prune", bundle, "--dry-run", "--json").stdout)["files"] == ["left-over"]
    assert (bundle / "left-over").exists()
    offcut("prune", bundle)
    assert not (bundle / "left-over").exists()
    assert json.loads(offcut("verify", bundle, "--json").stdout)["passed"] is True


@pytest.mark.slow
def test_run_compares(tiny_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    result = offcut(
        "run", tiny_bundle, "a cat", "-o", picture, "--steps", "6", "--interval", "3", "--warmup", "1",
        "--engine", "onnxruntime", "--compare", "--json",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["timeline"] == "#..#.."
    assert report["full_calls"] == 2
    assert report["psnr"] > 20
    assert Image.open(picture).width > 3 * 256

    plain = offcut("run", tiny_bundle, "a cat", "-o", picture, "--steps", "4", "--interval", "1")
    assert plain.returncode == 0, plain.stderr
    assert Image.open(picture).size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "{unet}", "a cat"], "UNet"),
        (["run", "{missing}", "a cat"], "not an offcut bundle"),
        (["inspect", "{missing}"], "make one with offcut build"),
        (["build", "{missing}", "-o", "{out}"], "nor a valid hub id"),
        (["build", "{model}", "-o", "{out}", "--precision", "fp12"], "fp12"),
        (["build", "{model}", "-o", "{out}", "--engine", "abacus"], "abacus"),
        (["build", "{model}", "-o", "{out}", "--engine", "onnxruntime", "--precision", "bf16"], "does not load bf16"),
        (
            ["build", "{model}", "-o", "{out}", "--precision", "int8", "--calibrate", "{missing}"],
            "cannot read the prompts",
        ),
        (["build", "{model}", "-o", "{out}", "--engine", "openvino", "--precision", "fp8"], "no CPU computes in fp8"),
        (["export", "{model}", "-o", "{out}", "--opset", "7"], "opset 7"),
        (["cuts", "{model}/config.json"], "not a readable ONNX file"),
        (["split", "{missing}"], "is not there"),
    ],
)
def test_user_errors_are_one_sentence(
    arguments: list[str], says: str, unet_bundle: Path, tiny_unet_dir: Path, tmp_path: Path
) -> None:
    places = {
        "unet": unet_bundle,
        "model": tiny_unet_dir,
        "missing": tmp_path / "missing" / "model",
        "out": tmp_path / "out",
    }
    filled = [argument.format(**places) for argument in arguments]
    assert says in failed(offcut(*filled, cwd=tmp_path))
    assert not (tmp_path / "out").exists()
