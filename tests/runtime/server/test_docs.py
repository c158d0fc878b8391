"""The manual's client gets an image from the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import offcut

GUIDE = Path(offcut.__file__).parent / "docs" / "guides" / "serving.md"


def test_the_client_of_the_manual_gets_an_image(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```py\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert Image.open(tmp_path / "lighthouse.png").size == (64, 64)
