"""``offcut tune`` with several cuts, on the shapes model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import offcut
from offcut import Tuned
from offcut.benchmarks.shapes.model import PROMPTS
from offcut.errors import CutError, UserError
from offcut.runtime.text_to_image import generate_from_prompt
from offcut.runtime.tuning.artifact import save
from offcut.runtime.tuning.document import TunedDocument
from offcut.runtime.tuning.tune import tune
from offcut.runtime.tuning.tuning_request import TuningRequest

pytestmark = pytest.mark.slow

STEPS, NAME = 12, "mixed"
CUTS = ("deepcache:0", "deepcache:3")


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
    settings: dict[str, Any] = {"guidance": (3.0, 3.0), "samples": 4, "prompts": PROMPTS, "probes": 3}
    request = TuningRequest(speed_up=1.5, steps=STEPS, cuts=CUTS, skip=False, **settings)
    bundle = offcut.Bundle.open(shapes)
    schedule = tune(pipe, bundle, NAME, request, lambda stage: None)
    save(bundle, schedule)
    return schedule


def test_each_cut_has_its_own_ratio(pipe: Any, shapes: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "guidance": (3.0, 3.0), "samples": 4, "prompts": PROMPTS, "probes": 1}
    settings["skip"] = False
    bundle, ratios = offcut.Bundle.open(shapes), dict(zip(CUTS, (0.1, 0.4), strict=True))
    with pytest.raises(UserError, match=f"no ratio was given for {CUTS[1]}: give one for each cut"):
        tune(
            pipe,
            bundle,
            "half",
            TuningRequest(speed_up=2, cuts=CUTS, ratios={CUTS[0]: 0.1}, **settings),
            lambda stage: None,
        )
    tuned = tune(
        pipe, bundle, "both", TuningRequest(speed_up=2, cuts=CUTS, ratios=ratios, **settings), lambda stage: None
    )
    assert tuned.document.ratios == ratios
    assert list(tuned.document.measured_ratios) == list(CUTS)
    first = tuned.document.measured[0]
    cost = sum(1 if cut is None else ratios[cut] for cut in tuned.document.by_call)
    assert first.speed_up == pytest.approx(6 / cost)


def image(pipe: Any, tuned: Tuned) -> np.ndarray:
    tuned.apply(pipe.unet)
    pixels: np.ndarray = generate_from_prompt(
        pipe, PROMPTS[0], steps=STEPS, guidance=3.0, seed=7, size=None, output="np"
    ).images[0]
    return pixels


def test_the_schedule_is_within_the_budget_and_the_report_has_a_row_for_one_cut(tuned: Tuned) -> None:
    document = tuned.document
    best, one_cut, reused, *_ = document.measured
    assert one_cut.name in [f"one cut only, {cut}" for cut in CUTS]
    assert reused.name == "tuned schedule, features reused"
    assert set(document.ratios) == set(CUTS)
    assert document.shallow_over_full == document.ratios[document.cut]
    assert set(document.used_cuts) <= set(CUTS)
    cost = sum(1.0 if cut is None else document.ratios[cut] for cut in document.by_call)
    assert best.speed_up == pytest.approx(STEPS / cost)
    for row in (best, one_cut):
        assert row.speed_up >= 1.5 - 1e-6 or row.full_calls == 1
    assert [cut is None for cut in document.by_call] == [call in document.full for call in range(STEPS)]


def test_a_loaded_schedule_gives_the_same_image(pipe: Any, shapes: Path, tuned: Tuned) -> None:
    loaded = Tuned.load(shapes, NAME)
    assert loaded.document == tuned.document
    assert np.array_equal(image(pipe, tuned), image(pipe, loaded))
    assert pipe.unet.last_run.cuts == tuned.document.by_call


def test_a_mixed_schedule_is_kept_in_the_bundle(
    pipe: Any, shapes: Path, tuned: Tuned, copied: Callable[[Path], Path], command: Callable[..., str]
) -> None:
    """The schedule is made by hand, so it does not depend on the result of the search."""
    by_call = tuple(None if call % 4 == 0 else CUTS[call % 2] for call in range(STEPS))
    changed = {"cuts": by_call, "full": (0, 4, 8), "cut": CUTS[0]}
    mixed = Tuned("by-hand", tuned.document.model_copy(update=changed), {})
    copy = copied(shapes)
    save(offcut.Bundle.open(copy), mixed)
    loaded = Tuned.load(copy, "by-hand")
    assert loaded.document.used_cuts == (CUTS[1], CUTS[0])
    assert loaded.schedule.cuts == (CUTS[1], CUTS[0])
    image(pipe, loaded)
    assert pipe.unet.last_run.cuts == by_call
    assert f"{CUTS[1]} and {CUTS[0]}" in " ".join(command("inspect", copy).split())


def test_documents_without_cuts_by_call_are_read(tuned: Tuned) -> None:
    older = json.loads(tuned.document.model_dump_json())
    del older["cuts"], older["ratios"]
    document = TunedDocument.model_validate_json(json.dumps(older))
    assert document.schedule.cuts == (None,)
    assert set(document.by_call) == {None, document.cut}


def test_a_cut_that_the_bundle_lacks_is_refused(pipe: Any, shapes: Path) -> None:
    request = TuningRequest(speed_up=2.0, steps=4, samples=4, prompts=PROMPTS, cuts=("deepcache:0", "deepcache:7"))
    with pytest.raises(CutError, match="'deepcache:7'; it has deepcache:0, deepcache:3"):
        tune(pipe, offcut.Bundle.open(shapes), "none", request, lambda stage: None)
    assert pipe.unet.schedule is None


def test_the_command_takes_all_cuts(shapes: Path, copied: Callable[[Path], Path], command: Callable[..., str]) -> None:
    options = ("--budget", "1.5x", "--cut", "all", "--no-skip", "--steps", "5", "--guidance", "3", "--samples", "4")
    output = command("tune", copied(shapes), *options, "--engine", "onnxruntime", "--threads", "1")
    text = " ".join(output.split())
    assert "one cut only, deepcache" in text
    assert f"({CUTS[0]})" in text
    assert f"({CUTS[1]})" in text
