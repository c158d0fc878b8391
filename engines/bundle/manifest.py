"""``offcut.json``: what a bundle says of itself. Read with pydantic, so that a damaged file is one clear error."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ...exporter.specs import DIM_PATTERN, Dim, TensorSpec, factors
from ..profiles import Profile

SCHEMA_VERSION = 1
MANIFEST_FILE = "offcut.json"


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


class FusedLora(_Model):
    """A LoRA that is part of the UNet's weights; their digest holds that of its file."""

    name: str
    scale: float


class Source(_Model):
    """Where the model came from; ``weights_digest`` is that of the UNet's weights as the user gave them, ``attention``
    the kind that it was exported with, None for its own. ``onnx`` is for foreign ONNX: the
    answers that engines are held against are ONNX Runtime's, of these graphs, not PyTorch's."""

    model: str
    revision: str | None
    variant: str | None
    weights_digest: str
    loras: tuple[FusedLora, ...] = ()
    attention: str | None = None
    onnx: bool = False

    @property
    def reference(self) -> str:
        """Whose answers are kept in the bundle."""
        return "the original ONNX" if self.onnx else "PyTorch"


class TensorEntry(_Model):
    """A ``TensorSpec`` on disk."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: tuple[Annotated[int, Field(ge=1, strict=True)] | Annotated[str, Field(pattern=DIM_PATTERN)], ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> TensorEntry:
        return cls.model_validate({"name": spec.name, "dtype": spec.dtype, "shape": spec.shape})

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


class CutEntry(_Model):
    """A cut's names and what it caches."""

    name: str
    aliases: tuple[str, ...]
    cached: tuple[TensorEntry, ...]


class GraphFiles(_Model):
    """The files of an export: its graphs, one weights file for all of them, and the map of their parameters."""

    full: InsidePath
    shallow: dict[str, InsidePath]
    weights: InsidePath
    parameters: InsidePath

    @property
    def files(self) -> tuple[str, ...]:
        return (self.full, *self.shallow.values(), self.weights, self.parameters)


class Quantization(_Model):
    """How a variant was rounded to a low precision.

    ``scheme`` names what is rounded and ``base`` the precision of the rest. ``calibration`` is all that decided the
    ranges, ``method`` how they were chosen. ``kept`` are the layers that were not rounded, those among them whose own
    signal-to-noise ratio would have been more than ``sensitive`` dB below the median layer's.
    """

    scheme: str
    base: str
    method: str
    sensitive: float
    calibration: dict[str, str | int | float | bool | tuple[str, ...] | None]
    kept: tuple[str, ...]
    rounded: Annotated[int, Field(ge=0)]


class Variant(_Model):
    """An export: a precision, an opset, and dimensions that may be fixed.

    ``graphs`` is None in a bundle that was built for deployment, whose engines are compiled and need none.
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
        """Precision of what goes in and out: the graphs' own, or what surrounds the rounded layers."""
        return self.quantization.base if self.quantization else self.precision

    @model_validator(mode="after")
    def _has_the_latents_shape(self) -> Self:
        """The noise is laid out as the latent is, but for its channels, and so are the cached features, but for their
        scale and that a video's frames are one after the other in them."""
        sample = next((tensor for tensor in self.inputs if tensor.name == "sample"), None)
        if sample is None:
            raise ValueError("no input is called sample")
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
    """A ``Profile`` on disk."""

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

    ``version`` is the engine's own, at the build. ``requires`` names what the machine must have, ``targets`` the kinds
    of machine that can run it, any of them. A compiled engine lies in ``files``, its log among them, and runs with
    ``version`` only, unless it was built for ``later_versions`` too; one that is not opens the variant's graphs.
    ``references`` are PyTorch's answers at sizes that its profiles cover, in place of the variant's. ``verified`` is
    False where the machine that built it could not run it.
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
    """A network around the UNet as an ONNX graph: a text encoder, or half of an autoencoder.

    ``label`` is the precision and opset that the build asked for, ``precision`` the graph's own.
    ``norm`` holds a text encoder's final norm apart, which pipelines apply that skip CLIP's last layers. ``engines``
    are those that were compiled from it; ``graph`` and its ``weights`` are None where only they were kept.
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
        """The newest build of this engine."""
        return next((entry for entry in reversed(self.engines) if entry.engine == engine), None)

    def joined(self, other: ComponentEntry) -> ComponentEntry:
        """This with what another build of the same network adds."""
        engines = {entry.key: entry for entry in (*self.engines, *other.engines)}
        kept = {"graph": other.graph or self.graph, "weights": other.weights or self.weights}
        return other.model_copy(update={**kept, "engines": tuple(engines.values())})


class ScheduleEntry(_Model):
    """A schedule that was tuned for the model, and the coefficients of its predictions; see ``runtime.tuning``."""

    document: InsidePath
    coefficients: InsidePath

    @property
    def files(self) -> tuple[str, str]:
        return self.document, self.coefficients


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
    components: tuple[ComponentEntry, ...] = ()
    schedules: dict[str, ScheduleEntry] = {}
    files: dict[InsidePath, FileEntry]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def schema_of(raw: Any) -> int | None:
    """The schema version of parsed JSON, before the rest of it is looked at."""
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    return version if isinstance(version, int) else None
