"""Stable Video Diffusion in turns: the loop of its pipeline, from prepared encodings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.worker_processes import latents_in_fp32

from offcut.benchmarks import record
from offcut.benchmarks.latency import loop, video
from offcut.benchmarks.latency.case import Case, LatencyRequest
from offcut.benchmarks.latency.pipelines import PIPELINES
from offcut.benchmarks.latency.resolve import resolve
from offcut.benchmarks.latency.rounds import relative_difference
from offcut.benchmarks.latency.worker import LatencyWorker
from offcut.benchmarks.report.latency import section
from offcut.benchmarks.schema.latency import Latency
from offcut.engines.bundle.bundle import Bundle
from offcut.errors import ShapeError

pytestmark = pytest.mark.slow
OURS, UNCACHED = "offcut onnxruntime fp32", "onnxruntime fp32 full only"
EAGER, HELPER = "diffusers eager fp32", "DeepCache eager fp32"
Video = Callable[[str], Path]


@pytest.fixture(scope="module")
def latency(video_dir: Video, video_bundle: Video, once: Callable[[str, Callable[[Path], object]], Path]) -> Latency:
    """Run the command and return its result."""

    def run(folder: Path) -> None:
        command = [
            "latency", video_bundle("svd"), "--model", video_dir("svd"), "--engine", "onnxruntime",
            "--peer", "diffusers", "--peer", "deepcache", "--peer", "engine", "--frames", "4", "--steps", "4",
            "--interval", "2", "--iterations", "1", "--threads", "1", "-o", folder,
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "offcut", "bench", *map(str, command)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    measured = record.read(once("bench-latency-svd", run)).latency
    assert measured is not None
    return measured


def test_videos_are_measured_cached_uncached_and_with_peers(latency: Latency) -> None:
    rows = {row.name: row for row in latency.contestants}
    assert list(rows) == [EAGER, HELPER, "diffusers eager bf16", "DeepCache eager bf16", OURS, UNCACHED]
    for row in rows.values():
        assert row.not_run is None, row.not_run
        assert (row.full_calls, row.shallow_calls) == ((2, 2) if row.caching else (4, 0))
        assert len(row.loops) == 1
        assert sum(row.full) + sum(row.shallow) < row.loops[0]
        assert (len(row.forecast_alone) > 0) == (row.name == OURS)
    assert latency.reference == EAGER
    assert 0 < (rows[UNCACHED].difference or 0) < 1e-4
    assert (rows[OURS].difference or 0) > 1e-3
    assert rows[OURS].difference == pytest.approx(rows[HELPER].difference, rel=1e-3)


def test_the_task_names_the_number_of_frames(latency: Latency) -> None:
    assert (latency.frames, latency.height, latency.guidance) == (4, 32, 3.0)
    assert latency.scheduler == "EulerDiscreteScheduler"
    assert "but not image encoder and VAE" in latency.clock
    assert "4 steps of EulerDiscreteScheduler, 32 by 32 pixels" in section(latency).task
    assert "1 video of 4 frames a call, guidance rising from 1 to 3" in section(latency).task


def case_of(bundle: Path, folder: Path, **options: object) -> Case:
    request = LatencyRequest(steps=4, schedule="uniform:2", threads=1, **options)  # type: ignore[arg-type]
    return resolve(Bundle.open(bundle), request, folder)[0]


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_a_loop_from_encodings_equals_diffusers_from_the_image(
    guidance: float | None, video_dir: Video, video_bundle: Video, tmp_path: Path
) -> None:
    import diffusers

    case = case_of(video_bundle("svd"), tmp_path, guidance=guidance, images=2)
    pipe = diffusers.StableVideoDiffusionPipeline.from_pretrained(video_dir("svd"))
    pipe.set_progress_bar_config(disable=True)
    vae, latents = pipe.vae, torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    encoded = video.encode(pipe, case, torch.Generator().manual_seed(5))
    ours = loop.denoise(pipe, case, {"latents": latents, **encoded})
    theirs = pipe(
        video.pictures(case), 32, 32, latents=latents, num_inference_steps=4, max_guidance_scale=guidance or 3.0,
        generator=torch.Generator().manual_seed(5), output_type="latent",
    ).frames  # fmt: skip
    assert ours.equal(theirs)
    assert pipe.vae is vae
    early = loop.denoise(pipe, case, {"latents": latents, **encoded}, calls=2)
    assert early.shape == ours.shape
    assert not early.equal(ours)


@pytest.fixture
def bare(video_bundle: Video, copied: Callable[[Path], Path]) -> Bundle:
    """Return the same bundle as if it had been built from the UNet alone, without another export."""
    path = copied(video_bundle("svd"))
    manifest = json.loads((path / "offcut.json").read_text(encoding="utf-8"))
    manifest |= {"pipeline": None, "parts": []}
    (path / "offcut.json").write_text(json.dumps(manifest), encoding="utf-8")
    return Bundle.open(path)


def test_a_bare_unet_runs_with_the_published_models_scheduler(bare: Bundle, tmp_path: Path) -> None:
    engine, peers = ("onnxruntime",), ("diffusers", "engine")
    request = LatencyRequest(steps=4, schedule="uniform:2", images=2, threads=1, engines=engine, peers=peers)
    case, entrants = resolve(bare, request, tmp_path)
    assert (case.height, case.width) == (64, 64)
    assert (case.frames, case.scheduler) == (3, "EulerDiscreteScheduler")
    scheduler = loop.build_pipeline(case, bare, None).scheduler
    assert PIPELINES["StableVideoDiffusionPipeline"].noise.items() <= dict(scheduler.config).items()
    LatencyWorker().inputs(case=case.as_json())
    latents = latents_in_fp32(case, entrants)
    assert latents["diffusers"].shape == (2, 3, 4, 8, 8)
    assert relative_difference(latents["onnxruntime"], latents["diffusers"]) < 1e-4
    assert relative_difference(latents["offcut"], latents["diffusers"]) > 1e-4


def test_memory_is_counted_for_all_frames_at_once(video_bundle: Video, tmp_path: Path) -> None:
    bundle = Bundle.open(video_bundle("svd"))
    needs = [
        resolve(bundle, LatencyRequest(frames=frames, peers=("none",)), tmp_path)[1][0].need for frames in (2, 4, 6)
    ]
    assert needs[2] - needs[1] == needs[1] - needs[0] > 0


def test_a_video_of_one_frame_is_refused(video_bundle: Video, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="at least 2 frames, not 1"):
        case_of(video_bundle("svd"), tmp_path, frames=1)
