"""The README's commands and code run as they stand, in its order, where the hub id is a small model's directory."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.loras import save_lora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def desk(small_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the hub id that the README uses is a local directory, and which has its LoRA."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(small_pipeline_dir, folder / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    save_lora("kohya", small_pipeline_dir, folder / "loras").rename(folder / "loras" / "style.safetensors")
    return folder


@pytest.mark.slow
def test_the_readme_runs(desk: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., str]) -> None:
    monkeypatch.chdir(desk)
    assert len(BLOCKS) >= 5
    for language, text in BLOCKS:
        if language == "python":
            exec(text, {"__name__": "__main__"})
            continue
        for line in filter(None, text.splitlines()):
            program, *arguments = shlex.split(line)
            assert program == "offcut"
            command(*arguments)
    assert (desk / "out.png").stat().st_size > 1000


def test_commands_for_larger_models_have_the_options_that_there_are() -> None:
    """They stand in ``bash`` blocks; each is parsed, not run."""
    from typer.main import get_command

    from offcut.cli import app

    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]
    assert lines
    group = get_command(app)
    for line in lines:
        program, name, *arguments = shlex.split(line)
        assert program == "offcut"
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments).close()


def test_the_readme_links_to_files_that_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
