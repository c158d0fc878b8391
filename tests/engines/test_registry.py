from __future__ import annotations

import subprocess
import sys

import pytest

import offcut.engines.onnxruntime.pair as onnxruntime_module
import offcut.engines.openvino as openvino_module
import offcut.engines.registry as registry
from offcut.engines.base import EngineProbe
from offcut.engines.registry import ENGINES, choose, engine, probe_all
from offcut.errors import EngineError

from .conftest import ONNX_ENGINES


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU with AMX on which only ONNX Runtime and OpenVINO work; tests replace its probes."""
    for name in ENGINES:
        monkeypatch.setattr(engine(name), "probe", lambda: EngineProbe(None, (), "not here"))
    monkeypatch.setattr(onnxruntime_module, "probe", lambda: EngineProbe("1.31.1", ("cpu",), "providers CPU"))
    monkeypatch.setattr(openvino_module, "probe", lambda: EngineProbe("2026.4.1", ("cpu",), "CPU with FP32, BF16"))
    monkeypatch.setattr(registry, "_has_amx", lambda: True)
    return monkeypatch


@pytest.mark.smoke
def test_the_engines_of_the_cpu_work_here() -> None:
    probes = probe_all()
    assert tuple(probes) == ENGINES
    for name in (*ONNX_ENGINES, "inductor"):
        probe = probes[name]
        assert probe.usable, name
        assert probe.version
        assert "cpu" in probe.devices


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_a_module_with_the_protocols_names(name: str) -> None:
    module = engine(name)
    assert module.name == name
    assert module.default_opset in range(20, 25)
    assert module.extra in ("cpu", "cuda", "rtx")
    assert callable(module.probe)
    assert callable(module.open)


@pytest.mark.parametrize("name", ["tensorrt9", "", "..errors", "base"])
def test_an_unknown_engine_is_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(EngineError, match="choose auto or one of tensorrt, tensorrt-rtx, openvino"):
        engine(name)


def test_auto_chooses_openvino_on_a_cpu_with_amx(machine: pytest.MonkeyPatch) -> None:
    choice = choose()
    assert (choice.name, "AMX" in choice.reason) == ("openvino", True)


def test_auto_chooses_onnx_runtime_on_a_cpu_without_amx(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(registry, "_has_amx", lambda: False)
    choice = choose()
    assert (choice.name, choice.reason) == ("onnxruntime", "measured fastest on a cpu without AMX")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_auto_chooses_the_engine_that_runs_on_cuda(device: str, machine: pytest.MonkeyPatch) -> None:
    machine.setattr(onnxruntime_module, "probe", lambda: EngineProbe("1.31.1", ("cpu", "cuda"), "providers CUDA, CPU"))
    assert choose(device).name == "onnxruntime"
    assert "the only engine usable" in choose(device).reason


def test_auto_chooses_the_only_usable_engine_and_names_the_others(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(openvino_module, "probe", lambda: EngineProbe(None, (), "not installed: pip install 'offcut[cpu]'"))
    assert choose().name == "onnxruntime"
    assert (
        choose().reason == "the only engine usable on cpu; tensorrt, tensorrt-rtx, openvino, inductor cannot run there"
    )


def test_auto_chooses_only_among_engines_of_the_bundle(machine: pytest.MonkeyPatch) -> None:
    assert choose(among=["onnxruntime"]).name == "onnxruntime"


def test_the_error_gives_each_reason_if_no_engine_is_usable(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(openvino_module, "probe", lambda: EngineProbe(None, (), "not installed: pip install 'offcut[cpu]'"))
    with pytest.raises(EngineError) as caught:
        choose("cuda")
    assert str(caught.value).startswith("no engine can run on cuda here (tensorrt: not here; ")
    assert "openvino: not installed: pip install" in str(caught.value)
    assert "onnxruntime: providers CPU" in str(caught.value)
    with pytest.raises(EngineError, match="none was built"):
        choose(among=[])


BLOCKED = """
import importlib.abc, importlib.metadata, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}")

BLOCKED, HIDE_METADATA = sys.argv[1], sys.argv[2] == "hidden"
sys.meta_path.insert(0, Block())
if HIDE_METADATA:
    real_version = importlib.metadata.version
    def version(name):
        if name.startswith(BLOCKED):
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)
    importlib.metadata.version = version

from pathlib import Path
from offcut.engines.base import EngineOptions, Graphs
from offcut.engines.registry import choose, engine, probe_all
from offcut.errors import EngineError, MissingExtraError
probe = probe_all()[BLOCKED]
print(probe.usable, "|", probe.reason)
print(choose().name, "|", choose().reason)
try:
    engine(BLOCKED).open(Graphs(Path("full.onnx"), {}, {}, {}, {}, 1, "fp32"), EngineOptions())
except EngineError as error:
    print(type(error).__name__, "|", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["hidden", "visible"])
@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_package_that_is_missing_or_broken_is_named_with_its_extra(name: str, metadata: str) -> None:
    """The package cannot be imported in a subprocess; its metadata is hidden too, or still visible."""
    process = subprocess.run(
        [sys.executable, "-c", BLOCKED, name, metadata], capture_output=True, text=True, check=True, timeout=120
    )
    probe, choice, error = process.stdout.splitlines()
    other = next(engine_name for engine_name in ONNX_ENGINES if engine_name != name)
    if metadata == "hidden":
        assert probe.startswith("False | not installed: pip install 'offcut[cpu]'")
    else:
        assert probe.startswith("False | installed, but it cannot be imported: No module named")
    assert choice.startswith(f"{other} | ")
    assert error == (
        f"MissingExtraError | the {name} engine needs the package {name}, which is not installed: "
        "pip install 'offcut[cpu]'"
    )
