"""Reading of a bundle's manifest: parsing, and the checks that a schema cannot express."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from ...errors import BundleError
from .manifest import MANIFEST_FILE, SCHEMA_VERSION, Manifest, schema_of

COMPONENT_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
"""Kinds of file that a bundle's components consist of: none of them holds code."""

_LARGEST = 2**26


def shorten(text: str, length: int) -> str:
    """Return a text of at most this length, cut with an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def read_manifest(path: Path) -> bytes:
    """Return the manifest's text.

    Raises:
        BundleError: the directory is not a bundle, or its manifest cannot be read or is too large.
    """
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise BundleError(f"{path} is not an offcut bundle: it has no {MANIFEST_FILE}; make one with offcut build")
    try:
        with file.open("rb") as opened:
            text = opened.read(_LARGEST + 1)
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(text) > _LARGEST:
        raise BundleError(f"{file} has more than {_LARGEST >> 20} MiB, which no manifest has: build the bundle again")
    return text


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Return a checked manifest.

    Args:
        text: content of ``offcut.json``.
        path: the bundle's directory.

    Raises:
        BundleError: the manifest is damaged, was written by a newer offcut, or names files outside the bundle.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path / MANIFEST_FILE} is damaged: it is not JSON; copy or build the bundle again"
        ) from error
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise BundleError(
            f"{path / MANIFEST_FILE} is damaged: a text in it is not valid Unicode; copy or build the bundle again"
        ) from error
    version = schema_of(raw)
    if version is None:
        raise BundleError(f"{path / MANIFEST_FILE} is not the manifest of a bundle: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} was written by a newer offcut (schema {shorten(str(version), 20)}, this one reads "
            f"{SCHEMA_VERSION}): upgrade offcut"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = shorten(".".join(str(part) for part in first["loc"]), 80)
        raise BundleError(f"{path / MANIFEST_FILE} is damaged at {where}: {shorten(first['msg'], 150)}") from error
    for key, entry in manifest.engines.items():
        variant = manifest.variants.get(entry.variant)
        if variant is None:
            raise BundleError(
                f"{path}: the engine {shorten(key, 80)} names the variant {shorten(entry.variant, 80)}, which the "
                "bundle does not have"
            )
        if not set(entry.cuts) <= {cut.name for cut in variant.cuts} or set(entry.cuts) != set(entry.shallow):
            raise BundleError(
                f"{path}: the graphs of the engine {shorten(key, 80)} do not belong together; build it again"
            )
        if entry.compiled:
            folder = f"engines/{entry.key}"
        else:  # graphs of an earlier set of cuts are in the same directory as the variant's
            folder = str(PurePosixPath(variant.graphs.weights).parent) if variant.graphs else ""
        if {str(PurePosixPath(file).parent) for file in (entry.full, *entry.shallow.values())} != {folder}:
            raise BundleError(
                f"{path}: the engine {shorten(key, 80)} has graphs of another variant than "
                f"{shorten(variant.name, 80)}; build it again"
            )
    for component in manifest.components:
        if strays := [entry.key for entry in component.engines if entry.full not in entry.files]:
            raise BundleError(
                f"{path}: the engine {shorten(strays[0], 80)} of {shorten(component.name, 80)} names a file of "
                "another engine; build it again"
            )
    for name in manifest.files:
        inside(path, name)
    if unsafe := [name for name in manifest.parts if PurePosixPath(name).suffix not in COMPONENT_SUFFIXES]:
        raise BundleError(
            f"{path}: {shorten(unsafe[0], 80)} is not a kind of file that components have "
            f"({', '.join(COMPONENT_SUFFIXES)}); build the bundle again"
        )
    return manifest


def inside(root: Path, name: str) -> Path:
    """Return the path of a file, after checking that no link on the way to it leaves the bundle."""
    file = root / name
    try:
        inside = file.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # circular links
        inside = False
    if not inside:
        raise BundleError(
            f"{root}: {shorten(name, 80)} is a link that leaves the bundle; copy the bundle with its links resolved"
        )
    return file
