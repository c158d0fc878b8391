"""Plan of a deployment (models, settings, replicas), and the KubeRay manifest for it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from string import Template
from typing import Any

from ....errors import UserError
from ..settings import ServeSettings, WorkerConfig

APP = "offcut"
"""Name of the Ray Serve application; an update replaces the application of this name."""

INGRESS, REPLICA = "Ingress", "Replica"
"""Names of the application's deployments."""

_IMPORT_PATH = "offcut.runtime.server.cluster.deploy:application"
"""Import path of the application in config files. It must not change: the manifests of users contain it."""


@dataclass(frozen=True)
class ReplicaScale:
    """Number of replicas, and the resources of each.

    Attributes:
        least, most: bounds of the number of replicas; Ray scales between them with the length of the queue.
        up_seconds, down_seconds: time for which demand must be higher, or lower, before replicas start, or stop.
        cpus, gpus: CPUs and GPUs that Ray reserves for a replica.
        surge: number of additional replicas that an update may start before old ones stop, in percent of the
            replicas; with 0 an old replica stops before its successor starts.

    Raises:
        UserError: a value is out of range.
    """

    least: int = 1
    most: int = 1
    up_seconds: float = 10.0
    down_seconds: float = 300.0
    cpus: float = 1.0
    gpus: float = 0.0
    surge: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise UserError(
                f"{self.least} to {self.most} is not a valid number of replicas: give one or more, the smaller first"
            )
        if self.cpus < 0 or self.gpus < 0:
            raise UserError("a replica cannot have a negative number of CPUs or GPUs: give 0 or more")
        if not 0 <= self.surge <= 100:
            raise UserError(f"a surge of {self.surge} % is out of range: give 0 to 100")


@dataclass(frozen=True)
class ClusterPlan:
    """Models, settings and replicas of one deployment. The plan is sent to other processes and written to manifests.

    Attributes:
        workers: worker configuration of each model by its name; the first is for requests that name none.
        settings: settings of the server. A manifest leaves the API key out: the ingress reads ``OFFCUT_API_KEY``.
        scale: replicas and their resources.
        max_queue: requests that may wait in addition to those that replicas work on.
        loaded: models that a replica keeps open at once; it opens the others on demand.

    Raises:
        UserError: there is no model, or ``loaded`` is out of range.
    """

    workers: Mapping[str, WorkerConfig]
    settings: ServeSettings = field(default_factory=ServeSettings)
    scale: ReplicaScale = field(default_factory=ReplicaScale)
    max_queue: int = 64
    loaded: int = 1

    def __post_init__(self) -> None:
        if not self.workers:
            raise UserError("there is nothing to deploy: name a bundle")
        if not 1 <= self.loaded <= len(self.workers):
            raise UserError(
                f"a replica cannot keep {self.loaded} of {len(self.workers)} bundles open: "
                f"give a number from 1 to {len(self.workers)}"
            )

    @property
    def default_model(self) -> str:
        """Name of the model for requests that name none."""
        return next(iter(self.workers))

    @property
    def requests_per_replica(self) -> int:
        """Requests that one replica works on at once."""
        return max(config.max_in_flight for config in self.workers.values())

    def document(self) -> dict[str, Any]:
        """Return the plan as a document of plain values for JSON or YAML, without the API key."""
        document: dict[str, Any] = asdict(replace(self, settings=replace(self.settings, api_key=None)))
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> ClusterPlan:
        """Return the plan of a document that ``document`` returned.

        Older documents call the workers ``recipes`` and name a batching policy; the name is ignored.

        Raises:
            UserError: the document is not valid; the message names the field.
        """
        from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

        content = dict(document)
        if isinstance(recipes := content.pop("recipes", None), Mapping):
            content["workers"] = {
                name: {key: value for key, value in config.items() if key != "policy"}
                for name, config in recipes.items()
            }
        strict = with_config(ConfigDict(extra="forbid"))
        try:
            return TypeAdapter(strict(cls)).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(map(str, first["loc"]))
            raise UserError(f"the deployment's {path} is not valid: {first['msg']}") from error


def kuberay_manifest(plan: ClusterPlan) -> str:
    """Return the manifest of a RayService for KubeRay as YAML. Users adapt its image, volume and sizes.

    The API key is not part of the manifest: the ingress reads it from a secret.
    """
    import yaml

    scale = plan.scale
    serve_config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {"name": APP, "route_prefix": "/", "import_path": _IMPORT_PATH, "args": plan.document()},
        ],
    }
    config = yaml.safe_dump(_with_lists(serve_config), sort_keys=False, width=110)
    template = Template((files(__package__) / "kuberay.yaml").read_text(encoding="utf-8"))
    limits = {"cpu": f"{max(scale.cpus, 1):g}", "memory": "16Gi"}
    if scale.gpus:
        limits["nvidia.com/gpu"] = f"{max(scale.gpus, 1):g}"
    return template.substitute(
        version=version("ray"),
        serve=textwrap.indent(config, " " * 4).rstrip(),
        least=scale.least,
        most=scale.most,
        limits=textwrap.indent(yaml.safe_dump(limits, sort_keys=False), " " * 20).strip(),
    )


def _with_lists(value: object) -> object:
    """Return the value with lists in place of tuples, which plain YAML does not have."""
    if isinstance(value, dict):
        return {name: _with_lists(item) for name, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, list | tuple) else value
