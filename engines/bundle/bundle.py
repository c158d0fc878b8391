"""The bundle: a directory that ``build`` writes and everything else reads.

Nothing in it is deserialised before its digest is checked. That proves that it is whole, not who made it: give
``expect_digest`` to pin its origin.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

from pydantic import ValidationError

from ...errors import BundleError, CutError, EngineError
from ...exporter.trace.export import GRAPH_FILE
from ...exporter.trace.parameters import StoredWeights
from ..base import EngineOptions, EnginePair, Graphs, OpenOptions
from ..registry import Choice, choose, engine
from .manifest import MANIFEST_FILE, SCHEMA_VERSION, EngineEntry, Manifest, Variant, schema_of


class Bundle:
    """An opened bundle, its manifest verified. Open one with ``Bundle.open``.

    Attributes:
        path: the directory.
        manifest: what it says of itself.
        digest: SHA-256 of the manifest, which holds every other file's.
    """

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, path: str | Path, expect_digest: str | None = None) -> Bundle:
        """Read and check a bundle's manifest. Files are checked when they are used; ``verify_files`` checks all.

        Raises:
            BundleError: it is not a bundle, is damaged or altered, names files outside itself, has another digest than
                ``expect_digest``, or was written by a newer offcut.
        """
        path = Path(path)
        file = path / MANIFEST_FILE
        if not file.is_file():
            raise BundleError(f"{path} is not an offcut bundle: it has no {MANIFEST_FILE}; make one with offcut build")
        text = file.read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        if expect_digest is not None and digest != expect_digest.lower():
            raise BundleError(f"{path} has digest {digest}, not the expected {expect_digest}: it is another bundle")
        return cls(path, _parse(text, path), digest)

    @property
    def built_digest(self) -> str:
        """The digest that it has without its schedules, on which no engine's answer depends."""
        schedules = self.manifest.schedules.values()
        own = {name for entry in schedules for name in entry.files}
        files = {name: entry for name, entry in self.manifest.files.items() if name not in own}
        bare = self.manifest.model_copy(update={"schedules": {}, "files": files})
        return hashlib.sha256(bare.to_json().encode()).hexdigest()

    @property
    def engines(self) -> list[str]:
        """The engines that were built into it, by name."""
        return list(dict.fromkeys(entry.engine for entry in self.manifest.engines.values()))

    @property
    def cuts(self) -> list[str]:
        """The cuts that some engine of it can run."""
        return list(dict.fromkeys(cut for entry in self.manifest.engines.values() for cut in entry.cuts))

    @property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's config, as diffusers wrote it."""
        name = self.manifest.unet_config
        self.verify_files([name])
        config = json.loads((self.path / name).read_text(encoding="utf-8"))
        assert isinstance(config, dict)
        return config

    def verify_files(self, names: Iterable[str] | None = None) -> None:
        """Check size and SHA-256 of these files, or of all.

        Raises:
            BundleError: one is missing, truncated, altered, or a link that leaves the bundle.
        """
        for name in self.manifest.files if names is None else names:
            entry = self.manifest.files.get(name)
            if entry is None:
                raise BundleError(f"{self.path}: {name} is not in the manifest; build the bundle again")
            file = _inside(self.path, name)
            if not file.is_file():
                raise BundleError(f"{self.path}: {name} is missing; copy or build the bundle again")
            size = file.stat().st_size
            if size != entry.size:
                raise BundleError(
                    f"{self.path}: {name} has {size} bytes, not {entry.size}; copy or build the bundle again"
                )
            if digest_file(file) != entry.sha256:
                raise BundleError(
                    f"{self.path}: {name} was altered (its SHA-256 differs); copy or build the bundle again"
                )

    def choose_engine(self, name: str = "auto", device: str = "cpu") -> Choice:
        """The engine to open: the one named, or the best of those in the bundle, and why.

        Raises:
            EngineError: it is not in the bundle or cannot run here.
        """
        if name == "auto":
            return choose(device, self.engines)
        if name not in self.engines:
            engine(name)
            raise EngineError(
                f"{self.path} holds {', '.join(self.engines)}, not {name}: add it with offcut build --engine {name}"
            )
        probe = engine(name).probe()
        if device.partition(":")[0] not in probe.devices:  # "cuda:1" is one of cuda's
            raise EngineError(f"{name} cannot run on {device} here: {probe.reason}")
        return Choice(name, "asked for")

    def entry(
        self, name: str, *, precision: str | None = None, inference_precision: str | None = None, cut: str | None = None
    ) -> EngineEntry:
        """The newest build of this engine that has these properties.

        Raises:
            EngineError: there is none; the message says what there is.
            CutError: none of them has the cut.
        """
        found = [
            entry
            for entry in self.manifest.engines.values()
            if entry.engine == name
            and (precision is None or self.manifest.variants[entry.variant].precision == precision)
            and (inference_precision is None or self.precision_of(entry) == inference_precision)
        ]
        if not found:
            there = ", ".join(self.manifest.engines) or "nothing"
            raise EngineError(f"{self.path} holds no such build of {name}; it holds {there}")
        with_cut = [entry for entry in found if cut is None or cut in entry.cuts]
        if not with_cut:
            raise CutError(f"{self.path} was not built with the cut {cut}; it has {', '.join(self.cuts)}")
        return with_cut[-1]

    def precision_of(self, entry: EngineEntry) -> str:
        """In which a build computes."""
        return entry.inference_precision or self.manifest.variants[entry.variant].precision

    def open_pair(
        self,
        engine: str = "auto",
        *,
        device: str = "cpu",
        precision: str | None = None,
        inference_precision: str | None = None,
        **options: Unpack[OpenOptions],
    ) -> EnginePair:
        """Open the full graph and its shallow graphs on a device.

        Args:
            engine: a name, or ``"auto"`` for the best one here.
            device: as PyTorch spells it.
            precision, inference_precision: choose among several builds of the engine; the newest by default.
                ``inference_precision="fp32"`` is the one without a hint.
            options: ``threads``, ``cuda_graphs``, ``weight_budget``, ``runtime_cache``, ``provider``: see
                ``EngineOptions``.

        Raises:
            BundleError: a file is damaged.
            EngineError: the engine cannot be used here, or was built for another machine or version.
        """
        entry = self.find(engine, device=device, precision=precision, inference_precision=inference_precision)
        return self.pair(entry, device=device, **options)

    def find(
        self,
        engine: str = "auto",
        *,
        device: str = "cpu",
        precision: str | None = None,
        inference_precision: str | None = None,
    ) -> EngineEntry:
        """The build that ``open_pair`` opens for these arguments; raises what it raises."""
        name = self.choose_engine(engine, device).name
        return self.entry(name, precision=precision, inference_precision=inference_precision)

    def pair(self, entry: EngineEntry, *, device: str = "cpu", **options: Unpack[OpenOptions]) -> EnginePair:
        """A build, opened; ``open_pair`` says with which options, and what it raises."""
        if not entry.verified:
            warnings.warn(
                f"{entry.key} could not be run where it was built: check it once here with offcut verify {self.path}",
                stacklevel=2,
            )
        return open_entry(self, entry, EngineOptions(device, inference_precision=entry.inference_precision, **options))

    def weights(self, entry: EngineEntry) -> StoredWeights:
        """The weights that an engine was built with.

        Raises:
            BundleError: they were left out of a bundle for deployment, or a file is damaged.
            EngineError: they are rounded to low precision.
        """
        variant = self.manifest.variants[entry.variant]
        if variant.graphs is None:
            raise BundleError(f"{self.path} was built for deployment and holds no weights: build it without --deploy")
        if variant.quantization is not None:
            raise EngineError(
                f"the weights of {entry.key} are rounded to {variant.precision}, and nothing can be added to them: "
                "fuse LoRAs when it is built"
            )
        self.verify_files([variant.graphs.full, variant.graphs.weights, variant.graphs.parameters])
        return StoredWeights(self.path / variant.graphs.full, self.path / variant.graphs.parameters)

    def graphs(self, entry: EngineEntry) -> Graphs:
        """The files of an engine and their contract."""
        variant = self.manifest.variants[entry.variant]
        cuts = {cut.name: cut for cut in variant.cuts if cut.name in entry.cuts}
        outputs = [variant.noise_pred, *(tensor for cut in cuts.values() for tensor in cut.cached)]
        # An engine that opens the ONNX graphs takes every size; what compiles them for it should know the bundle's.
        others = [other for other in self.manifest.engines.values() if other.variant == entry.variant]
        profiles = entry.profiles if entry.compiled else [each for other in others for each in other.profiles]
        return Graphs(
            full=self.path / entry.full,
            shallow={cut: self.path / file for cut, file in entry.shallow.items()},
            inputs={tensor.name: tensor.spec() for tensor in variant.inputs},
            outputs={tensor.name: tensor.spec() for tensor in outputs},
            cuts={name: tuple(tensor.name for tensor in cut.cached) for name, cut in cuts.items()},
            multiple=variant.multiple,
            precision=variant.precision,
            profiles=tuple(profile.profile() for profile in profiles),
            settings=entry.settings,
            digest=self._digest_of(engine_files(entry, variant)),
            parameters=self.path / variant.graphs.parameters if variant.graphs else None,
        )

    def _digest_of(self, names: Iterable[str]) -> str | None:
        """Return one digest of several files; None while a build has not yet committed them."""
        files = [self.manifest.files.get(name) for name in names]
        digests = [file.sha256 for file in files if file is not None]
        return hashlib.sha256("".join(digests).encode()).hexdigest() if len(digests) == len(files) else None


def onnx_of(path: str | Path) -> Path:
    """The UNet's ONNX graph in a bundle, in a directory that ``export`` made, or the file itself.

    Raises:
        BundleError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / GRAPH_FILE).is_file():
        return path / GRAPH_FILE
    bundle = Bundle.open(path)
    for variant in bundle.manifest.variants.values():
        if variant.graphs is not None:
            bundle.verify_files([variant.graphs.full])
            return path / variant.graphs.full
    raise BundleError(f"{path} was built for deployment and holds no ONNX graph: build it without --deploy")


def open_entry(bundle: Bundle, entry: EngineEntry, options: EngineOptions) -> EnginePair:
    """Check that a built engine fits this machine and its files are whole, and open it."""
    if options.provider is not None and entry.engine != "onnxruntime":
        raise EngineError(f"{entry.engine} has no providers, onnxruntime has: open that, or leave provider out")
    check_fits(entry, options.device)
    bundle.verify_files(engine_files(entry, bundle.manifest.variants[entry.variant]))
    return engine(entry.engine).open(bundle.graphs(entry), options)


def check_fits(entry: EngineEntry, device: str) -> None:
    """Check that a built engine is for this machine and the library that is here.

    Raises:
        EngineError: it is for another; the message says what to do.
    """
    probe = engine(entry.engine).probe()
    if missing := set(entry.requires) - probe.features:
        raise EngineError(
            f"{entry.key} needs {', '.join(sorted(missing))}, which this machine does not have ({probe.reason}): "
            "build it again here"
        )
    here = probe.targets.get(device.partition(":")[0])
    if entry.targets and here not in entry.targets:
        raise EngineError(
            f"{entry.key} was compiled for {', '.join(entry.targets)}, and this machine's {device} is "
            f"{here or 'none of them'}: build it again here"
        )
    if entry.compiled and not entry.later_versions and probe.version not in (None, entry.version):
        raise EngineError(
            f"{entry.key} was compiled with {entry.engine} {entry.version} and runs with no other, here is "
            f"{probe.version}: build it again here"
        )
    if probe.version is not None and _release(probe.version) < _release(entry.version):
        raise EngineError(
            f"{entry.key} was built and verified with {entry.engine} {entry.version}, here is {probe.version}: "
            "upgrade it, or build again here"
        )


def devices_of(entry: EngineEntry) -> list[str]:
    """The kinds of device here that can run a built engine."""
    probe = engine(entry.engine).probe()
    return [kind for kind in probe.devices if not entry.targets or probe.targets.get(kind) in entry.targets]


def engine_files(entry: EngineEntry, variant: Variant) -> list[str]:
    """Every file that opening this engine reads."""
    if entry.compiled:
        return list(entry.files)
    assert variant.graphs is not None
    return [entry.full, *entry.shallow.values(), variant.graphs.weights]


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(text: bytes, path: Path) -> Manifest:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise BundleError(
            f"{path / MANIFEST_FILE} is damaged: it is no JSON; copy or build the bundle again"
        ) from error
    version = schema_of(raw)
    if version is None:
        raise BundleError(f"{path / MANIFEST_FILE} is no manifest of a bundle: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} was written by a newer offcut (schema {version}, this one reads {SCHEMA_VERSION}): upgrade offcut"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path / MANIFEST_FILE} is damaged at {where}: {first['msg']}") from error
    for key, entry in manifest.engines.items():
        variant = manifest.variants.get(entry.variant)
        if variant is None:
            raise BundleError(f"{path}: the engine {key} names the variant {entry.variant}, which is not there")
        if not set(entry.cuts) <= {cut.name for cut in variant.cuts} or set(entry.cuts) != set(entry.shallow):
            raise BundleError(f"{path}: the graphs of the engine {key} do not belong together; build it again")
        if entry.compiled:
            theirs = f"engines/{entry.key}"
        else:  # graphs of an earlier choice of cuts lie beside the variant's
            theirs = str(PurePosixPath(variant.graphs.weights).parent) if variant.graphs else ""
        if {str(PurePosixPath(file).parent) for file in (entry.full, *entry.shallow.values())} != {theirs}:
            raise BundleError(f"{path}: the engine {key} has graphs of another variant than {variant.name}: rebuild")
    for component in manifest.components:
        if strays := [entry.key for entry in component.engines if entry.full not in entry.files]:
            raise BundleError(f"{path}: the engine {strays[0]} of {component.name} names a file of another: rebuild")
    for name in manifest.files:
        _inside(path, name)
    return manifest


def _inside(root: Path, name: str) -> Path:
    """The file, if no link on the way to it leaves the bundle."""
    file = root / name
    try:
        inside = file.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links that lead in a circle
        inside = False
    if not inside:
        raise BundleError(f"{root}: {name} is a link that leaves the bundle; copy the bundle with its links resolved")
    return file


def _release(version: str) -> tuple[int, ...]:
    """``"1.31.1"`` as (1, 31, 1); what follows the numbers is left out."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
