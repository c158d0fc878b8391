"""Prompts from a file, from the model, and by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from offcut.errors import UserError
from offcut.runtime.prompts import PROMPTS, prompts_for, read_prompts


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(file) == ("a cat", "a dog")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(file)
    with pytest.raises(UserError, match="cannot read the prompts"):
        read_prompts(tmp_path / "missing")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the prompts"):
        read_prompts(file)


def test_prompts_come_from_the_user_then_the_model_then_the_defaults(tmp_path: Path) -> None:
    assert prompts_for(tmp_path, None) == PROMPTS
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    assert prompts_for(tmp_path, None) == ("a cat",)
    own = tmp_path / "own.txt"
    own.write_text("a dog\n", encoding="utf-8")
    assert prompts_for(tmp_path, own) == ("a dog",)
