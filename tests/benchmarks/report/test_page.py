"""The page is well-formed and self-contained, escapes every value, and has the figures of the result."""

from __future__ import annotations

import base64
import inspect
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.results import contestant, draw_samples, latency, machine, quality, result
from typer.testing import CliRunner

from offcut.benchmarks import record
from offcut.benchmarks.record import Result
from offcut.benchmarks.report.latency import bar_of
from offcut.benchmarks.report.page import page, sections_of, write_report
from offcut.benchmarks.schema.latency import Contestant
from offcut.cli import app
from offcut.errors import UserError

HOSTILE = "<script>alert('x')</script> & \"quoted\""
VOID = {"br", "img", "input", "meta", "line", "rect", "circle", "path"}
NO_IMAGES = Path("none")


class Reader(HTMLParser):
    """An HTML parser that checks the nesting and stores the elements with their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("both")
    combined = result(latency=latency(), quality=quality())
    draw_samples(quality(), folder)
    combined.save(folder)
    return combined, folder


def test_the_page_is_well_formed_and_its_ids_are_unique(both: tuple[Result, Path]) -> None:
    combined, folder = both
    read = Reader(page([combined, combined, result()], [folder] * 3))
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = {attributes["href"] for attributes in read.all("a")}
    references = {attributes["xlink:href"] for attributes in read.all("use")}
    assert references
    assert references <= {f"#{key}" for key in ids}
    assert links <= {f"#{key}" for key in ids}
    assert len(read.all("section")) == len(links) - 1  # all but the link to the content itself


def test_the_page_downloads_nothing_and_has_no_script(both: tuple[Result, Path]) -> None:
    combined, folder = both
    text = page([combined], [folder])
    read = Reader(text)
    for _, attributes in read.elements:
        for name in ("src", "href", "action", "data", "xlink:href", "srcset", "xmlns"):
            address = attributes.get(name) or "#"
            assert address.startswith(("data:image/png;base64,", "#")), address
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert read.all("script") == read.all("link") == read.all("iframe") == []


def test_every_value_is_escaped() -> None:
    """A result whose texts are markup has a page with the same elements as a result with plain texts."""

    def marked(value: Any, kind: str = "") -> Any:
        if isinstance(value, dict):
            return {key: marked(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [marked(item, kind) for item in value]
        unchanged = ("kind", "family", "timeline", "started", "samples", "caching")
        return f"{value}{HOSTILE}" if isinstance(value, str) and kind not in unchanged else value

    plain = result(latency=latency(), quality=quality())
    hostile = Result.model_validate(marked(plain.model_dump(mode="json")))
    clean, read = Reader(page([plain], [NO_IMAGES])), Reader(page([hostile], [NO_IMAGES]))
    assert read.all("script") == []
    assert [tag for tag, _ in read.elements if tag in ("img", "section", "article")] == [
        tag for tag, _ in clean.elements if tag in ("img", "section", "article")
    ]
    text = "".join(read.text)
    for value in (hostile.command, hostile.title, hostile.environment.cpu, "optimum onnxruntime fp32" + HOSTILE):
        assert value in text


def test_bars_name_measured_contestants_and_the_others_have_reasons() -> None:
    combined = latency()
    read = Reader(page([result(latency=combined)], [NO_IMAGES]))
    for row in combined.contestants:
        assert sum(text.startswith(f"{row.name} ") and text.endswith(" s") for text in read.text) == bool(row.loops)
    bars = [bar_of(row) for row in combined.contestants if row.loops]
    assert sum(bar.ideal is not None for bar in bars) == sum(bool(row.full) for row in combined.contestants)
    assert "optimum-onnx is not installed: pip install 'offcut[optimum]'" in read.text


def test_the_page_has_samples_with_their_differences(both: tuple[Result, Path]) -> None:
    combined, folder = both
    assert combined.quality is not None
    images = {attributes["alt"]: attributes["src"] for attributes in Reader(page([combined], [folder])).all("img")}
    assert len([alt for alt in images if alt and alt.startswith("a red circle, uncached")]) == 1
    row = next(row for row in combined.quality.rows if row.interval == 5)

    def image_of(alt: str) -> Image.Image:
        address = images[alt]
        assert address is not None
        return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))

    cached = image_of(f"a red circle, {row.name}")
    with Image.open(folder / row.samples[0]) as saved:
        assert cached.tobytes() == saved.tobytes()
    differences = image_of(f"a red circle, {row.name}: difference to the uncached image")
    assert differences.getpixel((0, 0)) == (0, 0, 0)
    assert max(high for _, high in differences.getextrema()) == 255


def test_a_sample_outside_of_the_folder_or_no_image_is_missing(tmp_path: Path) -> None:
    measured = quality()
    draw_samples(measured, tmp_path / "in")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "in" / "text.png").write_text("no image")
    first = measured.rows[0]
    first.samples = ["../secret.png", "text.png", "absent.png"]
    read = Reader(page([result(quality=measured)], [tmp_path / "in"]))
    assert read.text.count("missing") == 3 + 3 * 3  # three uncached images, and the differences to them
    texts = [attributes["alt"] for attributes in read.all("img")]
    assert texts.count("a red circle, uncached") == 2  # of three samplers


def test_the_page_shows_warnings_and_limits() -> None:
    busy = result(latency=latency(rounds=2), environment=machine(load=3.2))
    elsewhere = result(quality=quality(), environment=machine(cpu="another"))
    text = " ".join(Reader(page([busy, elsewhere], [NO_IMAGES] * 2)).text)
    assert "The machine was not idle: load average 3.2" in text
    assert "2 rounds: too few" in text
    assert "different machines" in text
    assert "not idle" not in page([result()], [NO_IMAGES])


def test_a_result_with_one_measured_row_has_a_page() -> None:
    nobody = Contestant(name="x", family="x", engine="x", precision="fp32", not_run="no x here")
    lonely = contestant("offcut openvino fp32", 1.0, rounds=1)
    bare = quality(rows=quality().rows[:1])
    for combined in (
        result(latency=latency(contestants=[nobody])),
        result(latency=latency(contestants=[])),
        result(latency=latency(contestants=[lonely], rounds=1)),
        result(quality=bare),
        result(quality=quality(rows=[])),
    ):
        Reader(page([combined], [NO_IMAGES]))


def test_a_result_without_figures_is_refused() -> None:
    nothing = result().model_copy(update={"latency": None})
    with pytest.raises(UserError, match="no figures to show"):
        page([nothing], [NO_IMAGES])


def test_missing_sample_files_are_reported(tmp_path: Path) -> None:
    measured = quality()
    text = page([result(quality=measured)], [tmp_path])
    names = [name for row in measured.rows for name in row.samples]
    assert f"{len(names)} sample images are omitted" in "".join(Reader(text).text)
    assert ">missing<" not in text


def test_a_page_is_reproducible(both: tuple[Result, Path]) -> None:
    combined, folder = both
    assert page([combined], [folder]) == page([combined], [folder])


RECORDED = sorted((Path(inspect.getfile(record)).parent / "results").glob("*/result.json"))


@pytest.mark.skipif(not RECORDED, reason="an installed package has no recorded results")
def test_recorded_results_still_load_and_have_sections() -> None:
    for path in RECORDED:
        assert sections_of(record.read(path), path.parent), path


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_recorded_results_still_make_pages(path: Path) -> None:
    result_ = record.read(path)
    assert result_.title in "".join(Reader(page([result_], [path.parent])).text)


def test_the_page_is_written_without_other_files(both: tuple[Result, Path], tmp_path: Path) -> None:
    combined, folder = both
    path = write_report([combined, result()], tmp_path / "new", samples=[folder, folder])
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="give another directory"):
        write_report([result()], tmp_path / "file")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html"):
        write_report([result()], tmp_path)


def test_the_report_command_writes_the_page(both: tuple[Result, Path], tmp_path: Path) -> None:
    _, folder = both
    result().save(tmp_path / "latency")
    run = CliRunner().invoke(
        app, ["bench", "report", str(tmp_path / "latency"), str(folder / "result.json"), "-o", str(tmp_path / "out")]
    )
    assert run.exit_code == 0, run.output
    assert run.stdout == f"{tmp_path / 'out' / 'report.html'}\n"
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    schema = json.loads(CliRunner().invoke(app, ["bench", "schema"]).stdout)
    assert "latency" in schema["properties"]
    missing = CliRunner().invoke(app, ["bench", "report", str(tmp_path)])
    assert isinstance(missing.exception, UserError)
