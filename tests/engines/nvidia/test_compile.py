"""Real builds of plans, for GPUs that this machine does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offcut
from offcut.engines.base import CompileJob, EngineOptions, Graphs
from offcut.engines.bundle.bundle import open_entry
from offcut.engines.nvidia import tensorrt_rtx
from offcut.engines.nvidia.compile import LOG
from offcut.engines.nvidia.library import TENSORRT_RTX
from offcut.engines.nvidia.pair import NvidiaPair
from offcut.engines.profiles import Profile
from offcut.errors import EngineError, ShapeError
from offcut.exporter.trace.reference import read_reference

from .conftest import DYNAMIC, PROFILES, STATIC

Job = Callable[..., CompileJob]

pytestmark = pytest.mark.usefixtures("trt")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@pytest.fixture(scope="module")
def built(tiny_unet_dir: Path, tmp_path_factory: pytest.TempPathFactory, trt: Any) -> tuple[offcut.Bundle, list[str]]:
    """A bundle built for two GPUs, and the progress messages of the build."""
    path = tmp_path_factory.mktemp("rtx") / "tiny.offcut"
    messages: list[str] = []
    bundle = offcut.build(
        tiny_unet_dir,
        path,
        engine="tensorrt-rtx",
        cuts=["deepcache:0"],
        profiles=PROFILES,
        settings={"tensorrt-rtx": {"compute_capabilities": ("89", "120")}},
        deploy=True,
        progress=messages.append,
    )
    return bundle, messages


def only_full(graphs: Graphs) -> Graphs:
    outputs = dict(graphs.outputs)
    return replace(graphs, shallow={}, cuts={}, outputs=outputs)


# ---- a bundle


def test_full_and_shallow_plans_are_in_the_bundle_with_their_log(built: tuple[offcut.Bundle, list[str]]) -> None:
    bundle, _ = built
    entry = bundle.entry("tensorrt-rtx")
    folder = f"engines/{entry.key}"
    assert entry.full == f"{folder}/full.plan"
    assert entry.shallow == {"deepcache:0": f"{folder}/shallow-deepcache-0.plan"}
    assert [Path(name).name for name in entry.references] == ["reference-0.safetensors", "reference-1.safetensors"]
    assert set(entry.files) == {entry.full, *entry.shallow.values(), *entry.references, f"{folder}/{LOG}"}
    for name, profile in zip(entry.references, PROFILES, strict=True):
        sample = read_reference(bundle.path / name).inputs["sample"]
        assert (sample.shape[0], *sample.shape[2:]) == tuple(profile.min[d] for d in ("batch", "height", "width"))
    assert str(bundle.path) not in (bundle.path / folder / LOG).read_text(encoding="utf-8")
    for file in entry.files:
        assert (bundle.path / file).stat().st_size > 500
    bundle.verify_files()


def test_the_entry_records_targets_profiles_and_settings(built: tuple[offcut.Bundle, list[str]]) -> None:
    entry = built[0].entry("tensorrt-rtx")
    assert entry.targets == ("sm_89", "sm_120")
    assert tuple(profile.profile() for profile in entry.profiles) == PROFILES
    assert entry.settings["compute_capabilities"] == ("89", "120")
    assert entry.version == tensorrt_rtx.probe().version
    assert entry.verified is ("sm_89" in tensorrt_rtx.probe().targets.values())


def test_the_log_is_tensorrts_own(built: tuple[offcut.Bundle, list[str]]) -> None:
    bundle, _ = built
    entry = bundle.entry("tensorrt-rtx")
    text = (bundle.path / "engines" / entry.key / LOG).read_text(encoding="utf-8")
    assert text.count("Building engine with configuration") == 2
    assert "Profile 1" in text
    assert "STRONGLY_TYPED" in text
    assert "TF32" not in text
    assert "deep_feature_0" in text, "the shallow graph's profile"
    assert "ERROR" not in text


def test_the_build_reports_its_progress(built: tuple[offcut.Bundle, list[str]]) -> None:
    _, messages = built
    first = messages.index("compile full for sm_89, sm_120")
    second = messages.index("compile shallow-deepcache-0 for sm_89, sm_120")
    assert any(sentence.startswith("  full: ") and sentence.endswith("50 %") for sentence in messages[first:second])
    assert any(sentence.startswith("  shallow-deepcache-0: ") for sentence in messages[second:])
    assert len(messages) < 100
    assert len(set(messages)) > 10


@without_gpu
def test_a_plan_for_other_machines_is_refused_here_in_one_sentence(built: tuple[offcut.Bundle, list[str]]) -> None:
    bundle, messages = built
    assert any("left unverified" in sentence for sentence in messages)
    entry = bundle.entry("tensorrt-rtx")
    with pytest.raises(EngineError, match="tensorrt-rtx cannot run on cuda here: PyTorch sees no NVIDIA GPU"):
        bundle.open_pair("tensorrt-rtx", device="cuda")
    with pytest.raises(EngineError, match="was compiled for sm_89, sm_120, and this machine"):
        open_entry(bundle, entry, EngineOptions("cuda"))
    for device in ("cuda", "cpu"):
        with pytest.raises(EngineError, match=f"runs on an NVIDIA GPU, not on {device}: PyTorch sees no GPU here"):
            NvidiaPair(TENSORRT_RTX, bundle.graphs(entry), EngineOptions(device))


def test_a_hint_is_refused(built: tuple[offcut.Bundle, list[str]]) -> None:
    graphs = built[0].graphs(built[0].entry("tensorrt-rtx"))
    with pytest.raises(EngineError, match="computes in the precision that was exported: build with precision='bf16'"):
        NvidiaPair(TENSORRT_RTX, graphs, EngineOptions("cuda", inference_precision="bf16"))


# ---- profiles and settings


def test_without_profiles_there_is_a_dynamic_one(job: Job, onnx_graphs: Graphs) -> None:
    compiled = tensorrt_rtx.compile(job(only_full(onnx_graphs), profiles=()))
    (profile,) = compiled.profiles
    assert (profile.min["height"], profile.opt["height"], profile.max["height"]) == (8, 8, 128), "trained on 8"
    assert (profile.opt["batch"], profile.max["batch"]) == (2, 2), "in fp32 one guided image"
    assert compiled.targets == ("sm_89",)


def test_each_setting_reaches_the_builder(job: Job, onnx_graphs: Graphs) -> None:
    settings = {"version_compatible": True, "tf32": True, "workspace_mib": 256, "optimization_level": 1}
    compile_job = job(only_full(onnx_graphs), profiles=(STATIC,), **settings)
    compiled = tensorrt_rtx.compile(compile_job)
    text = (compile_job.folder / LOG).read_text(encoding="utf-8")
    for flag in ("VERSION_COMPATIBLE", "TF32", "REQUIRE_USER_ALLOCATION", "WORKSPACE: 256.00 MiB"):
        assert flag in text
    assert compiled.full.stat().st_size > 1000


def test_a_plan_that_streams_its_weights_allocates_by_itself(job: Job, onnx_graphs: Graphs) -> None:
    compile_job = job(only_full(onnx_graphs), profiles=(STATIC,), weight_streaming=True)
    tensorrt_rtx.compile(compile_job)
    text = (compile_job.folder / LOG).read_text(encoding="utf-8")
    assert "WEIGHT_STREAMING" in text
    assert "REQUIRE_USER_ALLOCATION" not in text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"compute_capabilities": ("70",)}, "does not build for sm_70: choose from sm_75, sm_80"),
        ({"compute_capabilities": ("ninety",)}, "'ninety' is not a compute capability: write e.g. 89"),
        ({"optimization_level": 9}, "optimization_level is a whole number from 0 to 5, not 9"),
        ({"workspace_mib": 0}, "workspace_mib is a whole number from 1 to"),
        ({"refittable": True, "compute_capabilities": ("89", "120")}, "is for one kind of GPU: name one"),
        pytest.param({"refittable": True}, "is built on a machine with a GPU, not here", marks=without_gpu),
        pytest.param({"strip_plan": True}, "is built on a machine with a GPU, not here", marks=without_gpu),
        pytest.param({"compute_capabilities": ()}, "which has none: name the GPUs to build for", marks=without_gpu),
    ],
)
def test_an_invalid_setting_is_refused_before_the_build(settings: dict[str, Any], sentence: str, job: Job) -> None:
    compile_job = job(**settings)
    with pytest.raises(EngineError, match=f"tensorrt-rtx.*{sentence}") as caught:
        tensorrt_rtx.compile(compile_job)
    assert "\n" not in str(caught.value)
    assert not list(compile_job.folder.glob("*.plan"))


@pytest.mark.parametrize("spelling", ["89", "8.9", "sm_89", "SM89"])
def test_a_compute_capability_has_several_spellings(spelling: str, job: Job, trt: Any) -> None:
    from offcut.engines.nvidia.build_settings import targets

    assert targets(TENSORRT_RTX, trt, job(compute_capabilities=(spelling, "89")).settings) == ("sm_89",)


def test_a_profile_for_another_graph_is_refused(job: Job) -> None:
    with pytest.raises(
        ShapeError,
        match="gives batch, but this graph's dynamic dimensions are batch, height, width, sequence",
    ):
        tensorrt_rtx.compile(job(profiles=(Profile.of({"batch": (1, 1, 1)}),)))


# ---- errors


def test_a_file_that_is_not_a_graph_is_refused_with_tensorrts_message(job: Job, onnx_graphs: Graphs) -> None:
    onnx_graphs.full.write_bytes(b"\x08\x07not a graph")
    with pytest.raises(EngineError, match=r"tensorrt-rtx refuses full\S*\.onnx: .*Failed to parse the ONNX") as caught:
        tensorrt_rtx.compile(job())
    assert "\n" not in str(caught.value)


def test_a_graph_without_its_weights_is_refused_with_the_missing_file(job: Job, onnx_graphs: Graphs) -> None:
    (onnx_graphs.full.parent / "weights.data").unlink()
    with pytest.raises(EngineError, match=r"tensorrt-rtx refuses full\S*\.onnx: .*weights\.data"):
        tensorrt_rtx.compile(job())


def test_the_error_quotes_the_graph_that_failed(job: Job, onnx_graphs: Graphs) -> None:
    """The full graph is built first, and messages about it are not quoted."""
    onnx_graphs.shallow["deepcache:0"].write_bytes(b"\x08\x07not a graph")
    compile_job = job(profiles=(DYNAMIC,))
    with pytest.raises(EngineError, match=r"refuses shallow-deepcache-0\S*\.onnx: .*Failed to parse"):
        tensorrt_rtx.compile(compile_job)
    assert "Failed to parse" in (compile_job.folder / LOG).read_text(encoding="utf-8")


def test_shapes_that_need_too_much_memory_are_refused_with_a_remedy(job: Job, onnx_graphs: Graphs) -> None:
    sides = {"height": (4, 8, 512), "width": (4, 8, 512)}
    huge = Profile.of({"batch": (1, 2, 16), "sequence": (7, 7, 77), **sides})
    with pytest.raises(EngineError, match="than the machine has: build for smaller images or fewer, or in fp16"):
        tensorrt_rtx.compile(job(only_full(onnx_graphs), profiles=(huge,)))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_progress_stops_the_build_and_is_raised(
    error: type[BaseException], job: Job, onnx_graphs: Graphs
) -> None:
    messages: list[str] = []

    def report(sentence: str) -> None:
        messages.append(sentence)
        if "optimizing" in sentence:
            raise error("enough")

    compile_job = replace(job(only_full(onnx_graphs)), progress=report)
    with pytest.raises(error, match="enough"):
        tensorrt_rtx.compile(compile_job)
    assert "optimizing" in messages[-1]
    assert not list(compile_job.folder.glob("*.plan"))


def test_nothing_is_printed(job: Job, onnx_graphs: Graphs, capfd: pytest.CaptureFixture[str]) -> None:
    tensorrt_rtx.compile(job(only_full(onnx_graphs), profiles=(STATIC,)))
    assert capfd.readouterr() == ("", "")
