"""The Kubernetes manifest is a complete RayService, and Ray Serve's schema accepts its application."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

import yaml
from typer.testing import CliRunner

from offcut.cli import app
from offcut.runtime.server.cluster.cluster_plan import ClusterPlan


@pytest.fixture(scope="module")
def manifest() -> Any:
    arguments = [
        "a.offcut",
        "b.offcut",
        "--ray",
        "--kuberay",
        "--device",
        "cuda",
        "--replicas",
        "1..4",
        "--steps",
        "20",
    ]
    result = CliRunner().invoke(app, ["serve", *arguments], env={"OFFCUT_API_KEY": "a-key-of-ours"})
    assert result.exit_code == 0, result.output
    assert "a-key-of-ours" not in result.stdout
    return yaml.safe_load(result.stdout)


def test_the_manifest_is_a_rayservice(manifest: Any) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    spec = manifest["spec"]
    assert set(spec) == {"serveConfigV2", "rayClusterConfig"}
    cluster = spec["rayClusterConfig"]
    assert cluster["rayVersion"] == version("ray")
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (1, 1, 4)
    for group in (cluster["headGroupSpec"], workers):
        assert isinstance(group["rayStartParams"], dict)
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name", "image", "resources"} <= set(container)
        environment = {each["name"]: each for each in container["env"]}
        assert environment["RAY_USAGE_STATS_ENABLED"]["value"] == "0"
        assert environment["OFFCUT_API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "offcut", "key": "api-key"}
        assert [mount["name"] for mount in container["volumeMounts"]] == [each["name"] for each in pod["volumes"]]
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"]
    assert resources["limits"]["nvidia.com/gpu"] == "1"


def test_ray_serve_accepts_the_application(manifest: Any) -> None:
    from ray.serve import Application
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert config.http_options.port == 8000
    (application,) = config.applications
    assert application.route_prefix == "/"
    assert application.import_path is not None
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    assert isinstance(build(application.args), Application)
    plan = ClusterPlan.from_document(application.args)
    assert list(plan.workers) == ["a", "b"]
    assert plan.workers["a"].bundle == str(Path("a.offcut").resolve())
    assert (plan.scale.least, plan.scale.most, plan.scale.gpus) == (1, 4, 1.0)
    assert (plan.settings.steps, plan.settings.hosts, plan.settings.api_key) == (20, None, None)
