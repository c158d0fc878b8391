"""The manifest ``offcut.json``: pydantic models of its entries, which turn a damaged file into one clear error."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ...exporter.specs import DIM_PATTERN, Dim, TensorSpec, factors
from ..profiles import Profile

SCHEMA_VERSION = 1
MANIFEST_FILE = "offcut.json"
_LONGEST_NAME, _LONGEST_PATH = 255, 1024
"""Bytes of a file's name and of its path inside a bundle."""


def _inside(path: str) -> str:
    """Require a relative POSIX path of a file inside the bundle that is legal on Windows too."""
    pure = PurePosixPath(path)
    if len(path.encode()) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_NAME for part in pure.parts):
        raise ValueError("a path is longer than file systems allow")
    if not path or pure.is_absolute() or ".." in pure.parts or any(char in path for char in '\\:*?"<>|\0'):
        raise ValueError(f"{path!r} is not a path inside the bundle")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Model):
    """Size in bytes and SHA-256 of a file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FusedLora(_Model):
    """A LoRA that was fused into the UNet; its file's digest is part of the weights digest."""

    name: str
    scale: float


class Source(_Model):
    """The model that a bundle was built from.

    ``weights_digest`` is the digest of the UNet's weights as the user gave them. ``attention`` is the kind of attention
    that the UNet was exported with; None for its own. ``onnx`` is True for foreign ONNX: engines are then compared
    with ONNX Runtime's outputs of the original graphs, not with PyTorch's.
    """

    model: str
    revision: str | None
    variant: str | None
    weights_digest: str
    loras: tuple[FusedLora, ...] = ()
    attention: str | None = None
    onnx: bool = False

    @property
    def reference(self) -> str:
        """Name of the model that computed the bundle's references."""
        return "the original ONNX" if self.onnx else "PyTorch"


class TensorEntry(_Model):
    """A ``TensorSpec`` in the manifest."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: tuple[Annotated[int, Field(ge=1, strict=True)] | Annotated[str, Field(pattern=DIM_PATTERN)], ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> TensorEntry:
        return cls.model_validate({"name": spec.name, "dtype": spec.dtype, "shape": spec.shape})

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


class CutEntry(_Model):
    """Names of a cut, and the tensors that it caches."""

    name: str
    aliases: tuple[str, ...]
    cached: tuple[TensorEntry, ...]


class GraphFiles(_Model):
    """Files of an export: the graphs, one weights file for all of them, and the map of their parameters."""

    full: InsidePath
    shallow: dict[str, InsidePath]
    weights: InsidePath
    parameters: InsidePath

    @property
    def files(self) -> tuple[str, ...]:
        return (self.full, *self.shallow.values(), self.weights, self.parameters)


class Quantization(_Model):
    """The rounding of a variant to low precision.

    ``scheme`` names what is rounded, and ``base`` the precision of the rest. ``calibration`` holds everything that
    decided the ranges, and ``method`` how they were chosen. ``kept`` are the layers that were not rounded; among them
    are layers whose signal-to-noise ratio would have been more than ``sensitive`` dB below the median layer's.
    """

    scheme: str
    base: str
    method: str
    sensitive: float
    calibration: dict[str, str | int | float | bool | tuple[str, ...] | None]
    kept: tuple[str, ...]
    rounded: Annotated[int, Field(ge=0)]


class Variant(_Model):
    """An export in one precision and opset, with some dimensions fixed.

    ``graphs`` is None in a bundle for deployment, whose engines are compiled and do not need them.
    """

    name: str
    precision: str
    opset: int
    fixed: dict[str, int]
    multiple: Annotated[int, Field(ge=1)]
    inputs: tuple[TensorEntry, ...]
    noise_pred: TensorEntry
    cuts: tuple[CutEntry, ...]
    graphs: GraphFiles | None
    reference: InsidePath
    quantization: Quantization | None = None

    @property
    def base(self) -> str:
        """Precision of the graphs' inputs and outputs, and of layers that are not rounded."""
        return self.quantization.base if self.quantization else self.precision

    @model_validator(mode="after")
    def _check_layouts(self) -> Self:
        """Check that the outputs have the latent's layout.

        The noise prediction may differ in channels, the cached features also in scale. A video's frames are part of the
        batch in the cached features.
        """
        sample = next((tensor for tensor in self.inputs if tensor.name == "sample"), None)
        if sample is None:
            raise ValueError("it has no input called sample")
        latents = [_symbols_in(dim) for dim in sample.shape]
        features = [sum(latents[:-2], ()), (), *latents[-2:]]
        for tensor in (self.noise_pred, *(tensor for cut in self.cuts for tensor in cut.cached)):
            expected = latents if tensor is self.noise_pred else features
            if len(sample.shape) < 3 or [_symbols_in(dim) for dim in tensor.shape] != expected:
                raise ValueError(f"{tensor.name} has shape {list(tensor.shape)}, the latent {list(sample.shape)}")
        return self


def _symbols_in(dim: Dim) -> tuple[str, ...]:
    return factors(dim).symbols if isinstance(dim, str) else ()


class ProfileEntry(_Model):
    """A ``Profile`` in the manifest."""

    min: dict[str, int]
    opt: dict[str, int]
    max: dict[str, int]

    @classmethod
    def of(cls, profile: Profile) -> ProfileEntry:
        return cls(min=dict(profile.min), opt=dict(profile.opt), max=dict(profile.max))

    def profile(self) -> Profile:
        return Profile(self.min, self.opt, self.max)


class EngineEntry(_Model):
    """A built engine.

    ``version`` is the version of the engine's library at the build. ``requires`` names features that the machine must
    have, and ``targets`` the kinds of machine that can run the engine. A compiled engine consists of ``files``
    (its log included) and runs with ``version`` only, or with ``later_versions`` too; an engine that is not compiled
    opens the variant's graphs. ``references`` are PyTorch's outputs at sizes that its profiles cover, and replace the
    variant's reference. ``verified`` is False if the machine that built the engine could not run it.
    """

    key: str
    engine: str
    version: str
    variant: str
    cuts: tuple[str, ...]
    inference_precision: str | None
    requires: tuple[str, ...]
    targets: tuple[str, ...]
    profiles: tuple[ProfileEntry, ...]
    settings: dict[str, str | int | float | bool | tuple[str, ...] | None]
    references: tuple[InsidePath, ...]
    later_versions: bool
    verified: bool
    full: InsidePath
    shallow: dict[str, InsidePath]
    files: tuple[InsidePath, ...]

    @property
    def compiled(self) -> bool:
        return bool(self.files)


class ComponentEntry(_Model):
    """A network around the UNet: a text encoder, or half of an autoencoder.

    ``label`` is the precision and opset of the build, and ``precision`` the graph's own. ``norm`` is a file with a text
    encoder's final norm, for pipelines that skip CLIP's last layers and apply it themselves. ``engines`` are
    compiled from the graph; ``graph`` and ``weights`` are None if the bundle holds only these engines.
    """

    name: str
    label: str
    precision: str
    multiple: Annotated[int, Field(ge=1)]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    graph: InsidePath | None
    weights: InsidePath | None
    reference: InsidePath
    norm: InsidePath | None = None
    engines: tuple[EngineEntry, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        compiled = (file for entry in self.engines for file in entry.files)
        return (*(file for file in (self.graph, self.weights, self.reference, self.norm) if file), *compiled)

    def compiled_by(self, engine: str) -> EngineEntry | None:
        """Return the newest build of this engine; None if there is none."""
        return next((entry for entry in reversed(self.engines) if entry.engine == engine), None)

    def joined(self, other: ComponentEntry) -> ComponentEntry:
        """Return this entry with the engines and files that another build of the same network adds."""
        engines = {entry.key: entry for entry in (*self.engines, *other.engines)}
        files = {"graph": other.graph or self.graph, "weights": other.weights or self.weights}
        return other.model_copy(update={**files, "engines": tuple(engines.values())})


class ScheduleEntry(_Model):
    """Files of a tuned schedule: its document, and the coefficients of its predictions; see ``runtime.tuning``."""

    document: InsidePath
    coefficients: InsidePath

    @property
    def files(self) -> tuple[str, str]:
        return self.document, self.coefficients


class Manifest(_Model):
    """The content of ``offcut.json``."""

    schema_version: int
    offcut_version: str
    family: str
    pipeline: str | None
    source: Source
    unet_config: InsidePath
    parts: tuple[InsidePath, ...]
    variants: dict[str, Variant]
    engines: dict[str, EngineEntry]
    components: tuple[ComponentEntry, ...] = ()
    schedules: dict[str, ScheduleEntry] = {}
    files: dict[InsidePath, FileEntry]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def schema_of(raw: Any) -> int | None:
    """Return the schema version of parsed JSON, before the rest is validated; None if it has none."""
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    return version if isinstance(version, int) else None
