"""``offcut.json``: what a bundle says of itself. Read with pydantic, so that a damaged file is one clear error."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..exporter.specs import TensorSpec

SCHEMA_VERSION = 1
MANIFEST_FILE = "offcut.json"
# A dimension that is not fixed; ``height/4`` is a quarter of it.
_SYMBOL = r"^(batch|sequence|height|width)(/[1-9][0-9]*)?$"


def _inside(path: str) -> str:
    """A relative POSIX path that names a file below the bundle, legal on Windows too."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or any(char in path for char in '\\:*?"<>|\0'):
        raise ValueError(f"{path!r} is not a path inside the bundle")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Model):
    """A file's size in bytes and its SHA-256."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Source(_Model):
    """Where the model came from; ``weights_digest`` is that of the UNet's weights as the user gave them."""

    model: str
    revision: str | None
    variant: str | None
    weights_digest: str


class Tensor(_Model):
    """A ``TensorSpec`` on disk."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: tuple[Annotated[int, Field(ge=1, strict=True)] | Annotated[str, Field(pattern=_SYMBOL)], ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> Tensor:
        return cls.model_validate({"name": spec.name, "dtype": spec.dtype, "shape": spec.shape})

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


class CutEntry(_Model):
    """A cut's names and what it caches."""

    name: str
    aliases: tuple[str, ...]
    cached: tuple[Tensor, ...]


class Variant(_Model):
    """An export: a precision, an opset, and dimensions that may be fixed."""

    name: str
    precision: str
    opset: int
    fixed: dict[str, int]
    multiple: Annotated[int, Field(ge=1)]
    inputs: tuple[Tensor, ...]
    noise_pred: Tensor
    cuts: tuple[CutEntry, ...]
    full: InsidePath
    shallow: dict[str, InsidePath]
    weights: InsidePath
    parameters: InsidePath
    reference: InsidePath


class EngineEntry(_Model):
    """A built engine.

    ``requires`` names what the machine must have; ``version`` is the engine's own, at the build.
    """

    key: str
    engine: str
    version: str
    variant: str
    cuts: tuple[str, ...]
    inference_precision: str | None
    requires: tuple[str, ...]
    full: InsidePath
    shallow: dict[str, InsidePath]


class Manifest(_Model):
    """The whole of ``offcut.json``."""

    schema_version: int
    offcut_version: str
    family: str
    pipeline: str | None
    source: Source
    unet_config: InsidePath
    parts: tuple[InsidePath, ...]
    variants: dict[str, Variant]
    engines: dict[str, EngineEntry]
    files: dict[InsidePath, FileEntry]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def schema_of(raw: Any) -> int | None:
    """The schema version of parsed JSON, before the rest of it is looked at."""
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    return version if isinstance(version, int) else None
