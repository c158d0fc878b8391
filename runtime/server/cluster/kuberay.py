"""A plan as a RayService of KubeRay, for Kubernetes."""

from __future__ import annotations

import textwrap
from importlib.metadata import version
from importlib.resources import files
from string import Template

from .names import APP
from .plan import Plan

_IMPORT = "offcut.runtime.server.cluster.deploy:application"


def manifest(plan: Plan) -> str:
    """YAML to look at, change and apply: image, volume and sizes are the cluster's own.

    The API key is not in it: the ingress reads it from a secret.
    """
    import yaml

    scale = plan.scale
    served = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {"name": APP, "route_prefix": "/", "import_path": _IMPORT, "args": plan.document()},
        ],
    }
    config = yaml.safe_dump(_plain(served), sort_keys=False, width=110)
    text = Template((files(__package__) / "kuberay.yaml").read_text(encoding="utf-8"))
    limits = {"cpu": f"{max(scale.cpus, 1):g}", "memory": "16Gi"}
    if scale.gpus:
        limits["nvidia.com/gpu"] = f"{max(scale.gpus, 1):g}"
    return text.substitute(
        version=version("ray"),
        serve=textwrap.indent(config, " " * 4).rstrip(),
        least=scale.least,
        most=scale.most,
        limits=textwrap.indent(yaml.safe_dump(limits, sort_keys=False), " " * 20).strip(),
    )


def _plain(value: object) -> object:
    """Without tuples, which plain YAML does not have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
