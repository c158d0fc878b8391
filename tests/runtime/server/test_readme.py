"""The README's client draws with the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import offcut

README = (Path(offcut.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_readmes_client_draws(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```py\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert Image.open(tmp_path / "lighthouse.png").size == (64, 64)
