"""The tokenizer has CLIP's file format, gives each word of a caption one token, and encodes and decodes any text."""

import json
from pathlib import Path

import numpy as np
import pytest

from offcut.benchmarks.shapes import scenes
from offcut.benchmarks.shapes.training import architecture as networks
from offcut.benchmarks.shapes.training import tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(folder)
    return folder


def test_captions_come_back_and_every_word_is_one_token(directory: Path) -> None:
    loaded = tokenizer.load_tokenizer(directory)
    rng = np.random.default_rng(5)
    for held_out in (False, True):
        for _ in range(200):
            text = scenes.caption(scenes.sample_scene(rng, held_out=held_out))
            ids = loaded(text).input_ids
            assert loaded.decode(ids, skip_special_tokens=True).strip() == text
            assert len(ids) == len(text.split()) + 2 <= loaded.model_max_length


def test_padding_start_and_end_are_as_the_networks_expect(directory: Path) -> None:
    loaded = tokenizer.load_tokenizer(directory)
    ids = loaded("", padding="max_length", max_length=loaded.model_max_length).input_ids
    config = networks.new_text_encoder().config
    assert loaded.model_max_length == config.max_position_embeddings == tokenizer.MAX_LENGTH
    assert ids == [config.bos_token_id] + [config.eos_token_id] * (tokenizer.MAX_LENGTH - 1)
    assert len(loaded) == config.vocab_size


def test_words_outside_of_captions_are_encoded_too(directory: Path) -> None:
    loaded = tokenizer.load_tokenizer(directory)
    text = "zwölf café 42!"
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_the_files_have_clips_format(directory: Path) -> None:
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert lines[0].startswith("#version")
    assert all("".join(line.split(" ")) in vocabulary for line in lines[1:])
    assert "circle</w>" in vocabulary


def test_the_most_frequent_pair_is_merged_first() -> None:
    assert tokenizer.learn_merges({"aab": 3, "ab": 1}) == [("a", "b</w>"), ("a", "ab</w>")]
    assert tokenizer.learn_merges({"a": 5}) == []
