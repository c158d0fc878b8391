"""Image files: upright start images, the format that the suffix says, and no file that is left half written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offcut.errors import UserError
from offcut.runtime.images.image_files import check_suffix, read_image, replaced_when_done, save

WIDE = Image.linear_gradient("L").resize((48, 32)).convert("RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    WIDE.save(tmp_path / "photo.png", exif=exif)
    upright = read_image(tmp_path / "photo.png")
    assert upright.size == ((48, 32) if orientation < 5 else (32, 48))
    if orientation == 3:
        assert np.array_equal(np.asarray(upright), np.asarray(WIDE.rotate(180)))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK", "I;16"])
def test_every_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    grey = np.asarray(WIDE.convert("L")).astype(np.uint16)
    image = Image.fromarray(grey * 257) if mode == "I;16" else WIDE.convert(mode)
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(file)
    read = read_image(file)
    assert (read.mode, read.size) == ("RGB", WIDE.size)
    if mode not in ("1", "P"):
        assert np.abs(np.asarray(read).astype(int) - np.asarray(WIDE).astype(int)).max() <= 1


def test_what_is_no_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((48, 32), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:150])
    (tmp_path / "text.png").write_text("no image")
    for name, sentence in (
        ("cut.png", "it is damaged"),
        ("text.png", "is not an image"),
        ("none.png", "No such file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too many pixels"):
        read_image(tmp_path / "whole.png")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("a.gif", "GIF")]
)
def test_one_picture_has_the_format_of_the_suffix(name: str, kind: str, tmp_path: Path) -> None:
    save([WIDE], tmp_path / name, fps=8)
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
        if kind in ("PNG", "WEBP"):
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(WIDE))


@pytest.mark.parametrize(("name", "video"), [("a", False), ("a.bmp", None), ("a.gif", False), ("a.jpg", True)])
def test_other_suffixes_are_refused(name: str, video: bool | None) -> None:
    with pytest.raises(UserError, match=r"give the file the suffix \.png"):
        check_suffix(Path(name), video=video)


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    file.write_bytes(b"earlier")

    def fail() -> None:
        with replaced_when_done(file) as unfinished:
            unfinished.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.read_bytes() == b"earlier"
    with replaced_when_done(file) as unfinished:
        unfinished.write_bytes(b"whole")
    assert file.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    for path, sentence in ((tmp_path, "it is a directory"), (tmp_path / "none" / "out.png", "No such file")):
        with pytest.raises(UserError, match=sentence), replaced_when_done(path):
            pass
