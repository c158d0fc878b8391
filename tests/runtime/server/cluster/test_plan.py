"""A plan survives the way through a manifest; plans and options out of range are refused before anything starts."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from offcut.cli import app
from offcut.errors import UserError
from offcut.runtime.server.cluster.cluster_plan import ClusterPlan, ReplicaScale
from offcut.runtime.server.settings import RequestLimits, ServeSettings, WorkerConfig

PLAN = ClusterPlan(
    {
        "one": WorkerConfig("/bundles/one.offcut", device="cuda", loras=(("/bundles/style.safetensors", 0.8),)),
        "other": WorkerConfig("/bundles/other.offcut", threads=2, max_in_flight=4),
    },
    ServeSettings(api_key="secret", hosts=None, steps=20, limits=RequestLimits(images=2), schedule="quad:5"),
    ReplicaScale(least=1, most=4, gpus=1.0, surge=50),
    loaded=1,
)


def test_a_plan_survives_json_without_its_key() -> None:
    text = json.dumps(PLAN.document())
    assert "secret" not in text
    again = ClusterPlan.from_document(json.loads(text))
    assert again == replace(PLAN, settings=replace(PLAN.settings, api_key=None))
    assert again.default_model == "one"
    assert again.requests_per_replica == 8


def test_a_plan_with_an_invalid_field_is_refused_by_name() -> None:
    document = PLAN.document()
    document["scale"]["least"] = "many"
    with pytest.raises(UserError, match=r"scale\.least"):
        ClusterPlan.from_document(document)
    with pytest.raises(UserError, match="surplus"):
        ClusterPlan.from_document({**PLAN.document(), "surplus": 1})


def test_a_document_of_an_earlier_version_is_read() -> None:
    document = PLAN.document()
    document["recipes"] = {name: {**config, "policy": "deadline"} for name, config in document.pop("workers").items()}
    assert ClusterPlan.from_document(document) == ClusterPlan.from_document(PLAN.document())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReplicaScale(least=3, most=2), "3 to 2 is not a valid number"),
        (lambda: ReplicaScale(least=0), "0 to 1 is not a valid number"),
        (lambda: ReplicaScale(surge=101), "101 %"),
        (lambda: ReplicaScale(gpus=-1), "0 or more"),
        (lambda: ClusterPlan({}), "name a bundle"),
        (lambda: replace(PLAN, loaded=3), "cannot keep 3 of 2 bundles"),
    ],
)
def test_a_plan_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_model_facts_can_be_pickled(pipe: Any) -> None:
    from offcut.errors import ShapeError
    from offcut.runtime.server.models import ServedModel

    model = ServedModel(pipe, "tiny", multiple=8)
    info = pickle.loads(pickle.dumps(model.info()))
    assert (info.name, info.size, info.cuts) == ("tiny", model.size, model.cuts)
    assert info.arguments == model.arguments
    assert info.calls(7) == model.calls(7)
    assert info.feature_bytes(None, 2, 64, 64) == model.feature_bytes(None, 2, 64, 64) > 0
    with pytest.raises(ShapeError):
        info.check_size(60, 64)
    assert not hasattr(info, "pipe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.offcut", "b.offcut"], "add --ray"),
        (["a.offcut", "--update"], "add --ray"),
        (["a.offcut", "c/a.offcut", "--ray"], "a name of its own"),
        (["a.offcut", "--ray", "--replicas", "many"], "'many' is not a number of replicas"),
        (["a.offcut", "--ray", "--loaded", "2"], "cannot keep 2 of 1 bundles"),
        (["a.offcut", "--ray"], "a.offcut"),
    ],
)
def test_the_command_refuses_options_that_do_not_fit(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
