"""The command line as a user sees it: help, JSON, exit codes, one-sentence errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from offcut.cli import _COMMANDS
from offcut.cli.options import unpack

COMMANDS = [function.__name__ for function in _COMMANDS]


Command = Callable[..., str]


def run_in_new_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run offcut in a new process; most tests call the entry point in their own, where the slow imports are done."""
    return subprocess.run(
        [sys.executable, "-m", "offcut", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.smoke
@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, command: Command) -> None:
    output = command(name, "--help")
    assert f"offcut {name}" in output
    assert "Example:" in output


def test_version_option() -> None:
    from importlib.metadata import version

    result = run_in_new_process("--version")
    assert (result.returncode, result.stdout) == (0, f"offcut {version('offcut')}\n")


def test_a_users_error_ends_the_process_without_a_traceback(tmp_path: Path) -> None:
    result = run_in_new_process("inspect", tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_help_loads_nothing_heavy() -> None:
    """``--help`` is fast because no slow package is imported."""
    code = (
        "import sys, offcut.cli; print([m for m in ('torch', 'diffusers', 'onnx_ir', 'openvino') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@dataclass(frozen=True)
class _Size:
    side: int
    names: tuple[str, ...] = ()


def _unpacked(arguments: list[str]) -> tuple[Any, ...]:
    """Run a command whose two dataclasses have fields of the same name, and return what it was called with."""
    calls: list[tuple[Any, ...]] = []

    def command(
        file: Annotated[str, typer.Argument()],
        size: Annotated[_Size, {"side": typer.Option(help="in pixels", min=1), "names": typer.Option("--name")}],
        other: Annotated[_Size, {"side": typer.Option("--other-side")}, "Others"],
        flag: Annotated[bool, typer.Option("--flag")] = False,
    ) -> None:
        calls.append((file, size, other, flag))

    app = typer.Typer()
    app.command()(unpack(command))
    app(arguments, standalone_mode=False)
    return calls[0]


def test_a_command_gets_dataclasses_for_its_options() -> None:
    values = _unpacked(["a", "--side", "8", "--name", "x", "--name", "y", "--other-side", "9"])
    assert values == ("a", _Size(8, ("x", "y")), _Size(9), False)
    assert _unpacked(["a", "--side", "8", "--other-side", "9", "--flag"]) == ("a", _Size(8), _Size(9), True)


def test_a_command_refuses_a_table_with_an_unknown_field() -> None:
    def command(size: Annotated[_Size, {"width": typer.Option()}]) -> None:
        pass

    with pytest.raises(TypeError, match="_Size has no field width"):
        unpack(command)


@pytest.mark.parametrize("arguments", [["inspect"], ["run"], ["tune", "--budget", "2x"], ["serve"]], ids=lambda a: a[0])
def test_a_wrong_bundle_path_fails_before_heavy_imports(arguments: list[str], tmp_path: Path) -> None:
    name, *options = arguments
    code = (
        f"import atexit, sys; sys.argv = ['offcut', {name!r}, {str(tmp_path)!r}, *{options!r}]\n"
        "atexit.register(lambda: print([m for m in ('torch', 'diffusers', 'onnx_ir') if m in sys.modules]))\n"
        "from offcut.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "is not an offcut bundle" in result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.smoke
def test_doctor_reports_engines(command: Command) -> None:
    report = json.loads(command("doctor", "--json"))
    assert report["engines"]["onnxruntime"]["usable"] is True
    assert "cpu" in report["engines"]["openvino"]["devices"]


def test_inspect_prints_the_manifest(unet_bundle: Path, command: Command) -> None:
    report = json.loads(command("inspect", unet_bundle, "--json"))
    assert report["pipeline"] is None
    assert {entry["engine"] for entry in report["engines"].values()} == {"onnxruntime", "openvino"}
    assert report["digest"] in command("inspect", unet_bundle)


def test_verify_passes_and_fails(unet_bundle: Path, copied: Callable[[Path], Path], command: Command) -> None:
    report = json.loads(command("verify", unet_bundle, "--json"))
    assert report["passed"] is True
    assert {row["engine"].split("-")[0] for row in report["checks"]} == {"onnxruntime", "openvino"}

    assert "another bundle" in command("verify", unet_bundle, "--expect-digest", "00", fails=True)

    damaged = copied(unet_bundle)
    weights = next(damaged.rglob("weights.data"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "altered" in command("verify", damaged, fails=True)


def test_cuts_counts_every_cut(unet_bundle: Path, command: Command) -> None:
    rows = json.loads(command("cuts", unet_bundle, "--json", "--height", "16", "--width", "16"))
    names = [row["cut"]["name"] for row in rows]
    assert names == ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "mlperf"]
    flops = [row["flops"] for row in rows[:-1]]
    assert flops == sorted(flops)
    assert 0 < flops[0] < flops[-1] < 1
    assert rows[0]["cache_bytes"] == 2 * 16 * 16 * 16 * 4  # [2, 16, 16, 16] in fp32


def test_split_prints_the_contract(unet_bundle: Path, tmp_path: Path, command: Command) -> None:
    graph = next(unet_bundle.rglob("full.onnx"))
    report = json.loads(command("split", graph, "--cut", "paper:0", "-o", tmp_path / "out", "--json"))
    assert report["cut"] == "deepcache:1"
    assert [spec["name"] for spec in report["full"]["outputs"]] == ["noise_pred", "deep_feature_1"]
    assert "deep_feature_1" in [spec["name"] for spec in report["shallow"]["inputs"]]
    assert Path(report["shallow"]["path"]).is_file()
    output = command("split", graph, "--cut", "deepcache:9", "-o", tmp_path / "other", fails=True)
    assert "no cut 'deepcache:9'" in output


def test_split_writes_every_cut(unet_bundle: Path, tmp_path: Path, command: Command) -> None:
    graph = next(unet_bundle.rglob("full.onnx"))
    cuts = ("deepcache:0", "deepcache:1")
    report = json.loads(command("split", graph, "--cut", cuts[0], "--cut", cuts[1], "-o", tmp_path / "out", "--json"))
    assert tuple(report["cuts"]) == cuts
    assert [spec["name"] for spec in report["full"]["outputs"]] == ["noise_pred", "deep_feature_0", "deep_feature_1"]
    for number, cut in enumerate(cuts):
        assert Path(report["cuts"][cut]["shallow"]["path"]).is_file()
        assert report["cuts"][cut]["cached"] == [f"deep_feature_{number}"]
    assert report["shallow"] == report["cuts"][cuts[0]]["shallow"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("cuts", "x.onnx", "--height", "8", "--height=16"),
        ("run", "b", "a", "-o", "x.png", "--output", "y.png"),
        ("bench", "latency", "b", "--steps", "3", "--steps", "4"),
    ],
)
def test_an_option_given_twice_is_refused(arguments: tuple[str, ...], command: Command) -> None:
    assert "is given twice" in command(*arguments, fails=True)


def test_prune_removes_only_files_that_the_manifest_does_not_name(
    unet_bundle: Path, copied: Callable[[Path], Path], command: Command
) -> None:
    bundle = copied(unet_bundle)
    leftover, own = bundle / "engines" / "left-over", bundle / "thesis.txt"
    for file in (leftover, own):
        file.write_text("x")
    preview = json.loads(command("prune", bundle, "--dry-run", "--json"))
    assert (preview["files"], preview["left"]) == (["engines/left-over"], ["thesis.txt"])
    assert leftover.exists()
    command("prune", bundle)
    assert not leftover.exists()
    assert own.exists()
    assert json.loads(command("verify", bundle, "--json"))["passed"] is True


@pytest.mark.slow
def test_run_compares(tiny_bundle: Path, tmp_path: Path, command: Command) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    run = ("run", tiny_bundle, "a cat", "-o", picture)
    engine = ("--engine", "onnxruntime", "--threads", "1")
    schedule = ("--steps", "6", "--interval", "3", "--warmup", "1")
    report = json.loads(command(*run, *schedule, *engine, "--compare", "--json"))
    assert report["timeline"] == "#..#.."
    assert report["full_calls"] == 2
    assert report["psnr"] > 20
    assert Image.open(picture).width > 3 * 256

    command(*run, "--steps", "4", "--interval", "1")
    assert Image.open(picture).size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
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
    arguments: list[str],
    message: str,
    unet_bundle: Path,
    tiny_unet_dir: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {
        "unet": unet_bundle,
        "model": tiny_unet_dir,
        "missing": tmp_path / "missing" / "model",
        "out": tmp_path / "out",
    }
    filled = [argument.format(**paths) for argument in arguments]
    assert message in command(*filled, fails=True)
    assert not (tmp_path / "out").exists()
