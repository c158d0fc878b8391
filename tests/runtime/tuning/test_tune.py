"""``offcut tune`` on the shapes model: schedules are saved, better than reuse, and refused under other conditions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from typer.testing import CliRunner

import offcut
from offcut import Extrapolate, Tuned
from offcut.benchmarks.shapes.model import PROMPTS, model_path
from offcut.cli import app
from offcut.errors import BundleError, ScheduleError, UserError
from offcut.runtime.batching import Worker
from offcut.runtime.generation.schedule import SKIP
from offcut.runtime.text_to_image import generate_from_prompt, prompt_arguments
from offcut.runtime.tuning import lockstep
from offcut.runtime.tuning.artifact import choose, make_key, mismatch, save
from offcut.runtime.tuning.document import ReportRow, TunedDocument
from offcut.runtime.tuning.images import TuningPipeline, split_images
from offcut.runtime.tuning.recording import FeatureRecorder, record
from offcut.runtime.tuning.scheduler_tap import tapped
from offcut.runtime.tuning.search import full_calls
from offcut.runtime.tuning.skipping import evenly_spaced, spread_shallow_calls
from offcut.runtime.tuning.tune import tune
from offcut.runtime.tuning.tuning_request import TuningRequest

pytestmark = pytest.mark.slow

STEPS, GUIDANCE, NAME = 20, 3.0, "clear"


@pytest.fixture(scope="module")
def shapes(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of its own, since schedules are added to it."""
    return Path(shutil.copytree(shapes_bundle, tmp_path_factory.mktemp("tuned") / "shapes.offcut"))


@pytest.fixture(scope="module")
def pipe(shapes: Path) -> Iterator[Any]:
    loaded = offcut.load(shapes, "onnxruntime", threads=1)
    loaded.set_progress_bar_config(disable=True)
    loaded.unet.advise = False
    yield loaded
    loaded.unet.close()


@pytest.fixture(scope="module")
def tuned(shapes: Path, pipe: Any) -> Tuned:
    """The fastest schedule with 35 dB for DDIM and 20 steps, saved in the bundle.

    The target is a PSNR, since speed would depend on the machine's load.
    """
    progress: list[str] = []
    request = TuningRequest(psnr=35.0, steps=STEPS, guidance=(2.0, 4.0), samples=8, prompts=PROMPTS, probes=4, pareto=2)
    bundle = offcut.Bundle.open(shapes)
    schedule = tune(pipe, bundle, NAME, request, progress.append)
    save(bundle, schedule)
    stages = [line for line in progress if not line.startswith(" ")]
    assert stages[0] == "generate uncached images"
    assert "fit again on cached images" in stages
    return schedule


def image(pipe: Any, tuned: Tuned | None, **changes: Any) -> np.ndarray:
    settings: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "seed": 77, "size": None, "output": "np"}
    if tuned is not None:
        tuned.apply(pipe.unet)
    pixels: np.ndarray = generate_from_prompt(pipe, PROMPTS[0], **settings | changes).images[0]
    return pixels


def test_the_target_is_reached_and_the_report_is_complete(tuned: Tuned) -> None:
    document = tuned.document
    best, *others, fewer_steps = document.measured
    reused = next(row for row in others if row.name == "tuned schedule, features reused")
    assert document.full[0] == 0
    assert best.full_calls == len(document.full)
    assert best.full_calls + best.shallow_calls + best.skipped_calls == STEPS
    assert 1 < len(document.full) < STEPS - 2
    assert best.psnr > 29  # on prompts and seeds that tuning did not use
    assert [kind == "full" for kind in document.predictors] == [call in document.full for call in range(STEPS)]
    assert document.samples == {"fit": 4, "select": 2, "test": 2}
    assert reused.full_calls == best.full_calls
    names = [row.name for row in others]
    assert {"CacheQuant's schedule", "every 2th call full"} & set(names)
    assert ("tuned, not corrected" in names) == bool(document.corrected)
    assert ("tuned, no call skipped" in names) == (SKIP in document.by_call)
    assert fewer_steps.name.startswith("uncached")
    assert len(document.pareto) == 2
    costs = [row.full_calls for row in document.pareto]
    assert costs == sorted(costs)


def test_the_schedule_is_better_than_reuse_at_the_same_cost(tuned: Tuned) -> None:
    """DDIM is deterministic, so features change smoothly and predictions hold for the test images."""
    best, *others = tuned.document.measured
    reused = next(row for row in others if row.name == "tuned schedule, features reused")
    assert best.psnr > reused.psnr + 1
    for row in others:
        plain = not {"forecast", "corrected", "skipped"} & set(row.name.replace(",", "").split())
        if row.speed_up >= best.speed_up - 1e-9 and plain:
            assert best.psnr > row.psnr, row.name


def test_a_better_untuned_schedule_of_the_same_speed_is_named(tuned: Tuned) -> None:
    best, fewer_steps = tuned.document.measured[0], tuned.document.measured[-1]

    def better(**changes: Any) -> str | None:
        rows = [best.model_copy(update={"psnr": 30.0, "speed_up": 2.0}), fewer_steps.model_copy(update=changes)]
        row = tuned.document.model_copy(update={"measured": tuple(rows)}).better_untuned
        return row and row.name

    assert better(psnr=30.5, speed_up=2.0) == fewer_steps.name
    assert better(psnr=30.5, speed_up=1.98) == fewer_steps.name
    assert better(psnr=30.5, speed_up=1.9) is None
    assert better(psnr=29.5, speed_up=2.0) is None
    assert better(psnr=30.5, speed_up=2.0, name="tuned, not corrected") is None


def test_corrected_noise_predictions_improve_new_images(
    pipe: Any, shapes: Path, copied: Callable[[Path], Path]
) -> None:
    """Every fourth of 12 calls is full; images are the same alone and in a worker, after a reload from the bundle."""
    bundle, steps = offcut.Bundle.open(copied(shapes)), 12
    pipeline = TuningPipeline(pipe, steps, None, {"deepcache:0": pipe.unet.cut_features["deepcache:0"]})
    sets = split_images(PROMPTS, 16, (GUIDANCE, GUIDANCE), 0)
    full = offcut.Uniform(4).full_calls(steps)
    kinds = tuple("full" if call in full else "reuse" for call in range(steps))
    document = TunedDocument(
        key=make_key(bundle, pipe.scheduler, steps, (GUIDANCE, GUIDANCE)),
        cut="deepcache:0",
        full=full,
        predictors=kinds,
        engine="onnxruntime",
        shallow_over_full=0.1,
        samples={},
        measured=(ReportRow(name="tuned", full_calls=1, shallow_calls=1, speed_up=1, psnr=1, worst=1),),
    )
    pipe.unet.record_times, scheduler = True, pipe.scheduler
    with tapped(pipe) as tap:
        record(pipeline, sets, FeatureRecorder(pipe.unet, pipeline.features, 16), steps, lambda stage: None, tap=tap)
        corrected, left_out = lockstep.fit(pipeline, tap, Tuned("corrected", document, {}), sets[0], sets[1])
    assert pipe.scheduler is scheduler
    assert len(corrected.document.corrected) > 6
    assert 0 not in corrected.document.corrected
    assert left_out is not None
    psnrs = [fmean(pipeline.psnr(images, corrected.schedule, corrected.forecast)) for images in sets]
    fitted = (psnrs[0] * len(sets[0].images) + psnrs[1] * len(sets[1].images)) / len(left_out)
    assert fmean(left_out) < fitted  # `fitted`: kernels that were fitted to the same images
    assert fmean(left_out) == pytest.approx(psnrs[2], abs=2)  # the test images
    reused = fmean(pipeline.psnr(sets[2], corrected.schedule))
    assert psnrs[2] > reused + 1

    earlier = replace(corrected, document=document.model_copy(update={"version": 1, "corrected": (1,)}))
    assert "earlier version" in (mismatch(earlier, document.key) or "")
    with pytest.raises(ScheduleError, match="tune it again"):
        earlier.apply(pipe.unet)

    save(bundle, corrected)
    loaded = Tuned.load(offcut.Bundle.open(bundle.path), "corrected")
    alone = image(pipe, loaded, steps=steps)
    pipe.unet.set_schedule(None)
    arguments = prompt_arguments(pipe, PROMPTS[0], steps=steps, guidance=GUIDANCE, seed=77, size=None, output="np")
    with Worker(pipe, max_in_flight=2) as worker:
        tickets = [
            worker.submit(arguments | {"generator": torch.Generator().manual_seed(77)}, **settings)
            for settings in (
                {"schedule": loaded.schedule, "forecast": loaded.forecast},
                {"schedule": offcut.Uniform(3)},
            )
        ]
        pixels = [ticket.future.result().images[0] for ticket in tickets]
    assert np.abs(pixels[0] - alone).max() < 1e-3
    assert np.abs(pixels[1] - alone).max() > 1e-2


def test_skipped_calls_are_better_than_fewer_steps(pipe: Any, shapes: Path) -> None:
    """20 steps with 7 full and 13 skipped calls are compared with 7 steps."""
    bundle = offcut.Bundle.open(shapes)
    pipeline = TuningPipeline(pipe, STEPS, None, {"deepcache:0": pipe.unet.cut_features["deepcache:0"]})
    sets = split_images(PROMPTS, 16, (GUIDANCE, GUIDANCE), 0)
    cuts = spread_shallow_calls(evenly_spaced(STEPS, 7), STEPS, 0, "deepcache:0")
    document = TunedDocument(
        key=make_key(bundle, pipe.scheduler, STEPS, (GUIDANCE, GUIDANCE)),
        cut="deepcache:0",
        cuts=cuts,
        full=full_calls(cuts),
        predictors=tuple("full" if cut is None else SKIP for cut in cuts),
        engine="onnxruntime",
        shallow_over_full=0.1,
        samples={},
        measured=(),
    )
    pipe.unet.record_times = True
    with tapped(pipe) as tap:
        record(pipeline, sets, FeatureRecorder(pipe.unet, pipeline.features, 16), STEPS, lambda stage: None, tap=tap)
        corrected, _ = lockstep.fit(pipeline, tap, Tuned("skipping", document, {}), sets[0], sets[1])
    psnr = fmean(pipeline.psnr(sets[2], corrected.schedule, corrected.forecast))
    assert pipeline.last_run.cuts == cuts
    assert psnr > fmean(pipeline.psnr(sets[2], corrected.schedule)) + 3  # the last noise prediction repeated
    assert psnr > fmean(pipeline.psnr(sets[2], None, steps=7)) + 1


def test_a_loaded_schedule_gives_the_same_image(pipe: Any, shapes: Path, tuned: Tuned) -> None:
    bundle = offcut.Bundle.open(shapes)
    bundle.verify_files()
    loaded = Tuned.load(bundle, NAME)
    assert loaded.document == tuned.document
    assert loaded.coefficients.keys() == tuned.coefficients.keys()
    assert np.array_equal(image(pipe, tuned), image(pipe, loaded))
    assert pipe.unet.last_run.full_calls == tuned.document.full


def test_a_schedule_is_refused_under_other_conditions(pipe: Any, shapes: Path, tuned: Tuned) -> None:
    bundle = offcut.Bundle.open(shapes)
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    euler = EulerDiscreteScheduler.from_config(ddim.config)
    spaced = DDIMScheduler.from_config(ddim.config, timestep_spacing="leading")
    assert choose(bundle, make_key(bundle, ddim, STEPS, (3.0, 3.0))).name == NAME
    for scheduler, steps, scale, reason in (
        (euler, STEPS, 3.0, "not EulerDiscreteScheduler"),
        (spaced, STEPS, 3.0, "another configuration of DDIMScheduler"),
        (ddim, 25, 3.0, f"{STEPS} steps, not 25"),
        (ddim, STEPS, 7.5, "guidance 2 to 4, not 7.5"),
    ):
        with pytest.raises(ScheduleError, match=reason):
            choose(bundle, make_key(bundle, scheduler, steps, (scale, scale)))
    other = make_key(bundle, ddim, STEPS, (3.0, 3.0)).model_copy(update={"weights": "0" * 64})
    assert mismatch(tuned, other) == "it was tuned for other weights"
    cuts = tuple(cut for cut in tuned.document.used_cuts if cut != SKIP)
    assert mismatch(tuned, tuned.document.key, cuts) is None
    assert bool(cuts) == ("it needs" in (mismatch(tuned, tuned.document.key, ("deepcache:9",)) or ""))
    with pytest.raises(ScheduleError, match=f"has no schedule fast; it has {NAME}"):
        Tuned.load(shapes, "fast")


def test_another_number_of_calls_is_refused_at_the_first_call(pipe: Any, tuned: Tuned) -> None:
    tuned.apply(pipe.unet)
    with pytest.raises(ScheduleError, match=f"tuned for {STEPS} UNet calls, and the generation has 9"):
        image(pipe, None, steps=9)


def test_a_damaged_file_is_refused(shapes: Path, tuned: Tuned, copied: Callable[[Path], Path]) -> None:
    copy = copied(shapes)
    bundle = offcut.Bundle.open(copy)
    file = copy / bundle.manifest.schedules[NAME].coefficients
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match="bytes, not"):
        Tuned.load(bundle, NAME)


def test_a_schedule_replaces_one_of_the_same_name(tuned: Tuned, shapes: Path, copied: Callable[[Path], Path]) -> None:
    copy = copied(shapes)
    bundle = offcut.Bundle.open(copy)
    before = bundle.manifest.schedules[NAME]
    changed = replace(tuned, document=tuned.document.model_copy(update={"engine": "another"}))
    save(bundle, changed)
    after = offcut.Bundle.open(copy)
    assert after.manifest.schedules[NAME] != before
    assert before.document not in after.manifest.files
    assert Tuned.load(after, NAME).document.engine == "another"


def test_a_later_build_and_prune_keep_the_schedule(tuned: Tuned, shapes: Path, copied: Callable[[Path], Path]) -> None:
    bundle = copied(shapes)
    offcut.build(model_path(), bundle, cuts=["deepcache:0", "deepcache:3"], engine="onnxruntime")
    pruned = CliRunner().invoke(app, ["prune", str(bundle)])
    assert pruned.exit_code == 0, pruned.output
    assert Tuned.load(bundle, NAME).document == tuned.document


def test_recording_changes_no_image(pipe: Any, tuned: Tuned) -> None:
    """The recorder runs the full graph at shallow calls, and restores what they read, with and without a forecast."""
    features = pipe.unet.cut_features["deepcache:0"]
    for forecast in (None, Extrapolate(1.0)):
        pipe.unet.set_schedule(offcut.Uniform(4), forecast=forecast)
        plain = image(pipe, None)
        recorder = FeatureRecorder(pipe.unet, features, positions=16)
        with recorder.watch():
            recorded = image(pipe, None)
        assert np.array_equal(plain, recorded)
    moments = recorder.empty_moments()
    recorder.add_to(moments)
    (feature_moments,) = moments.values()
    assert feature_moments.sums.shape[1] == STEPS
    assert feature_moments.count == 16


def test_a_given_ratio_replaces_the_measured_one(pipe: Any, shapes: Path) -> None:
    bundle = offcut.Bundle.open(shapes)

    def tuned_with(**changes: Any) -> Any:
        settings: dict[str, Any] = {"steps": 8, "guidance": (3.0, 3.0), "samples": 4, "prompts": PROMPTS, "probes": 2}
        return tune(
            pipe, bundle, "given", TuningRequest(speed_up=2.0, **settings | changes), lambda stage: None
        ).document

    document = tuned_with(ratios={"deepcache:0": 0.1})
    assert document.shallow_over_full == 0.1
    assert 0.02 < document.measured_ratios["deepcache:0"] < 2
    assert document.measured_ratios["deepcache:0"] != 0.1
    assert document.measured[0].speed_up >= 2
    for row in document.measured:
        assert row.speed_up == pytest.approx(8 / (row.full_calls + 0.1 * row.shallow_calls))
    assert SKIP not in tuned_with(skip=False).by_call
    with pytest.raises(UserError, match="ratio was given for deepcache:9, but the tuned cuts are deepcache:0"):
        tuned_with(ratios={"deepcache:0": 0.1, "deepcache:9": 0.2})
    with pytest.raises(UserError, match="no ratio was given for deepcache:0"):
        tuned_with(ratios={"deepcache:9": 0.2})


def test_heun_has_more_calls_than_steps(pipe: Any, shapes: Path) -> None:
    bundle, before = offcut.Bundle.open(shapes), pipe.scheduler
    pipe.scheduler = HeunDiscreteScheduler.from_config(before.config)
    try:
        request = TuningRequest(psnr=20.0, steps=5, guidance=(3.0, 3.0), samples=4, prompts=PROMPTS, probes=2)
        tuned = tune(pipe, bundle, "heun", request, lambda stage: None)
    finally:
        pipe.scheduler = before
    assert tuned.document.key.calls == 9
    assert len(tuned.document.predictors) == 9
    assert tuned.document.measured[0].psnr > 15


def test_the_commands_tune_run_and_inspect(
    shapes: Path, tuned: Tuned, copied: Callable[[Path], Path], tmp_path: Path, command: Callable[..., str]
) -> None:
    copy = copied(shapes)
    options = ("--steps", "8", "--guidance", "3", "--engine", "onnxruntime", "--threads", "1")
    output = command("tune", copy, "--budget", "2x", *options, "--samples", "4", "--ratio", "0.2", "--json")
    document = json.loads(output)
    assert document["name"] == "DDIM-8-2x"
    assert document["key"]["steps"] == 8
    assert document["shallow_over_full"] == 0.2
    run = ("run", copy, "a red circle", *options, "-o", tmp_path / "a.png")
    report = json.loads(command(*run, "--schedule", "auto", "--json"))
    assert report["full_calls"] == len(document["full"])
    predicts = document["corrected"] or any(kind not in ("full", "reuse") for kind in document["predictors"])
    assert report["forecast"] == ("tuned" if predicts else None)
    budget = document["measured"][0]
    assert budget["speed_up"] >= 2 or budget["full_calls"] == 1
    listed = command("inspect", copy)
    assert "schedule DDIM-8-2x: DDIMScheduler, 8 steps, guidance 3" in " ".join(listed.split())
    assert f"schedule {NAME}:" in listed
    (tmp_path / "a.png").unlink()
    refused = command(*run, "--schedule", f"tuned:{NAME}", fails=True)
    assert f"{NAME}: it was tuned for {STEPS} steps, not 8" in " ".join(refused.split())
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one target above 0"),
        (["--budget", "2x", "--psnr", "30"], "give one target above 0"),
        (["--budget", "fast"], "is not a value such as 2.5x"),
        (["--latency", "1us"], "is not a value such as"),
        (["--budget", "2x", "--guidance", "9..5"], "is not a range from low to high"),
        (["--budget", "2x", "--name", "a/b"], "is not a valid schedule name"),
        (["--budget", "2x", "--ratio", "small"], "is not a value such as 0.1"),
        (["--budget", "2x", "--ratio", "0"], "the ratio of deepcache:0 is 0"),
        (["--budget", "2x", "--ratio", "1.5"], "the ratio of deepcache:0 is 1.5"),
        (["--latency", "1s", "--ratio", "0.1"], "a latency target holds for this machine only"),
        (["--budget", "2x", "--ratio", "deepcache:3=0.1"], "no ratio was given for deepcache:0"),
        (["--budget", "2x", "--sampler", "Nonsense"], "diffusers has no scheduler Nonsense"),
    ],
)
def test_wrong_options_give_a_clear_message(shapes: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["tune", str(shapes), *options])
    assert result.exit_code != 0
    text = f"{result.stderr} {result.exception}".replace("│", " ")
    assert message in " ".join(text.split())
    assert isinstance(result.exception, UserError | SystemExit)


def test_invalid_requests_are_refused() -> None:
    with pytest.raises(UserError, match="one target"):
        TuningRequest(speed_up=2, psnr=30)
    with pytest.raises(UserError, match="at least 4"):
        TuningRequest(speed_up=2, samples=3, prompts=("a",))
    with pytest.raises(UserError, match="no prompt"):
        TuningRequest(speed_up=2, prompts=())
