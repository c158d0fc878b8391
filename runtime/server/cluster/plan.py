"""What is deployed: bundles, settings, and how many replicas; it travels to other processes and into manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ....errors import UserError
from ..opening import Recipe
from ..settings import Settings


@dataclass(frozen=True)
class Scale:
    """How many replicas, and what each of them has.

    Attributes:
        least, most: replicas; where they differ, as many as the queue needs.
        up_seconds, down_seconds: for which a queue, or its absence, is watched before the number changes.
        cpus, gpus: that Ray reserves for a replica.
        surge: percent of the replicas that an update may start beside the old ones; with 0 it stops old ones first.
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
            raise UserError(f"{self.least} to {self.most} replicas cannot be: give one or more, the fewest first")
        if self.cpus < 0 or self.gpus < 0:
            raise UserError("a replica cannot have less than no CPU or GPU: give 0 or more")
        if not 0 <= self.surge <= 100:
            raise UserError(f"a surge of {self.surge} % cannot be: give 0 to 100")


@dataclass(frozen=True)
class Plan:
    """Of one deployment.

    Attributes:
        recipes: of each model by its name; the first is for requests that name none.
        settings: of the server. A manifest leaves the API key out: the ingress reads it from ``OFFCUT_API_KEY``.
        max_queue: requests that wait beside those that replicas work on.
        loaded: models that a replica keeps open at once; it opens the others when they are asked for.
    """

    recipes: Mapping[str, Recipe]
    settings: Settings = field(default_factory=Settings)
    scale: Scale = field(default_factory=Scale)
    max_queue: int = 64
    loaded: int = 1

    def __post_init__(self) -> None:
        if not self.recipes:
            raise UserError("there is nothing to deploy: name a bundle")
        if not 1 <= self.loaded <= len(self.recipes):
            raise UserError(
                f"{len(self.recipes)} bundles cannot have {self.loaded} of them open: give a number in between"
            )

    @property
    def first(self) -> str:
        """The model for requests that name none."""
        return next(iter(self.recipes))

    @property
    def places(self) -> int:
        """Requests that one replica works on at once."""
        return max(recipe.max_in_flight for recipe in self.recipes.values())

    def document(self) -> dict[str, Any]:
        """As JSON and YAML have it, without the API key."""
        return asdict(replace(self, settings=replace(self.settings, api_key=None)))

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Plan:
        """From what ``document`` made.

        Raises:
            UserError: it is none.
        """
        from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

        strict = with_config(ConfigDict(extra="forbid"))
        try:
            return TypeAdapter(strict(cls)).validate_python(dict(document))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"the deployment's {where} is wrong: {first['msg']}") from error
