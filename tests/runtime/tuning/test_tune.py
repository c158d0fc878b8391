"""``offcut tune`` for real, on the shapes model: what it finds is kept, refused elsewhere, and better than reuse."""

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
from offcut.runtime.tuning.artifact import save
from offcut.runtime.tuning.choice import choose, key_of, refusal
from offcut.runtime.tuning.cuts import full_of
from offcut.runtime.tuning.document import Document
from offcut.runtime.tuning.images import Studio, three_sets
from offcut.runtime.tuning.measure import record
from offcut.runtime.tuning.record import Recorder
from offcut.runtime.tuning.skipping import evenly, mixed
from offcut.runtime.tuning.tune import tune
from offcut.runtime.tuning.wanted import Target, Wanted
from offcut.runtime.tuning.watched import watched

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
    """DDIM, 20 steps, the fastest with 35 dB, saved in the bundle: unlike time, that depends on no load."""
    said: list[str] = []
    wanted = Wanted(Target(psnr=35.0), steps=STEPS, guidance=(2.0, 4.0), samples=8, prompts=PROMPTS, probes=4, pareto=2)
    bundle = offcut.Bundle.open(shapes)
    found = tune(pipe, bundle, NAME, wanted, said.append)
    save(bundle, found)
    stages = [each for each in said if not each.startswith(" ")]
    assert stages[0] == "draw uncached images"
    assert "fit again on cached images" in stages
    return found


def image(pipe: Any, by: Tuned | None, **changed: Any) -> np.ndarray:
    asked: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "seed": 77, "size": None, "output": "np"}
    if by is not None:
        by.apply(pipe.unet)
    made: np.ndarray = generate_from_prompt(pipe, PROMPTS[0], **asked | changed).images[0]
    return made


def test_the_target_is_reached_and_the_report_whole(tuned: Tuned) -> None:
    document = tuned.document
    ours, *others, fewer = document.measured
    reused = next(row for row in others if row.name == "tuned schedule, features reused")
    assert document.full[0] == 0
    assert ours.full_calls == len(document.full)
    assert ours.full_calls + ours.shallow_calls + ours.skipped_calls == STEPS
    assert 1 < len(document.full) < STEPS - 2
    assert ours.psnr > 29  # other prompts and seeds than those that chose it
    assert [kind == "full" for kind in document.predictors] == [call in document.full for call in range(STEPS)]
    assert document.samples == {"fit": 4, "select": 2, "test": 2}
    assert reused.full_calls == ours.full_calls
    names = [row.name for row in others]
    assert {"CacheQuant's schedule", "every 2th call full"} & set(names)
    assert ("tuned, answers not corrected" in names) == bool(document.corrected)
    assert ("tuned, no call skipped" in names) == (SKIP in document.by_call)
    assert fewer.name.startswith("uncached")
    assert len(document.pareto) == 2
    costs = [row.full_calls for row in document.pareto]
    assert costs == sorted(costs)


def test_it_is_better_than_reuse_at_the_same_cost(tuned: Tuned) -> None:
    """DDIM is deterministic: features go on as they went, on images that had no part in the tuning too."""
    ours, *others = tuned.document.measured
    reused = next(row for row in others if row.name == "tuned schedule, features reused")
    assert ours.psnr > reused.psnr + 1
    for row in others:
        plain = not {"forecast", "corrected", "skipped"} & set(row.name.replace(",", "").split())
        if row.speed_up >= ours.speed_up - 1e-9 and plain:
            assert ours.psnr > row.psnr, row.name


def test_a_plain_way_that_is_as_fast_and_nearer_is_named(tuned: Tuned) -> None:
    ours, fewer = tuned.document.measured[0], tuned.document.measured[-1]

    def nearer(**changed: Any) -> str | None:
        rows = [ours.model_copy(update={"psnr": 30.0, "speed_up": 2.0}), fewer.model_copy(update=changed)]
        found = tuned.document.model_copy(update={"measured": tuple(rows)}).nearer
        return found and found.name

    assert nearer(psnr=30.5, speed_up=2.0) == fewer.name
    assert nearer(psnr=30.5, speed_up=1.98) == fewer.name
    assert nearer(psnr=30.5, speed_up=1.9) is None
    assert nearer(psnr=29.5, speed_up=2.0) is None
    assert nearer(psnr=30.5, speed_up=2.0, name="tuned, answers not corrected") is None


def test_corrected_answers_bring_new_images_nearer(pipe: Any, shapes: Path, copied: Callable[[Path], Path]) -> None:
    """Of plain reuse at every fourth of 12 calls; alone, in a worker, and from a bundle alike."""
    bundle, steps = offcut.Bundle.open(copied(shapes)), 12
    studio = Studio(pipe, steps, None, {"deepcache:0": pipe.unet.cut_features["deepcache:0"]})
    sets = three_sets(PROMPTS, 16, (GUIDANCE, GUIDANCE), 0)
    full = offcut.Uniform(4).full_calls(steps)
    kinds = tuple("full" if call in full else "reuse" for call in range(steps))
    document = Document(
        key=key_of(bundle, pipe.scheduler, steps, (GUIDANCE, GUIDANCE)),
        cut="deepcache:0",
        full=full,
        predictors=kinds,
        engine="onnxruntime",
        shallow_over_full=0.1,
        samples={},
        measured=(),
    )
    pipe.unet.record_times, scheduler = True, pipe.scheduler
    with watched(pipe) as watch:
        record(studio, sets, Recorder(pipe.unet, studio.features, 16), steps, lambda said: None, watch=watch)
        corrected, left_out = lockstep.fit(studio, watch, Tuned("corrected", document, {}), sets[0], sets[1])
    assert pipe.scheduler is scheduler
    assert len(corrected.document.corrected) > 6
    assert 0 not in corrected.document.corrected
    assert left_out is not None
    near = [fmean(studio.psnr(each, corrected.schedule, corrected.forecast)) for each in sets]
    known = (near[0] * len(sets[0].images) + near[1] * len(sets[1].images)) / len(left_out)
    assert fmean(left_out) < known  # these the kernels were fitted to
    assert fmean(left_out) == pytest.approx(near[2], abs=2)  # these not
    reused = fmean(studio.psnr(sets[2], corrected.schedule))
    assert near[2] > reused + 1

    earlier = replace(corrected, document=document.model_copy(update={"version": 1, "corrected": (1,)}))
    assert "earlier version" in (refusal(earlier, document.key) or "")
    with pytest.raises(ScheduleError, match="tune it again"):
        earlier.apply(pipe.unet)

    save(bundle, corrected)
    again = Tuned.load(offcut.Bundle.open(bundle.path), "corrected")
    alone = image(pipe, again, steps=steps)
    pipe.unet.set_schedule(None)
    asked = prompt_arguments(pipe, PROMPTS[0], steps=steps, guidance=GUIDANCE, seed=77, size=None, output="np")
    with Worker(pipe, max_in_flight=2) as worker:
        tickets = [
            worker.submit(asked | {"generator": torch.Generator().manual_seed(77)}, **by)
            for by in ({"schedule": again.schedule, "forecast": again.forecast}, {"schedule": offcut.Uniform(3)})
        ]
        made = [ticket.future.result().images[0] for ticket in tickets]
    assert np.abs(made[0] - alone).max() < 1e-3
    assert np.abs(made[1] - alone).max() > 1e-2


def test_calls_without_an_engine_are_better_than_fewer_steps(pipe: Any, shapes: Path) -> None:
    """7 of 20 calls are full and no other runs an engine, against 7 steps."""
    bundle = offcut.Bundle.open(shapes)
    studio = Studio(pipe, STEPS, None, {"deepcache:0": pipe.unet.cut_features["deepcache:0"]})
    sets = three_sets(PROMPTS, 16, (GUIDANCE, GUIDANCE), 0)
    cuts = mixed(evenly(STEPS, 7), STEPS, 0, "deepcache:0")
    document = Document(
        key=key_of(bundle, pipe.scheduler, STEPS, (GUIDANCE, GUIDANCE)),
        cut="deepcache:0",
        cuts=cuts,
        full=full_of(cuts),
        predictors=tuple("full" if cut is None else SKIP for cut in cuts),
        engine="onnxruntime",
        shallow_over_full=0.1,
        samples={},
        measured=(),
    )
    pipe.unet.record_times = True
    with watched(pipe) as watch:
        record(studio, sets, Recorder(pipe.unet, studio.features, 16), STEPS, lambda said: None, watch=watch)
        made, _ = lockstep.fit(studio, watch, Tuned("skipping", document, {}), sets[0], sets[1])
    found = fmean(studio.psnr(sets[2], made.schedule, made.forecast))
    assert studio.run.cuts == cuts
    assert found > fmean(studio.psnr(sets[2], made.schedule)) + 3  # the answers held as they are
    assert found > fmean(studio.psnr(sets[2], None, steps=7)) + 1


def test_what_is_read_again_draws_the_same(pipe: Any, shapes: Path, tuned: Tuned) -> None:
    bundle = offcut.Bundle.open(shapes)
    bundle.verify_files()
    again = Tuned.load(bundle, NAME)
    assert again.document == tuned.document
    assert again.coefficients.keys() == tuned.coefficients.keys()
    assert np.array_equal(image(pipe, tuned), image(pipe, again))
    assert pipe.unet.last_run.full_calls == tuned.document.full


def test_it_fits_what_it_was_tuned_for_and_nothing_else(pipe: Any, shapes: Path, tuned: Tuned) -> None:
    bundle = offcut.Bundle.open(shapes)
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    euler = EulerDiscreteScheduler.from_config(ddim.config)
    spaced = DDIMScheduler.from_config(ddim.config, timestep_spacing="leading")
    assert choose(bundle, key_of(bundle, ddim, STEPS, (3.0, 3.0))).name == NAME
    for scheduler, steps, scale, says in (
        (euler, STEPS, 3.0, "not EulerDiscreteScheduler"),
        (spaced, STEPS, 3.0, "another configuration of DDIMScheduler"),
        (ddim, 25, 3.0, f"{STEPS} steps, not 25"),
        (ddim, STEPS, 7.5, "guidance 2 to 4, not 7.5"),
    ):
        with pytest.raises(ScheduleError, match=says):
            choose(bundle, key_of(bundle, scheduler, steps, (scale, scale)))
    other = key_of(bundle, ddim, STEPS, (3.0, 3.0)).model_copy(update={"weights": "0" * 64})
    assert refusal(tuned, other) == "it was tuned for other weights"
    cuts = tuple(cut for cut in tuned.document.used if cut != SKIP)
    assert refusal(tuned, tuned.document.key, cuts) is None
    assert bool(cuts) == ("it needs" in (refusal(tuned, tuned.document.key, ("deepcache:9",)) or ""))
    with pytest.raises(ScheduleError, match=f"has no schedule fast; it has {NAME}"):
        Tuned.load(shapes, "fast")


def test_another_number_of_calls_is_refused_in_the_loop(pipe: Any, tuned: Tuned) -> None:
    tuned.apply(pipe.unet)
    with pytest.raises(ScheduleError, match=f"tuned for {STEPS} UNet calls, and the generation has 9"):
        image(pipe, None, steps=9)


def test_a_damaged_file_is_found(shapes: Path, tuned: Tuned, copied: Callable[[Path], Path]) -> None:
    copy = copied(shapes)
    bundle = offcut.Bundle.open(copy)
    file = copy / bundle.manifest.schedules[NAME].coefficients
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match="bytes, not"):
        Tuned.load(bundle, NAME)


def test_a_second_of_the_name_takes_its_place(tuned: Tuned, shapes: Path, copied: Callable[[Path], Path]) -> None:
    copy = copied(shapes)
    bundle = offcut.Bundle.open(copy)
    before = bundle.manifest.schedules[NAME]
    changed = Tuned(NAME, tuned.document.model_copy(update={"engine": "another"}), tuned.coefficients)
    save(bundle, changed)
    after = offcut.Bundle.open(copy)
    assert after.manifest.schedules[NAME] != before
    assert before.document not in after.manifest.files
    assert Tuned.load(after, NAME).document.engine == "another"


def test_another_build_and_a_prune_keep_it(tuned: Tuned, shapes: Path, copied: Callable[[Path], Path]) -> None:
    bundle = copied(shapes)
    offcut.build(model_path(), bundle, cuts=["deepcache:0", "deepcache:3"], engine="onnxruntime")
    pruned = CliRunner().invoke(app, ["prune", str(bundle)])
    assert pruned.exit_code == 0, pruned.output
    assert Tuned.load(bundle, NAME).document == tuned.document


def test_watching_changes_nothing(pipe: Any, tuned: Tuned) -> None:
    """The full graph is run beside the shallow calls, and what they read is put back, with and without a forecast."""
    features = pipe.unet.cut_features["deepcache:0"]
    for forecast in (None, Extrapolate(1.0)):
        pipe.unet.set_schedule(offcut.Uniform(4), forecast=forecast)
        plain = image(pipe, None)
        recorder = Recorder(pipe.unet, features, positions=16)
        with recorder.watch():
            watched = image(pipe, None)
        assert np.array_equal(plain, watched)
    moments = recorder.empty()
    recorder.add_to(moments)
    (each,) = moments.values()
    assert each.sums.shape[1] == STEPS
    assert each.count == 16


def test_a_given_ratio_takes_the_place_of_the_measured_one(pipe: Any, shapes: Path) -> None:
    bundle = offcut.Bundle.open(shapes)

    def tuned_for(**changed: Any) -> Any:
        asked: dict[str, Any] = {"steps": 8, "guidance": (3.0, 3.0), "samples": 4, "prompts": PROMPTS, "probes": 2}
        return tune(pipe, bundle, "given", Wanted(Target(speed_up=2.0), **asked | changed), lambda said: None).document

    document = tuned_for(ratios={"deepcache:0": 0.1})
    assert document.shallow_over_full == 0.1
    assert 0.02 < document.measured_ratios["deepcache:0"] < 2
    assert document.measured_ratios["deepcache:0"] != 0.1
    assert document.measured[0].speed_up >= 2
    for row in document.measured:
        assert row.speed_up == pytest.approx(8 / (row.full_calls + 0.1 * row.shallow_calls))
    assert SKIP not in tuned_for(skip=False).by_call
    with pytest.raises(UserError, match="ratio was given for deepcache:9, but tuned for is deepcache:0"):
        tuned_for(ratios={"deepcache:0": 0.1, "deepcache:9": 0.2})
    with pytest.raises(UserError, match="no ratio was given for deepcache:0"):
        tuned_for(ratios={"deepcache:9": 0.2})


def test_heun_has_more_calls_than_steps(pipe: Any, shapes: Path) -> None:
    bundle, before = offcut.Bundle.open(shapes), pipe.scheduler
    pipe.scheduler = HeunDiscreteScheduler.from_config(before.config)
    try:
        wanted = Wanted(Target(psnr=20.0), steps=5, guidance=(3.0, 3.0), samples=4, prompts=PROMPTS, probes=2)
        found = tune(pipe, bundle, "heun", wanted, lambda said: None)
    finally:
        pipe.scheduler = before
    assert found.document.key.calls == 9
    assert len(found.document.predictors) == 9
    assert found.document.measured[0].psnr > 15


def test_the_commands(
    shapes: Path, tuned: Tuned, copied: Callable[[Path], Path], tmp_path: Path, command: Callable[..., str]
) -> None:
    copy = copied(shapes)
    asked = ("--steps", "8", "--guidance", "3", "--engine", "onnxruntime", "--threads", "1")
    made = command("tune", copy, "--budget", "2x", *asked, "--samples", "4", "--ratio", "0.2", "--json")
    document = json.loads(made)
    assert document["name"] == "DDIM-8-2x"
    assert document["key"]["steps"] == 8
    assert document["shallow_over_full"] == 0.2
    run = ("run", copy, "a red circle", *asked, "-o", tmp_path / "a.png")
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
    ("options", "says"),
    [
        ([], "give one target above 0"),
        (["--budget", "2x", "--psnr", "30"], "give one target above 0"),
        (["--budget", "fast"], "is not a value such as 2.5x"),
        (["--latency", "1us"], "is not a value such as"),
        (["--budget", "2x", "--guidance", "9..5"], "ends before it begins"),
        (["--budget", "2x", "--name", "a/b"], "cannot name a schedule"),
        (["--budget", "2x", "--ratio", "small"], "is not a value such as 0.1"),
        (["--budget", "2x", "--ratio", "0"], "the ratio of deepcache:0 is 0"),
        (["--budget", "2x", "--ratio", "1.5"], "the ratio of deepcache:0 is 1.5"),
        (["--latency", "1s", "--ratio", "0.1"], "a latency is this machine's"),
        (["--budget", "2x", "--ratio", "deepcache:3=0.1"], "no ratio was given for deepcache:0"),
        (["--budget", "2x", "--sampler", "Nonsense"], "diffusers has no scheduler Nonsense"),
    ],
)
def test_what_cannot_be_is_one_sentence(shapes: Path, options: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["tune", str(shapes), *options])
    assert result.exit_code != 0
    said = f"{result.stderr} {result.exception}".replace("│", " ")
    assert says in " ".join(said.split())
    assert isinstance(result.exception, UserError | SystemExit)


def test_a_target_must_be_one() -> None:
    with pytest.raises(UserError, match="one target"):
        Target(speed_up=2, psnr=30)
    with pytest.raises(UserError, match="at least 4"):
        Wanted(Target(speed_up=2), samples=3, prompts=("a",))
    with pytest.raises(UserError, match="no prompt"):
        Wanted(Target(speed_up=2))
