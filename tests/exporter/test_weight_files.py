"""The weight files that are loaded: of a variant, plain, or the only others."""

from __future__ import annotations

from pathlib import Path

import pytest

from offcut.errors import ModelError
from offcut.exporter.weight_files import chosen_variant, small_files, weight_files

PLAIN = "m.safetensors"
SHARDS = ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_shards_of_a_variant_belong_to_it(tmp_path: Path) -> None:
    touch(tmp_path, PLAIN, *SHARDS)
    assert [file.name for file in weight_files(tmp_path, "fp16")] == SHARDS
    assert [file.name for file in weight_files(tmp_path, None)] == [PLAIN]
    assert [file.name for file in weight_files(tmp_path, "bf16")] == [PLAIN]


def test_the_only_variant_is_taken_and_several_are_refused(tmp_path: Path) -> None:
    assert weight_files(tmp_path, None) == []
    touch(tmp_path, *SHARDS)
    assert chosen_variant(tmp_path, None) == "fp16"
    assert chosen_variant(tmp_path, "bf16") == "fp16"
    touch(tmp_path, "m.non_ema.safetensors")
    with pytest.raises(ModelError, match="variants fp16, non_ema only: choose one with --variant"):
        chosen_variant(tmp_path, None)
    assert chosen_variant(tmp_path, "non_ema") == "non_ema"


def test_indexes_of_shards_are_no_configs(tmp_path: Path) -> None:
    indexes = ["m.safetensors.index.json", "m.safetensors.index.fp16.json", "pytorch_model.bin.index.json"]
    touch(tmp_path, "config.json", "vocab.txt", "m.bin", *indexes)
    assert sorted(file.name for file in small_files(tmp_path)) == ["config.json", "vocab.txt"]
