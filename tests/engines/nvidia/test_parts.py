"""Parts that need neither a GPU nor TensorRT: progress, weight budget, choice of the library, missing packages."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from offcut.engines.base import EngineProbe
from offcut.engines.nvidia import tensorrt, tensorrt_rtx
from offcut.engines.nvidia.build_settings import targets
from offcut.engines.nvidia.library import TENSORRT, load, probe
from offcut.engines.nvidia.plan import share_budget
from offcut.engines.nvidia.progress import BuildPhases
from offcut.engines.onnxruntime import pair as onnxruntime
from offcut.engines.registry import Choice, choose, compiler
from offcut.errors import EngineError

# ---- progress


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def phases(messages: list[str]) -> BuildPhases:
    return BuildPhases("full", messages.append)


def test_a_long_phase_is_reported_at_each_quarter(phases: BuildPhases, messages: list[str]) -> None:
    phases.start("Timing tactics", None, 40)
    assert all(phases.step("Timing tactics", process) for process in range(40))
    phases.finish("Timing tactics")
    expected = ["timing tactics", *(f"timing tactics, {share} %" for share in (25, 50, 75))]
    assert messages == [f"  full: {sentence}" for sentence in expected]


def test_short_phases_are_reported_near_the_root_only(phases: BuildPhases, messages: list[str]) -> None:
    phases.start("Building", None, 2)
    phases.start("Optimizing", "Building", 3)
    phases.start("Reformatting", "Optimizing", 1)
    phases.step("Reformatting", 0)
    phases.finish("Reformatting")
    phases.start("Timing", "Optimizing", 8)
    assert messages == ["  full: building", "  full: optimizing", "  full: timing"]


def test_an_error_in_progress_stops_the_build_and_is_stored() -> None:
    def report(sentence: str) -> None:
        raise KeyboardInterrupt

    phases = BuildPhases("full", report)
    phases.start("Building", None, 2)
    assert phases.step("Building", 0) is False
    assert isinstance(phases.failure, KeyboardInterrupt)


def test_a_step_of_an_unknown_phase_is_ignored(phases: BuildPhases, messages: list[str]) -> None:
    assert phases.step("Unknown", 3) is True
    phases.finish("Unknown")
    assert messages == []


# ---- weight streaming


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, ({"small": 0, "large": 0}, 0)),
        (7, ({"small": 7, "large": 0}, 0)),
        (50, ({"small": 10, "large": 40}, 0)),
        (500, ({"small": 10, "large": 90}, 400)),
        (5000, ({"small": 10, "large": 90}, 1000)),
    ],
)
def test_shallow_graphs_keep_their_weights_first(budget: int, expected: tuple[dict[str, int], int]) -> None:
    assert share_budget(budget, {"large": 90, "small": 10}, 1000) == expected


# ---- which library


@pytest.mark.usefixtures("trt")
def test_a_process_can_use_only_one_of_the_two_libraries() -> None:
    with pytest.raises(EngineError, match="already uses tensorrt-rtx and cannot use tensorrt too"):
        load(TENSORRT)


def test_auto_prefers_engines_compiled_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_result = EngineProbe("1.0", ("cuda",), "a GPU", targets={"cuda": "sm_89"})
    for module in (onnxruntime, tensorrt_rtx):
        monkeypatch.setattr(module, "probe", lambda: probe_result)
    assert choose("cuda") == Choice("tensorrt-rtx", "compiles the graphs for this GPU")
    monkeypatch.setattr(tensorrt, "probe", lambda: probe_result)
    assert choose("cuda:1").name == "tensorrt"
    assert choose("cuda", ["onnxruntime", "tensorrt-rtx"]).name == "tensorrt-rtx"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_both_engines_compile_and_share_settings(name: str) -> None:
    module = compiler(name)
    assert module is not None
    shared = {"optimization_level", "workspace_mib", "weight_streaming", "refittable", "strip_plan"}
    assert shared < set(module.SETTINGS)
    assert ("compute_capabilities" in module.SETTINGS) is (name == "tensorrt-rtx")
    assert ({"hardware_compatibility", "timing_cache"} < set(module.SETTINGS)) is (name == "tensorrt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_enterprise_tensorrt_builds_nothing_without_a_gpu() -> None:
    module: Any = compiler("tensorrt")
    with pytest.raises(EngineError, match="GPU of this machine, which has none: build on one with a GPU"):
        targets(TENSORRT, None, module.SETTINGS)
    assert not probe(TENSORRT).builds


MISSING = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Block())
from offcut.engines.nvidia import tensorrt, tensorrt_rtx
from offcut.engines.onnxruntime import pair
from offcut.engines.base import EngineProbe
from offcut.engines.nvidia.library import TENSORRT_RTX, load
from offcut.errors import MissingExtraError
try:
    load(TENSORRT_RTX)
except MissingExtraError as error:
    print(error)
"""


@pytest.mark.parametrize(("module", "package"), [("tensorrt_rtx", "tensorrt-rtx"), ("polygraphy", "polygraphy")])
def test_a_missing_package_is_named_with_its_extra(module: str, package: str) -> None:
    if package != "polygraphy":
        pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    process = subprocess.run(
        [sys.executable, "-c", MISSING, module], capture_output=True, text=True, check=True, timeout=120
    )
    assert process.stdout.strip() == (
        f"the tensorrt-rtx engine needs the package {package}, which is not installed: pip install 'offcut[rtx]'"
    )
