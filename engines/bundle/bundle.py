"""The bundle: a directory that ``build`` writes and everything else reads.

No file in it is deserialised before its digest is checked. The digests prove that the bundle is whole, not who made it;
``expect_digest`` pins its origin.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

from ...errors import BundleError, CutError, EngineError
from ...exporter.graph import external_files
from ...exporter.trace.export import GRAPH_FILE
from ...exporter.trace.parameters import StoredWeights
from ..base import EngineOptions, EnginePair, Graphs, OpenOptions
from ..registry import Choice, choose, engine
from . import trust as record
from .manifest import EngineEntry, Manifest, Variant
from .reading import inside, parse_manifest, read_manifest


class Bundle:
    """An opened bundle with a checked manifest. ``Bundle.open`` opens one.

    Attributes:
        path: directory of the bundle.
        manifest: the content of ``offcut.json``.
        digest: SHA-256 of the manifest, which holds the digests of all other files.
    """

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, path: str | Path, expect_digest: str | None = None, *, trust: bool = False) -> Bundle:
        """Read and check a bundle's manifest. Files are checked when they are used; ``verify_files`` checks all.

        Args:
            path: directory of the bundle.
            expect_digest: the digest that ``offcut build`` printed. A bundle that has it is trusted from now on.
            trust: trust the bundle from now on. Compiled engines are code, so they are only opened in bundles that
                were built here or are trusted.

        Raises:
            BundleError: the directory is not a bundle, is damaged or altered, names files outside itself, has another
                digest than ``expect_digest``, or was written by a newer offcut.
        """
        path = Path(path)
        text = read_manifest(path)
        digest = hashlib.sha256(text).hexdigest()
        if expect_digest is not None and digest != expect_digest.lower():
            raise BundleError(f"{path} has digest {digest}, not the expected {expect_digest}: it is another bundle")
        bundle = cls(path, parse_manifest(text, path), digest)
        if (trust or expect_digest is not None) and bundle.has_code:
            record.trust(bundle.built_digest)
        return bundle

    @property
    def built_digest(self) -> str:
        """Digest of the bundle without its schedules, on which no engine's output depends."""
        schedules = self.manifest.schedules.values()
        schedule_files = {name for entry in schedules for name in entry.files}
        files = {name: entry for name, entry in self.manifest.files.items() if name not in schedule_files}
        without_schedules = self.manifest.model_copy(update={"schedules": {}, "files": files})
        return hashlib.sha256(without_schedules.to_json().encode()).hexdigest()

    @property
    def has_code(self) -> bool:
        """Whether the bundle holds compiled engines, which are code."""
        components = (entry for component in self.manifest.components for entry in component.engines)
        return any(entry.compiled for entry in (*self.manifest.engines.values(), *components))

    def require_trust(self) -> None:
        """Check that this bundle may run code here.

        Raises:
            BundleError: the bundle was neither built here nor trusted by the user.
        """
        if not record.is_trusted(self.built_digest):
            raise BundleError(
                f"{self.path} has compiled engines, which are code, and was not built here: give the digest that its "
                "build printed (--expect-digest), or accept it (--trust)"
            )

    @property
    def engines(self) -> list[str]:
        """Names of the engines that were built into the bundle."""
        return list(dict.fromkeys(entry.engine for entry in self.manifest.engines.values()))

    @property
    def cuts(self) -> list[str]:
        """Names of the cuts that at least one engine can run."""
        return list(dict.fromkeys(cut for entry in self.manifest.engines.values() for cut in entry.cuts))

    @property
    def unet_config(self) -> dict[str, Any]:
        """Config of the UNet, as diffusers wrote it."""
        name = self.manifest.unet_config
        self.verify_files([name])
        config = json.loads((self.path / name).read_text(encoding="utf-8"))
        assert isinstance(config, dict)
        return config

    def verify_files(self, names: Iterable[str] | None = None) -> None:
        """Check the size and SHA-256 of these files, or of all.

        Raises:
            BundleError: a file is missing, truncated, altered, or a link that leaves the bundle.
        """
        for name in self.manifest.files if names is None else names:
            self.open_verified(name).close()

    def open_verified(self, name: str) -> BufferedReader:
        """Open a file whose size and SHA-256 are those of the manifest, at its start.

        Raises:
            BundleError: as ``verify_files``; or the manifest does not list the file.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: {name} is not in the manifest; build the bundle again")
        path = inside(self.path, name)
        if not path.is_file():
            raise BundleError(f"{self.path}: {name} is missing; copy or build the bundle again")
        file = path.open("rb")
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            file.close()
            raise BundleError(f"{self.path}: {name} has {size} bytes, not {entry.size}; copy or build the bundle again")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            file.close()
            raise BundleError(f"{self.path}: {name} was altered (its SHA-256 differs); copy or build the bundle again")
        file.seek(0)
        return file

    @contextmanager
    def unchanged(self, names: Iterable[str]) -> Iterator[None]:
        """Check these files as ``verify_files`` does, run the block, and check that they are still the same files.

        Raises:
            BundleError: as ``verify_files``; or a file was exchanged or written in the meantime.
        """
        names = list(names)
        before = [_identity(self.path / name) for name in names]
        self.verify_files(names)
        yield
        for name, identity in zip(names, before, strict=True):
            if _identity(self.path / name) != identity:
                raise BundleError(f"{self.path}: {name} was changed while it was opened; open the bundle again")

    def choose_engine(self, name: str = "auto", device: str = "cpu") -> Choice:
        """Choose the engine to open: the named one, or the best one of the bundle, with the reason.

        Raises:
            EngineError: the engine is not in the bundle, or cannot run here.
        """
        if name == "auto":
            return choose(device, self.engines)
        if name not in self.engines:
            engine(name)
            raise EngineError(
                f"{self.path} holds {', '.join(self.engines)}, not {name}: add it with offcut build --engine {name}"
            )
        probe = engine(name).probe()
        if device.partition(":")[0] not in probe.devices:  # "cuda:1" is a device of the kind "cuda"
            raise EngineError(f"{name} cannot run on {device} here: {probe.reason}")
        return Choice(name, "requested")

    def entry(
        self, name: str, *, precision: str | None = None, inference_precision: str | None = None, cut: str | None = None
    ) -> EngineEntry:
        """Return the newest build of this engine with these properties.

        Raises:
            EngineError: no build has them; the message lists the builds.
            CutError: no such build has the cut.
        """
        entries = [
            entry
            for entry in self.manifest.engines.values()
            if entry.engine == name
            and (precision is None or self.manifest.variants[entry.variant].precision == precision)
            and (inference_precision is None or self.precision_of(entry) == inference_precision)
        ]
        if not entries:
            builds = ", ".join(self.manifest.engines) or "nothing"
            raise EngineError(f"{self.path} holds no such build of {name}; it holds {builds}")
        with_cut = [entry for entry in entries if cut is None or cut in entry.cuts]
        if not with_cut:
            raise CutError(f"{self.path} was not built with the cut {cut}; it has {', '.join(self.cuts)}")
        return with_cut[-1]

    def precision_of(self, entry: EngineEntry) -> str:
        """Return the precision that a build computes in."""
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
            engine: a name, or ``"auto"`` for the best engine here.
            device: device to open on, as PyTorch spells it.
            precision: precision of the graphs, to choose among several builds of the engine; the newest by default.
            inference_precision: precision of the computation, to choose among several builds; ``"fp32"`` chooses the
                build without a hint.
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
        """Return the build that ``open_pair`` opens for these arguments; the same errors are raised."""
        name = self.choose_engine(engine, device).name
        return self.entry(name, precision=precision, inference_precision=inference_precision)

    def pair(self, entry: EngineEntry, *, device: str = "cpu", **options: Unpack[OpenOptions]) -> EnginePair:
        """Open a build; options and errors are those of ``open_pair``."""
        if not entry.verified:
            warnings.warn(
                f"{entry.key} could not be run where it was built: check it once here with offcut verify {self.path}",
                stacklevel=2,
            )
        return open_entry(self, entry, EngineOptions(device, inference_precision=entry.inference_precision, **options))

    def weights(self, entry: EngineEntry, *, verify: bool = True) -> StoredWeights:
        """Return the weights that an engine was built with.

        Args:
            verify: whether to check the digests of the files, which reads them whole.

        Raises:
            BundleError: the bundle was built for deployment and holds no weights, or a file is damaged.
            EngineError: the weights are rounded to low precision.
        """
        variant = self.manifest.variants[entry.variant]
        if variant.graphs is None:
            raise BundleError(f"{self.path} was built for deployment and holds no weights: build it without --deploy")
        if variant.quantization is not None:
            raise EngineError(
                f"the weights of {entry.key} are rounded to {variant.precision}, and nothing can be added to them: "
                "fuse LoRAs when it is built"
            )
        if verify:
            self.verify_files([variant.graphs.full, variant.graphs.weights, variant.graphs.parameters])
        return StoredWeights(self.path / variant.graphs.full, self.path / variant.graphs.parameters)

    def graphs(self, entry: EngineEntry) -> Graphs:
        """Return the graphs of an engine, with their inputs and outputs."""
        variant = self.manifest.variants[entry.variant]
        cuts = {cut.name: cut for cut in variant.cuts if cut.name in entry.cuts}
        outputs = [variant.noise_pred, *(tensor for cut in cuts.values() for tensor in cut.cached)]
        # An engine that opens the ONNX graphs takes every size. ONNX Runtime's TensorRT providers, which compile the
        # graphs when they open them, compile for the sizes of the bundle's other engines.
        others = [other for other in self.manifest.engines.values() if other.variant == entry.variant]
        profiles = entry.profiles if entry.compiled else [profile for other in others for profile in other.profiles]
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
    """Return the file of the UNet's ONNX graph in a bundle or an export's directory; a file is returned as it is.

    Raises:
        BundleError: the directory has no ONNX graph.
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
    """Open a built engine, after checking that it fits this machine and that its files are whole."""
    if options.provider is not None and entry.engine != "onnxruntime":
        raise EngineError(
            f"only onnxruntime has providers, {entry.engine} has none: open onnxruntime, or leave provider out"
        )
    check_fits(entry, options.device)
    if entry.compiled:
        bundle.require_trust()
    names = engine_files(entry, bundle.manifest.variants[entry.variant])
    with bundle.unchanged(names):
        if not entry.compiled:
            check_external_files(bundle, entry)
        return engine(entry.engine).open(bundle.graphs(entry), options)


def check_external_files(bundle: Bundle, entry: EngineEntry) -> None:
    """Check that graphs take their weights from the file of their variant that the manifest lists.

    Raises:
        BundleError: a graph names another file.
    """
    graphs = bundle.manifest.variants[entry.variant].graphs
    assert graphs is not None
    weights = PurePosixPath(graphs.weights)
    for name in (entry.full, *entry.shallow.values()):
        listed = {str(weights.relative_to(PurePosixPath(name).parent))}
        if others := external_files(bundle.path / name) - listed:
            raise BundleError(
                f"{bundle.path}: the graph {name} takes weights from {min(others)}, which is not its variant's file of "
                "weights; build the bundle again"
            )


def check_fits(entry: EngineEntry, device: str) -> None:
    """Check that a built engine fits this machine and the installed version of its library.

    Raises:
        EngineError: it does not fit; the message says what to do.
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
            f"{here or 'another'}: build it again here"
        )
    if entry.compiled and not entry.later_versions and probe.version not in (None, entry.version):
        raise EngineError(
            f"{entry.key} was compiled with {entry.engine} {entry.version} and runs with that version only, but "
            f"{probe.version} is installed: build it again here"
        )
    if probe.version is not None and _release(probe.version) < _release(entry.version):
        raise EngineError(
            f"{entry.key} was built and verified with {entry.engine} {entry.version}, but the installed version is "
            f"{probe.version}: upgrade it, or build again here"
        )


def devices_of(entry: EngineEntry) -> list[str]:
    """Return the kinds of device on this machine that can run a built engine."""
    probe = engine(entry.engine).probe()
    return [kind for kind in probe.devices if not entry.targets or probe.targets.get(kind) in entry.targets]


def engine_files(entry: EngineEntry, variant: Variant) -> list[str]:
    """Return the names of all files that opening this engine reads."""
    if entry.compiled:
        return list(entry.files)
    assert variant.graphs is not None
    return [entry.full, *entry.shallow.values(), variant.graphs.weights]


def _identity(file: Path) -> tuple[int, ...] | None:
    """Return values that differ if a file was exchanged or written; None if it does not exist."""
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _release(version: str) -> tuple[int, ...]:
    """Return ``"1.31.1"`` as (1, 31, 1); suffixes are ignored."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
