"""``--plan front``: the settings at equal cost, tuning once, and the row of a tuned schedule."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import offcut
from offcut.benchmarks.quality import front, pictures, plan
from offcut.benchmarks.quality.evaluate import evaluate
from offcut.benchmarks.quality.pictures import ImageTask
from offcut.engines.bundle.bundle import Bundle
from offcut.errors import UserError

pytestmark = pytest.mark.slow
pytest.importorskip("torchmetrics")

SAMPLER, STEPS = "dpm++ 2m", 8
RATIOS = plan.SHALLOW_OVER_FULL


@pytest.fixture(scope="module")
def shapes(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a new bundle, because schedules are added to it."""
    return Path(shutil.copytree(shapes_bundle, tmp_path_factory.mktemp("front") / "shapes.offcut"))


@pytest.fixture(scope="module")
def pipe(shapes: Path) -> Iterator[Any]:
    loaded = offcut.load(shapes, "onnxruntime", threads=1)
    yield loaded
    loaded.unet.close()


@pytest.fixture(scope="module")
def settings(pipe: Any, shapes: Path) -> list[plan.QualitySetting]:
    known = [setting for setting in front.known(2 * STEPS, [SAMPLER]) if setting.interval in (1, 3)]
    return front.front_plan(pipe, Bundle.open(shapes), known, 3.0, RATIOS, samples=4)


def test_known_settings_have_no_tuned_schedule() -> None:
    rows = front.known(50)
    assert {(row.sampler, row.steps) for row in rows} == {("ddim", 50), ("dpm++ 2m", 25), ("euler ancestral", 25)}
    for sampler in plan.SAMPLERS:
        own = [row for row in rows if row.sampler == sampler]
        assert [row.kind for row in own].count("uncached") == 1
        for interval in front.INTERVALS:
            of_it = [row for row in own if row.interval == interval]
            assert [row.parsed.warmup if row.parsed else None for row in of_it] == [0, 2, 2]
            assert [row.damping is None for row in of_it] == [True, True, False]
    with pytest.raises(UserError, match="'heun' is not a sampler of this benchmark"):
        front.known(50, ["heun"])


def test_a_tuned_schedule_is_as_fast_as_the_plain_one(settings: list[plan.QualitySetting]) -> None:
    (tuned,) = (row for row in settings if row.bundle_schedule is not None)
    plain = next(row for row in settings if row.schedule == "uniform:3")
    assert tuned.kind == "cached"
    assert tuned.cost(RATIOS) <= plain.cost(RATIOS) + 1e-9
    assert tuned.full_calls == tuned.bundle_schedule.by_call.count(None)  # type: ignore[union-attr]
    assert tuned.interval is None
    (theirs,) = (row for row in settings if (row.schedule or "").startswith("steps:0,"))
    assert theirs.full_calls == 3


def test_a_schedule_is_tuned_once(settings: list[plan.QualitySetting], pipe: Any, shapes: Path) -> None:
    bundle, messages = Bundle.open(shapes), list[str]()
    known = [row for row in settings if row.bundle_schedule is None and not (row.schedule or "").startswith("steps")]
    assert front.front_plan(pipe, bundle, known, 3.0, RATIOS, samples=4, progress=messages.append) == settings
    assert messages == []
    assert Bundle.open(shapes).digest == bundle.digest
    ratios = {**RATIOS, plan.CUTS[0]: 0.3}
    other = front.front_plan(pipe, bundle, known, 3.0, ratios, samples=4, progress=messages.append)
    assert any("tuned for other settings" in message for message in messages)
    assert other != settings
    changed = [row for row in other if row.bundle_schedule is not None]
    task = ImageTask(("a",), 3.0, 0, 1, "")
    for now, before in zip(changed, (row for row in settings if row.bundle_schedule is not None), strict=True):
        assert now.name == before.name
        assert task.key(now, 0) != task.key(before, 0)  # images of one are not used for the other
    front.front_plan(pipe, bundle, known, 3.0, RATIOS, samples=4)


def test_images_are_the_same_with_and_without_schedules_in_the_bundle(
    settings: Any, shapes: Path, shapes_bundle: Path
) -> None:
    with_them, without = Bundle.open(shapes), Bundle.open(shapes_bundle)
    assert with_them.manifest.schedules
    assert with_them.digest != without.digest
    assert with_them.built_digest == without.built_digest == without.digest


def test_a_tuned_schedule_has_a_row_with_its_calls(
    settings: list[plan.QualitySetting], pipe: Any, shapes: Path, tmp_path: Path
) -> None:
    known = [row for row in settings if row.bundle_schedule is None and not (row.schedule or "").startswith("steps")]
    now = front.front_plan(pipe, Bundle.open(shapes), known, 3.0, RATIOS, samples=4)
    task = ImageTask(pictures.prompts(4, 1000), guidance=3.0, seed=0, batch=4, identity="test", bundle=shapes)
    rows = plan.with_fewer_steps(now, RATIOS)
    measured = evaluate(pipe, task, rows, tmp_path, ratios=RATIOS, model="shapes")
    (row,) = (each for each in measured.rows if (each.schedule or "").startswith("tuned:"))
    (setting,) = (each for each in rows if each.bundle_schedule is not None)
    assert row.full_calls + row.shallow_calls + row.skipped_calls == STEPS
    assert row.skipped_calls == setting.bundle_schedule.by_call.count("skip")  # type: ignore[union-attr]
    assert row.cost == setting.cost(RATIOS)
    assert row.psnr is not None
