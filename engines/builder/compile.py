"""One engine's build of one set of graphs: key, entry, compilation, references and verification.

The UNet and the networks around it are built through these functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..base import CompileJob, Graphs, Progress
from ..bundle.manifest import EngineEntry, ProfileEntry
from ..profiles import Profile
from ..registry import compiler, engine
from .resolve import BuildPlan

WriteReference = Callable[[Profile, Path], None]
"""Writes the model's outputs at the smallest sizes of a profile to a file."""


def engine_key(plan: BuildPlan, name: str, subject: Sequence[object], profiles: Sequence[Profile]) -> str:
    """Return the engine's name and a digest of everything that decides what it computes and where it runs.

    Args:
        subject: values that identify the graphs and the engine that opens them.
        profiles: the shapes to compile for.
    """
    decisive = list(subject)
    if compiler(name):
        shapes = [ProfileEntry.of(profile).model_dump() for profile in profiles]
        targets = dict(engine(name).probe().targets)
        decisive += [json.dumps(value, sort_keys=True) for value in (targets, plan.recorded_settings(name), shapes)]
        decisive.append(plan.device)
    return f"{name}-{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]}"


def engine_entry(
    plan: BuildPlan,
    name: str,
    key: str,
    variant: str,
    full: str,
    shallow: Mapping[str, str],
    inference_precision: str | None = None,
) -> EngineEntry:
    """Return the entry of an engine that opens the ONNX graphs as they are, not yet verified.

    Args:
        variant: name of the variant, or label of the network.
        full, shallow: names of the graphs' files in the bundle.
    """
    return EngineEntry(
        key=key,
        engine=name,
        version=engine(name).probe().version or "",
        variant=variant,
        cuts=tuple(shallow),
        inference_precision=inference_precision,
        requires=(inference_precision,) if inference_precision else (),
        targets=(),
        profiles=(),
        settings=plan.recorded_settings(name),
        references=(),
        later_versions=False,
        verified=False,
        full=full,
        shallow=dict(shallow),
        files=(),
    )


def compile_engine(
    plan: BuildPlan,
    entry: EngineEntry,
    graphs: Graphs,
    *,
    folder: Path,
    staged: Path,
    profiles: tuple[Profile, ...],
    fixed: Mapping[str, int],
    write_reference: WriteReference,
    progress: Progress,
    component: str | None = None,
) -> EngineEntry:
    """Compile graphs, write references at the sizes of the profiles, and return the entry of the compiled engine.

    Args:
        entry: the entry of the same engine before it is compiled.
        folder: the new directory of the engine's files, inside ``staged``.
        staged: the staging directory, laid out as the bundle is.
        fixed: dimensions that the export fixed.
        component: name of the network around the UNet; None for the UNet.

    Raises:
        EngineError: the engine refuses the graphs.
    """
    module = compiler(entry.engine)
    assert module is not None
    folder.mkdir(parents=True)
    compiled = module.compile(
        CompileJob(
            graphs=graphs,
            source=plan.source,
            fixed=fixed,
            profiles=profiles,
            settings=plan.settings[entry.engine],
            device=plan.device,
            folder=folder,
            progress=progress,
            component=component,
        )
    )
    references = [folder / f"reference-{index}.safetensors" for index in range(len(compiled.profiles))]
    for profile, path in zip(compiled.profiles, references, strict=True):
        write_reference(profile, path)

    def name_of(file: Path) -> str:
        return file.relative_to(staged).as_posix()

    return entry.model_copy(
        update={
            "references": tuple(map(name_of, references)),
            "later_versions": compiled.later_versions,
            "targets": compiled.targets,
            "profiles": tuple(ProfileEntry.of(profile) for profile in compiled.profiles),
            "full": name_of(compiled.full),
            "shallow": {cut: name_of(file) for cut, file in compiled.shallow.items()},
            "files": tuple(sorted(name_of(file) for file in folder.rglob("*") if file.is_file())),
        }
    )


def verify_engine(
    plan: BuildPlan, entry: EngineEntry, label: str, check: Callable[[str], None], progress: Progress
) -> EngineEntry:
    """Verify an engine on a device that runs it, and return its entry; without such a device it stays unverified.

    Args:
        label: name of the engine in messages.
        check: takes the device and raises ``ParityError`` if the engine's result is out of its bounds.
    """
    if device := plan.device_for(entry):
        progress(f"verify {label}")
        check(device)
        return entry.model_copy(update={"verified": True})
    progress(f"{label} is left unverified: it was compiled for {', '.join(entry.targets)}, which is not here")
    return entry
