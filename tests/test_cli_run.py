"""``offcut run`` with hundreds of combinations of options: a right file, or one sentence and nothing lost."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import offcut
from offcut.cli import main

# For each option, values that are right and values that are not, each as text on the command line.
OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "--steps": (["1", "2", "3"], ["0", "-1", "1001", "x"]),
    "--seed": (["0", "7", str(2**63 - 1)], ["-1", str(2**63), str(2**64), "1.5"]),
    "--guidance": (["1", "3.5", "0"], ["nan", "inf", "x"]),
    "--height": (["16", "32"], ["100", "-64", "0", "17", "x"]),
    "--width": (["16", "48"], ["100", "-64", "0", "15"]),
    "--interval": (["1", "2", "5"], ["0", "-3"]),
    "--warmup": (["0", "2"], ["-1"]),
    "--schedule": (
        ["uniform:2", "steps:0,2", "quad:2:center=none"],
        ["uniform", "uniform:0", "tuned:none", "adaptive"],
    ),
    "--forecast": (["0", "0.5"], ["2", "-1", "nan"]),
    "--cut": (["deepcache:0", "skip"], ["deepcache:99", "x"]),
    "--sampler": (
        ["DDIMScheduler", "HeunDiscreteScheduler", "LCMScheduler"],
        [
            "FlowMatchEulerDiscreteScheduler",
            "EDMEulerScheduler",
            "DDIMInverseScheduler",
            "RePaintScheduler",
            "UNet2DModel",
            "x",
        ],
    ),
    "--negative-prompt": (["", "b"], ["\udcff"]),
    "--frames": ([], ["3", "0"]),
    "--image": ([], ["start.png", "none.png"]),
    "--fps": (["8"], ["0", "nan"]),
    "--threads": (["1"], ["0", "-1"]),
    "--engine": (["onnxruntime", "auto"], ["openvino", "x"]),
    "--lora": ([], ["none.safetensors"]),
    "-o": (["x.png", "x.jpg", "x.webp", "x.JPEG"], ["x.bmp", "x", "none/x.png", ".", "x.gif"]),
}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@pytest.fixture(scope="module")
def small_bundle(small_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "small.offcut"
    offcut.build(small_pipeline_dir, path, engine="onnxruntime")
    return path


def choose(rng: random.Random) -> tuple[dict[str, str], bool]:
    """Return options for one command line, and whether all of them are right."""
    options = {}
    right = True
    for name in rng.sample(list(OPTIONS), rng.randint(1, 6)):
        good, bad = OPTIONS[name]
        wrong = not good or (bool(bad) and rng.random() < 0.15)
        options[name] = rng.choice(bad if wrong else good)
        right = right and not wrong
    if "--forecast" in options and options.get("--cut") == "skip":
        options.pop("--forecast")
    return options, right


def run(bundle: Path, options: dict[str, str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    arguments = [item for pair in options.items() for item in pair]
    sys.argv = ["offcut", "run", str(bundle), "a red square", *arguments, "--json"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def check(options: dict[str, str], right: bool, result: tuple[int, str, str]) -> None:
    code, out, err = result
    output = Path(options.get("-o", "out.png"))
    if not right:
        assert code != 0, options
        assert "Traceback" not in err
        assert len(err) < 2500, err
        if output.suffix and output.parent == Path() and output.name:
            assert output.read_bytes() == b"earlier", options
        return
    assert code == 0, (options, err)
    report: dict[str, Any] = json.loads(out)
    with Image.open(output) as image:
        assert image.format == FORMATS[output.suffix.lower()]
        height = int(options.get("--height", 0)) or None
        width = int(options.get("--width", 0)) or None
        assert height is None or image.height == height
        assert width is None or image.width == width
    assert report["seed"] == int(options.get("--seed", 0))
    assert len(report["timeline"]) == report["calls"]


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 40), pytest.param(1, 300, marks=pytest.mark.slow)], ids=["forty", "three hundred"]
)
def test_random_options_give_a_right_file_or_one_sentence(
    seed: int,
    count: int,
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    Image.new("RGB", (8, 8)).save("start.png")
    rng = random.Random(seed)
    outcomes = []
    for _ in range(count):
        options, right = choose(rng)
        options = {"--steps": "2", **options}
        for name in ("out.png", "x.png", "x.jpg", "x.webp", "x.JPEG", "x.bmp", "x.gif"):
            Path(name).write_bytes(b"earlier")
        check(options, right, run(small_bundle, options, capsys))
        outcomes.append(right)
    assert 0.15 < sum(outcomes) / count < 0.8
    assert not list(tmp_path.glob(".*.part"))
