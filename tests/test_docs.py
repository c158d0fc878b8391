"""README and manual: commands and code run as they are written, and links and files exist.

The language of a code block decides how it is tested: ``sh`` commands run on a small model, ``bash`` commands (for
larger models) are only parsed, and ``python`` code runs. ``py`` is the client of a running server, which
``runtime/server/test_docs.py`` tests.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.loras import save_lora

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
BUILD = "offcut build stable-diffusion-v1-5/stable-diffusion-v1-5 -o sd15.offcut"


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Language and text of the page's code blocks in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


PAGES_WITH_CODE = [name for page, name in zip(PAGES, NAMES, strict=True) if blocks(page, "sh", "python")]


@pytest.fixture(scope="module")
def workdir(small_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the manual's hub id is a local directory, with a LoRA next to it."""
    folder = tmp_path_factory.mktemp("manual")
    shutil.copytree(small_pipeline_dir, folder / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    save_lora("kohya", small_pipeline_dir, folder / "loras").rename(folder / "loras" / "style.safetensors")
    return folder


@pytest.fixture
def bundle(workdir: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., str]) -> Path:
    """The bundle that README's first command builds; the other pages use it."""
    monkeypatch.chdir(workdir)
    if not (workdir / "sd15.offcut").exists():
        (first, *_) = [line for _, text in blocks(PAGES[0], "sh") for line in text.splitlines()]
        assert first.startswith(BUILD)
        command(*shlex.split(first)[1:])
    return workdir / "sd15.offcut"


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES_WITH_CODE)
def test_the_code_of_a_page_runs(name: str, bundle: Path, workdir: Path, command: Callable[..., str]) -> None:
    for language, text in blocks(ROOT / name, "sh", "python"):
        if language == "python":
            exec(text, {"__name__": "__main__"})
            continue
        for line in filter(None, text.splitlines()):
            program, *arguments = shlex.split(line)
            assert program == "offcut"
            command(*arguments)
    if name == "README.md":
        assert (workdir / "out.png").stat().st_size > 1000


def test_commands_for_larger_models_parse() -> None:
    from typer.main import get_command

    from offcut.cli import app

    lines = [line for page in PAGES for _, text in blocks(page, "bash") for line in text.splitlines() if line]
    assert len(lines) > 15
    group = get_command(app)
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if (program, *arguments[:2]) == ("python", "-m", "offcut.benchmarks.gpu_check"):
            continue
        assert program == "offcut", line
        command = group
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(line, arguments).close()


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_page_lead_to_files(name: str) -> None:
    page = ROOT / name
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))]
    local = [link for link in links if link and not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_page_names_exist(name: str) -> None:
    """Recorded results, tests and modules that a page names in code font."""
    text = (ROOT / name).read_text(encoding="utf-8")
    results = set(re.findall(r"`([\w./-]+/result\.json|benchmarks/results/[\w./-]+)`", text))
    tests = set(re.findall(r"`((?:runtime|exporter|engines)/[\w/]*test_\w+\.py)`", text))
    modules = set(re.findall(r"`((?:tests|cli|engines|exporter|runtime|benchmarks)/[\w/]+\.py)`", text)) - tests
    paths = [ROOT / path if path.startswith("benchmarks/") else ROOT / "benchmarks/results" / path for path in results]
    paths += [ROOT / "tests" / path for path in tests] + [ROOT / path for path in modules]
    assert [str(path) for path in paths if not path.exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_lines_of_a_page_are_short(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 140] == []


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8 * 1024


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for name in NAMES[1:] if f": {name.removeprefix('docs/')}\n" not in navigation] == []


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", PAGES[0].read_text(encoding="utf-8")))
    assert {"demo", "test", "docs"} <= named <= targets
